"""docs/results.md: the program writes its measured parts, tables, numbers and pictures; people write all else."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import pearsonr, spearmanr, ttest_ind

from common import plots
from common.files import read_json, replacing, write_json
from evaluation.comparison import about_bars, flops_unit

WITHIN = 0.05  # of the best score: what a rule for the switch is to reach
TABLES = ("table", "variants", "scores")  # of a set, as compare.py writes them
SIGNIFICANT = 0.05  # a p-value below it
PAGE_WIDTH = 1200  # pixels of a picture: with 256 colours it stays under 300 kB
QUICK = "**Made with `--quick`: it shows that everything works; the numbers are worth nothing.**"


def write_page(
    path: Path, measured: Sequence[Mapping[str, Any]], how: str, machine: Mapping[str, Any], quick: bool = False
) -> list[str]:
    """Fill the page in, and beside it write its pictures and its numbers (.json), which the next run is held against.

    measured: of each set of images what its results.json holds. how: the command and its time. machine: of
    benchmarking.measure. quick: say that the numbers are worth nothing. Returns lines for the one who measured: what
    the run before, if there was one, found too, and what is left to do by hand.
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
        pictures = [path.with_name(f"{path.stem}_{name}{suffix}.png") for suffix in ("", "_switch")]
        copy_for_page(Path(of_set["table"]["picture"]), pictures[0])
        draw_switches(pictures[1], of_set)
        parts = [f"## {name.capitalize()}", introduction(of_set, f"{how}. Machine: {about}."), methods(of_set)]
        parts += [f"![Score against time, with samples]({pictures[0].name})", training(of_set), switching(of_set)]
        parts += [f"![Score and divergence against t_switch]({pictures[1].name})", rules(of_set), repeating(of_set)]
        page = filled(page, name, "\n\n".join([*parts, *([repeated] if repeated else [])]))
        if repeated:
            remarks.append(repeated)
        if any(numbers[name][key] != earlier.get(name, {}).get(key) for key in numbers[name]):
            remarks.append(f"{name} was measured anew: see whether what {path} says by hand still holds")
        numbers[name]["repeated"] = repeated
    save_page(path, page)
    write_json(before, earlier | numbers)
    return remarks


def about_machine(machine: Mapping[str, Any]) -> str:
    """A machine, of benchmarking.measure, in words."""
    return ", ".join(f"{key} {value}" for key, value in machine.items() if isinstance(value, str | int))


def begun(path: Path, title: str, quick: bool) -> str:
    """The page as it is, or a new one. quick: a new one says that its numbers are worth nothing."""
    return path.read_text("utf-8") if path.exists() else "\n\n".join([f"# {title}", *[QUICK] * quick])


