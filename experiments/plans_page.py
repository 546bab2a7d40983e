"""docs/plans.md: the program writes its measured parts, tables and pictures; people write all else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import spearmanr

from common import plots
from common.files import read_json, write_json
from evaluation.comparison import Estimate, estimate
from experiments.page import about_machine, begun, bold, filled, save_page, table
from experiments.plans_measure import BROUGHT, FULL_ALONE, JOINT, OWN, SPEED_UPS, TIMED_BATCH, TIMED_ROUNDS, at_speed

Row = Mapping[str, Any]  # of a plan: a list of values for each key, one of each seed


def write_page(
    path: Path, measured: Sequence[Mapping[str, Any]], how: str, machine: Mapping[str, Any], quick: bool = False
) -> None:
    """Fill the page in, and beside it write its pictures and its numbers (.json).

    measured: of each set of images what `Evidence.measure` gives. how: the command. quick: the numbers are worth
    nothing, and the page says so.
    """
    about = about_machine(machine)
    page = begun(path, "Plans", quick)
    for of_set in measured:
        picture = path.with_name(f"{path.stem}_{of_set['name']}.png")
        draw(picture, of_set)
        parts = [
            f"## {of_set['name'].capitalize()}",
            introduction(of_set, f"{how}. Machine: {about}."),
            f"### At equal speed\n\n{plans_table(of_set)}\n\n{verdict(of_set)}",
            f"![Divergence and score against speed]({picture.name})",
            f"### Predicted and measured\n\n{additivity(of_set)}",
        ]
        if of_set["moved"]:
            parts.append(f"### Elsewhere\n\n{elsewhere(of_set)}")
        page = filled(page, of_set["name"], "\n\n".join(parts))
    save_page(path, page)
    numbers = path.with_suffix(".json")
    before = read_json(numbers) if numbers.exists() else {}
    write_json(numbers, before | {of_set["name"]: {**of_set, "machine": about} for of_set in measured})


def introduction(of_set: Mapping[str, Any], how: str) -> str:
    (full, shallow), seeds = of_set["training"], ", ".join(map(str, of_set["seeds"]))
    return (
        f"Measured by {how}\n\nImages: {of_set['about']}. Networks of the seeds {seeds}: "
        f"full, {full} steps of training; shallow, {shallow}. {of_set['n_samples']} samples by {of_set['setting']}. "
        f"Divergence: {of_set['n_paths']} paths to predict it and as many others to measure it. Speed-up: of sampling "
        f"batches of {TIMED_BATCH} in turns, the median of {TIMED_ROUNDS} rounds. "
        f"Score: {of_set['score']}."
    )


def plans_table(of_set: Mapping[str, Any]) -> str:
    """All plans in the setting that they were made for."""
    scores = scores_of(of_set["rows"])
    rows = [
        (
            bold(row["label"], row["label"].startswith(JOINT)),
            cell(row, "predicted", ".2"),
            cell(row, "measured", ".2"),
            cell(row, "sampled", ".2"),
            f"{estimate(row['coherence']).mean:.1f}" if has(row, "coherence") else "",
            f"{1000 * estimate(row['seconds']).mean:.2f}",
            cell(row, "sampled_speed_up", ".2"),
            f"{estimate(row['score']):.2}",
            difference_of(row["score"], scores[FULL_ALONE]),
            cell(row, "psnr", ".1"),
        )
        for row in of_set["rows"]
    ]
    head = (
        "",
        "nats predicted",
        "measured",
        "on sampled paths",
        "coherence",
        "ms/image",
        "speed-up",
        "score",
        "minus full",
        "PSNR",
    )
    return table(head, rows)


def verdict(of_set: Mapping[str, Any]) -> str:
    """The plan of all against the single mechanism with the least nats, and against that with the best score."""
    rows, lines = {row["label"]: row for row in of_set["rows"]}, []
    for speed_up in SPEED_UPS:
        joint = rows.get(at_speed(JOINT, speed_up))
        alone = [row for name in of_set["curves"] if (row := rows.get(at_speed(name, speed_up))) not in (None, joint)]
        if joint is None or not alone:
            continue
        nearest = min(alone, key=lambda row: estimate(row["measured"]).mean)
        best = min(alone, key=lambda row: estimate(row["score"]).mean)
        ratios = [a / b for a, b in zip(joint["measured"], nearest["measured"], strict=True)]
        lines.append(
            f"- {speed_up:g}x: the plan of all has {min(ratios):.2f} to {max(ratios):.2f} of the measured nats of "
            f"{nearest['label'].rpartition(',')[0]}, and its score minus that of {best['label'].rpartition(',')[0]} is "
            f"{difference_of(joint['score'], best['score'])}."
        )
    return "\n".join(lines)


def additivity(of_set: Mapping[str, Any]) -> str:
    """How far the nats measured as a whole are from the sum of prices; and whether nats say what the score says."""
    planned = [row for row in of_set["rows"] if row["label"] != FULL_ALONE and has(row, "predicted")]
    joint = [row for row in planned if row["label"].startswith(JOINT)]
    lines = []
    for key, paths in (("measured", "other images"), ("sampled", "sampled paths")):
        all_of, of_joint = (
            [m / p for row in rows for m, p in zip(row[key], row["predicted"], strict=True)]
            for rows in (planned, joint)
        )
        lines.append(
            f"- On {paths} the measured nats are {min(all_of):.2f} to {max(all_of):.2f} of the predicted ones; "
            f"of the plans of all {min(of_joint):.2f} to {max(of_joint):.2f}."
        )
    full = scores_of(of_set["rows"])[FULL_ALONE]
    nats = [estimate(row["measured"]).mean for row in planned]
    more = [estimate(row["score"]).mean - estimate(full).mean for row in planned]
    ratios = [s / p for row in planned for s, p in zip(row["sampled_speed_up"], row["speed_up"], strict=True)]
    drift = [estimate([n * c for n, c in zip(row["measured"], row["coherence"], strict=True)]).mean for row in planned]
    ratio_to_full = [estimate(row["psnr"]).mean for row in planned]
    for name, values in (("nats", nats), ("nats x coherence", drift)):
        lines.append(
            f"- Over these {len(planned)} plans the ranks of {name} and of the score correlate by "
            f"{spearmanr(values, more).statistic:.2f}, those of {name} and PSNR by "
            f"{spearmanr(values, ratio_to_full).statistic:.2f}."
        )
    lines.append(
        f"- The measured speed-up of sampling is {min(ratios):.2f} to {max(ratios):.2f} of the predicted one, "
        f"{sorted(ratios)[len(ratios) // 2]:.2f} in the middle."
    )
    return "\n".join(lines)


def elsewhere(of_set: Mapping[str, Any]) -> str:
    """The plan in other settings, beside the one that is made there for the same speed."""
    rows = []
    for name, found in of_set["moved"].items():
        full = scores_of(found["rows"]).get(FULL_ALONE)
        for row in found["rows"]:
            if row["label"] == FULL_ALONE:
                continue
            rows.append(
                (
                    name,
                    {BROUGHT: "brought", OWN: "made there"}[row["label"]],
                    f"{cell(row, 'measured', '.3')} {found['unit']}",
                    cell(row, "distance", ".3") if found["unit"] != "nats" else "",
                    cell(row, "sampled_speed_up", ".2"),
                    difference_of(row["score"], full) if full and has(row, "score") else "",
                    cell(row, "psnr", ".1"),
                )
            )
    head = ("setting", "plan", "divergence", "of the images", "speed-up", "score minus full", "PSNR")
    return table(head, rows)


def draw(path: Path, of_set: Mapping[str, Any]) -> None:
    """Divergence against predicted speed-up for each mechanism, and what the samples scored against measured speed."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = {row["label"]: row for row in of_set["rows"]}
    full = rows[FULL_ALONE]["score"]
    for number, (name, curve) in enumerate(of_set["curves"].items()):
        colour, width = ("black", 2.4) if name == JOINT else (f"C{number}", 1.3)
        shown = [(speed_up, nats) for speed_up, nats in curve if nats > 0]
        left.plot(*zip(*shown, strict=True), color=colour, linewidth=width, label=name)
        points = [rows[label] for s in SPEED_UPS if (label := at_speed(name, s)) in rows]
        differences = [estimate([a - b for a, b in zip(row["score"], full, strict=True)]) for row in points]
        right.errorbar(
            [estimate(row["sampled_speed_up"]).mean for row in points],
            [of.mean for of in differences],
            yerr=[of.half_width or 0 for of in differences],
            color=colour,
            linewidth=width,
            marker="o",
            capsize=4,
        )
    left.set(
        yscale="log", xlabel="predicted speed-up", ylabel="nats per image, predicted", xlim=(1, 2 * max(SPEED_UPS))
    )
    right.set(xlabel="measured speed-up", ylabel="score minus full")
    right.axhline(0, color=plots.GREY, linestyle=":")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    plots.save(figure, path)


def scores_of(rows: Sequence[Row]) -> dict[str, Sequence[float]]:
    return {row["label"]: row["score"] for row in rows if has(row, "score")}


def has(row: Row, key: str) -> bool:
    return key in row and None not in row[key]


def cell(row: Row, key: str, digits: str) -> str:
    """The mean over seeds with half of its interval; nothing without a value."""
    return f"{estimate(row[key]):{digits}}" if has(row, key) else ""


def difference_of(scores: Sequence[float], standard: Sequence[float]) -> str:
    """Paired; bold where its interval leaves out 0."""
    of = estimate([a - b for a, b in zip(scores, standard, strict=True)])
    return bold(f"{of:+.2}", is_apart(of)) if scores is not standard else ""


def is_apart(of: Estimate) -> bool:
    return of.half_width is not None and abs(of.mean) > of.half_width
