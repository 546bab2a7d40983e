"""docs/results.md from what scripts/results.py measured: every number and every judgement comes of those."""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import read_json, replacing, write_json

WITHIN = 0.05  # of the best score: what a rule for the switch is to reach
TABLES = ("table", "variants", "scores")  # of a set, as compare.py writes them


def write_document(
    path: Path, measured: Sequence[Mapping[str, Any]], machine: Mapping[str, Any], seconds: float, quick: bool = False
) -> list[str]:
    """The document, and beside it its pictures and its numbers (.json), which the next run is held against.

    measured: of each set of images what its results.json holds. machine: of benchmarking.measure. seconds: it took.
    quick: say that the numbers are worth nothing. Returns lines on what the run before, if there was one, found too.
    """
    about = ", ".join(f"{key} {value}" for key, value in machine.items() if isinstance(value, str | int))
    numbers, before = numbers_of(measured, about), path.with_suffix(".json")
    earlier = read_json(before) if before.exists() else None
    if earlier and earlier["sets"] == numbers["sets"]:  # nothing was measured since
        repeated = earlier["repeated"]
    else:
        repeated = held_against(earlier, numbers) if earlier else []
    sections = [introduction(measured, about, seconds, quick)]
    for of_set in measured:
        pictures = [path.with_name(f"{path.stem}_{of_set['name']}{suffix}.png") for suffix in ("", "_switch")]
        shutil.copyfile(of_set["table"]["picture"], pictures[0])
        draw_switches(pictures[1], of_set)
        sections += [section(of_set), methods(of_set, pictures[0].name)]
        sections += [training(of_set), switching(of_set, pictures[1].name)]
    sections.append(repeating(measured, repeated))
    with replacing(path) as temporary:
        temporary.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    write_json(before, numbers | {"repeated": repeated})
    return repeated


def numbers_of(measured: Sequence[Mapping[str, Any]], about: str) -> dict[str, Any]:
    """What another run may find too: of every row of every table."""
    kept = ("score", "difference", "speed_up")
    return {
        "machine": about,
        "seeds": measured[0]["table"]["labels"][0]["seeds"],
        "sets": {
            of_set["name"]: {
                "t_switch": of_set["t_switch"],
                **{
                    name: {label["label"]: {key: label[key] for key in kept} for label in of_set[name]["labels"]}
                    for name in TABLES
                },
            }
            for of_set in measured
        },
    }


def held_against(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two runs both found, set by set, as lines.

    Two means of independent runs agree where they are no farther apart than half of the interval of their difference:
    the root of the sum of the squares of theirs.
    """
    seeds = ", ".join(map(str, earlier["seeds"]))
    lines = [f"The run before this one (seeds {seeds}; {earlier['machine']}), row by row of the tables above:", ""]
    for name, of_set in now["sets"].items():
        if name not in earlier["sets"]:
            continue
        before = earlier["sets"][name]
        pairs = [
            (f"{label} ({table})", before[table][label], row)
            for table in TABLES
            for label, row in of_set[table].items()
            if label in before[table]
        ]
        counts = []
        for value, called in (("score", "scores"), ("difference", "differences to the first row")):
            both = [(label, old[value], new[value]) for label, old, new in pairs if old[value] and new[value]]
            apart = [label for label, old, new in both if not agree(old, new)]
            others = f" (not: {'; '.join(apart)})" if apart else ""
            counts.append(f"{len(both) - len(apart)} of {len(both)} {called} agree{others}")
        ratios = [abs(new["speed_up"] / old["speed_up"] - 1) for _, old, new in pairs]
        widths = percent(statistics.median(ratios), 1), percent(max(ratios), 1)
        counts.append(f"speed-ups are {widths[0]} apart in the middle, {widths[1]} at most")
        counts.append(f"the knee was {before['t_switch']}, it is {of_set['t_switch']}")
        lines.append(f"- {name}: {'; '.join(counts)}.")
    return lines


def agree(one: Mapping[str, float | None], other: Mapping[str, float | None]) -> bool:
    return abs(one["mean"] - other["mean"]) <= math.hypot(one["half_width"] or 0, other["half_width"] or 0)


def introduction(measured: Sequence[Mapping[str, Any]], about: str, seconds: float, quick: bool) -> str:
    table = measured[0]["table"]
    seeds = ", ".join(map(str, table["labels"][0]["seeds"]))
    lines = [
        "# Results",
        "",
        *(["**Made with `--quick`: it shows that everything works; the numbers are worth nothing.**", ""] * quick),
        f"Measured by `bash scripts/results.sh` in {seconds / 60:.0f} minutes; the same command, without `results/`, "
        f"repeats it and writes this page anew. Machine: {about}.",
        "",
        f"Each score is the mean over the seeds {seeds} ± half of its {percent(table['confidence'])} confidence "
        "interval (Student's t); lower is better. Each seed has networks of its own, all of them, and samples of its "
        "own. Differences are paired: the same seed, so the same full network and the same noise. An effect counts as "
        "one here if the interval of its difference leaves out 0. FLOPs do not depend on the machine, seconds do.",
        "",
        "Look at the samples, too: the features that scores are made of are those of a small classifier, which may not "
        "see what a person sees at once, such as single broken patches. And the knee's factor of 1.5 was settled on "
        "earlier trainings on these two sets, so they are "
        "no independent test of it.",
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
        comparison_table(labels),
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
        {**switch, **{key: label[key] for key in ("score", "difference")}, "measured_speed_up": label["speed_up"]}
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
    return row["score"]["mean"]


def slower(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """By the steps that the full network runs, which no machine's mood changes."""
    return row["steps_of_each"][1] > other["steps_of_each"][1]


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

    rows = switches_with_scores(of_set)
    plot_switches(
        path,
        [row["t_switch"] for row in rows],
        [(row["score"]["mean"], row["score"]["half_width"]) for row in rows],
        [row["divergence"] for row in rows],
        of_set["rules"],
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
            *repeated,
            "",
            "Two means agree if they are no farther apart than half of the interval of their difference.",
        ]
    return "\n".join(lines)


def comparison_table(labels: Sequence[Mapping[str, Any]]) -> str:
    from compare import flops_unit

    unit, name = flops_unit(max(label["flops_per_image"] for label in labels))
    rows = [
        (
            label["label"],
            shown(label["score"]),
            difference(label),
            f"{1000 * label['seconds_per_image']['mean']:.2f}",
            f"{label['flops_per_image'] / unit:.3g}",
            f"{label['speed_up']:.2f}x",
        )
        for label in labels
    ]
    return "\n".join(markdown_table(("", "score", "minus full", "ms/image", f"{name}/image", "speed-up"), rows))


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
    return (
        one["seconds_per_image"]["mean"] < other["seconds_per_image"]["mean"]
        and one["score"]["mean"] < other["score"]["mean"]
    )


def percent(share: float, digits: int = 0, sign: str = "") -> str:
    return f"{100 * share:{sign}.{digits}f} %"
