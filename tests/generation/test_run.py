"""Batches that leave the finite numbers."""

from __future__ import annotations

import pytest
import torch

import generation.run
import sampler

FLAGS = ["--device", "cpu", "--quiet", "--precision", "fp32", "--solver", "ddim", "--steps", "4", "--batch_size", "2"]


@pytest.fixture
def overflowing(runs, tmp_path):
    """A class-conditional network, which cannot calculate class 1 in 32 bits."""
    content = torch.load(runs / "classes" / "digits_uvit_last.pth", weights_only=True)
    for part in ("model", "ema"):
        content[part]["label_emb.weight"][1] = 3e38
    torch.save(content, tmp_path / "overflowing.pth")
    return tmp_path / "overflowing.pth"


def test_a_batch_that_is_not_finite_is_named_and_none_of_it_written(overflowing, tmp_path, fails):
    """The batches before it stay, and the run goes on where they end."""
    argv = ["--checkpoint_path", overflowing, "--output_folder", tmp_path / "s", *FLAGS, "--n_samples", 6]
    argv += ["--timesteps_save", 9, "--class_id"]
    fails(sampler.main, [*argv, 0, 2, 0, 1, 0, 2], "samples 2..3: not finite from t = 19 on")
    written = sorted(path.name for path in (tmp_path / "s").rglob("0*.png"))
    assert written == ["000000.png", "000000.png", "000001.png", "000001.png"]  # and the frames of these


def test_what_an_autoencoder_makes_infinite_is_not_written(full, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(generation.run, "image_maker", lambda *_: lambda latents: latents / 0)
    argv = ["--checkpoint_path", full, "--output_folder", tmp_path / "s", *FLAGS]
    fails(sampler.main, argv, "samples 0..1", "autoencoder", "not finite")
    assert not list((tmp_path / "s").iterdir())


def test_half_precision_that_does_not_suffice_is_named(full, tmp_path, fails, monkeypatch):
    """Weights that are finite in 32 bits, and infinite in 16."""
    monkeypatch.setitem(generation.run.DTYPES, "bf16", torch.float16)  # a CPU need not calculate in fp16
    content = torch.load(full, weights_only=True)
    for part in ("model", "ema"):
        content[part]["norm.weight"][0] = 1e6
    torch.save(content, tmp_path / "wide.pth")
    argv = ["--checkpoint_path", tmp_path / "wide.pth", "--output_folder", tmp_path / "s", *FLAGS]
    argv[argv.index("fp32")] = "bf16"
    fails(sampler.main, argv, "samples 0..1: not finite from t = 19 on", "--precision fp32")
    assert not list((tmp_path / "s").glob("*.png"))
