"""experiments/switches.py: the rules for the switch, by hand."""

from __future__ import annotations

import pytest

from experiments import switches
from tests.switches import OPTIONS, option


def test_rules():
    rules = {name: of["t_switch"] for name, of in switches.chosen_by_rules(OPTIONS).items()}
    assert rules == {
        "knee": 399,
        "farthest from the chord": 399,
        "least excess": 599,
        "fastest without excess": 399,
        "speed-up 1.5": 399,
    }
    straight = [option(999 - 200 * n, n, 0.8 * n, 1.0 * n, 0.01) for n in range(5)]
    rules = {name: of["t_switch"] for name, of in switches.chosen_by_rules(straight).items()}
    assert rules["knee"] == 199 and rules["least excess"] == rules["fastest without excess"] == 999


def test_switches_of_the_grid_are_timesteps_that_are_visited():
    assert list(switches.grid_of(OPTIONS)) == [999, 799, 599, 399, 199]


def test_means_over_calibrations():
    slower = [of | {"speed_up": 1.0, "excess": of["excess"] + 1} for of in OPTIONS]
    mean = switches.averaged([{"options": OPTIONS}, {"options": slower}])
    assert mean[4]["excess"] == 4.5 and mean[4]["t_switch"] == 199
    assert 1 / mean[4]["speed_up"] == pytest.approx((1 / OPTIONS[4]["speed_up"] + 1) / 2)
