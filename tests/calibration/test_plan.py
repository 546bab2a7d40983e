"""calibrate.py --plan, and sampler.py --plan auto: from networks to a file of stages that runs."""

from __future__ import annotations

import json

import numpy as np
import pytest

import calibrate
import sampler
from generation.stages import read_stages
from tests.folders import equal, samples, statistics

QUICK = ["--dataset", "digits", "--n_images", 12, "--batch_size", 4, "--device", "cpu", "--quiet"]
FLAGS = ["--device", "cpu", "--quiet", "--batch_size", 4]


@pytest.fixture
def pair(shallow, full):
    return ["--plan", "--checkpoint_path", shallow, full, *QUICK]


def contents(path):
    return json.loads(path.with_suffix(".json").read_text())


@pytest.mark.slow
def test_from_two_networks_to_samples(pair, tmp_path, run_quietly):
    out = tmp_path / "plan.yaml"
    said = run_quietly(calibrate.main, [*pair, "--budget", 1e9, "--output", out])
    assert all(words in said for words in ("plan of all", "corrected", "noise held", "whole plan on other paths"))
    found = contents(out)
    assert found["speed_up"] == pytest.approx(max(option["speed_up"] for option in found["joint"]), rel=1e-6)
    assert {"network", "correct", "hold", "reuse"} >= found["alone"].keys() >= {"network", "correct", "hold"}
    for option in found["joint"]:  # of all mechanisms together none is beaten by one alone
        for curve in found["alone"].values():
            faster = [other["divergence"] for other in curve if other["speed_up"] >= option["speed_up"]]
            assert all(option["divergence"] <= other * (1 + 1e-6) + 1e-12 for other in faster)
    assert out.with_suffix(".png").stat().st_size > 10_000
    run_quietly(sampler.main, ["--stages", out, *FLAGS, "--output_folder", tmp_path / "s"])
    about = statistics(tmp_path / "s")
    assert len(about["stages"]) == len(read_stages(out).stages)


@pytest.mark.slow
def test_every_rule(pair, tmp_path, run_quietly):
    """At a speed-up of 1 the plan is the full network; the knee needs no rule."""
    for name, rule in (("one", ["--speedup", 1]), ("budget", ["--budget", 0]), ("seconds", ["--seconds", 1e6])):
        out = tmp_path / f"{name}.yaml"
        run_quietly(calibrate.main, [*pair, *rule, "--output", out])
        assert contents(out)["divergence"] == contents(out)["measured_divergence"] == 0, name
    said = run_quietly(calibrate.main, [*pair, "--solver", "ddim", "--steps", 6, "--output", tmp_path / "knee.yaml"])
    assert "knee" in said and "shift^2" in said


@pytest.mark.slow
def test_an_early_exit_model_and_sampled_paths(runs, tmp_path, run_quietly):
    """Of one file: its layers, and what one network can do. No real image is asked for."""
    exits = runs / "ee" / "digits_deediff_uvit_last.pth"
    out = tmp_path / "plan.yaml"
    flags = ["--plan", "--checkpoint_path", exits, "--paths", "sampled", *QUICK[2:], "--output", out]
    said = run_quietly(calibrate.main, [*flags, "--budget", 1e9])
    assert "sampled paths" in said and "one exit layer per stage" in said
    stages = read_stages(out).stages
    assert all(stage.exit_layer is not None for stage in stages)
    assert any(stage.exit_layer < 5 or stage.hold_every > 1 for stage in stages)
    run_quietly(sampler.main, ["--stages", out, *FLAGS, "--output_folder", tmp_path / "s"])
    assert len(samples(tmp_path / "s")) == 4


def test_paths_belong_to_the_seed(pair, tmp_path, run_quietly):
    measured = []
    for name, seed, size in (("a", 1, 4), ("b", 1, 5), ("c", 2, 4)):
        flags = ["--seed", seed, "--batch_size", size, "--steps", 5, "--speedup", 1.01, "--output"]
        run_quietly(calibrate.main, [*pair, *flags, tmp_path / f"{name}.yaml"])
        by_speed = contents(tmp_path / f"{name}.yaml")["alone"]["network"]
        measured.append(by_speed[-1]["divergence"])
    np.testing.assert_allclose(measured[0], measured[1], rtol=1e-4)
    assert not np.isclose(measured[0], measured[2], rtol=1e-3)


def test_auto(shallow, full, tmp_path, run_quietly, monkeypatch):
    """The plan is measured once; a run that goes on keeps it."""
    auto = ["--checkpoint_path", shallow, "--checkpoint_path_late", full, "--plan", "auto", "--steps", 6]
    auto += ["--dataset", "digits", "--n_images", 8, "--budget", 1e9, *FLAGS, "--output_folder"]
    said = run_quietly(sampler.main, [*auto, tmp_path / "s", "--n_samples", 4])
    assert "chosen:" in said and (tmp_path / "s" / "report" / "calibration.yaml").is_file()
    first = samples(tmp_path / "s")
    run_quietly(
        sampler.main,
        [
            "--stages",
            tmp_path / "s" / "report" / "calibration.yaml",
            "--steps",
            6,
            *FLAGS,
            "--output_folder",
            tmp_path / "f",
        ],
    )
    assert equal(samples(tmp_path / "f"), first)
    monkeypatch.setattr("calibration.automatic.calibrate_plan", pytest.fail)
    said = run_quietly(sampler.main, [*auto, tmp_path / "s", "--n_samples", 6])
    assert "as they were chosen when this run began" in said and len(samples(tmp_path / "s")) == 6


def test_refusals(pair, shallow, full, runs, tmp_path, fails):
    out = ["--output", tmp_path / "p.yaml"]
    fails(calibrate.main, [*pair, "--speedup", 500, "--steps", 3, *out], "no plan is as fast as", "as fast as the full")
    fails(calibrate.main, [*pair, "--speedup", 2, "--seconds", 1, *out], "--speedup and --seconds")
    fails(calibrate.main, [*pair, "--free", *out], "--free and --plan")
    fails(calibrate.main, [*pair[1:], "--seconds", 1, *out], "--seconds belongs to a plan")
    fails(calibrate.main, [*pair[1:], "--paths", "sampled", *out], "--paths belongs to a plan")
    fails(calibrate.main, ["--plan", "--checkpoint_path", full, "--device", "cpu", *out], "give --dataset")
    two = ["--checkpoint_path", shallow, "--checkpoint_path_late", full, "--plan", "auto", *FLAGS]
    two += ["--output_folder", tmp_path / "s"]
    fails(sampler.main, two, "--plan auto", "give --dataset")
    two += ["--dataset", "digits"]
    fails(sampler.main, [*two, "--t_switch", 5], "--t_switch and --plan auto")
    fails(sampler.main, [*two, "--hold_every", 2], "--hold_every and --plan auto")
    fails(sampler.main, [*two, "--offload"], "leave out --offload")
    assert not (tmp_path / "s").exists() and not (tmp_path / "p.yaml").exists()
