"""Bare weights, and what describes them."""

from __future__ import annotations

import pytest
import torch
import yaml

import eesampler
import sampler
import train
from models import EarlyExitUViT, UViT
from tests.conftest import TINY, TINY_FLAGS, TRAINING_FLAGS, perturbed

FLAGS = ["--device", "cpu", "--solver", "ddim", "--steps", "2", "--batch_size", "1"]
LINEAR = "linear betas 0.0001..0.02"


@pytest.fixture
def bare(tmp_path):
    """Weights that come without a description."""
    torch.save(perturbed(UViT(**TINY, depth=3)).state_dict(), tmp_path / "bare.pth")
    return tmp_path / "bare.pth"


def described(folder, **settings):
    path = folder / "net.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "normalize, diffusion, said",
    [
        (False, {}, f"{LINEAR}, time input t for t = 0..999"),
        (True, {}, f"{LINEAR}, time input t / 1000 for t = 0..999"),
        (False, {"time_shift": 1.0, "num_timesteps": 500}, f"{LINEAR}, time input t + 1 for t = 0..499"),
        (True, {"time_shift": -0.5}, f"{LINEAR}, time input (t - 0.5) / 1000 for"),
        (
            *(False, {"beta_schedule": "continuous_vp", "time_scale": 0.999, "time_shift": 1.0}),
            "continuous_vp betas 0.0001..0.02, time input 0.999 (t + 1) for",
        ),
        (
            *(False, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "time_scale": 2.0}),
            "scaled_linear betas 0.00085..0.012, time input 2 t for",
        ),
    ],
)
def test_what_bare_weights_are_taken_to_be_told_is_said(normalize, diffusion, said, bare, tmp_path, caplog):
    """Nothing in them would contradict another time input or schedule than the one they were trained with."""
    params = TINY | {"depth": 3, "normalize_timesteps": normalize}
    config = described(tmp_path, model_params=params, diffusion_params=diffusion)
    argv = ["--checkpoint_path", bare, "--config_path", config, "--output_folder", tmp_path / "s", *FLAGS]
    sampler.main([str(arg) for arg in argv])
    assert f"{bare} has no description; using that of {config}: {said}" in caplog.text


def test_of_weights_that_training_begins_with_it_is_said_too(bare, tmp_path, caplog):
    flags = [*TINY_FLAGS, *TRAINING_FLAGS, "--depth", "3", "--n_steps", "1", "--log_path", str(tmp_path)]
    train.main([*flags, "--load_checkpoint_path", str(bare), "--exp_name", "a"])
    train.main([*flags, "--distill_from", str(bare), "--exp_name", "b"])
    start, teacher = (line for line in caplog.text.splitlines() if "has no description" in line)
    assert "using that of the flags (see also --config_path): " + LINEAR in start and "t = 0..19" in start
    assert "using that of the network that learns from it: " + LINEAR in teacher


def test_nothing_is_said_of_weights_that_carry_a_description(full, tmp_path, caplog):
    sampler.main([str(arg) for arg in ("--checkpoint_path", full, "--output_folder", tmp_path / "s", *FLAGS)])
    assert "description" not in caplog.text


def test_a_bad_value_is_told_with_the_file_it_is_in(bare, full, tmp_path, fails):
    config = described(tmp_path, model_params=TINY | {"depth": -3})
    argv = ["--output_folder", tmp_path / "s", "--device", "cpu", "--checkpoint_path"]
    fault = "model_params: depth=-3 is out of range, wanted 1..999"
    fails(sampler.main, [*argv, bare, "--config_path", config], f": {config}: {fault}")
    content = torch.load(full, weights_only=True)
    content["config"]["model_params"]["depth"] = -3
    torch.save(content, tmp_path / "changed.pth")
    fails(sampler.main, [*argv, tmp_path / "changed.pth"], f"changed.pth: {fault}")


def test_the_original_authors_files_load_with_their_checkpoints(tmp_path, run_quietly):
    """Their YAML says classifier_type among the network's own settings."""
    model = perturbed(EarlyExitUViT(UViT(**TINY, depth=3), "attention_probe"))
    weights = {f"uvit.{name}": tensor for name, tensor in model.uvit.state_dict().items()}
    weights |= {f"matrix.{name}": tensor for name, tensor in model.probes.state_dict().items()}
    heads = ["in_blocks_heads.0", "mid_block_head", "out_blocks_heads.0"]
    for head, name in zip(model.exit_heads, heads, strict=True):
        weights |= {f"{name}.{key}": tensor for key, tensor in head.state_dict().items()}
    torch.save({"model_state_dict": weights, "num_steps": 3}, tmp_path / "original.pth")
    config = described(tmp_path, model_params=TINY | {"depth": 3, "classifier_type": "attention_probe"})
    argv = ["--checkpoint_path", tmp_path / "original.pth", "--config_path", config, "--threshold", 0.1, *FLAGS]
    assert "mean exit layer" in run_quietly(eesampler.main, [*argv, "--output_folder", tmp_path / "s"])
