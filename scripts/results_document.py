"""docs/results.md from what scripts/results.py measured: every number and every judgement comes of those."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import read_json, replacing, write_json

WITHIN = 0.05  # of the best score: what a rule for the switch is to reach
TABLES = ("table", "variants", "scores")  # of a set, as compare.py writes them
SIGNIFICANT = 0.05  # a p-value below it


def write_document(
    path: Path,
    measured: Sequence[Mapping[str, Any]],
    machine: Mapping[str, Any],
    seconds: float,
    arguments: str = "",
    quick: bool = False,
) -> list[str]:
    """The document, and beside it its pictures and its numbers (.json), which the next run is held against.

    measured: of each set of images what its results.json holds. machine: of benchmarking.measure. seconds: it took.
    arguments: of scripts/results.sh. quick: say that the numbers are worth nothing. Returns lines on what the run
    before, if there was one, found too.
    """
    about = ", ".join(f"{key} {value}" for key, value in machine.items() if isinstance(value, str | int))
    before = path.with_suffix(".json")
    earlier = read_json(before) if before.exists() else {}
    numbers = {of_set["name"]: numbers_of(of_set, about) for of_set in measured}
    repeated = {name: held_against(name, earlier.get(name), numbers[name]) for name in numbers}
    sections = [introduction(measured, about, seconds, arguments, quick)]
    for of_set in measured:
        pictures = [path.with_name(f"{path.stem}_{of_set['name']}{suffix}.png") for suffix in ("", "_switch")]
        shutil.copyfile(of_set["table"]["picture"], pictures[0])
        draw_switches(pictures[1], of_set)
        sections += [section(of_set), methods(of_set, pictures[0].name)]
        sections += [training(of_set), switching(of_set, pictures[1].name)]
    said = [line for line in repeated.values() if line]
    sections.append(repeating(measured, said))
    with replacing(path) as temporary:
        temporary.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    # Sets that were not measured now are kept for the run that measures them again.
    write_json(before, earlier | {name: numbers[name] | {"repeated": repeated[name]} for name in numbers})
    return said


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
            rows[label["label"]] = {"differences": differences} | {
                key: label[key] for key in ("scores", "score", "speed_up")
            }
    seeds = of_set["table"]["labels"][0]["seeds"]
    return {"machine": about, "seeds": seeds, "t_switch": of_set["t_switch"], "rows": rows}


def held_against(name: str, earlier: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str | None:
    """A line on what the run before found too; None if there was none.

    earlier, now: of `numbers_of`. Where nothing was measured since, it is what the page said already.
    """
    if earlier is None:
        return None
    if all(earlier[key] == now[key] for key in now):
        said: str | None = earlier["repeated"]
        return said
    both = {label: (earlier["rows"][label], row) for label, row in now["rows"].items() if label in earlier["rows"]}
    first = next(iter(now["rows"]))
    but_first = {label: pair for label, pair in both.items() if label != first}
    inside = sum(
        abs(new["score"]["mean"] - old["score"]["mean"]) <= old["score"]["half_width"] for old, new in both.values()
    )
    ratios = [abs(new["speed_up"] / old["speed_up"] - 1) for old, new in but_first.values()]
    seeds = ", ".join(map(str, earlier["seeds"]))
    return (
        f"- {name} (before: seeds {seeds}; {earlier['machine']}): of {len(both)} mean scores {inside} lie in the "
        f"interval they had before; Welch's t-test tells {told_apart(both, 'scores')} apart, and of {len(but_first)} "
        f"differences to the first row of a table {told_apart(but_first, 'differences')}; speed-ups differ by "
        f"{percent(statistics.median(ratios), 1)} in the middle, by {percent(max(ratios), 1)} at most; the knee was "
        f"{earlier['t_switch']}, it is {now['t_switch']}."
    )


def told_apart(pairs: Mapping[str, Sequence[Mapping[str, Any]]], key: str) -> str:
    """How many of the pairs of rows Welch's t-test tells apart, and which."""
    from scipy.stats import ttest_ind

    apart = [
        label
        for label, pair in pairs.items()
        if ttest_ind(*(row[key] for row in pair), equal_var=False).pvalue < SIGNIFICANT
    ]
    return f"{len(apart)} ({', '.join(apart)})" if apart else "0"


