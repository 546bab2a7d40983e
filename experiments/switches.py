"""Rules for the switch, and what they choose of the options that calibrate.py measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from calibration.choice import knee

GRID = (999, 900, 800, 700, 600, 500, 400, 300, 200, 100)
SPEEDUP = 1.5  # that one of the rules asks for
KNEE = "knee"


def averaged(calibrations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The options over several calibrations: means, of speed-ups in time; standard errors too, for they measured on
    the same images."""
    options = []
    for same in zip(*(calibration["options"] for calibration in calibrations), strict=True):
        option = {key: same[0][key] for key in ("t_switch", "steps_of_each")}
        option["speed_up"] = statistics.harmonic_mean([of["speed_up"] for of in same])
        for key in ("divergence", "divergence_se", "divergence_per_dimension", "excess", "excess_se"):
            option[key] = statistics.mean(of[key] for of in same)
        options.append(option)
    return options


def grid_of(options: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """The options of the grid by their switch, which is the next timestep that the sampler visits."""
    reached = (next((o for o in options if o["t_switch"] <= t), None) for t in GRID)
    return {option["t_switch"]: option for option in reached if option is not None}


def chosen_by_rules(options: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What each rule chooses. options: rising in speed, the full network alone first. KNEE is calibrate.py's own."""
    quickest, most = options[-1]["speed_up"], options[-1]["divergence"]

    def from_chord(option: Mapping[str, Any]) -> float:
        """How far below the line from the first option to the last (Satopaa et al. 2011)."""
        saved, all_saved = (1 - 1 / speed_up for speed_up in (option["speed_up"], quickest))
        return saved / all_saved - option["divergence"] / most if all_saved > 0 and most > 0 else 0.0

    return {
        KNEE: knee_of(options),
        "farthest from the chord": max(options, key=from_chord),
        "least excess": min(options, key=lambda option: option["excess"]),
        "fastest without excess": [option for option in options if option["excess"] <= 2 * option["excess_se"]][-1],
        f"speed-up {SPEEDUP:g}": next((o for o in options if o["speed_up"] >= SPEEDUP), options[-1]),
    }


def knee_of(options: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What calibrate.py chooses by default."""
    rows: list[Any] = [SimpleNamespace(**option) for option in options]  # the numbers of an Option, not its networks
    chosen: SimpleNamespace = knee(rows)
    return vars(chosen)
