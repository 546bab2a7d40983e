"""docs/results.md: the measured part of each set of images, with its pictures and numbers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import pearsonr, spearmanr, ttest_ind

from common.files import read_json, write_json
from evaluation.comparison import estimate
from experiments.page import about_machine, begun, bold, copy_for_page, filled, percent, save_page, table
from experiments.results_plots import SHOWN, WORST, draw_samples, draw_scores, draw_switches, draw_worst
from experiments.samples import Row

WITHIN = 0.05  # above a score: what counts as equal to it
SIGNIFICANT = 0.05  # a p-value below it


def write_page(
    path: Path, measured: Sequence[Mapping[str, Any]], how: str, machine: Mapping[str, Any], quick: bool = False
) -> list[str]:
    """Fill the page in, and beside it write its pictures and its numbers (.json), which the next run is held against.

    measured: of each set of images what `Experiment.measure` gives. how: the command. machine: of benchmarking.measure.
    quick: say that the numbers are worth nothing. Returns lines for the one who measured: what the run before, if there
    was one, found too, and what is left to do by hand.
    """
    about = about_machine(machine)
    before = path.with_suffix(".json")
    earlier = read_json(before) if before.exists() else {}
    page = begun(path, "Results", quick)
    remarks, numbers = [], {}
    for of_set in measured:
        name = of_set["name"]
        numbers[name] = numbers_of(of_set, about)
        repeated = held_against(name, earlier.get(name), numbers[name])
        parts = [f"## {name.capitalize()}", introduction(of_set, how, about), *parts_of(of_set, path)]
        page = filled(page, name, "\n\n".join([*parts, repeating(of_set), *([repeated] if repeated else [])]))
        if repeated:
            remarks.append(repeated)
        if any(numbers[name][key] != earlier.get(name, {}).get(key) for key in numbers[name]):
            remarks.append(f"{name} was measured anew: see whether what {path} says by hand still holds")
        numbers[name]["repeated"] = repeated
    save_page(path, page)
    write_json(before, earlier | numbers)
    return remarks


def parts_of(of_set: Mapping[str, Any], path: Path) -> Iterator[str]:
    """The tables and pictures of a set; the pictures are drawn beside the page."""
    of_samplers, home = of_set["samplers"], next(iter(of_set["samplers"]))
    scores, samples, worst, switches = (
        path.with_name(f"{path.stem}_{of_set['name']}{suffix}.png") for suffix in ("", "_samples", "_worst", "_switch")
    )
    draw_scores(scores, of_samplers)
    draw_samples(samples, of_samplers[home])
    draw_worst(worst, of_samplers[home])
    draw_switches(switches, of_set["switching"], home)
    for picture in (scores, samples, worst, switches):
        copy_for_page(picture, picture)
    yield f"### Score minus the full network's in the same sampler, and speed-up\n\n{differences(of_samplers)}"
    yield verdict(of_samplers)
    yield f"![KID against time: a colour for each way, a form for each sampler]({scores.name})"
    yield f"![The first images of each way, from the same noise]({samples.name})"
    yield f"The first images of each way, from the same noise ({home})."
    yield f"![The {WORST} images that differ most from the full network's]({worst.name})"
    yield (
        f"Below the full network's images, the {WORST} images of the same noise with the lowest PSNR to them ({home}): "
        f"{', '.join(SHOWN)}."
    )
    yield f"### Score, PSNR and time\n\n{values(of_samplers)}"
    yield switching(of_set, home)
    yield f"![Score and divergence against t_switch]({switches.name})"
    yield rules(of_set["switching"])
    if "training" in of_set:
        yield training(of_set["training"], home)


def introduction(of_set: Mapping[str, Any], how: str, machine: str) -> str:
    blocks, seeds = of_set["blocks"], ", ".join(map(str, of_set["seeds"]))
    networks = "those of [pretrained/](../pretrained/README.md), the same for all seeds"
    if of := of_set.get("steps"):
        networks = (
            f"full, {blocks[-1]} blocks, {of['full']} steps of training; shallow, {blocks[0]}, {of['shallow']}; "
            f"early-exit heads, {of['exits']}; other networks for each seed"
        )
    return (
        f"Measured by {how} in {of_set['hours']:.1f} hours. Machine: {machine}.\n\nImages: {of_set['about']}. "
        f"Networks: {networks}. {of_set['n_samples']} samples of each of the seeds {seeds}, in {of_set['precision']}. "
        f"Score: KID x 1000 against {of_set['n_real']} real images in the features of EfficientNet-Lite0."
    )


def differences(of_samplers: Mapping[str, Sequence[Row]]) -> str:
    """All ways in all samplers, to the full network in the same sampler."""
    first = [f"{estimate(rows[0]['kid']):.1}" for rows in of_samplers.values()]
    lines = [["full: its score", *first]]
    for number, row in enumerate(next(iter(of_samplers.values()))[1:], 1):
        of_label = [rows[number] for rows in of_samplers.values()]
        lines.append([row["label"], *(f"{difference(row)}, {speed_up(row):.2f}x" for row in of_label)])
    return table(["", *of_samplers], lines)


def verdict(of_samplers: Mapping[str, Sequence[Row]]) -> str:
    """In each sampler the fastest way that is surely not much worse."""
    lines = []
    for name, (full, *others) in of_samplers.items():
        most = WITHIN * mean_of(full["kid"])
        fastest = max((row for row in others if upper_end(row) <= most), key=speed_up, default=None)
        said = "none" if fastest is None else f"{fastest['label']}, {speed_up(fastest):.2f}x, {difference(fastest)}"
        lines.append(f"- {name}: {said}.")
    about = f"The fastest way whose score, with both intervals, is at most {percent(WITHIN)} above the full network's:"
    return "\n".join([about, "", *lines])


def upper_end(row: Row) -> float:
    """The larger one of the intervals over seeds and over images."""
    of = estimate(row["difference"])
    return float(max(row["interval"][1], of.mean + (of.half_width or 0)))


def values(of_samplers: Mapping[str, Sequence[Row]]) -> str:
    lines = [
        [
            name,
            row["label"],
            f"{estimate(row['kid']):.1}",
            f"{estimate(row['psnr']):.1}" if "psnr" in row else "",
            f"{1000 * statistics.median(row['seconds']):.2f}",
            f"{row['flops'] / 1e9:.3g}",
        ]
        for name, rows in of_samplers.items()
        for row in rows
    ]
    return table(("sampler", "", "score", "PSNR to full", "ms/image", "GFLOP/image"), lines)


def training(of: Mapping[str, Any], home: str) -> str:
    """How the shallow network should learn, at equal training time."""
    ratios = [b / a for a, b in zip(of["rates"]["plain"], of["rates"]["distilled"], strict=True)]
    lines = [
        (row["label"], str(of["steps"][row["label"]]), f"{estimate(row['kid']):.1}", difference(row))
        for row in of["rows"]
    ]
    return (
        f"### Training the shallow network, at equal time\n\nAll switch at t = {of['t_switch']}, above which lies "
        f"their own range ({home}). Distillation ran at {min(ratios):.2f} to {max(ratios):.2f} of the speed of plain "
        f"steps in {len(ratios)} rounds.\n\n"
        f"{table(('shallow network', 'steps', 'score', 'minus all timesteps'), lines)}"
    )


def switching(of_set: Mapping[str, Any], home: str) -> str:
    """Divergence, excess and score of each switch."""
    of, lines = of_set["switching"], []
    for row in of["rows"]:
        option, t_switch = row["option"], row["option"]["t_switch"]
        lines.append(
            (
                f"{t_switch}{'' if t_switch in of['grid'] else ' (not of the grid)'}",
                " + ".join(map(str, option["steps_of_each"])),
                f"{speed_up(row):.2f}x",
                f"{option['divergence']:.2f}",
                f"{option['excess']:+.2f} ± {option['excess_se']:.2f}",
                f"{estimate(row['kid']):.1}",
                difference(row),
                ", ".join(rule for rule, chosen in of["rules"].items() if chosen == t_switch),
            )
        )
    head = (
        "t_switch",
        "shallow + full",
        "predicted speed-up",
        "divergence",
        "excess",
        "score",
        "minus full",
        "chosen by",
    )
    knees = "; ".join(f"{name} {', '.join(map(str, dict.fromkeys(of)))}" for name, of in of_set["t_switch"].items())
    return f"### Where to switch\n\nThe knee: {knees}. The rest of this part: {home}.\n\n{table(head, lines)}"


def rules(of: Mapping[str, Any]) -> str:
    """What each rule chose against the best of the grid, and against the best of those that are as fast."""
    by_switch = {row["option"]["t_switch"]: row for row in of["rows"]}
    grid, lines = [by_switch[t_switch] for t_switch in of["grid"]], []
    for rule, t_switch in of["rules"].items():
        chosen = by_switch[t_switch]
        as_fast = [row for row in grid if calls_of_full(row) <= calls_of_full(chosen)]
        lines.append((rule, str(t_switch), above_best(chosen, grid), above_best(chosen, as_fast)))
    said = [f"The knee of each seed's own networks: {', '.join(map(str, of['knees']))}."] * (len(set(of["knees"])) > 1)
    for name in ("divergence", "excess"):
        measured, scores = [row["option"][name] for row in grid], [mean_of(row["kid"]) for row in grid]
        pearson, spearman = pearsonr(measured, scores).statistic, spearmanr(measured, scores).statistic
        said.append(f"Correlation of {name} and score over the grid: {pearson:.2f} (of their ranks {spearman:.2f}).")
    head = ("rule", "t_switch", "score above the best of the grid", "above the best that is as fast")
    return f"{table(head, lines)}\n\n{' '.join(said)}"


def above_best(chosen: Row, rows: Sequence[Row]) -> str:
    """ "+1.2 % (t_switch 699)": by how much its score is above the best of the rows; bold where that is too much."""
    if not rows:
        return ""
    best = min(rows, key=lambda row: mean_of(row["kid"]))
    more = mean_of(chosen["kid"]) / mean_of(best["kid"]) - 1
    return f"{bold(percent(more, '+'), more > WITHIN)} (t_switch {best['option']['t_switch']})"


def calls_of_full(row: Row) -> int:
    calls: int = row["option"]["steps_of_each"][1]
    return calls


# The measurement before


def tables_of(of_set: Mapping[str, Any]) -> dict[str, Sequence[Row]]:
    tables = {**of_set["samplers"], "switches": of_set["switching"]["rows"]}
    return tables | ({"training": of_set["training"]["rows"]} if "training" in of_set else {})


def repeating(of_set: Mapping[str, Any]) -> str:
    """How much of the numbers the next run may find otherwise."""
    rows, widths = [row for of_table in tables_of(of_set).values() for row in of_table], []
    for name, said in (("kid", "a score"), ("seconds", "the seconds")):
        estimates = [estimate(row[name]) for row in rows if name in row]
        relative = [(of.half_width or 0) / of.mean for of in estimates if of.mean > 0] or [0.0]
        widths.append(f"{percent(statistics.median(relative))} ({percent(max(relative))}) of {said}")
    return f"### How much a repeat may differ\n\nHalf of the interval, median (most): {', '.join(widths)}."


def numbers_of(of_set: Mapping[str, Any], about: str) -> dict[str, Any]:
    """What another run may find too: the rows of all tables."""
    rows = {
        f"{name}: {row['label']}": {
            "scores": row["kid"],
            "differences": row.get("difference"),
            "speed_up": speed_up(row),
        }
        for name, of_table in tables_of(of_set).items()
        for row in of_table
    }
    kept = {name: of_set[name] for name in ("about", "n_samples", "precision", "seeds", "t_switch")}
    return {"machine": about, **kept, "rows": rows}


def held_against(name: str, earlier: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str | None:
    """A line on what the run before found too; None if there was none, or one of other images or other samples.

    earlier, now: of `numbers_of`. Where nothing was measured since, it is what the page said already.
    """
    if earlier is None or any(earlier.get(name) != now[name] for name in ("about", "n_samples", "precision")):
        return None
    if all(earlier[key] == now[key] for key in now):
        repeated: str | None = earlier["repeated"]
        return repeated
    both = {label: (earlier["rows"][label], row) for label, row in now["rows"].items() if label in earlier["rows"]}
    others = {label: pair for label, pair in both.items() if None not in (of["differences"] for of in pair)}
    inside = 0
    for old, new in both.values():
        of = estimate(old["scores"])
        inside += abs(mean_of(new["scores"]) - of.mean) <= (of.half_width or 0)
    ratios = [abs(new["speed_up"] / old["speed_up"] - 1) for old, new in others.values()] or [0.0]
    seeds = ", ".join(map(str, earlier["seeds"]))
    return (
        f"- {name} (before: seeds {seeds}; {earlier['machine']}): of {len(both)} mean scores {inside} lie in the "
        f"interval they had before; Welch's t-test tells {told_apart(both, 'scores')} apart, and of "
        f"{len(others)} differences to the first row of a table {told_apart(others, 'differences')}; speed-ups "
        f"differ by {percent(statistics.median(ratios))} in the middle, by {percent(max(ratios))} at most."
    )


def told_apart(pairs: Mapping[str, Sequence[Mapping[str, Any]]], key: str) -> str:
    """How many of the pairs of rows Welch's t-test tells apart, and which."""
    tests = {label: ttest_ind(*(row[key] for row in pair), equal_var=False) for label, pair in pairs.items()}
    apart = [label for label, test in tests.items() if test.pvalue < SIGNIFICANT]
    return f"{len(apart)} ({', '.join(apart)})" if apart else "0"


# Cells


def difference(row: Row) -> str:
    """To the first row of the table: over seeds, and its interval over images; nothing for that row itself."""
    if "difference" not in row:
        return ""
    low, high = row["interval"]
    return bold(f"{estimate(row['difference']):+.1} [{low:+.1f}, {high:+.1f}]", is_apart(row))


def is_apart(row: Row) -> bool:
    """Whether both intervals of the difference leave out 0, that over seeds and that over images."""
    of, (low, high) = estimate(row["difference"]), row["interval"]
    return of.half_width is not None and abs(of.mean) > of.half_width and (low > 0 or high < 0)


def speed_up(row: Row) -> float:
    """The median over the rounds; 1 where no times are compared."""
    return float(statistics.median(row.get("speed_up", [1.0])))


def mean_of(values: Iterable[float]) -> float:
    return statistics.mean(values)