def introduction(measured: Sequence[Mapping[str, Any]], about: str, seconds: float, arguments: str, quick: bool) -> str:
    table = measured[0]["table"]
    seeds = ", ".join(map(str, table["labels"][0]["seeds"]))
    call = f"bash scripts/results.sh {arguments}".rstrip()
    lines = [
        "# Results",
        "",
        *(["**Made with `--quick`: it shows that everything works; the numbers are worth nothing.**", ""] * quick),
        f"Measured by `{call}` in {seconds / 60:.0f} minutes; the same command, without `results/`, repeats it and "
        f"writes this page anew. Machine: {about}.",
        "",
        f"Each score is the mean over the seeds {seeds} ± half of its {percent(table['confidence'])} confidence "
        "interval (Student's t); lower is better. Each seed has networks of its own, all of them, and samples of its "
        "own. Differences are paired: the same seed, so the same full network and the same noise. An effect counts as "
        "one here if the interval of its difference leaves out 0. FLOPs do not depend on the machine, seconds do.",
        "",
        "Look at the samples, too: the features that scores are made of are those of a small classifier, which may not "
        "see what a person sees at once, such as broken patches or wrong colours. Where a score is good and the images "
        "are many levels away from those of the full network, look twice. And the knee's factor of 1.5 was settled on "
        "earlier trainings on these two sets, so they are no independent test of it.",
    ]
    return "\n".join(lines)


def section(of_set: Mapping[str, Any]) -> str:
    n_blocks, training = of_set["blocks"], of_set["training"]
    sampling = of_set["sampling"]
    return "\n".join(
        [
            f"## {of_set['name'].capitalize()}",
            "",
            f"Images: {of_set['about']}. Networks: the full one has {n_blocks[-1]} blocks "
            f"({training['full']} steps of training), the shallow one {n_blocks[0]} "
            f"({training['shallow']['all timesteps']} steps); the early-exit heads learned for {training['exits']} "
            f"steps. If nothing else is said, {of_set['table']['n_samples']} samples by `--solver {sampling['solver']} "
            f"--steps {sampling['steps']}`. Score: {of_set['score']}.",
        ]
    )


def methods(of_set: Mapping[str, Any], picture: str) -> str:
    """DuoDiff and what one would do instead, on the same clock."""
    labels = of_set["table"]["labels"]
    full, others = labels[0], labels[1:]
    lines = [
        "### Score against time",
        "",
        f'DuoDiff switches at t = {of_set["t_switch"]}, by the rule "{of_set["rule"]}" (see below).',
        "",
        comparison_table(labels, of_set["levels"]),
        "",
        "Levels: how far the images are from those that the full network makes of the same noise in the same steps "
        "(root mean square, of 255 levels).",
        "",
        f"![Score against time, with samples]({picture})",
        "",
    ]
    lines += [
        f"- {label['label']}: {label['speed_up']:.2f}x the speed of full; {judged(label, full)}." for label in others
    ]
    behind = {label["label"]: [other for other in labels if beats(other, label)] for label in labels}
    front = [name for name, ahead in behind.items() if not ahead]
    lines.append(f"- Nothing else here is faster and has a better mean score than: {', '.join(front)}.")
    beaten = [f"{name} ({min(ahead, key=score_of)['label']})" for name, ahead in behind.items() if ahead]
    if beaten:
        lines.append(f"- The others, and what is faster and has the best mean score: {', '.join(beaten)}.")
    return "\n".join(lines)


def training(of_set: Mapping[str, Any]) -> str:
    """How the shallow network should learn, at equal training time."""
    labels, steps, rates = of_set["variants"]["labels"], of_set["training"]["shallow"], of_set["step_rates"]
    ratios = [b / a for a, b in zip(rates["plain"], rates["distilled"], strict=True)]
    lines = [
        "### Training the shallow network, at equal time",
        "",
        f"A step of distillation, in turns with plain ones, ran at {min(ratios):.2f} to {max(ratios):.2f} of their "
        f"speed in {len(ratios)} rounds: the median ratio gives its number of steps. The full network, which some of "
        "the kinds begin with or learn from, was there anyway: its training is not counted. All sampled with the "
        f"switch at t = {of_set['t_switch']}, above which lies their own range.",
        "",
        *markdown_table(
            ("shallow network", "steps", "score", "minus all timesteps"),
            [(of["label"], str(steps[of["label"]]), shown(of["score"]), difference(of)) for of in labels],
        ),
        "",
    ]
    lines += [f"- {label['label']}: {judged(label, labels[0])}." for label in labels[1:]]
    best = min(labels, key=lambda label: label["score"]["mean"])
    lines.append(f"- The best mean score is that of: {best['label']}.")
    return "\n".join(lines)


