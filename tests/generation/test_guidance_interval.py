"""Guidance at some of the timesteps alone: outside the network runs once, with the class."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

import sampler as sampler_script
from diffusion.sampling import guided
from generation.settings import SamplerSettings
from generation.stages import plan_of
from models.flops import backbone_flops
from models.uvit import UViT
from tests.conftest import TINY

T = 20


@pytest.fixture
def argv(runs, tmp_path):
    network = runs / "no_class" / "digits_uvit_last.pth"
    flags = ["--checkpoint_path", network, "--n_samples", 2, "--device", "cpu", "--quiet", "--precision", "fp32"]
    return [*flags, "--guidance_scale", 1.5, "--class_id", 3, "--output_folder"]


def statistics(out):
    return json.loads((out / "report" / "statistics.json").read_text())


def images(out):
    return [path.read_bytes() for path in sorted(out.glob("*.png"))]


WHOLE = backbone_flops(UViT(**TINY, depth=3, num_classes=11))
AROUND = backbone_flops(UViT(**TINY, depth=3, num_classes=11), 1)


def test_it_is_called_once_where_there_is_none():
    """cond + s (cond - uncond) at t = 5..7, of a network that says 10 for the class and 1 without: 10 + 2 * 9."""
    calls = []

    def network(x_t, t, y):
        calls.append((t, y.tolist()))
        return torch.where(y == 9, 1.0, 10.0)[:, None]

    denoiser = guided(network, 2.0, 9, guides=lambda t: 5 <= t <= 7)
    got = [denoiser(torch.zeros(2, 1), t, torch.tensor([3, 4])).unique().item() for t in (8, 7, 5, 4)]
    assert got == [10, 28, 28, 10]
    assert calls == [(8, [3, 4]), (7, [3, 4, 9, 9]), (5, [3, 4, 9, 9]), (4, [3, 4])]


def test_half_of_the_calls_outside_are_saved(argv, tmp_path, run_quietly):
    run_quietly(sampler_script.main, [*argv, tmp_path / "part", "--guidance_t_min", 5, "--guidance_t_max", 9])
    about = statistics(tmp_path / "part")
    assert about["network_flops_per_image"] == (T + 5) * WHOLE
    assert about["stages"][0] | {"guidance_t_min": 5, "guidance_t_max": 9} == about["stages"][0]
    # All timesteps and none of them are what they are without an interval.
    run_quietly(sampler_script.main, [*argv, tmp_path / "all", "--guidance_t_min", 0])
    run_quietly(sampler_script.main, [*argv, tmp_path / "plain"])
    assert images(tmp_path / "all") == images(tmp_path / "plain") != images(tmp_path / "part")
    assert statistics(tmp_path / "plain")["network_flops_per_image"] == 2 * T * WHOLE
    run_quietly(sampler_script.main, [*argv, tmp_path / "none", "--guidance_t_min", T])
    unguided = [0 if word == 1.5 else word for word in argv]
    run_quietly(sampler_script.main, [*unguided, tmp_path / "unguided"])
    assert images(tmp_path / "none") == images(tmp_path / "unguided")


def test_a_file_of_stages_has_its_own(argv, tmp_path, run_quietly):
    network = str(argv[1])
    stages = [
        {"checkpoint_path": network, "t_min": 10, "t_max": 19, "guidance_scale": 1.5, "guidance_t_max": 14},
        {"checkpoint_path": network, "t_min": 0, "t_max": 9, "guidance_scale": 0},
    ]
    (tmp_path / "stages.yaml").write_text(yaml.safe_dump({"stages": stages}))
    flags = [*argv[2:-3], "--class_id", 3, "--output_folder"]
    flags = [*flags[: flags.index("--guidance_scale")], *flags[flags.index("--guidance_scale") + 2 :]]
    run_quietly(sampler_script.main, ["--stages", tmp_path / "stages.yaml", *flags, tmp_path / "file"])
    run_quietly(sampler_script.main, [*argv, tmp_path / "flags", "--guidance_t_min", 10, "--guidance_t_max", 14])
    assert images(tmp_path / "file") == images(tmp_path / "flags")
    assert statistics(tmp_path / "file")["network_flops_per_image"] == (T + 5) * WHOLE


def test_with_a_cache_the_middle_is_computed_where_guidance_begins_and_ends(argv, tmp_path, run_quietly):
    """Another batch cannot use what was kept. Kept for ever otherwise: three computed, at 1, 2 and 1 passes."""
    interval = ["--guidance_t_min", 5, "--guidance_t_max", 9]
    run_quietly(sampler_script.main, [*argv, tmp_path / "out", *interval, "--reuse_every", 100])
    about = statistics(tmp_path / "out")
    assert about["backbones"][0]["timesteps_reusing"] == T - 3
    assert about["network_flops_per_image"] == 4 * WHOLE + (9 + 2 * 4 + 4) * AROUND


def test_bad_input(argv, full, tmp_path, fails):
    fails(sampler_script.main, [*argv, tmp_path / "a", "--guidance_t_min", 9, "--guidance_t_max", 5], "is more than")
    plain = ["--checkpoint_path", full, "--output_folder", tmp_path / "a"]
    fails(sampler_script.main, [*plain, "--guidance_t_min", 9], "need --guidance_scale")
    stages = tmp_path / "stages.yaml"
    for in_file, flags in (({"guidance_t_min": 9, "guidance_t_max": 5}, []), ({"guidance_t_max": 5}, [9])):
        entry = {"checkpoint_path": str(full), "t_min": 0, "t_max": 19, "guidance_scale": 1.0}
        stages.write_text(yaml.safe_dump({"stages": [entry | in_file]}))
        given = ["--stages", stages, *plain[2:], *(["--guidance_t_min", *flags] if flags else [])]
        said = "stages 1: guidance_t_min 9 is more than guidance_t_max 5"
        fails(sampler_script.main, given, f"{stages}: {said}")
    two = {"checkpoint_path_late": full, "t_switch": 9, "guidance_scale_late": 1.0, "guidance_t_max": 5}
    plan = plan_of(SamplerSettings(checkpoint_path=full, output_folder=tmp_path, **two))
    assert [[t for t in range(8) if stage.guides(t)] for stage in plan.stages] == [[], [0, 1, 2, 3, 4, 5]]
