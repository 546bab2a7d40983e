"""--precision, --compile, --offload and --min_group on the command lines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

import eesampler
import export
import sampler
from common import devices
from generation.folder import SampleFolder
from models import UViT
from tests.folders import equal, samples, statistics
from tests.processes import run


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


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.slow
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("exported", [None, "late.safetensors", "late"])
def test_offloading_changes_no_image(exported, precision, duo, full, tmp_path, run_quietly):
    if exported:
        run_quietly(export.main, [full, tmp_path / exported])
        duo[duo.index(full)] = tmp_path / exported
    flags = [*duo, "--n_samples", 7, "--precision", precision, "--cache_interval", 2, "--output_folder"]
    run_quietly(sampler.main, [*flags, tmp_path / "s"])
    run_quietly(sampler.main, [*flags, tmp_path / "offloaded", "--offload"])
    assert equal(samples(tmp_path / "s"), samples(tmp_path / "offloaded"))


def test_a_file_that_is_gone_when_its_stage_begins(duo, full, tmp_path, fails, monkeypatch):
    """One line, and no sample of the batch."""
    moved = tmp_path / "moved.pth"
    duo[duo.index(full)] = moved.write_bytes(full.read_bytes()) and moved
    making = SampleFolder.making
    monkeypatch.setattr(
        SampleFolder, "making", lambda self, *args, **more: moved.unlink() or making(self, *args, **more)
    )
    said = f"{moved} was changed or removed, but --offload needs it"
    fails(sampler.main, [*duo, "--offload", "--output_folder", tmp_path / "s"], said)
    assert not samples(tmp_path / "s")


WIDE = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 512, "num_heads": 4, "depth": 5}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells the peak of a process")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_offloading_saves_the_memory_of_a_network(suffix, tmp_path):
    """Two of one size are in memory without it; and the second is there twice for a moment, when it has been read."""
    config = tmp_path / "wide.yaml"
    config.write_text(yaml.safe_dump({"model_params": WIDE, "diffusion_params": {"num_timesteps": 20}}))
    flags = ["--t_switch", 9, "--solver", "ddim", "--steps", 2, "--n_samples", 2, "--batch_size", 1]
    flags += ["--precision", "fp32", "--device", "cpu"]
    for late in ("", "_late"):
        weights = UViT(**WIDE).state_dict()
        path = tmp_path / f"wide{late}{suffix}"
        torch.save(weights, path) if suffix == ".pth" else save_file(weights, path)
        flags += [f"--checkpoint_path{late}", path, f"--config_path{late}", config]
    peaks = {}
    for name, more in (("s", []), ("offloaded", ["--offload"])):
        said = tmp_path / f"{name}.txt"
        assert run("sampler", [*flags, *more, "--output_folder", tmp_path / name], said) == [0], said.read_text()
        peaks[name] = statistics(tmp_path / name)["peak_memory_bytes"]
        assert f"peak memory {peaks[name] / 2**20:.0f} MiB" in said.read_text()
    assert equal(samples(tmp_path / "s"), samples(tmp_path / "offloaded"))
    size = path.stat().st_size
    assert size > 2**25 and peaks["s"] - peaks["offloaded"] > 0.95 * size
