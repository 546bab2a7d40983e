"""The tables of docs/public-weights.md, against counts by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from common.config import build_config, read_yaml
from models.flops import backbone_flops
from models.loading import build_network

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "public-weights.md").read_text(encoding="utf-8")
# Width, blocks, patches, values in a patch, extra tokens, and numbers that a last convolution goes over (0: none).
UVITS = {
    "cifar10": (512, 13, 16**2, 3 * 2**2, 1, 3 * 32**2),
    "celeba": (512, 13, 16**2, 3 * 4**2, 1, 3 * 64**2),
    "imagenet64_mid": (768, 17, 16**2, 3 * 4**2, 2, 3 * 64**2),
    "imagenet64_large": (1024, 21, 16**2, 3 * 4**2, 2, 3 * 64**2),
    "imagenet256_large": (1024, 21, 16**2, 4 * 2**2, 2, 4 * 32**2),
    "imagenet256_huge": (1152, 29, 16**2, 4 * 2**2, 2, 0),
    "imagenet512_large": (1024, 21, 16**2, 4 * 4**2, 2, 4 * 64**2),
    "imagenet512_huge": (1152, 29, 16**2, 4 * 4**2, 2, 0),
}
DITS = {"s": (384, 12), "b": (768, 12), "l": (1024, 24), "xl": (1152, 28)}  # width, blocks


def blocks(count: int, tokens: int, width: int) -> int:
    """Projections to q, k, v and back, an MLP of four times the width, and attention of all tokens to all."""
    projections, mlp = 4 * width**2, 8 * width**2
    return count * (2 * tokens * (projections + mlp) + 4 * tokens**2 * width)


def flops_of_uvit(width, count, patches, values, extra, convolved) -> int:
    tokens, channels = patches + extra, 4 if values in (4 * 2**2, 4 * 4**2) else 3
    skips = count // 2 * 2 * tokens * 2 * width * width
    return blocks(count, tokens, width) + skips + 2 * 2 * patches * values * width + 2 * 9 * channels * convolved


def flops_of_dit(width, count, patches=16**2, values=4 * 2**2) -> int:
    conditioning = 2 * (256 * width + width**2) + count * 2 * width * 6 * width + 2 * width * 2 * width
    return blocks(count, patches, width) + conditioning + 2 * 2 * patches * values * width


FLOPS = {f"uvit_{name}_public": flops_of_uvit(*sizes) for name, sizes in UVITS.items()}
FLOPS |= {
    f"{family}_imagenet256_{size}_public": flops_of_dit(*DITS[size]) for family in ("dit", "sit") for size in DITS
}


def rows(header: str) -> list[list[str]]:
    """The cells of the table whose first line begins so, without that line."""
    lines = PAGE[PAGE.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_public_network_has_its_row_and_its_cost():
    named = {row[2].strip("`").removesuffix(".yaml"): row[4] for row in rows("| family | file |")}
    assert named == {name: f"{flops / 1e9:.1f}" for name, flops in FLOPS.items()}
    assert named.keys() == {
        path.stem for path in (ROOT / "configs").glob("*_public.yaml") if not path.stem.startswith("deediff")
    }


@pytest.mark.parametrize("name", FLOPS)
def test_the_count_by_hand_is_that_of_torch(name):
    with torch.device("meta"):
        network = build_network(build_config(read_yaml(ROOT / "configs" / f"{name}.yaml"), name))
    assert backbone_flops(network) == FLOPS[name]


def test_time_inputs_and_schedules():
    """The column has a word for each noise schedule and time input in the descriptions."""
    words = {"continuous_vp": "VP", "scaled_linear": "LDM", "linear": "DDPM", "rectified_flow": "flow"}
    for row in rows("| family | file |"):
        schedule = read_yaml(ROOT / "configs" / row[2].strip("`"))["diffusion_params"]["beta_schedule"]
        assert row[3] == words[schedule]
    assert [row[0] for row in rows("| | noise schedule |")] == list(words.values())


def test_the_predicted_speed_ups():
    """The small network at t = 500..999, the large one at 0..499."""
    family = {
        ("U-ViT", "64"): "uvit_imagenet64_{}_public",
        ("U-ViT", "256"): "uvit_imagenet256_{}_public",
        ("U-ViT", "512"): "uvit_imagenet512_{}_public",
        ("DiT", "256"): "dit_imagenet256_{}_public",
        ("SiT", "256"): "sit_imagenet256_{}_public",
    }
    table = rows("| pair |")
    assert len(table) == 9
    for pair, images, speed_up in table:
        kind, small, large = re.fullmatch(r"(\S+) (\w+), (\w+)", pair).groups()
        form = family[kind, re.search(r"\d+", images)[0]]
        a, b = (FLOPS[form.format(size.lower())] for size in (small, large))
        assert speed_up == f"{1000 * b / (500 * a + 500 * b):.2f}x"


def test_licences_of_every_family_are_stated_and_no_host_is_named():
    published = rows("| family | published by |")
    assert len(published) == 6 and all(len(row) == 3 and row[2] for row in published)
    assert "://" not in PAGE and ".com" not in PAGE
