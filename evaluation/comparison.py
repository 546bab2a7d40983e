"""Compare scored runs: read their reports, check that they are comparable, and make the table and the numbers.

No torch in here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import InputError
from common.files import read_json
from common.settings import CONDITIONS, RESULT, differences, leaves
from common.tables import on_terminal
from common.tables import table as aligned
from evaluation.settings import KID_SUBSET_SIZE, KID_SUBSETS
from generation.settings import EarlyExitSettings, SamplerSettings

CONFIDENCE = 0.95
WIDE = 4  # the axis of scores is logarithmic if they differ by more than this factor
MEASURED = ("seconds_per_image", "network_flops_per_image")
# The options of the samplers. All seeds of a label must share those that decide the result. Times are compared only
# if the options that decide the conditions are equal; an option that a script does not have counts as its default.
OF_RESULT, OF_CONDITIONS = (
    {f.name: f for cls in (SamplerSettings, EarlyExitSettings) for f in leaves(cls, decides)}
    for decides in (RESULT, CONDITIONS)
)
OF_MACHINE = ("device", "processes", "threads", "torch")


class Run(NamedTuple):
    label: str
    folder: Path
    score: float
    seconds_per_image: float
    flops_per_image: float
    seed: int
    basis: dict[str, Any]  # must be equal to compare scores
    settings: dict[str, Any]  # must also be equal for all seeds of a label
    conditions: dict[str, Any]  # must be equal to compare times
    noise: dict[str, Any]  # must be equal, and the seed, to compare images; the keys name it in one word
    terms: Sequence[float] | None = None  # of KID, one for each image; see evaluation.kid


class Estimate(NamedTuple):
    """A mean over seeds, and the half width of its confidence interval by Student's t.

    For one seed: its value, and the interval over its images (None if unknown).
    """

    mean: float
    half_width: float | None

    def __format__(self, sign_and_digits: str) -> str:
        """sign_and_digits: such as "", "+" or ".2"; three digits by default."""
        sign, _, digits = sign_and_digits.partition(".")
        digits = digits or "3"
        return f"{self.mean:{sign}.{digits}f}" + ("" if self.half_width is None else f" ± {self.half_width:.{digits}f}")


class Pairs(NamedTuple):
    """The distance between the images of a label and those that another label makes of the same noise.

    The estimates are over seeds, of means over images; see evaluation.pairs for the distances.
    """

    to: str  # the other label
    unshared: str | None  # the difference in one word, if the images are not pairs; the other fields are then empty
    psnr: Estimate | None = None  # dB
    feature_distance: Estimate | None = None  # None also without a feature extractor
    psnr_of_samples: Sequence[Sequence[float]] = ()  # of the first samples, for each run of the label


class Summary(NamedTuple):
    """All the seeds of one label."""

    label: str
    runs: list[Run]  # by seed
    score: Estimate
    difference: Estimate | None  # paired, to the first label; None if the seeds differ
    seconds_per_image: Estimate | None  # None if the timing conditions of the seeds differ
    flops_per_image: float
    pairs: Pairs | None = None  # None for the label that the others are compared with

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]


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
        values = [float(scores[metric]), *(float(statistics[key]) for key in MEASURED)]
        if not all(map(math.isfinite, values)) or values[1] <= 0:
            raise ValueError(f"{metric}, {', '.join(MEASURED)}: {', '.join(map(str, values))}")
        settings = dict(statistics["settings"])
        seed = int(settings["seed"])
        shared = {name: settings.get(name) for name in OF_RESULT}
        shared = {**shared, "stages": statistics["stages"], "seed": None}
        conditions = {
            **{name: f.default for name, f in OF_CONDITIONS.items()},
            **dict.fromkeys(OF_MACHINE, "unknown"),
        }
        conditions = {name: statistics.get(name, default) for name, default in conditions.items()}
        score, seconds, flops = values
        noise = noise_of(statistics)
        terms = scores.get("kid_terms") if metric == "kid" else None
        if terms is not None and not (len(terms) == basis["n_samples"] and all(map(math.isfinite, terms))):
            raise ValueError("kid_terms: wanted a number for each sample")
        return Run(label, folder, score, seconds, flops, seed, basis, shared, conditions, noise, terms)
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise InputError(f"{folder}/report: not in the format of fid.py and sampler.py ({error})") from None


def noise_of(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """The settings besides the seed that determine the noise and class of sample i. statistics: statistics.json."""
    settings, device = statistics["settings"], str(statistics.get("device"))
    by_name = device if device in ("cpu", "mps") else "cuda"  # older reports have no device_type
    random = settings.get("solver", "ddpm") == "ddpm" or bool(settings.get("eta"))
    networks = statistics.get("backbones") or [{}]
    return {
        "class": [settings.get("class_id"), networks[0].get("real_classes")],
        # A random solver draws noise at each step except the last, so the noise depends on the number of steps.
        "noise": settings.get("steps") if random else 0,
        "device": statistics.get("device_type", by_name),
    }


def check_comparable(runs: Sequence[Run]) -> None:
    """Raises InputError if the scores of two runs are not comparable, or the runs of a label have other settings."""
    first: dict[str, Run] = {}
    for run in runs:
        if different := [key for key, value in run.basis.items() if value != runs[0].basis[key]]:
            raise InputError(f"{run.label} cannot be compared with {runs[0].label}: different {', '.join(different)}")
        same = first.setdefault(run.label, run)
        if different := differences(same.settings, run.settings):
            raise InputError(
                f"the label {run.label} is given to {same.folder} and {run.folder}, which differ in more than the "
                f"seed: {', '.join(different)}"
            )
    for label in first:
        seeds = [run.seed for run in runs if run.label == label]
        if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
            raise InputError(f"the label {label} is given twice with seed {twice[0]}; give runs of different seeds")


def summarised(runs: Sequence[Run]) -> list[Summary]:
    """One summary per label, in the order of their first runs."""
    by_label: dict[str, list[Run]] = {}
    for run in runs:
        by_label.setdefault(run.label, []).append(run)
    for of_label in by_label.values():
        of_label.sort(key=lambda run: run.seed)
    standard = by_label[runs[0].label]
    same_seeds = all([run.seed for run in of] == [run.seed for run in standard] for of in by_label.values())
    return [
        Summary(
            label,
            of_label,
            score_of(of_label),
            difference_of(of_label, standard) if same_seeds else None,
            estimate([run.seconds_per_image for run in of_label]) if one_clock(of_label) else None,
            sum(run.flops_per_image for run in of_label) / len(of_label),
        )
        for label, of_label in by_label.items()
    ]


def score_of(runs: Sequence[Run]) -> Estimate:
    """Over the seeds; over the images of a single seed, if their terms are known."""
    if len(runs) == 1 and runs[0].terms is not None:
        return over_images(runs[0].score, runs[0].terms)
    return estimate([run.score for run in runs])


def difference_of(runs: Sequence[Run], standard: Sequence[Run]) -> Estimate:
    """Paired, of the same seeds: over them, or over the images of a single seed."""
    one, other = runs[0], standard[0]
    if len(runs) == 1 and one.terms is not None and other.terms is not None:
        return over_images(one.score - other.score, [a - b for a, b in zip(one.terms, other.terms, strict=True)])
    return estimate([run.score - ours.score for run, ours in zip(runs, standard, strict=True)])


def over_images(value: float, terms: Sequence[float]) -> Estimate:
    """terms: of the images, whose mean has the variance of KID of all of them.

    KID is a mean over random subsets, whose choice adds to the variance.
    """
    more = max(0, len(terms) - KID_SUBSET_SIZE) / (KID_SUBSETS * KID_SUBSET_SIZE)
    half_width = estimate(terms).half_width
    return Estimate(value, half_width and half_width * math.sqrt(1 + more))


def one_clock(runs: Sequence[Run]) -> bool:
    """Whether all were timed under the same conditions."""
    return all(run.conditions == runs[0].conditions for run in runs)


def timed_alike(summary: Summary, standard: Summary) -> bool:
    return one_clock([*standard.runs, *summary.runs])


def notes_on(runs: Sequence[Run]) -> list[str]:
    """Lines about the conditions that differ from the first run; no lines if all are equal."""
    labels = list(dict.fromkeys(run.label for run in runs))
    unlike: dict[tuple[str, str], list[int]] = {}  # seeds, by label and by the conditions that differ
    for run in sorted(runs, key=lambda run: (labels.index(run.label), run.seed)):
        if different := differences(run.conditions, runs[0].conditions):
            unlike.setdefault((run.label, ", ".join(different)), []).append(run.seed)
    if not unlike:
        return []
    lines = [f"times are compared only under the conditions of {runs[0].label}"]
    for (label, named), seeds in unlike.items():
        all_seeds = len(seeds) == sum(run.label == label for run in runs)
        some = "" if all_seeds else f" (seed {', '.join(map(str, seeds))})"
        lines.append(f"{label}{some}: {named}")
    if any(run.conditions["precision"] != runs[0].conditions["precision"] for run in runs):
        lines.append(
            "scores at different precisions: samples of one seed differ; sample with --precision fp32 to compare"
        )
    return lines


def estimate(values: Sequence[float]) -> Estimate:
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return Estimate(mean, None)

    from scipy.special import stdtrit

    std = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return Estimate(mean, float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * std / math.sqrt(n))


def paired(summaries: Sequence[Summary]) -> bool:
    """Whether there are several labels, whose differences to the first one have intervals."""
    _, *others = summaries
    return bool(others) and all(of.difference is not None and of.difference.half_width is not None for of in others)


def bars(summaries: Sequence[Summary]) -> list[Estimate]:
    """The scores with their intervals, or, for paired seeds, with the intervals of the paired differences."""
    if not paired(summaries):
        return [summary.score for summary in summaries]
    return [Estimate(of.score.mean, of.difference and of.difference.half_width) for of in summaries]


def about_bars(standard: str) -> str:
    return f"bars: {CONFIDENCE:.0%} interval of the paired difference to {standard}"


def columns(summaries: Sequence[Summary], metric: str) -> list[tuple[str, list[str]]]:
    """The headers of the table with their cells, one cell per label.

    The score, time and cost of each label, and its measured speed-up over the first label if comparable. For several
    seeds also their number, if it differs between labels, and the paired difference to the first label. For measured
    pairs their distance, or in parentheses the difference that prevents pairs.
    """
    standard = summaries[0]
    unit, name = flops_unit(max(summary.flops_per_image for summary in summaries))
    of_image = [summary.seconds_per_image for summary in summaries]
    speed_ups = [speed_up(summary, standard) for summary in summaries]
    by_number = len({len(summary.runs) for summary in summaries}) > 1
    found: list[tuple[str, list[str] | None]] = [
        ("run", [summary.label for summary in summaries]),
        ("seeds", [str(len(summary.runs)) for summary in summaries] if by_number else None),
        (metric.upper(), [f"{summary.score}" for summary in summaries]),
        (
            f"minus {standard.label}",
            ["", *(f"{summary.difference:+}" for summary in summaries[1:])] if paired(summaries) else None,
        ),
        *pair_columns([summary.pairs for summary in summaries]),
        ("s/image", ["" if seconds is None else f"{seconds.mean:.4f}" for seconds in of_image]),
        (f"{name}/image", [f"{summary.flops_per_image / unit:.3g}" for summary in summaries]),
        ("speed-up", ["" if ratio is None else f"{ratio:.2f}x" for ratio in speed_ups]),
    ]
    return [(header, cells) for header, cells in found if cells is not None]


def pair_columns(of_labels: Sequence[Pairs | None]) -> list[tuple[str, list[str]]]:
    """The columns of the distances that were measured."""
    measured = [pairs for pairs in of_labels if pairs is not None]
    if not measured:
        return []

    def cells(name: str, digits: str) -> list[str]:
        found = []
        for pairs in of_labels:
            estimate = None if pairs is None else getattr(pairs, name)
            instead = "" if pairs is None or pairs.unshared is None else f"({pairs.unshared})"
            found.append(instead if estimate is None else f"{estimate:{digits}}")
        return found

    found = [(f"PSNR to {measured[0].to}", cells("psnr", ".2"))]
    if any(pairs.feature_distance for pairs in measured):
        found.append(("feature distance", cells("feature_distance", ".4")))
    return found


def table(summaries: Sequence[Summary], metric: str) -> str:
    """The `columns` as text, with a line about the intervals and one about the pairs."""
    found = columns(summaries, metric)
    text = aligned([header for header, _ in found], list(zip(*(cells for _, cells in found), strict=True)), left=1)
    return "\n".join([text, *map(on_terminal, about_table(summaries))])


def about_table(summaries: Sequence[Summary]) -> list[str]:
    """Lines that explain the table."""
    lines, counts = [], sorted({len(summary.runs) for summary in summaries})
    if counts[-1] > 1:
        seeds = f"{counts[0]} seeds" if len(counts) == 1 else "the seeds"
        lines.append(f"means over {seeds} ± half the {CONFIDENCE:.0%} confidence interval (Student's t)")
    if any(len(summary.runs) == 1 and summary.score.half_width is not None for summary in summaries):
        lines.append(
            f"one seed: ± half the {CONFIDENCE:.0%} confidence interval over its images; networks and real images are "
            "fixed"
        )
    measured = [pairs for summary in summaries if (pairs := summary.pairs) is not None]
    if any(pairs.psnr for pairs in measured):
        n = next(len(pairs.psnr_of_samples[0]) for pairs in measured if pairs.psnr_of_samples)
        named = "PSNR (dB) and feature distance" if any(p.feature_distance for p in measured) else "PSNR (dB)"
        what = f"the first {n:,} samples" if n > 1 else "the first sample"
        lines.append(f"{named}: {what} of a seed against those of {measured[0].to} from the same noise")
    if any(pairs.unshared for pairs in measured):
        lines.append(f"in parentheses: the difference to {measured[0].to}, because of which the images are not pairs")
    return lines


def numbers(summaries: Sequence[Summary], metric: str) -> dict[str, Any]:
    """The content of --json: the means of each label with half widths, and the scores of its seeds."""
    return {
        "metric": metric,
        "confidence": CONFIDENCE,
        **summaries[0].runs[0].basis,
        "labels": [
            {
                "label": summary.label,
                "seeds": summary.seeds,
                "folders": [str(run.folder) for run in summary.runs],
                "scores": [run.score for run in summary.runs],
                "score": summary.score._asdict(),
                "difference": summary.difference and summary.difference._asdict(),
                "conditions": [run.conditions for run in summary.runs],
                "seconds_per_image": summary.seconds_per_image and summary.seconds_per_image._asdict(),
                "flops_per_image": summary.flops_per_image,
                "speed_up": speed_up(summary, summaries[0]),
                "pairs": summary.pairs and pair_numbers(summary.pairs),
            }
            for summary in summaries
        ],
    }


def pair_numbers(pairs: Pairs) -> dict[str, Any]:
    estimates = {name: getattr(pairs, name) for name in ("psnr", "feature_distance")}
    return {
        "to": pairs.to,
        "unshared": pairs.unshared,
        "samples_per_seed": len(pairs.psnr_of_samples[0]) if pairs.psnr_of_samples else 0,
        **{name: value and value._asdict() for name, value in estimates.items()},
    }


def speed_up(summary: Summary, standard: Summary) -> float | None:
    """The ratio of the measured times; None if their conditions differ."""
    of_standard, own = standard.seconds_per_image, summary.seconds_per_image
    if of_standard is None or own is None or not timed_alike(summary, standard):
        return None
    return of_standard.mean / own.mean


def flops_unit(largest: float) -> tuple[float, str]:
    power = min(5, max(0, int(math.log10(max(largest, 1)) // 3)))
    return 1000.0**power, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"][power]
