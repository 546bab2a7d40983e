"""experiments/plans.py: from the trainings to the page, with networks that learned nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calibration import plan
from calibration.planning import Prices, Way
from calibration.prices import Seconds
from common import timing
from common.files import read_json
from experiments import plans, plans_measure, plans_page
from experiments.plans_sets import digits_for_plans
from experiments.settings import words
from generation.settings import SavingSettings
from generation.stages import PlannedStage


@pytest.mark.slow
def test_from_networks_to_the_page(tmp_path, monkeypatch, run_quietly):
    few = {"full_steps": 2, "shallow_steps": 2, "n_samples": 4, "sampling_steps": 3, "n_calibration": 4}
    images = digits_for_plans()
    tiny = replace(images, training_batch=4, extractor=images.extractor.resolve(), **few)
    monkeypatch.setitem(plans.SETS, "digits", lambda: tiny)
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.0)
    seconds = Seconds([1.0, 5.0], {}, {1: 2.0}, overhead=0.1)
    monkeypatch.setattr(plan, "time_predictors", lambda *_: seconds)
    home, *elsewhere = plans_measure.settings_of(3)
    monkeypatch.setattr(plans_measure, "settings_of", lambda steps: [home, elsewhere[2], elsewhere[-1]])
    monkeypatch.setattr(plans_measure, "SPEED_UPS", (1.2,))
    monkeypatch.setattr(plans_measure, "MOVED", 1.2)
    monkeypatch.setattr(plans_measure, "ROUNDS", 1)
    monkeypatch.setattr(plans_measure, "TIMED_ROUNDS", 1)
    monkeypatch.setattr(plans_page, "SPEED_UPS", (1.2,))
    (tmp_path / "configs").symlink_to(Path("configs").resolve())
    monkeypatch.chdir(tmp_path)
    argv = ["--sets", "digits", "--seeds", 3, 4]
    assert "-> docs/plans.md" in run_quietly(plans.main, argv)
    page, numbers = (tmp_path / "docs" / "plans.md").read_text(), read_json(tmp_path / "docs" / "plans.json")["digits"]
    by_label = {row["label"]: row for row in numbers["rows"]}
    assert {"full", "plan of all, 1.2x", "switch at 439", "corrected every 4, held"} <= by_label.keys()
    assert all(f"| {label}" in page.replace("**", "") for label in by_label)
    assert numbers["moved"].keys() == {"ddim, 3 steps", "ddpm, 3 steps, networks halfway"}
    assert "squared shift" in page and (tmp_path / "docs" / "plans_digits.png").stat().st_size > 5000
    for label, row in by_label.items():  # no mechanism alone has fewer nats than the plan of all at its speed
        if label.endswith("1.2x"):
            joint = by_label["plan of all, 1.2x"]["predicted"]
            assert all(a <= b * (1 + 1e-6) for a, b in zip(joint, row["predicted"], strict=True)), label
    done = (tmp_path / "results" / "plans" / "commands.json").read_bytes()
    run_quietly(plans.main, argv)
    assert (tmp_path / "results" / "plans" / "commands.json").read_bytes() == done, "all was there"


def test_what_is_predicted_of_any_plan():
    """Three steps: a shallow network at the first; then the full one, held at the last, which draws no noise."""
    rows = {"full": 0.0, "shallow": 0.5, "held": 0.25}
    divergence = np.array([[[value] * 2] * 3 for value in rows.values()])
    divergence[1:, -1] = np.nan

    def way(network, saving, seconds, numbers):
        return Way("", "", network, saving, None, np.array(seconds), np.array(numbers))

    held = SavingSettings(hold_every=2, hold_order=0)
    ways = [
        way(1, SavingSettings(), [4.0], [[0], [0]]),
        way(0, SavingSettings(), [1.0], [[1], [1]]),
        way(1, held, [4.0, 0.0], [[0, 2], [0, 2]]),
    ]
    three = Prices([900, 500, 100], divergence, ways, overhead=1.0)
    stages = [PlannedStage(0, 501, 0.0, ""), PlannedStage(1, 0, 0.0, "", saving=held)]
    speed_up, nats = plans_measure.predicted_of(three, stages)
    assert (speed_up, nats) == (15 / (2 + 5 + 1), 0.5)


def test_the_command_line_of_settings():
    given = ["--sets", "emoji", "--no-elsewhere", "--quick"]
    settings = plans.parse_settings(given)
    assert not settings.elsewhere and plans.parse_settings(words(settings)) == settings
    assert sorted(words(settings)) == sorted(given)


def test_refusals(fails):
    fails(plans.main, ["--seeds", 1], "two or more")
    fails(plans.main, ["--sets", "faces"], "--sets")
