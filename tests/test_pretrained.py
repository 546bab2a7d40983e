"""pretrained/: networks that load, belong together and are small; and the real garments they are held against."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eesampler
import fid
import sampler
from common.files import read_json

PRETRAINED = Path(__file__).parents[1] / "pretrained"
FULL, SHALLOW, EXITS = (PRETRAINED / f"fashion_mnist_{name}" for name in ("full", "shallow", "exits"))
REAL = PRETRAINED / "fashion_mnist_real.npz"
FEW = ["--n_samples", 4, "--solver", "ddim", "--steps", 2, "--guidance_scale", 1, "--class_id", 0, 9, "--device", "cpu"]


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_they_are_small():
    assert sum(path.stat().st_size for path in PRETRAINED.rglob("*") if path.is_file()) < 16e6
    assert {value.dtype for folder in (FULL, SHALLOW, EXITS) for value in weights(folder).values()} == {torch.float16}


def test_early_exit_stands_on_the_full_backbone():
    """Its weights are the full network's own, so that the two can be compared."""
    full, exits = weights(FULL), weights(EXITS)
    assert all(torch.equal(value, exits[f"uvit.{name}"]) for name, value in full.items())


@pytest.mark.parametrize("folder, blocks", [(FULL, 9), (SHALLOW, 3), (EXITS, 9)])
def test_cards(folder, blocks):
    card, described = (folder / "README.md").read_text(), read_json(folder / "config.json")
    assert f", {blocks} blocks |" in card and "in float16 |" in card and f"| steps | {described['step']} |" in card
    assert described["config"]["dataset"] == "fashion_mnist"


def test_real_garments():
    """A thousand, about as many of each class, and no two alike."""
    with np.load(REAL) as file:
        images = file["arr_0"]
    assert (images.shape, images.dtype) == ((1000, 28, 28), np.uint8)
    assert len({image.tobytes() for image in images}) == 1000


@pytest.mark.slow
def test_the_pair_the_plan_and_early_exit_sample(tmp_path, run_quietly):
    pair = ["--checkpoint_path", SHALLOW, "--checkpoint_path_late", FULL, "--t_switch", 500]
    exits = ["--checkpoint_path", EXITS, "--threshold", 0.1]
    plan = ["--stages", PRETRAINED / "fashion_mnist_plan.yaml"]
    for name, main, words in (
        ("sampler", sampler.main, pair),
        ("plan", sampler.main, plan),
        ("eesampler", eesampler.main, exits),
    ):
        run_quietly(main, [*words, *FEW, "--output_folder", tmp_path / name, "--quiet"])
        assert len(list((tmp_path / name).glob("*.png"))) == 4
    scoring = ["--reference", REAL, "--feature_extractor", Path("experiments/digits_classifier.pt").resolve()]
    assert fid.parse_settings([str(word) for word in ["--samples_path", tmp_path / "sampler", *scoring]])
