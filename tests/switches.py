"""Switches as calibrate.py measures them, of a sampler in five steps."""

from __future__ import annotations


def option(t_switch, n_shallow, divergence, excess, excess_se=0.1, steps=5):
    """As calibrate.py writes it, of a shallow network with a fifth of the full one's cost."""
    return {
        "t_switch": t_switch,
        "steps_of_each": [n_shallow, steps - n_shallow],
        "speed_up": steps / (steps - 0.8 * n_shallow),
        "divergence": divergence,
        "divergence_se": 0.01,
        "divergence_per_dimension": divergence / 64,
        "excess": excess,
        "excess_se": excess_se,
    }


OPTIONS = [
    option(999, 0, 0.0, 0.0, 0.0),
    option(799, 1, 0.1, -0.3),
    option(599, 2, 0.2, -0.5),
    option(399, 3, 0.3, -0.1),
    option(199, 4, 5.0, 4.0),
]
