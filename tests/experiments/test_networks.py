"""experiments/networks.py: trainings that go on, and ways to train at equal time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from common.errors import command
from common.files import read_json
from experiments import networks, runner, sets


def trained(tmp_path, images=None):
    return networks.Trained(images or sets.quick(sets.digits()), tmp_path, runner.Runner(tmp_path))


def test_trainings_go_on_where_they_were_cut_off(tmp_path, run_quietly, fails):
    """With the same arguments alone: a network that was trained otherwise is not taken for the one asked for."""
    of, train = trained(tmp_path), ("train", "net", "uvit_digits_1")
    run_quietly(lambda _: of.train(*train, 3, 0), [])
    assert of.checkpoint("net").exists()
    (line,) = read_json(tmp_path / "commands.json")
    (tmp_path / "commands.json").write_text(json.dumps({line: None}))  # stopped before it was noted
    of = trained(tmp_path)
    assert "done before" in run_quietly(lambda _: of.train(*train, 3, 0), [])
    fails(command(lambda _: of.train(*train, 3, 0, t_min=500)), [], "another command", f"remove {tmp_path}")


def test_steps_at_equal_time():
    """The median of the rounds' ratios, 0.5, 0.4 and 0.6."""
    rates = {"plain": [10, 20, 10], "distilled": [5, 8, 6]}
    steps = {name: networks.equal_time(name, 1000, rates) for name in networks.VARIANTS}
    assert steps == {"all timesteps": 1000, "own range": 1000, "warm start": 1000, "distilled": 500, "all three": 500}
    assert networks.equal_time("distilled", 2, {"plain": [10], "distilled": [1]}) == 1


def test_a_network_has_the_classes_of_the_images(tmp_path):
    """A copy of the file in configs/ if the number differs; none for images without classes."""
    for number in range(3):
        (tmp_path / f"class{number}").mkdir()
        (tmp_path / f"class{number}" / "0.png").touch()
    images = sets.colour(tmp_path, is_emoji=False)
    of = trained(tmp_path / "work", images)
    config = yaml.safe_load(of.config("uvit_emoji32").read_text())
    whole = yaml.safe_load(Path("configs/uvit_emoji32.yaml").read_text())
    assert config["model_params"].pop("num_classes") == 3 and whole["model_params"].pop("num_classes") == 18
    assert config == whole
    (tmp_path / "1.png").touch()
    assert yaml.safe_load(of.config("uvit_emoji32").read_text())["model_params"]["num_classes"] == -1
    assert trained(tmp_path).config("uvit_digits") == Path("configs/uvit_digits.yaml")


@pytest.mark.parametrize(("precision", "amp"), [("bf16", True), ("fp32", False)])
def test_the_precision_is_that_of_training(tmp_path, precision, amp):
    lines = []
    of = trained(tmp_path, replace(sets.digits(), precision=precision))
    of.run = lambda *module, going_on=None, **flags: lines.append(flags)
    of.run.began = lambda *_, **flags: False
    of.train("train", "net", "uvit_digits", 3, 0)
    assert lines[0].get("use_amp", False) == amp
