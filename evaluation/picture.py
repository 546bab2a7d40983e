"""A picture that compares scored runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from common import plots
from common.errors import InputError
from evaluation.comparison import WIDE, Summary, about_bars, bars, paired, timed_alike
from evaluation.images import FinishedImages

SAMPLES_SHOWN = 10
GAP = 16  # the gap between two images is this part of their width
SHORT = 30  # longest label of a legend in two columns
FEW = 6  # most labels of a legend inside the axes


def draw(path: Path, summaries: Sequence[Summary], metric: str) -> None:
    """Draw score against time, one point per label, and the first samples of each label.

    Labels whose time is not comparable with that of the first are drawn in a separate panel without a time axis.
    """
    rows, labels = len(summaries), [plots.drawable(summary.label) for summary in summaries]
    figure = Figure(figsize=(13, max(4.5, 0.8 * rows + 0.6)), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 1))[0]
    times = [summary.seconds_per_image if timed_alike(summary, summaries[0]) else None for summary in summaries]
    timed = [seconds for seconds in times if seconds is not None]
    widths = [share for share, some in ((5, timed), (1, len(timed) < rows)) if some]
    panels = left.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]
    points, scores = [], bars(summaries)
    for i, (seconds, score) in enumerate(zip(times, scores, strict=True)):
        axes, (x, x_error) = (panels[-1], (i, None)) if seconds is None else (panels[0], seconds)
        style = {"fmt": plots.MARKERS[i % len(plots.MARKERS)], "color": f"C{i % 10}", "markersize": 9, "capsize": 4}
        points.append(axes.errorbar(x, score.mean, yerr=score.half_width, xerr=x_error, zorder=3, **style))
    means = [score.mean for score in scores]
    if 0 < WIDE * min(means) < max(means):
        panels[0].set_yscale("log")
    for axes in panels:
        axes.axhline(means[0], color="C0", linestyle=":", linewidth=1)
        axes.margins(x=0.3, y=0.06)
        axes.grid(alpha=0.3, which="both")
    if len(timed) < rows:
        panels[-1].set(xlabel="not timed\nalike", xticks=[])
    if timed:
        right_end = 1.04 * max(seconds.mean + (seconds.half_width or 0) for seconds in timed)
        panels[0].set(xlabel="seconds per image, measured", xlim=(0, right_end))
    about = about_bars(labels[0]) if paired(summaries) else ""
    panels[0].set_ylabel(metric.upper(), parse_math=False)
    panels[0].set_title(f"{metric.upper()} against time\n{about}".strip(), parse_math=False)
    if rows <= FEW:
        plots.add_legend(panels[0], points, labels)
    else:
        ncols = 2 if max(map(len, labels)) <= SHORT else 1
        plots.add_legend(left, points, labels, loc="outside lower center", ncols=ncols)
    for i, (label, summary, axes) in enumerate(
        zip(labels, summaries, right.subplots(rows, squeeze=False)[:, 0], strict=True)
    ):
        axes.imshow(first_samples(summary.runs[0].folder), cmap="gray", vmin=0, vmax=255)
        axes.set_title(label, loc="left", fontsize=10, fontweight="bold", color=f"C{i % 10}", parse_math=False)
        axes.set_anchor("W")
        axes.set_axis_off()
    plots.save(figure, path)


def first_samples(folder: Path) -> NDArray[np.uint8]:
    """The first samples in one row with white gaps between them, uint8 (H, W, 3)."""
    images: list[NDArray[np.uint8]] = []
    for path in sorted(folder.glob("*.png"))[:SAMPLES_SHOWN]:
        image = FinishedImages.open(path).convert("RGB")
        larger = max(1, 64 // image.height)  # enlarge tiny images to make them visible
        image = image.resize((image.width * larger, image.height * larger), Image.Resampling.BICUBIC)
        if images:
            images.append(np.full((image.height, max(1, image.width // GAP), 3), 255, np.uint8))
        images.append(np.asarray(image))
    if not images:
        raise InputError(f"{folder}: the samples are gone")
    return np.concatenate(images, axis=1)
