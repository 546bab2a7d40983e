"""Pictures of numbers. Drawn without pyplot, so that nothing depends on a display or on global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure, SubFigure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D

from common.files import replacing
from common.tables import escaped

BLUE, GREY, ORANGE = "#2a6f97", "#8d99ae", "#bc6c25"
MARKERS = "os^Dv<>pP*XhHd"
LONGEST = 60  # characters of a label; those in the middle of a longer one are left out
SHORT = 30  # characters of labels that a legend has room for in two columns
FEW = 6  # labels that a legend inside the axes has room for
WIDE = 4  # scores that are further apart than this factor are drawn on a logarithmic axis

Interval = tuple[float, float | None]  # a mean, and half the width of its interval where there is one


def plot_exit_layers(path: Path, timesteps: np.ndarray, exit_layer: np.ndarray, depth: int, threshold: float) -> None:
    """How deep images go at each t: mean, and the middle 90 %.

    timesteps: (S,). exit_layer: (S, N) in 0..depth.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    low, high = np.percentile(exit_layer, [5, 95], axis=1)
    axes.fill_between(timesteps, low, high, color=BLUE, alpha=0.25, linewidth=0, label="90 % of the images")
    axes.plot(timesteps, exit_layer.mean(axis=1), color=BLUE, label="mean")
    axes.axhline(depth, color=GREY, linestyle=":", label=f"whole network ({depth} blocks)")
    axes.set(
        xlim=(timesteps.max(), timesteps.min()) if len(timesteps) > 1 else None,
        ylim=(-0.02 * depth, 1.35 * depth),
        xlabel="timestep t (noise on the left, image on the right)",
        ylabel="exit layer (blocks run)",
        title=f"Early exit at threshold {threshold:g}: {exit_layer.mean():.2f} of {depth} blocks on average",
    )
    axes.legend(loc="upper left", ncols=3, framealpha=1)
    _save(figure, path)


def plot_comparison(
    path: Path,
    labels: Sequence[str],
    seconds: Sequence[Interval | None],
    scores: Sequence[Interval],
    metric: str,
    strips: Sequence[np.ndarray],
    about_bars: str = "",
) -> None:
    """Score against time, one point a label; beside it the first samples of each.

    seconds: None for a label whose time is not to be compared: its score stands apart, without a time. strips: uint8
    (H, W) or (H, W, 3), one a label. about_bars: what the intervals of the scores are.
    """
    rows, labels = len(labels), [drawable(label) for label in labels]
    figure = Figure(figsize=(13, max(4.5, 0.8 * rows + 0.6)), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 1))[0]
    timed = [interval for interval in seconds if interval is not None]
    widths = [share for share, some in ((5, timed), (1, len(timed) < rows)) if some]
    panels = left.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]
    points = []
    for i, (of_time, (y, y_error)) in enumerate(zip(seconds, scores, strict=True)):
        axes, (x, x_error) = (panels[-1], (i, None)) if of_time is None else (panels[0], of_time)
        style = {"fmt": MARKERS[i % len(MARKERS)], "color": f"C{i % 10}", "markersize": 9, "capsize": 4}
        points.append(axes.errorbar(x, y, yerr=y_error, xerr=x_error, zorder=3, **style))
    means = [score for score, _ in scores]
    if 0 < WIDE * min(means) < max(means):
        panels[0].set_yscale("log")
    for axes in panels:
        axes.axhline(means[0], color="C0", linestyle=":", linewidth=1)
        axes.margins(x=0.3, y=0.15)
        axes.grid(alpha=0.3, which="both")
    if len(timed) < rows:
        panels[-1].set(xlabel="not timed\nalike", xticks=[])
    if timed:
        right_end = 1.08 * max(x + (error or 0) for x, error in timed)
        panels[0].set(xlabel="seconds per image, measured", xlim=(0, right_end))
    panels[0].set_ylabel(metric, parse_math=False)
    panels[0].set_title(f"{metric} against time\n{about_bars}".strip(), parse_math=False)
    if rows <= FEW:
        _legend(panels[0], points, labels)
    else:
        ncols = 2 if max(map(len, labels)) <= SHORT else 1
        _legend(left, points, labels, loc="outside lower center", ncols=ncols)
    for i, (label, strip, axis) in enumerate(
        zip(labels, strips, right.subplots(rows, squeeze=False)[:, 0], strict=True)
    ):
        axis.imshow(strip, cmap="gray", vmin=0, vmax=255)
        axis.set_title(label, loc="left", fontsize=9, color=f"C{i % 10}", parse_math=False)
        axis.set_anchor("W")
        axis.set_axis_off()
    _save(figure, path)


