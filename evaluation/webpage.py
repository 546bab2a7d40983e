"""The web page of compare.py: one file with the table, the plot, and the samples side by side."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path
from string import Template
from typing import NamedTuple

from matplotlib.ticker import LogLocator, MaxNLocator

from common.files import replacing
from evaluation.comparison import (
    WIDE,
    Run,
    Summary,
    about_bars,
    about_table,
    bars,
    columns,
    paired,
    timed_alike,
)
from evaluation.images import FinishedImages
from evaluation.strips import Strip, badge, colour, what_ran

MOST_BYTES = 4 * 2**20  # of all images on the page
WIDTH, HEIGHT = 440, 320  # of the plot
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 44  # its margins


class Sample(NamedTuple):
    """One sample index of one seed."""

    seed: int
    place: int  # among the sorted files of a run
    name: str
    psnr: dict[int, float]  # by the number of the label; to the image of the label that the others are compared with
    rank: int | None  # 1: the most different of all; None without pairs


def write_page(
    path: Path,
    summaries: Sequence[Summary],
    strips: Sequence[Strip],
    metric: str,
    notes: Sequence[str],
    pair_with: str,
    most_samples: int,
) -> None:
    """Write the page.

    strips: of each label. notes: lines about conditions. pair_with: label whose images replace the others when
    flipped. most_samples: fewer are shown if their images would exceed MOST_BYTES. Raises InputError if samples are
    gone.
    """
    labels = [summary.label for summary in summaries]
    standard = labels.index(pair_with)
    of_pairs = [len(of_run) for of in summaries if of.pairs for of_run in of.pairs.psnr_of_samples]
    first = max(of_pairs, default=most_samples)
    images = {run.folder: FinishedImages(run.folder, first) for summary in summaries for run in summary.runs}
    everything = all_samples(summaries, images, standard)
    shown = chosen(everything, min(most_samples, affordable(images, summaries)))
    width = next(iter(images.values())).size[0]
    tile = min(max(width, 84), 192)
    page = Template(_part("html")).substitute(
        css=_part("css"),
        js=_part("js"),
        title=escape(title_of(labels)),
        about=escape(about_scores(summaries[0].runs[0], summaries)),
        table=html_table(summaries, metric),
        notes=lines([*about_table(summaries), *notes]),
        metric=escape(metric.upper()),
        plot=score_plot(summaries, metric) + about_plot(summaries),
        ran=what_ran(labels, strips),
        about_samples=escape(about_samples(shown, everything, pair_with)),
        standard=standard,
        against=options(list(enumerate(labels)), standard),
        order=options(orders(summaries)),
        tile=tile,
        card=min(len(labels), 6) * (tile + 8) + 16,
        cards="\n".join(card(sample, summaries, images, standard, len(everything)) for sample in shown),
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")  # labels of bytes outside UTF-8


def _part(suffix: str) -> str:
    return Path(__file__).with_suffix(f".{suffix}").read_text(encoding="utf-8")


# The text, the table and the plot


def title_of(labels: Sequence[str]) -> str:
    others = {1: "", 2: f" and {labels[-1]}"}.get(len(labels), f" and {len(labels) - 1} other runs")
    return f"{labels[0]}{others}"


def about_scores(run: Run, summaries: Sequence[Summary]) -> str:
    """The samples, the reference and the features of the scores, as text."""
    basis, seeds = run.basis, sorted({seed for summary in summaries for seed in summary.seeds})
    reference, features = basis["reference"], basis["feature_extractor"]
    if isinstance(reference, Mapping):
        named = reference.get("dataset") or reference.get("reference") or "the reference"
        reference = f"{reference['n_reference']:,} of {named}" if reference.get("n_reference") else named
    if isinstance(features, Mapping):
        features = features.get("extractor", "unknown")
    numbered = ("seed " if len(seeds) == 1 else "seeds ") + ", ".join(map(str, seeds))
    return f"{basis['n_samples']:,} samples ({numbered}) against {reference}, in the features of {features}"


def lines(texts: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<ul class="notes soft">{items}</ul>' if texts else ""


def html_table(summaries: Sequence[Summary], metric: str) -> str:
    (_, labels), *others = columns(summaries, metric)
    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in ("run", *(header for header, _ in others)))
    rows = []
    for number, label in enumerate(labels):
        cells = "".join(f"<td>{escape(cells[number])}</td>" for _, cells in others)
        name = f'<span class="label">{badge(number)}<span>{escape(label)}</span></span>'
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def score_plot(summaries: Sequence[Summary], metric: str) -> str:
    """Score against time as SVG: a numbered circle per label that is timed as the first one is."""
    points = [
        (number, summary.label, summary.seconds_per_image, score)
        for number, (summary, score) in enumerate(zip(summaries, bars(summaries), strict=True))
        if summary.seconds_per_image and timed_alike(summary, summaries[0])
    ]
    if not points:
        return '<p class="soft">No run is timed under one condition for all of its seeds.</p>'
    ends = [score.mean + sign * (score.half_width or 0) for *_, score in points for sign in (-1, 1)]
    means = [score.mean for *_, score in points]
    log = 0 < WIDE * min(means) < max(means) and min(ends) > 0
    longest = max(seconds.mean + (seconds.half_width or 0) for _, _, seconds, _ in points)
    unit, unit_name = (1e-3, "milliseconds") if longest < 0.5 else (1, "seconds")
    x_of, x_ticks = axis([0, longest / unit], LEFT, WIDTH - RIGHT)
    y_of, y_ticks = axis(ends, HEIGHT - BOTTOM, TOP, log=log, margin=0.08)
    parts = []
    for tick in x_ticks:
        x = x_of(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:.4g}</text>')
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    same = y_of(summaries[0].score.mean)
    parts.append(f'<line class="same" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{same:.1f}" y2="{same:.1f}"/>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{unit_name} per image</text>'
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    named = f"{escape(metric.upper())}{' (logarithmic)' if log else ''}"
    parts.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{named}</text>')
    for number, label, seconds, score in reversed(points):  # the first one on top
        x, y = x_of(seconds.mean / unit), y_of(score.mean)
        parts.append(f'<g style="--run: {colour(number)}"><title>{escape(label)}: {score}</title>')
        if score.half_width:
            low, high = (y_of(score.mean + sign * score.half_width) for sign in (-1, 1))
            parts.append(f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
        if seconds.half_width:
            low, high = (x_of(max(0, seconds.mean + sign * seconds.half_width) / unit) for sign in (-1, 1))
            parts.append(f'<line class="bar" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="10"/>')
        parts.append(f'<text class="number" x="{x:.1f}" y="{y + 4:.1f}">{number + 1}</text></g>')
    about = escape(f"{metric.upper()} against seconds per image; the table has the numbers")
    return f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{about}">{"".join(parts)}</svg>'


def axis(
    values: Sequence[float], start: float, end: float, log: bool = False, margin: float = 0.0
) -> tuple[Callable[[float], float], list[float]]:
    """A function from values to places, and the ticks. The axis ends where the values end, plus the margin."""
    scale: Callable[[float], float] = math.log10 if log else float
    low, high = scale(min(values)), scale(max(values))
    spread = (high - low) or abs(high) or 1.0
    low, high = low - margin * spread, high + max(margin, 0.04) * spread
    if log:
        ticks = LogLocator(subs=(1, 2, 5)).tick_values(10**low, 10**high)
    else:
        ticks = MaxNLocator(5).tick_values(low, high)
    inside = [float(tick) for tick in ticks if (not log or tick > 0) and low <= scale(tick) <= high]
    return (lambda value: start + (scale(value) - low) / (high - low) * (end - start)), inside


def about_plot(summaries: Sequence[Summary]) -> str:
    said = [about_bars(summaries[0].label)] if paired(summaries) else []
    if apart := [f"{n}" for n, of in enumerate(summaries, 1) if not timed_alike(of, summaries[0])]:
        said.append(f"timed under other conditions, so without a point: {', '.join(apart)}")
    return lines([f"dotted: the score of {summaries[0].label}", *said])


# Samples


def all_samples(summaries: Sequence[Summary], images: Mapping[Path, FinishedImages], standard: int) -> list[Sample]:
    """The samples of the label `standard`, the most different from those of another label first."""
    found = []
    for run in summaries[standard].runs:
        ratios = {
            number: of.pairs.psnr_of_samples[of.seeds.index(run.seed)]
            for number, of in enumerate(summaries)
            if of.pairs and of.pairs.psnr_of_samples and run.seed in of.seeds
        }
        n = min(map(len, ratios.values()), default=len(images[run.folder]))
        for index, path in enumerate(images[run.folder].files[:n]):
            psnr = {number: of_label[index] for number, of_label in ratios.items()}
            found.append(Sample(run.seed, index, path.stem, psnr, None))
    if not any(sample.psnr for sample in found):
        return found
    found.sort(key=lambda sample: min(sample.psnr.values(), default=math.inf))
    return [sample._replace(rank=rank) for rank, sample in enumerate(found, 1)]


def affordable(images: Mapping[Path, FinishedImages], summaries: Sequence[Summary]) -> int:
    """The number of samples whose images, written in base64, take MOST_BYTES; at least 1."""
    folders = [summary.runs[0].folder for summary in summaries]
    first = [[path.stat().st_size for path in images[folder].files[:16]] for folder in folders]
    return max(1, int(MOST_BYTES / (4 / 3 * sum(sum(sizes) / len(sizes) for sizes in first))))


def chosen(samples: Sequence[Sample], n: int) -> list[Sample]:
    """n samples in their order: half are the most different, the others evenly spaced, which shows the usual case.

    The runs take turns in choosing their most different sample, so that the worst run does not choose them all.
    """
    numbers = {number for sample in samples for number in sample.psnr}
    of_runs = [
        sorted((sample for sample in samples if number in sample.psnr), key=lambda sample: sample.psnr[number])
        for number in sorted(numbers)
    ]
    in_turn = [sample for of_turn in zip_longest(*of_runs) for sample in of_turn if sample is not None] or samples
    worst = {(sample.seed, sample.place): sample for sample in in_turn}
    worst = dict(list(worst.items())[: math.ceil(n / 2)])
    others = [sample for sample in samples if (sample.seed, sample.place) not in worst]
    count = min(n - len(worst), len(others))
    even = [others[(2 * k + 1) * len(others) // (2 * count)] for k in range(count)]
    keys = worst.keys() | {(sample.seed, sample.place) for sample in even}
    return [sample for sample in samples if (sample.seed, sample.place) in keys]


def about_samples(shown: Sequence[Sample], everything: Sequence[Sample], pair_with: str) -> str:
    if everything[0].rank is None:
        return f"The first {len(shown)} of {len(everything):,} samples. No run has images of the same noise as another."
    if len(shown) == len(everything):
        what = f"All {len(shown)} samples"
    else:
        worst = math.ceil(len(shown) / 2)
        what = (
            f"{len(shown)} of {len(everything):,} samples: {worst} that differ most, for each run in turn, and "
            f"{len(shown) - worst} evenly spaced among the others"
        )
    return f"{what}. Under each image: its PSNR to the image of {pair_with} from the same noise."


def orders(summaries: Sequence[Summary]) -> list[tuple[object, str]]:
    paired_labels = [(n, of.label) for n, of in enumerate(summaries) if of.pairs and of.pairs.psnr_of_samples]
    if not paired_labels:
        return [("index", "by index")]
    of_runs = [(number, f"most different: {label}") for number, label in paired_labels]
    return [("all", "most different first"), *of_runs, ("index", "by index")]


def options(values: Sequence[tuple[object, str]], selected: object = None) -> str:
    return "".join(
        f'<option value="{value}"{" selected" if value == selected else ""}>{escape(text)}</option>'
        for value, text in values
    )


def card(
    sample: Sample, summaries: Sequence[Summary], images: Mapping[Path, FinishedImages], standard: int, total: int
) -> str:
    """A sample with a tile per label that has its seed."""
    several_seeds = len(summaries[standard].runs) > 1
    name = f"sample {int(sample.name)}" if sample.name.isdecimal() else f"sample {sample.name}"
    name += f", seed {sample.seed}" if several_seeds else ""
    rank = "" if sample.rank is None else f'<span class="soft">rank {sample.rank:,} of {total:,}</span>'
    tiles = "".join(tiles_of(sample, name, summaries, images))
    ratios = json.dumps({number: round(ratio, 4) for number, ratio in sample.psnr.items()})
    place = sample.place + sample.seed * 10**7  # sorts by seed, then by index
    return (
        f'<article class="card" data-name="{escape(name)}" data-index="{place}" data-psnr="{escape(ratios)}">'
        f'<h3><span>{escape(name.capitalize())}</span>{rank}</h3><div class="tiles">{tiles}</div></article>'
    )


def tiles_of(
    sample: Sample, name: str, summaries: Sequence[Summary], images: Mapping[Path, FinishedImages]
) -> Iterator[str]:
    for number, summary in enumerate(summaries):
        for run in summary.runs:
            files = images[run.folder].files
            if run.seed != sample.seed or sample.place >= len(files):
                continue
            path, (width, height) = files[sample.place], images[run.folder].size
            under = badge(number)
            if number in sample.psnr:
                under += f'<span class="db">{sample.psnr[number]:.1f} dB</span>'
            elif summary.pairs and summary.pairs.unshared:
                under += f'<span class="soft">({escape(summary.pairs.unshared)})</span>'
            yield (
                f'<button class="tile" type="button" data-run="{number}"><img src="{data_uri(path)}" width="{width}" '
                f'height="{height}" alt="{escape(f"{name} of {summary.label}")}"><span class="under">{under}</span>'
                "</button>"
            )


def data_uri(path: Path) -> str:
    """The file of a PNG, in the page itself."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
