"""The pictures of docs/results.md."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from common import plots
from common.images import enlarge
from evaluation.comparison import estimate
from evaluation.pairs import psnr
from experiments.measure import DUODIFF, JOINT
from experiments.samples import Row, images_of

FIRST, WORST = 12, 8  # images of a way
SHOWN = (DUODIFF, JOINT, "early exit 0.1", "early exit 0.2")  # of their worst pairs


def draw_scores(path: Path, of_samplers: Mapping[str, Sequence[Row]]) -> None:
    """KID against time: a colour for each way, a form for each sampler."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    (below,) = figure.subfigures(1, 1, squeeze=False)[0]
    axes = below.subplots()
    labels = [row["label"] for row in next(iter(of_samplers.values()))]
    for marker, rows in zip(plots.MARKERS, of_samplers.values(), strict=False):
        for i, row in enumerate(rows):
            point = 1000 * statistics.median(row["seconds"]), statistics.mean(row["kid"])
            axes.plot(*point, marker=marker, color=f"C{i}", linestyle="", alpha=0.8)
    forms = zip(plots.MARKERS, of_samplers, strict=False)
    handles = [Line2D([], [], marker=marker, color=plots.GREY, linestyle="") for marker, _ in forms]
    handles += [Line2D([], [], color=f"C{i}", linewidth=4) for i in range(len(labels))]
    axes.set(xscale="log", xlabel="ms per image, measured", ylabel="KID x 1000")
    positive = all(statistics.mean(row["kid"]) > 0 for rows in of_samplers.values() for row in rows)
    axes.set_yscale("log" if positive else "linear")  # KID is unbiased: near 0 it may be negative
    for axis in (axes.xaxis, axes.yaxis) if positive else (axes.xaxis,):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.set_title(f"KID against time in {len(of_samplers)} samplers")
    axes.grid(alpha=0.3, which="both")
    plots.add_legend(below, handles, [*of_samplers, *labels], loc="outside lower center", ncols=3)
    plots.save(figure, path)


def draw_samples(path: Path, rows: Sequence[Row]) -> None:
    """The first images of the first seed: a row of images for each way."""
    figure = Figure(figsize=(10, 0.62 * len(rows)), layout=ConstrainedLayoutEngine(h_pad=0, hspace=0, compress=True))
    for axes, row in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows, strict=True):
        show(axes, images_of(Path(row["folders"][0]))[None, :FIRST])
        axes.set_ylabel(row["label"], rotation=0, ha="right", va="center", fontsize=8, parse_math=False)
    plots.save(figure, path)


def draw_worst(path: Path, rows: Sequence[Row]) -> None:
    """Of some ways the images of the first seed with the lowest PSNR, each below the full network's."""
    of_full, some = images_of(Path(rows[0]["folders"][0])), [row for row in rows if row["label"] in SHOWN]
    figure = Figure(figsize=(7.2, 1.75 * len(some)), layout="constrained")
    for axes, row in zip(figure.subplots(len(some), squeeze=False)[:, 0], some, strict=True):
        images = images_of(Path(row["folders"][0]))
        ratios = psnr(images, of_full)
        worst = ratios.argsort()[:WORST]
        show(axes, torch.stack([of_full[worst], images[worst]]))
        lowest = f"PSNR {ratios[worst[0]]:.0f} to {ratios[worst[-1]]:.0f}, the median {ratios.median():.0f}"
        axes.set_title(f"{row['label']}: {lowest}", loc="left", fontsize=10, parse_math=False)
    plots.save(figure, path)


def show(axes: Axes, images: Tensor) -> None:
    """Rows of images with gaps, in place of the axes. images: uint8 (R, N, C, H, W)."""
    tiles = torch.stack([enlarge(row, 64) for row in images])
    tiles = torch.nn.functional.pad(tiles, (2, 2, 2, 2), value=255).expand(-1, -1, 3, -1, -1)
    axes.imshow(tiles.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2).numpy())
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def draw_switches(path: Path, switching: Mapping[str, Any], home: str) -> None:
    """Scores of samples over t_switch, and the divergence that was measured before there were any."""
    rows, rules = switching["rows"], switching["rules"]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    switches = [row["option"]["t_switch"] for row in rows]
    errors = [estimate(row["difference"]).half_width or 0 if "difference" in row else 0 for row in rows]
    scores = [statistics.mean(row["kid"]) for row in rows]
    axes.errorbar(switches, scores, yerr=errors, color=plots.BLUE, marker="o", capsize=4)
    other = axes.twinx()
    other.plot(switches, [row["option"]["divergence"] for row in rows], color=plots.ORANGE, linestyle="--")
    other.set_ylabel("divergence (nats per image)", color=plots.ORANGE)
    for i, (rule, t_switch) in enumerate(rules.items()):
        axes.axvline(t_switch, color=f"C{i}", linestyle=":", linewidth=1 + 0.8 * (len(rules) - i), label=rule)
    about = "bars: 95 % intervals of the difference to full over seeds"
    axes.set(xlabel="t_switch (noise on the left, image on the right)", title=f"Where to switch: {home}\n{about}")
    axes.set_ylabel("KID x 1000", color=plots.BLUE)
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5)
    plots.save(figure, path)
