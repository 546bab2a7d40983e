"""The measurements as tables for the terminal, and as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common import plots
from common.devices import in_units
from common.tables import table


def _header(result: Mapping[str, Any], what: str) -> str:
    memory = result["peak_memory_bytes"]
    parts = [what, result["precision"], f"batch {result['batch_size']}"]
    parts += ["compiled"] * result["compiled"]
    parts += [f"{in_units(memory)} at most"] if memory else []
    return ", ".join(parts)


def sampling_tables(result: Mapping[str, Any]) -> str:
    calls = table(
        ("network", "blocks", "ms/call", "GFLOP/image", "GFLOP/s", "of matrix rate"),
        [
            (
                network["network"],
                network["blocks"],
                f"{network['ms_per_call']:.2f}",
                f"{network['flops_per_image_call'] / 1e9:.3f}",
                f"{network['flops_per_second'] / 1e9:.1f}",
                f"{network['share_of_matrix_rate']:.3f}",
            )
            for network in result["networks"]
        ],
    )
    runs = table(
        (
            "solver",
            "t_switch",
            "images/s",
            "network only",
            "outside",
            "of matrix rate",
            "speed-up",
            "predicted",
            "reached",
        ),
        [
            (
                run["solver"],
                "full" if run["t_switch"] is None else run["t_switch"],
                f"{run['images_per_second']:.4g}",
                f"{run['images_per_second_network_only']:.4g}",
                f"{run['share_outside_network']:.2%}",
                f"{run['share_of_matrix_rate']:.3f}",
                f"{run['speed_up']:.2f}x",
                f"{run['speed_up_predicted']:.2f}x",
                f"{run['speed_up_reached']:.3f}",
            )
            for run in result["runs"]
        ],
    )
    rate = f"matrix products: {result['matrix_flops_per_second'] / 1e9:.1f} GFLOP/s"
    return f"{_header(result, 'Sampling')}, {result['steps']} steps; {rate}\n\n{calls}\n\n{runs}\n"


def early_exit_table(result: Mapping[str, Any]) -> str:
    def row(name: object, measured: Mapping[str, Any]) -> tuple[object, ...]:
        return (
            name,
            f"{measured['mean_exit_layer']:.2f}",
            f"{1000 * measured['seconds_per_image']:.2f}",
            f"{1000 * measured['seconds_per_image_ideal']:.2f}",
            f"{measured['ideal_over_measured']:.3f}",
        )

    rows = [row(measured["exit_layer"], measured) for measured in result["exits"]]
    rows += [row(f"spread, min_group {measured['min_group']}", measured) for measured in result["spread"]]
    full = 1000 * result["seconds_per_image_full_network"]
    return (
        f"{_header(result, 'Early exit')}, {result['classifier_type']}\n\n"
        + table(("images leave at", "mean layer", "ms/image", "ideal", "ideal/measured"), rows)
        + f"\n\nThe full network without probes: {full:.2f} ms/image, "
        f"{result['full_over_never_exiting']:.3f} of the time of never exiting\n"
    )


def training_table(result: Mapping[str, Any]) -> str:
    what = f"Training of the {result['model']}" + " on a frozen backbone" * result["frozen_backbone"]
    row = (
        f"{result['steps_per_second']:.3g}",
        f"{result['images_per_second']:.4g}",
        f"{result['flops_per_image'] / 1e9:.2f}",
        f"{result['flops_per_second'] / 1e9:.1f}",
        f"{result['matrix_flops_per_second'] / 1e9:.1f}",
        f"{result['share_of_matrix_rate']:.3f}",
    )
    head = ("steps/s", "images/s", "GFLOP/image", "GFLOP/s", "matrix products", "of matrix rate")
    return f"{_header(result, what)}\n\n{table(head, [row])}\n"


def draw(path: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the picture of a folder. results: the present measurements, by sub-command.

    Measured times are drawn by their ratio to other times in the same rounds; see `in_turns`.
    """
    panels = {"sample": draw_switches, "early-exit": draw_exits}
    there = {name: results[name]["measured"] for name in panels if name in results and results[name]["measured"]}
    if not there:
        return
    figure = Figure(figsize=(6.5 * len(there), 4.5), layout="constrained")
    for axes, (name, measured) in zip(figure.subplots(1, len(there), squeeze=False)[0], there.items(), strict=True):
        panels[name](axes, measured)
        axes.set_ylabel("ms per image and timestep")
        axes.margins(x=0.03, y=0.03)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)  # below, because points are everywhere
    plots.save(figure, path)


def draw_switches(axes: Axes, measured: Sequence[Mapping[str, Any]]) -> None:
    lines = [
        (result, solver) for result in measured for solver in dict.fromkeys(run["solver"] for run in result["runs"])
    ]
    for i, (result, solver) in enumerate(lines):
        runs = [run for run in result["runs"] if run["solver"] == solver]
        whole = next(run for run in runs if run["t_switch"] is None)["seconds_per_image"] / result["steps"]
        # Any t_switch from T - 1 on gives the full network alone.
        ends = (result["num_timesteps"] - 1 if run["t_switch"] is None else run["t_switch"] for run in runs)
        points = [(t, whole / r["speed_up"], whole / r["speed_up_predicted"]) for t, r in zip(ends, runs, strict=True)]
        draw_points(axes, i, f"{solver}, {result['precision']}", sorted(points))
    axes.set(xlabel="t_switch (T - 1: the full network alone)", title="DuoDiff")


def draw_exits(axes: Axes, measured: Sequence[Mapping[str, Any]]) -> None:
    """Draw batches that exit at one layer as points and lines, and batches spread over all layers as stars."""

    def point(result: Mapping[str, Any]) -> tuple[float, float]:
        return result["mean_exit_layer"], result["seconds_per_image_ideal"] / result["ideal_over_measured"]

    for i, result in enumerate(measured):
        points = [(*point(exits), exits["seconds_per_image_ideal"]) for exits in result["exits"]]
        draw_points(axes, i, f"{result['precision']}, batch {result['batch_size']}", points)
        for k, spread in enumerate(result["spread"]):
            layer, seconds = point(spread)
            colour = f"C{len(measured) + i * len(result['spread']) + k}"
            label = f"spread over all layers, min_group {spread['min_group']}"
            axes.scatter(layer, 1000 * seconds, s=90, marker="*", color=colour, label=label, zorder=3)
    axes.set(xlabel="exit layer (blocks run)", title="Early exit")


def draw_points(axes: Axes, i: int, label: str, points: Sequence[tuple[float, float, float]]) -> None:
    """points: x, seconds measured, seconds predicted."""
    x, measured, predicted = np.asarray(points).T
    marker = plots.MARKERS[i % len(plots.MARKERS)]
    axes.plot(x, 1000 * predicted, color=f"C{i}", linewidth=1, linestyle="--", label=f"{label}: predicted")
    axes.scatter(x, 1000 * measured, s=40, marker=marker, color=f"C{i}", label=f"{label}: measured")
