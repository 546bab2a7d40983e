"""The part of docs/results.md that garments.py writes: tables, a plot, and the pairs of images that differ most."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from common import plots
from common.images import enlarge
from evaluation.comparison import estimate
from evaluation.pairs import psnr
from experiments.garments_measure import images_of
from experiments.page import about_machine, begun, bold, copy_for_page, filled, save_page, table

WORST = 10  # pairs of images
SHOWN = ("DuoDiff at the knee", "plan of all", "early exit 0.1")  # of their worst pairs

Row = Mapping[str, Any]


def write_page(
    path: Path, measured: Mapping[str, Any], how: str, machine: Mapping[str, Any], quick: bool = False
) -> None:
    """Replace the part `garments` of the page. measured: of Garments.measure. how: the command and its time."""
    of_samplers: Mapping[str, Sequence[Row]] = measured["samplers"]
    plot, pairs = (path.with_name(f"{path.stem}_garments{suffix}.png") for suffix in ("", "_worst"))
    draw(plot, of_samplers)
    draw_worst(pairs, next(iter(of_samplers.values())))
    for picture in (plot, pairs):
        copy_for_page(picture, picture)
    n, seeds = measured["n_samples"], ", ".join(map(str, measured["seeds"]))
    parts = [
        "## Garments",
        f"Measured by {how}. Machine: {about_machine(machine)}.",
        f"Images: Fashion-MNIST, 28 x 28 grey. Networks: those of [pretrained/](../pretrained/README.md). {n} samples "
        f"of each of the seeds {seeds}, in fp32. Score: KID x 1000 against {measured['n_real']} real images in the "
        "features of EfficientNet-Lite0.",
        "### Score minus the full network's in the same sampler, and speed-up",
        differences(of_samplers),
        "### Score, PSNR and time",
        values(of_samplers),
        f"![KID against time, a line for each way to save work]({plot.name})",
        f"![The {WORST} images of each way that differ most from the full network's]({pairs.name})",
        f"The {WORST} images of some ways with the lowest PSNR to the full network's image of the same noise, which "
        f"stands above each ({next(iter(of_samplers))}).",
    ]
    save_page(path, filled(begun(path, "Results", quick), "garments", "\n\n".join(parts)))


def differences(of_samplers: Mapping[str, Sequence[Row]]) -> str:
    labels = [row["label"] for row in next(iter(of_samplers.values()))][1:]
    lines = []
    for label in labels:
        cells = []
        for rows in of_samplers.values():
            row = next(row for row in rows if row["label"] == label)
            mean, low, high = row["resampled"]
            apart = bold(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", low > 0 or high < 0)
            cells.append(f"{apart}, {statistics.median(row['speed_up']):.2f}x")
        lines.append([label, *cells])
    return table(["", *of_samplers], lines)


def values(of_samplers: Mapping[str, Sequence[Row]]) -> str:
    lines = [
        [
            name,
            row["label"],
            f"{estimate(row['kid']):.1}",
            f"{estimate(row['psnr']):.1}" if "psnr" in row else "",
            f"{1000 * statistics.median(row['seconds']):.1f}",
            f"{row['flops'] / 1e9:.2f}",
        ]
        for name, rows in of_samplers.items()
        for row in rows
    ]
    return table(("sampler", "", "KID x 1000", "PSNR to full", "ms/image", "GFLOP/image"), lines)


def draw(path: Path, of_samplers: Mapping[str, Sequence[Row]]) -> None:
    """KID against time, both on logarithmic axes: a line for each way, a point for each sampler."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    (below,) = figure.subfigures(1, 1, squeeze=False)[0]
    axes = below.subplots()
    labels = [row["label"] for row in next(iter(of_samplers.values()))]
    lines = []
    for i, label in enumerate(labels):
        rows = [row for rows in of_samplers.values() for row in rows if row["label"] == label]
        points = sorted((1000 * statistics.median(row["seconds"]), statistics.mean(row["kid"])) for row in rows)
        lines += axes.plot(*zip(*points, strict=True), marker=plots.MARKERS[i], color=f"C{i}", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="ms per image, measured", ylabel="KID x 1000")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.set_title(f"KID against time in {len(of_samplers)} samplers")
    axes.grid(alpha=0.3, which="both")
    plots.add_legend(below, lines, labels, loc="outside lower center", ncols=3)
    plots.save(figure, path)


def draw_worst(path: Path, rows: Sequence[Row]) -> None:
    """Of some ways the images of the first seed with the lowest PSNR, each below the full network's."""
    of_full, shown = images_of(Path(rows[0]["folders"][0])), [row for row in rows if row["label"] in SHOWN]
    figure = Figure(figsize=(7.2, 1.75 * len(shown)), layout="constrained")
    for axes, row in zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True):
        images = images_of(Path(row["folders"][0]))
        values = psnr(images, of_full)
        worst = values.argsort()[:WORST]
        tiles = torch.stack([enlarge(pixels[worst], 64) for pixels in (of_full, images)])  # (2, N, C, H, W)
        tiles = torch.nn.functional.pad(tiles, (2, 2, 2, 2), value=255)
        axes.imshow(
            tiles[:, :, 0].permute(0, 2, 1, 3).flatten(0, 1).flatten(1, 2).numpy(), cmap="gray", vmin=0, vmax=255
        )
        lowest = f"PSNR {values[worst[0]]:.0f} to {values[worst[-1]]:.0f}, the median {values.median():.0f}"
        axes.set_title(f"{row['label']}: {lowest}", loc="left", fontsize=10, parse_math=False)
        axes.set_axis_off()
    plots.save(figure, path)
