"""Put scored runs side by side: a table, and a picture of score against time."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.cli import Parser
from common.errors import InputError, command
from common.files import read_json, writable_folder

if TYPE_CHECKING:
    import numpy as np

SAMPLES_SHOWN = 10


MEASURED = ("seconds_per_image", "network_flops_per_image")


class Run(NamedTuple):
    label: str
    score: float
    seconds_per_image: float
    flops_per_image: float
    n_samples: int
    basis: dict[str, Any]  # what scores must share to be compared


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="LABEL=FOLDER",
        type=labelled,
        help="scored samples; the first is the standard",
    )
    parser.add_argument("--metric", default="fid", help="which score of report/metrics.json")
    parser.add_argument("--output", type=Path, default=Path("comparison.png"), help="the picture")
    args = parser.parse_args(argv)
    if args.output.suffix.lower() not in (".png", ".pdf", ".svg"):
        parser.error(f"--output {args.output}: wanted a .png, .pdf or .svg")
    labels = [label for label, _ in args.runs]
    if twice := [label for label in labels if labels.count(label) > 1]:
        parser.error(f"the label {twice[0]} is given twice")
    return args


def labelled(text: str) -> tuple[str, Path]:
    label, _, folder = text.rpartition("=")
    if not label or not folder:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted LABEL=FOLDER")
    if not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{folder}: no such folder")
    return label, Path(folder)


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    runs = [read_run(label, folder, args.metric) for label, folder in args.runs]
    check_comparable(runs)
    writable_folder(args.output.parent)
    print(table(runs, args.metric))

    from common.plots import plot_comparison

    plot_comparison(
        args.output,
        [run.label for run in runs],
        [run.seconds_per_image for run in runs],
        [run.score for run in runs],
        args.metric.upper(),
        [first_samples(folder) for _, folder in args.runs],
    )
    print(f"picture: {args.output}")


def read_run(label: str, folder: Path, metric: str) -> Run:
    scored, sampled = folder / "report" / "metrics.json", folder / "report" / "statistics.json"
    if not sampled.exists():
        raise InputError(f"{sampled} is missing: make the samples with sampler.py or eesampler.py")
    if not scored.exists():
        raise InputError(f"{scored} is missing: score the samples with fid.py --samples_path {folder}")
    scores, statistics = read_json(scored), read_json(sampled)
    try:
        if not isinstance(scores.get(metric), int | float):
            raise InputError(f"{scored} has no {metric}; run fid.py with --metrics {metric}")
        basis = {key: scores[key] for key in ("n_samples", "reference", "feature_extractor")}
        basis |= {key: statistics[key] for key in ("device", "threads")}
        numbers = [float(scores[metric]), *(float(statistics[key]) for key in MEASURED)]
        if not all(map(math.isfinite, numbers)) or numbers[1] <= 0:
            raise ValueError(f"{metric}, {', '.join(MEASURED)}: {numbers}")
        return Run(label, *numbers, int(scores["n_samples"]), basis)
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise InputError(f"{folder}/report: not as fid.py and sampler.py write it ({error})") from None


def first_samples(folder: Path) -> np.ndarray:
    """The first samples beside each other, uint8 (H, W) or (H, W, 3)."""
    import numpy as np
    from PIL import Image

    from evaluation.images import FinishedImages

    images = []
    for path in sorted(folder.glob("*.png"))[:SAMPLES_SHOWN]:
        image = FinishedImages.open(path)
        larger = max(1, 64 // image.height)  # tiny images enlarged, so that a person makes them out
        images.append(np.asarray(image.resize((image.width * larger, image.height * larger), Image.BICUBIC)))
    if not images:
        raise InputError(f"{folder}: the samples are gone")
    return np.concatenate(images, axis=1)


def check_comparable(runs: Sequence[Run]) -> None:
    """Raises InputError where scores of two runs mean different things."""
    for run in runs[1:]:
        different = [key for key, value in run.basis.items() if value != runs[0].basis[key]]
        if different:
            raise InputError(f"{run.label} cannot be compared with {runs[0].label}: other {', '.join(different)}")


def table(runs: Sequence[Run], metric: str) -> str:
    """Score, time and cost of each run; the speed-up is that of the measured time against the first."""
    unit, name = flops_unit(max(run.flops_per_image for run in runs))
    header = ("run", metric.upper(), "s/image", f"{name}/image", "speed-up")
    rows = [
        (
            run.label,
            f"{run.score:.3f}",
            f"{run.seconds_per_image:.4f}",
            f"{run.flops_per_image / unit:.3g}",
            f"{runs[0].seconds_per_image / run.seconds_per_image:.2f}x",
        )
        for run in runs
    ]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def flops_unit(largest: float) -> tuple[float, str]:
    power = min(5, max(0, int(math.log10(max(largest, 1)) // 3)))
    return 1000.0**power, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"][power]


if __name__ == "__main__":
    main()
