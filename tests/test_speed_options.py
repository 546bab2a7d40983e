"""--precision, --compile, --offload and --min_group on the command lines."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch

import eesampler
import main as main_script
import sampler
import train
from common import devices
from tests.conftest import TINY_FLAGS, TRAINING_FLAGS
from tests.test_sampling_scripts import samples, statistics


@pytest.fixture
def duo(full, shallow):
    flags = ["--checkpoint_path", shallow, "--checkpoint_path_late", full, "--t_switch", 9, "--batch_size", 5]
    return [*flags, "--device", "cpu", "--quiet"]


@pytest.fixture
def ee(early_exit):
    return ["--checkpoint_path", early_exit, "--threshold", 0.45, "--batch_size", 5, "--device", "cpu", "--quiet"]


@pytest.mark.parametrize("script", ["duo", "ee"])
def test_half_precision_gives_nearly_the_same_images(script, duo, ee, tmp_path, run_quietly):
    main, flags = (sampler.main, duo) if script == "duo" else (eesampler.main, ee)
    for precision in ("fp32", "bf16"):
        run_quietly(main, [*flags, "--precision", precision, "--output_folder", tmp_path / precision])
        assert statistics(tmp_path / precision)["settings"]["precision"] == precision
    fp32, bf16 = (np.stack(list(samples(tmp_path / name).values())).astype(float) for name in ("fp32", "bf16"))
    difference = np.abs(fp32 - bf16)
    assert 0 < difference.mean() < 2.0, "of 255 levels, after twenty steps"


def test_what_the_device_offers_is_the_default_and_is_recorded(duo, tmp_path, run_quietly, monkeypatch):
    for there, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(devices, "in_hardware", lambda precision, device, there=there: there)
        run_quietly(sampler.main, [*duo, "--output_folder", tmp_path / name])
        assert statistics(tmp_path / name)["settings"]["precision"] == name


@pytest.fixture
def quickly_compiled(monkeypatch):
    """Traced and differentiated as ever, but without the minutes of C++; models/test_inference.py has those."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("quickly_compiled")
def test_compiled_and_eager_runs_make_the_same_images(duo, ee, tmp_path, run_quietly):
    """Two batches, of which the last is smaller."""
    for main, flags, name in ((sampler.main, duo, "duo"), (eesampler.main, ee, "ee")):
        flags = [*flags, "--n_samples", 7]
        run_quietly(main, [*flags, "--output_folder", tmp_path / name])
        run_quietly(main, [*flags, "--compile", "--output_folder", tmp_path / f"{name}_compiled"])
        eager, compiled = samples(tmp_path / name), samples(tmp_path / f"{name}_compiled")
        assert eager.keys() == compiled.keys() and len(eager) == 7
        for key in eager:  # a rounding may fall the other way
            assert np.abs(eager[key].astype(int) - compiled[key].astype(int)).max() <= 1


def test_min_group_makes_the_same_images(ee, tmp_path, run_quietly):
    run_quietly(eesampler.main, [*ee, "--threshold", 0, "--output_folder", tmp_path / "0"])
    uncertainty = np.load(tmp_path / "0" / "report" / "exits.npz")["uncertainty"]
    threshold = float(np.median(uncertainty.min(axis=1)))  # about half of the images leave somewhere
    for n in (1, 3):
        flags = [*ee, "--threshold", threshold, "--min_group", n, "--output_folder", tmp_path / str(n)]
        run_quietly(eesampler.main, flags)
    one, three = samples(tmp_path / "1"), samples(tmp_path / "3")
    assert all(np.abs(one[key].astype(int) - three[key].astype(int)).max() <= 1 for key in one)
    exits = [np.load(tmp_path / n / "report" / "exits.npz") for n in ("1", "3")]
    assert np.array_equal(exits[0]["exit_layer"], exits[1]["exit_layer"])
    assert len(np.unique(exits[0]["exit_layer"])) > 1, "the case is of no use if all leave at one layer"


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("duo", ["--precision", "fp16"], ["--precision fp16", "bf16 or fp32"]),
        ("ee", ["--precision", "fp16"], ["--precision fp16"]),
        ("duo", ["--precision", "fp8"], ["--precision", "fp8"]),
        ("duo", ["--offload"], ["--offload", "CUDA", "cpu"]),
        ("duo", ["--offload", "--compile"], ["--offload", "--compile"]),
        ("ee", ["--offload"], ["--offload"]),
        ("ee", ["--min_group", "0"], ["--min_group"]),
        ("ee", ["--min_group", "4", "--batch_size", "3"], ["--min_group 4", "--batch_size 3"]),
        ("duo", ["--min_group", "2"], ["--min_group"]),
    ],
)
def test_wrong_combinations_end_in_one_line(script, flags, words, duo, ee, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(devices, "in_hardware", lambda precision, device: precision == "fp32")
    main, given = (sampler.main, duo) if script == "duo" else (eesampler.main, ee)
    fails(main, [*given, *flags, "--output_folder", tmp_path / "s"], *words)
    assert not (tmp_path / "s").exists()


def test_offload_needs_a_network_to_keep_away(full, tmp_path, fails):
    flags = ["--checkpoint_path", full, "--offload", "--output_folder", tmp_path / "s"]
    fails(sampler.main, flags, "--offload", "--checkpoint_path_late")


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("quickly_compiled")
def test_compiled_training_is_training(full, tmp_path, run_quietly):
    flags = [*TINY_FLAGS, *TRAINING_FLAGS, "--depth", 3, "--n_steps", 2, "--log_every_n_steps", 1]
    flags[flags.index("--preview_steps") + 1] = 2
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        run_quietly(train.main, [*flags, *more, "--log_path", tmp_path, "--exp_name", name])
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "eager"), rtol=1e-4)
    assert (tmp_path / "compiled" / "previews" / "step-2.png").exists()
    saved = torch.load(tmp_path / "compiled" / "digits_uvit_last.pth", weights_only=True)["model"]
    assert not any("_orig_mod" in key for key in saved)

    heads = ["--model", "deediff_uvit", "--classifier_type", "mlp_probe_per_layer", "--load_backbone", full]
    flags = [*TINY_FLAGS, *TRAINING_FLAGS, *heads, "--freeze_backbone", "--depth", 5, "--n_steps", 1]
    flags += ["--log_every_n_steps", 1]
    for name, more in (("ee_eager", []), ("ee_compiled", ["--compile"])):
        run_quietly(main_script.main, [*flags, *more, "--log_path", tmp_path, "--exp_name", name])
    np.testing.assert_allclose(losses(tmp_path / "ee_compiled"), losses(tmp_path / "ee_eager"), rtol=1e-4)
