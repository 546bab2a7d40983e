from __future__ import annotations

from models.dit import DiT
from models.early_exit import EarlyExitUViT
from models.flops import backbone_flops, early_exit_flops
from models.uvit import UViT
from tests.conftest import TINY

N, D, PATCHES, P2C = 5, 32, 4, 16  # tokens, width, patches, values in a patch
BLOCK = 2 * N * D * (3 * D + D + 8 * D) + 2 * 2 * N * N * D  # projections and MLP, then attention
SKIP = 2 * N * 2 * D * D
BLOCK_6, SKIP_6 = 2 * 6 * D * 12 * D + 4 * 6 * 6 * D, 2 * 6 * 2 * D * D  # with a token for the class
EMBED = 2 * PATCHES * D * P2C
CONV = 2 * 9 * 64  # 3 x 3 on 64 pixels of one channel
HEAD = 2 * PATCHES * D * P2C + CONV  # patches to pixels, then the convolution


def test_uvit_flops_are_those_of_its_products():
    assert backbone_flops(UViT(**TINY, depth=5)) == EMBED + 5 * BLOCK + 2 * SKIP + HEAD


def test_without_the_convolution_they_are_fewer():
    full, plain = (UViT(**TINY, depth=3, conv=conv) for conv in (True, False))
    assert backbone_flops(full) - backbone_flops(plain) == backbone_flops(full, 1) - backbone_flops(plain, 1) == CONV
    early = [early_exit_flops(EarlyExitUViT(uvit, "attention_probe")) for uvit in (full, plain)]
    assert [a - b for a, b in zip(*early, strict=True)] == [CONV] * 4


def test_a_dit_is_counted_as_its_products_are():
    """A vector a block of the time and the class, and no token of theirs."""
    dit = DiT(input_size=8, patch_size=4, in_channels=1, hidden_size=32, depth=3, num_heads=4, num_classes=5)
    block = 2 * 4 * D * 12 * D + 4 * 4 * 4 * D + 2 * D * 6 * D
    time, head = 2 * 256 * D + 2 * D * D, 2 * D * 2 * D + 2 * PATCHES * D * P2C
    assert backbone_flops(dit) == EMBED + time + 3 * block + head
    assert backbone_flops(dit) - backbone_flops(dit, 1) == block


def test_around_the_middle_it_takes_the_outer_blocks_alone():
    uvit = UViT(**TINY, depth=7, num_classes=3)
    for outer, saved in ((1, 5 * BLOCK_6 + 2 * SKIP_6), (2, 3 * BLOCK_6 + SKIP_6), (3, BLOCK_6)):
        assert backbone_flops(uvit, outer) == backbone_flops(uvit) - saved


def test_early_exit_flops_add_up_layer_by_layer():
    probe = 2 * N * D
    costs = early_exit_flops(EarlyExitUViT(UViT(**TINY, depth=5), "mlp_probe_per_layer"))
    blocks = [0, BLOCK, 2 * BLOCK, 3 * BLOCK, 4 * BLOCK + SKIP]
    want = [EMBED + ran + (k + 1) * probe + HEAD for k, ran in enumerate(blocks)]
    assert costs == [*want, EMBED + 5 * BLOCK + 2 * SKIP + 5 * probe + HEAD]