def save_page(path: Path, page: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def copy_for_page(picture: Path, path: Path) -> None:
    """Copy a picture, smaller and with fewer colours, because every clone of the project loads it."""
    with Image.open(picture) as image:
        image = image.convert("RGB")
    if image.width > PAGE_WIDTH:
        image = image.resize((PAGE_WIDTH, round(image.height * PAGE_WIDTH / image.width)), Image.Resampling.LANCZOS)
    with replacing(path) as temporary:
        image.quantize(256).save(temporary, "PNG", optimize=True)


def filled(page: str, name: str, text: str) -> str:
    """The page with the measured part of that name replaced, or added at its end; all else stays as it is."""
    part = f"<!-- measured: {name} -->\n{text}\n<!-- end -->"
    pattern = re.compile(rf"<!-- measured: {re.escape(name)} -->.*?<!-- end -->", re.DOTALL)
    return pattern.sub(lambda _: part, page) if pattern.search(page) else f"{page.rstrip()}\n\n{part}\n"


def introduction(of_set: Mapping[str, Any], how: str) -> str:
    blocks, steps, sampling, table = (of_set[name] for name in ("blocks", "training", "sampling", "table"))
    sampled = f"{table['n_samples']} samples by `--solver {sampling['solver']} --steps {sampling['steps']}`"
    return (
        f"Measured by {how}\n\nImages: {of_set['about']}. Networks: full, {blocks[-1]} blocks, {steps['full']} steps; "
        f"shallow, {blocks[0]}, {steps['shallow']['all timesteps']} steps; early-exit heads, {steps['exits']} steps. "
        f"{sampled} unless the row says otherwise, of the seeds {', '.join(map(str, table['labels'][0]['seeds']))}. "
        f"Score: {of_set['score']}."
    )


def methods(of_set: Mapping[str, Any]) -> str:
    """DuoDiff and what one would do instead, on the same clock."""
    labels, levels = of_set["table"]["labels"], of_set["levels"]
    unit, name = flops_unit(max(label["flops_per_image"] for label in labels))
    rows = [
        (
            label["label"],
            shown(label["score"]),
            difference(label),
            f"{levels[label['label']]:.1f}" if label["label"] in levels else "",
            f"{1000 * seconds_of(label):.2f}",
            f"{label['flops_per_image'] / unit:.3g}",
            f"{label['speed_up']:.2f}x",
            best_of(other for other in labels if beats(other, label)),
        )
        for label in labels
    ]
    head = ("", "score", "minus full", "levels", "ms/image", f"{name}/image", "speed-up", "beaten by")
    return f"### Score against time\n\nDuoDiff switches at t = {of_set['t_switch']}, the knee.\n\n{table(head, rows)}"


def training(of_set: Mapping[str, Any]) -> str:
    """How the shallow network should learn, at equal training time."""
    steps, rates = of_set["training"]["shallow"], of_set["step_rates"]
    ratios = [b / a for a, b in zip(rates["plain"], rates["distilled"], strict=True)]
    rows = [
        (label["label"], str(steps[label["label"]]), shown(label["score"]), difference(label))
        for label in of_set["variants"]["labels"]
    ]
    return (
        f"### Training the shallow network, at equal time\n\nAll switch at t = {of_set['t_switch']}, above which lies "
        f"their own range. Distillation ran at {min(ratios):.2f} to {max(ratios):.2f} of the speed of plain steps in "
        f"{len(ratios)} rounds.\n\n{table(('shallow network', 'steps', 'score', 'minus all timesteps'), rows)}"
    )


def switching(of_set: Mapping[str, Any]) -> str:
    """Divergence, excess and score of each switch."""
    rows = [
        (
            f"{row['t_switch']}{'' if row['t_switch'] in of_set['grid'] else ' (not of the grid)'}",
            " + ".join(map(str, row["steps_of_each"])),
            f"{row['measured_speed_up']:.2f}x",
            f"{row['divergence']:.2f}",
            f"{row['excess']:+.2f} ± {row['excess_se']:.2f}",
            shown(row["score"]),
            difference(row),
            ", ".join(rule for rule, t_switch in of_set["rules"].items() if t_switch == row["t_switch"]),
        )
        for row in switches_with_scores(of_set)
    ]
    head = ("t_switch", "shallow + full", "speed-up", "divergence", "excess", "score", "minus full", "chosen by")
    return f"### Where to switch\n\n{table(head, rows)}"


def rules(of_set: Mapping[str, Any]) -> str:
    """What each rule chose against the best of the grid, and against the best of those that are as fast."""
    all_rows = switches_with_scores(of_set)
    grid = [row for row in all_rows if row["t_switch"] in of_set["grid"]]
    by_switch = {row["t_switch"]: row for row in all_rows}
    rows = []
    for rule, t_switch in of_set["rules"].items():
        chosen = by_switch[t_switch]
        as_fast = [row for row in grid if row["steps_of_each"][1] <= chosen["steps_of_each"][1]]
        rows.append((rule, str(t_switch), above_best(chosen, grid), above_best(chosen, as_fast)))
    lines = [f"The knee of each seed's own networks: {', '.join(map(str, of_set['knees']))}."]
    for name in ("divergence", "excess"):
        values, scores = [row[name] for row in grid], [score_of(row) for row in grid]
        pearson, spearman = pearsonr(values, scores).statistic, spearmanr(values, scores).statistic
        lines.append(f"Correlation of {name} and score over the grid: {pearson:.2f} (of their ranks {spearman:.2f}).")
    head = ("rule", "t_switch", "score above the best of the grid", "above the best that is as fast")
    return f"{table(head, rows)}\n\n{' '.join(lines)}"


def above_best(chosen: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """ "+1.2 % (t_switch 699)": by how much its score is above the best of the rows; bold where that is too much."""
    if not rows:
        return ""
    best = min(rows, key=score_of)
    more = score_of(chosen) / score_of(best) - 1
    return f"{bold(percent(more, '+'), more > WITHIN)} (t_switch {best['t_switch']})"


def switches_with_scores(of_set: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What calibrate.py says of each switch beside what its samples scored."""
    return [
        {**switch, **{key: label[key] for key in ("score", "difference")}, "measured_speed_up": label["speed_up"]}
        for switch, label in zip(of_set["switches"], of_set["scores"]["labels"], strict=True)
    ]


def draw_switches(path: Path, of_set: Mapping[str, Any]) -> None:
    """Scores of samples over t_switch, and the divergence that was measured before there were any."""
    rows, rules = switches_with_scores(of_set), of_set["rules"]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    switches, errors = [row["t_switch"] for row in rows], [row["difference"]["half_width"] or 0 for row in rows]
    axes.errorbar(switches, list(map(score_of, rows)), yerr=errors, color=plots.BLUE, marker="o", capsize=4)
    other = axes.twinx()
    other.plot(switches, [row["divergence"] for row in rows], color=plots.ORANGE, linestyle="--")
    other.set_ylabel("divergence (nats per image)", color=plots.ORANGE)
    for i, (rule, t_switch) in enumerate(rules.items()):
        axes.axvline(t_switch, color=f"C{i}", linestyle=":", linewidth=1 + 0.8 * (len(rules) - i), label=rule)
    about = about_bars(of_set["scores"]["labels"][0]["label"])
    axes.set(xlabel="t_switch (noise on the left, image on the right)", title=f"Where to switch\n{about}")
    axes.set_ylabel("score", color=plots.BLUE)
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5)
    plots.save(figure, path)


# The measurement before


def repeating(of_set: Mapping[str, Any]) -> str:
    """How much of the numbers the next run may find otherwise."""
    labels, widths = [label for name in TABLES for label in of_set[name]["labels"]], []
    for name, said in (("score", "a score"), ("seconds_per_image", "the seconds")):
        relative = [(label[name]["half_width"] or 0) / label[name]["mean"] for label in labels]
        widths.append(f"{percent(statistics.median(relative))} ({percent(max(relative))}) of {said}")
    return f"### How much a repeat may differ\n\nHalf of the interval, median (most): {', '.join(widths)}."


def numbers_of(of_set: Mapping[str, Any], about: str) -> dict[str, Any]:
    """What another run may find too: the rows of all tables, by their labels.

    The first row of a table is what the others are held against; those of the second and the third table stand in the
    first one already.
    """
    rows = {}
    for name in TABLES:
        first, *others = of_set[name]["labels"]
        for label in [first] * (name == TABLES[0]) + others:
            differences = [a - b for a, b in zip(label["scores"], first["scores"], strict=True)]
            told = {key: label[key] for key in ("scores", "score", "speed_up")}
            rows[label["label"]] = {"differences": differences, **told}
    seeds = of_set["table"]["labels"][0]["seeds"]
    return {"machine": about, "seeds": seeds, "t_switch": of_set["t_switch"], "rows": rows}


def held_against(name: str, earlier: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str | None:
    """A line on what the run before found too; None if there was none.

    earlier, now: of `numbers_of`. Where nothing was measured since, it is what the page said already.
    """
    if earlier is None:
        return None
    if all(earlier[key] == now[key] for key in now):
        repeated: str | None = earlier["repeated"]
        return repeated
    both = {label: (earlier["rows"][label], row) for label, row in now["rows"].items() if label in earlier["rows"]}
    others = list(both)[1:]
    inside = sum(
        abs(new["score"]["mean"] - old["score"]["mean"]) <= old["score"]["half_width"] for old, new in both.values()
    )
    ratios = [abs(new["speed_up"] / old["speed_up"] - 1) for old, new in (both[label] for label in others)]
    seeds = ", ".join(map(str, earlier["seeds"]))
    return (
        f"- {name} (before: seeds {seeds}; {earlier['machine']}): of {len(both)} mean scores {inside} lie in the "
        f"interval they had before; Welch's t-test tells {told_apart(both, both, 'scores')} apart, and of "
        f"{len(others)} differences to the first row of a table {told_apart(both, others, 'differences')}; speed-ups "
        f"differ by {percent(statistics.median(ratios))} in the middle, by {percent(max(ratios))} at most; the knee "
        f"was {earlier['t_switch']}, it is {now['t_switch']}."
    )


def told_apart(pairs: Mapping[str, Sequence[Mapping[str, Any]]], labels: Iterable[str], key: str) -> str:
    """How many of the pairs of rows Welch's t-test tells apart, and which."""
    tests = {label: ttest_ind(*(row[key] for row in pairs[label]), equal_var=False) for label in labels}
    apart = [label for label, test in tests.items() if test.pvalue < SIGNIFICANT]
    return f"{len(apart)} ({', '.join(apart)})" if apart else "0"


# Cells


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def shown(estimate: Mapping[str, float | None], sign: str = "") -> str:
    text = f"{estimate['mean']:{sign}.2f}"
    return text if estimate["half_width"] is None else f"{text} ± {estimate['half_width']:.2f}"


def difference(label: Mapping[str, Any]) -> str:
    """To the first label, bold where its interval leaves out 0; nothing for that one itself."""
    of = label["difference"]
    if of is None or of["mean"] == 0 == of["half_width"]:
        return ""
    return bold(shown(of, "+"), of["half_width"] is not None and abs(of["mean"]) > of["half_width"])


def best_of(labels: Iterable[Mapping[str, Any]]) -> str:
    return min(labels, key=score_of, default={"label": ""})["label"]


def beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Faster, and with a better mean score."""
    return seconds_of(one) < seconds_of(other) and score_of(one) < score_of(other)


def score_of(row: Mapping[str, Any]) -> float:
    return float(row["score"]["mean"])


def seconds_of(row: Mapping[str, Any]) -> float:
    return float(row["seconds_per_image"]["mean"])


def percent(share: float, sign: str = "") -> str:
    return f"{100 * share:{sign}.1f} %"


def bold(text: str, is_bold: bool) -> str:
    return f"**{text}**" if is_bold else text