def drawable(label: str) -> str:
    """A label as a picture can show it: letters that the font lacks escaped, and at most LONGEST characters."""
    letters = get_font(findfont(FontProperties())).get_charmap()
    label = escaped(label, lambda character: ord(character) in letters)
    return label if len(label) <= LONGEST else f"{label[: LONGEST // 2]}…{label[1 - LONGEST // 2 :]}"


def _legend(
    owner: Axes | SubFigure, handles: Sequence[ErrorbarContainer | Line2D], labels: Sequence[str], **where: Any
) -> None:
    """Labels to the letter: matplotlib itself leaves out those that begin with _, and takes $ for mathematics."""
    # Containers have legends too, whatever the types of a figure's method say.
    legend = owner.legend(handles, ["label"] * len(labels), **where)  # type: ignore[arg-type]
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set(text=drawable(label), parse_math=False)


Measured = tuple[float, float, float]  # x, seconds measured, seconds predicted


def plot_benchmark(
    path: Path,
    switches: Sequence[tuple[str, Sequence[Measured]]],
    depths: Sequence[tuple[str, Sequence[Measured], Sequence[tuple[str, float, float]]]],
) -> None:
    """Time per image and network call, against t_switch and against the exit layer.

    switches: label and points by t_switch. depths: label, points by exit layer, and of batches whose images left
    at different layers the label, the mean layer and the time. One of the two may be empty.
    """
    panels = bool(switches) + bool(depths)
    figure = Figure(figsize=(6.5 * panels, 4.5), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    if switches:
        axis = axes.pop(0)
        for i, (label, points) in enumerate(switches):
            _measured_and_predicted(axis, i, label, points)
        axis.set(xlabel="t_switch (T - 1: the full network alone)", title="DuoDiff")
    if depths:
        axis = axes.pop(0)
        for i, (label, points, spread) in enumerate(depths):
            _measured_and_predicted(axis, i, label, points)
            for k, (of_spread, layer, seconds) in enumerate(spread):
                colour = f"C{len(depths) + i * len(spread) + k}"
                axis.scatter(layer, 1000 * seconds, s=90, marker="*", color=colour, label=of_spread, zorder=3)
        axis.set(xlabel="exit layer (blocks run)", title="Early exit")
    for axis in figure.axes:
        axis.set_ylabel("ms per image and timestep")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    _save(figure, path)


def _measured_and_predicted(axis: Axes, i: int, label: str, points: Sequence[Measured]) -> None:
    x, measured, predicted = np.asarray(points).T
    axis.plot(x, 1000 * predicted, color=f"C{i}", linewidth=1, linestyle="--", label=f"{label}: predicted")
    axis.scatter(x, 1000 * measured, s=40, marker=MARKERS[i % len(MARKERS)], color=f"C{i}", label=f"{label}: measured")


class Curve(NamedTuple):
    """What a calibration found, option by option, rising in speed: arrays (O,)."""

    x: np.ndarray  # t_switch, or the speed-up again
    x_label: str
    divergence: np.ndarray
    error: np.ndarray  # its standard error
    label: str  # what divergence is here
    speed_up: np.ndarray
    chosen: int
    chosen_label: str
    scores: Mapping[int, tuple[float, float]]  # by the number of the option: mean, standard error; may be empty
    falling: bool  # x from high to low, as sampling goes


class ErrorCurve(NamedTuple):
    """Of a network, over the timesteps that it knows: arrays (S,)."""

    label: str
    timesteps: np.ndarray
    mean: np.ndarray  # squared error of eps
    error: np.ndarray  # its standard error


def plot_calibration(path: Path, curve: Curve, errors: Sequence[ErrorCurve]) -> None:
    """Divergence and speed-up of every option, scores where there are some, and the networks' errors over t."""
    panels = 3 if curve.scores else 2
    figure = Figure(figsize=(6.5 * panels, 4.5), layout="constrained")
    left, *middle, right = figure.subplots(1, panels)

    left.plot(curve.x, curve.divergence, color=BLUE, label=curve.label)
    low, high = curve.divergence - 2 * curve.error, curve.divergence + 2 * curve.error
    left.fill_between(curve.x, low, high, color=BLUE, alpha=0.25, linewidth=0)
    left.set(
        ylabel=curve.label, title="What a switch costs, and what it saves" if curve.falling else "What speed costs"
    )
    # Near the image divergence grows out of all proportion; what is to be seen lies before that.
    left.set_ylim(0, max(4 * curve.divergence[curve.chosen], curve.divergence[-1] / 20, 1e-12))
    if curve.falling:
        other = left.twinx()
        other.plot(curve.x, curve.speed_up, color=ORANGE, linestyle="--")
        other.set_ylabel("predicted speed-up", color=ORANGE)
    left.yaxis.label.set_color(BLUE)

    for axis in middle:
        numbers = sorted(curve.scores)
        means, spread = np.array([curve.scores[number] for number in numbers]).T
        axis.errorbar(curve.x[numbers], means, yerr=spread, color=BLUE, marker="o", capsize=4)
        axis.set(ylabel="score", title="Scores of samples (mean and standard error over seeds)")
    for axis in (left, *middle):
        axis.axvline(curve.x[curve.chosen], color=GREY, linestyle=":", label=curve.chosen_label)
        axis.set_xlabel(curve.x_label)
        axis.grid(alpha=0.3)
        axis.legend(loc="upper left" if axis is left else "best")
        if curve.falling:
            axis.invert_xaxis()

    lines = []
    for i, (_, timesteps, mean, error) in enumerate(errors):
        lines += right.plot(timesteps, mean, color=f"C{i}")
        right.fill_between(timesteps, mean - 2 * error, mean + 2 * error, color=f"C{i}", alpha=0.25, linewidth=0)
    right.set(yscale="log", xlabel="timestep t (noise on the left, image on the right)")
    right.set(ylabel="mean squared error of eps", title="Error of each network (band: 2 standard errors)")
    right.invert_xaxis()
    right.grid(alpha=0.3, which="both")
    _legend(right, lines, [of_network.label for of_network in errors])
    _save(figure, path)


def plot_switches(
    path: Path,
    switches: Sequence[int],
    scores: Sequence[Interval],
    divergences: Sequence[float],
    chosen: Mapping[str, int],
    about_bars: str,
) -> None:
    """Scores of samples over t_switch, and the divergence that was measured before there were any.

    chosen: the switch of each rule, by its name. about_bars: what the intervals of the scores are.
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    means, errors = [mean for mean, _ in scores], [error or 0 for _, error in scores]
    axes.errorbar(switches, means, yerr=errors, color=BLUE, marker="o", capsize=4)
    other = axes.twinx()
    other.plot(switches, divergences, color=ORANGE, linestyle="--")
    other.set_ylabel("divergence (nats per image)", color=ORANGE)
    for i, (rule, t_switch) in enumerate(chosen.items()):
        axes.axvline(t_switch, color=f"C{i}", linestyle=":", linewidth=1 + 0.8 * (len(chosen) - i), label=rule)
    axes.set(xlabel="t_switch (noise on the left, image on the right)", title=f"Where to switch\n{about_bars}")
    axes.set_ylabel("score", color=BLUE)
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
