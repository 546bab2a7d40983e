"""A shallow network that begins as part of a deeper one, and the other way round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.errors import InputError
from models import UViT
from models.warm_start import warm_start
from tests.conftest import TINY, perturbed

F = Path("full.pth")


def networks(depth: int, source_depth: int, **more) -> tuple[UViT, UViT]:
    return perturbed(UViT(**TINY, depth=depth)), perturbed(UViT(**TINY | more, depth=source_depth))


@pytest.mark.parametrize("depth, conv", [(1, True), (2, True), (7, True), (12, True), (7, False)])
def test_with_all_blocks_it_is_the_source(depth, conv):
    uvit = perturbed(UViT(**TINY, depth=depth, conv=conv))
    source = perturbed(UViT(**TINY, depth=depth // 2 * 2 + 1, conv=conv))
    warm_start(uvit, source, F)
    x, t = torch.randn(3, *source.config.image_shape), torch.tensor([0, 3, 999])
    assert torch.equal(uvit(x, t), source(x, t))


@pytest.mark.parametrize(
    "depth, kept", [(1, []), (3, [0]), (5, [0, 3]), (7, [0, 2, 4]), (9, [0, 1, 3, 4]), (13, [0, 1, 2, 3, 4, 5])]
)
def test_blocks_are_spread_evenly_and_keep_the_partner_of_their_skip(depth, kept):
    uvit, source = networks(depth, 13)
    warm_start(uvit, source, F)
    own, theirs = uvit.blocks, source.blocks
    chosen = [*kept, 6, *(12 - i for i in reversed(kept))]  # blocks count 0..12, and 12 - i takes the skip of i
    for mine, number in zip(own, chosen, strict=True):
        for a, b in zip(mine.parameters(), theirs[number].parameters(), strict=True):
            assert torch.equal(a, b)
    for name in ("pos_embed", "patch_embed.proj.weight", "norm.weight", "decoder_pred.bias", "final_layer.weight"):
        assert torch.equal(uvit.state_dict()[name], source.state_dict()[name])


@pytest.mark.parametrize("depth, source_depth", [(3, 1), (9, 3), (9, 5), (13, 7)])
def test_a_deeper_network_begins_as_the_same_function(depth, source_depth):
    uvit, source = networks(depth, source_depth)
    warm_start(uvit, source, F)
    x, t = torch.randn(3, *source.config.image_shape), torch.tensor([0, 3, 999])
    torch.testing.assert_close(uvit(x, t), source(x, t))


def test_after_a_step_all_weights_of_new_blocks_learn():
    """Zeros in two layers one after the other would stay zeros."""
    uvit, source = networks(5, 3)
    warm_start(uvit, source, F)
    x, t = torch.randn(3, *source.config.image_shape), torch.tensor([0, 3, 999])
    for _ in range(2):
        uvit.zero_grad()
        (uvit(x, t) - 1).square().mean().backward()
        still = [name for name, p in uvit.named_parameters() if p.grad is None or not p.grad.any()]
        with torch.no_grad():
            for p in uvit.parameters():
                p -= 0.01 * p.grad
    assert not still


def test_what_does_not_fit_changes_nothing():
    for uvit, source in (
        networks(3, 5, embed_dim=64),
        networks(3, 5, num_heads=2),
        networks(3, 5, conv=False),
    ):
        before = {name: value.clone() for name, value in uvit.state_dict().items()}
        with pytest.raises(InputError, match=r"full\.pth"):
            warm_start(uvit, source, F)
        assert all(torch.equal(before[name], value) for name, value in uvit.state_dict().items())