def switching(of_set: Mapping[str, Any], picture: str) -> str:
    """What calibrate.py chose against the best of the grid, and how well divergence foretells scores."""
    rows = switches_with_scores(of_set)
    grid = [row for row in rows if row["t_switch"] in of_set["grid"]]
    by_switch = {row["t_switch"]: row for row in rows}
    chosen_by: dict[int, list[str]] = {}
    for rule, t_switch in of_set["rules"].items():
        chosen_by.setdefault(t_switch, []).append(rule)
    lines = [
        "### Where to switch",
        "",
        "Divergence (nats per image, along the sampler's path) and excess error (the change of the variational bound, "
        "nats per image; below 0 the shallow network is the better) as calibrate.py measured them, means over the "
        "seeds' networks; the scores are of samples.",
        "",
        *markdown_table(
            ("t_switch", "shallow + full", "speed-up", "divergence", "excess", "score", "minus full", "chosen by"),
            [
                (
                    f"{row['t_switch']}{'' if row in grid else ' (not of the grid)'}",
                    " + ".join(map(str, row["steps_of_each"])),
                    f"{row['measured_speed_up']:.2f}x",
                    f"{row['divergence']:.2f}",
                    f"{row['excess']:+.2f} ± {row['excess_se']:.2f}",
                    shown(row["score"]),
                    difference(row),
                    ", ".join(chosen_by.get(row["t_switch"], [])),
                )
                for row in rows
            ],
        ),
        "",
        f"![Score and divergence against t_switch]({picture})",
        "",
    ]
    lines += [f"- {verdict(rule, by_switch[t_switch], grid)}" for rule, t_switch in of_set["rules"].items()]
    lines.append(f"- The knee of each seed's own networks: {', '.join(map(str, of_set['knees']))}.")
    lines.append(f"- {correlations(grid)}")
    return "\n".join(lines)


def switches_with_scores(of_set: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What calibrate.py says of each switch beside what its samples scored."""
    labels = of_set["scores"]["labels"]
    return [
        switch
        | {key: label[key] for key in ("label", "score", "difference")}
        | {"measured_speed_up": label["speed_up"]}
        for switch, label in zip(of_set["switches"], labels, strict=True)
    ]


def verdict(rule: str, chosen: Mapping[str, Any], grid: Sequence[Mapping[str, Any]]) -> str:
    """A rule's switch against the best of the grid, and against the best of those that are as fast as it."""
    best = min(grid, key=score_of)
    text = f"{rule} chose t_switch {chosen['t_switch']}. The best of the grid is t_switch {best['t_switch']}: "
    text += f"{against(chosen, best)}. At its speed or faster: {'**no**' if slower(chosen, best) else 'yes'}."
    as_fast = [row for row in grid if not slower(row, chosen)]
    if not as_fast:
        return f"{text} All of the grid is slower than the chosen one."
    rival = min(as_fast, key=score_of)
    if rival is best:
        return text
    if rival is chosen:
        return f"{text} Of those as fast as the chosen one none has a better mean score."
    return (
        f"{text} Of those as fast as the chosen one the best is t_switch {rival['t_switch']}: {against(chosen, rival)}."
    )


def against(chosen: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    """ "the chosen one scores 1.2 % above it; within 5 %: yes"."""
    more = score_of(chosen) / score_of(best) - 1
    side, within = "below" if more < 0 else "above", "yes" if more <= WITHIN else "**no**"
    return f"the chosen one scores {percent(abs(more), 1)} {side} it; within {percent(WITHIN)}: {within}"


def score_of(row: Mapping[str, Any]) -> float:
    return float(row["score"]["mean"])


def slower(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """By the steps that the full network runs, which no machine's mood changes."""
    return bool(row["steps_of_each"][1] > other["steps_of_each"][1])


def correlations(grid: Sequence[Mapping[str, Any]]) -> str:
    from scipy.stats import pearsonr, spearmanr

    scores, texts = [score_of(row) for row in grid], []
    for name in ("divergence", "excess"):
        values = [row[name] for row in grid]
        both = pearsonr(values, scores).statistic, spearmanr(values, scores).statistic
        texts.append(f"of {name} and score {both[0]:.2f} (of their ranks {both[1]:.2f})")
    return f"Correlation over the grid: {', '.join(texts)}."


def draw_switches(path: Path, of_set: Mapping[str, Any]) -> None:
    from common.plots import plot_switches
    from compare import about_bars

    rows = switches_with_scores(of_set)
    plot_switches(
        path,
        [row["t_switch"] for row in rows],
        [(row["score"]["mean"], row["difference"]["half_width"]) for row in rows],
        [row["divergence"] for row in rows],
        of_set["rules"],
        about_bars(rows[0]["label"]),
    )


def repeating(measured: Sequence[Mapping[str, Any]], repeated: Sequence[str]) -> str:
    """How much of the numbers the next run may find otherwise, and how much this one did."""
    lines = ["## How much a repeat may differ", ""]
    for of_set in measured:
        labels = [label for name in TABLES for label in of_set[name]["labels"]]
        widths = {}
        for name in ("score", "seconds_per_image"):
            relative = [(label[name]["half_width"] or 0) / label[name]["mean"] for label in labels]
            widths[name] = f"{percent(statistics.median(relative), 1)} ({percent(max(relative), 1)})"
        lines.append(
            f"- {of_set['name']}: half of the interval is, in the middle (at most), {widths['score']} of a score and "
            f"{widths['seconds_per_image']} of the seconds."
        )
    lines += [
        "",
        "On the same machine, with the same versions and seeds, training and samples repeat themselves but for the "
        "numbers of steps at equal time, which follow from measured times. Another CPU or version of torch rounds "
        "differently, and after thousands of steps of training its networks are other ones of the same kind, as with "
        "other seeds (`--seeds`).",
    ]
    if repeated:
        lines += [
            "",
            "Against the run before this one, row by row of the tables above; a test at the level of 5 % tells one in "
            "twenty apart by chance alone:",
            "",
            *repeated,
        ]
    return "\n".join(lines)


def comparison_table(labels: Sequence[Mapping[str, Any]], levels: Mapping[str, float]) -> str:
    """levels: of some labels, the root mean square distance of their images from full's."""
    from compare import flops_unit

    unit, name = flops_unit(max(label["flops_per_image"] for label in labels))
    rows = [
        (
            label["label"],
            shown(label["score"]),
            difference(label),
            f"{levels[label['label']]:.1f}" if label["label"] in levels else "",
            f"{1000 * label['seconds_per_image']['mean']:.2f}",
            f"{label['flops_per_image'] / unit:.3g}",
            f"{label['speed_up']:.2f}x",
        )
        for label in labels
    ]
    return "\n".join(
        markdown_table(("", "score", "minus full", "levels", "ms/image", f"{name}/image", "speed-up"), rows)
    )


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def shown(estimate: Mapping[str, float | None], sign: str = "") -> str:
    text = f"{estimate['mean']:{sign}.2f}"
    return text if estimate["half_width"] is None else f"{text} ± {estimate['half_width']:.2f}"


def difference(label: Mapping[str, Any]) -> str:
    """To the first label; nothing for that one itself."""
    of = label["difference"]
    return "" if of is None or of["mean"] == 0 == of["half_width"] else shown(of, "+")


def judged(label: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """In words, what its score is against the first one's."""
    of, scale = label["difference"], first["score"]["mean"]
    relative = percent(of["mean"] / scale, 1, "+")
    if of["half_width"] is None or abs(of["mean"]) <= of["half_width"]:
        return f"no difference in score from {first['label']} that these seeds could tell ({relative})"
    return f"the score is {'worse' if of['mean'] > 0 else 'better'} than that of {first['label']} ({relative})"


def beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Faster, and with a better mean score."""
    return bool(
        one["seconds_per_image"]["mean"] < other["seconds_per_image"]["mean"]
        and one["score"]["mean"] < other["score"]["mean"]
    )


def percent(share: float, digits: int = 0, sign: str = "") -> str:
    return f"{100 * share:{sign}.{digits}f} %"
