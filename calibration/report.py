"""Report a calibration as text, as a table, as files and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from calibration.choice import KNEE_RATIO, Option, mean_and_se
from calibration.planning import PlanOption
from calibration.run import KNEE, KNEE_OF_DDPM, Calibration
from calibration.settings import Measurement
from common import plots
from common.files import write_json
from common.settings import record
from common.tables import table
from generation.stages import StageEntry, StageFile, write_stages
from models.loading import Network, Runnable

ROWS = 14  # rows of the table, without the chosen one
WIDE = 0.05  # spread of the choice, as a part of all timesteps, that leads to a note


def in_words(calibration: Calibration) -> str:
    """The choice, its rule and its uncertainty, as text."""
    chosen, timesteps = calibration.chosen, calibration.steps.timesteps
    n = calibration.predictions.error.shape[-1]
    lines = [f"chosen: {name_of(calibration, chosen)}, predicted {chosen.speed_up:.2f}x ({why(calibration)})"]
    if calibration.of_switches:
        low, high = np.percentile([o.t_switch(timesteps) for o in calibration.others], [5, 95], method="nearest")
        lines.append(f"resampled sets of {n} images choose t_switch {low}..{high} (90 % of them)")
        if high - low > WIDE * (timesteps[0] + 1):
            if 4 * n <= calibration.images_there:
                lines.append(f"this is a wide range: --n_images {4 * n} would halve it")
            else:
                lines.append(f"this is a wide range, but the dataset has only {calibration.images_there} images")
    else:
        low, high = np.percentile([o.speed_up for o in calibration.others], [5, 95])
        lines.append(f"resampled sets of {n} images choose {low:.2f}x..{high:.2f}x (90 % of them)")
    if chosen.excess_se and abs(chosen.excess) < 2 * chosen.excess_se:
        enough = int(np.ceil(n * (2 * chosen.excess_se / abs(chosen.excess)) ** 2)) if chosen.excess else None
        more = ""
        if enough:
            more = f"; about --n_images {enough} would be enough"
            more += f", but the dataset has only {calibration.images_there}" * (enough > calibration.images_there)
        lines.append(f"too few images to tell whether the excess error is above or below 0{more}")
    return "\n".join(lines)


def why(calibration: Calibration) -> str:
    """The rule of the choice, or the reason why there was no other option."""
    rule, options, chosen = calibration.rule, calibration.options, calibration.chosen
    if len(options) == 1:
        return "no other network was trained on the first timesteps"
    if rule not in (KNEE, KNEE_OF_DDPM):
        return f"{rule}; no faster choice fulfils it" if chosen is options[0] and "--budget" in rule else rule
    curve = "" if rule == KNEE else " of the divergence that ddpm has at these steps"
    ratio = f"{KNEE_RATIO:g} times the average so far"
    if chosen is options[0]:
        return "no other choice is predicted to be faster"
    if chosen is calibration.last_judged:
        return (
            f"the curve{curve} has no knee: each second saved costs at most {ratio}; choose with --speedup or --budget"
        )
    return f"the knee{curve}: beyond it a second saved costs more than {ratio}"


def name_of(calibration: Calibration, option: Option) -> str:
    """The name of an option: the switch, or the number of timesteps of each network."""
    if calibration.of_switches:
        return f"t_switch {option.t_switch(calibration.steps.timesteps)}"
    return " + ".join(map(str, counts(calibration, option))) + " timesteps"


def blocks_of(network: Network[Runnable]) -> str:
    number = network.config.model_params.num_blocks
    return f"{number} block" + "s" * (number > 1)


def counts(calibration: Calibration, option: Option) -> list[int]:
    return [int((option.networks == k).sum()) for k in range(len(calibration.networks))]


def as_table(calibration: Calibration, scores: Mapping[int, Sequence[float]] | None = None) -> str:
    """A table of some options with the chosen one marked. scores: one per seed, by the number of the option."""
    options, dimensions = calibration.options, calibration.predictions.dimensions
    number = options.index(calibration.chosen)
    shown = {*np.linspace(0, len(options) - 1, min(ROWS, len(options))).round().astype(int).tolist(), number}
    shown |= set(scores or ())
    names = [blocks_of(network) for network in calibration.networks]
    unit = "nats" if calibration.random else "shift^2"
    head = ["", *["t_switch"] * calibration.of_switches, *names, "speed-up", unit, f"{unit}/dim", "excess"]
    head += ["score"] * bool(scores)
    rows = []
    for i in sorted(shown):
        option = options[i]
        row: list[object] = ["->" if i == number else ""]
        row += [option.t_switch(calibration.steps.timesteps)] if calibration.of_switches else []
        row += counts(calibration, option)
        row += divergence_cells(option, dimensions)
        row += [with_error(dimensions * option.excess, dimensions * option.excess_se)]
        if scores:
            row += [with_error(*mean_and_se_of(scores[i])) if i in scores else ""]
        rows.append(row)
    notes = [
        f"{unit}: the divergence of the sampler's path from the full network's, per image and per dimension, as "
        "estimated on noised real images"
        if calibration.random
        else f"{unit}: squared shifts of the image off the full network's steps, per image and per dimension",
        "excess: squared error of eps minus that of the full network, with the same weights; below 0 the choice "
        "predicts better than the full network",
    ]
    if calibration.random:
        others = zip(names[:-1], calibration.last_shift, strict=False)
        shifts = ", ".join(f"{name} {shift:.2g}" for name, shift in others if np.isfinite(shift))
        what = (
            f"; with another network this step would shift the image, squared and per dimension, by {shifts}"
            if shifts
            else ""
        )
        notes.append(f"the last step adds no noise, so the full network runs there{what}")
    return "\n".join([table(head, rows), *notes])


def divergence_cells(option: Option | PlanOption, dimensions: int) -> list[str]:
    """The speed-up, and the divergence per image and per dimension."""
    divergence = with_error(dimensions * option.divergence, dimensions * option.divergence_se)
    return [f"{option.speed_up:.2f}x", divergence, f"{option.divergence:.2g}"]


def with_error(mean: float, error: float) -> str:
    return f"{mean:.3g}" + (f" ± {error:.1g}" if error else "")


def mean_and_se_of(scores: Sequence[float]) -> tuple[float, float]:
    if len(scores) == 1:
        return scores[0], 0.0
    mean, error = mean_and_se(np.array(scores))
    return float(mean), float(error)


def stages_of(
    calibration: Calibration, option: Option, files: Sequence[tuple[Path, Path | None]]
) -> tuple[StageEntry, ...]:
    """The stages of an option. files: weights and YAML file of each network. A guidance scale of 0 is omitted."""
    timesteps, networks = calibration.steps.timesteps, option.networks
    starts = [i for i in range(len(networks)) if i == 0 or networks[i] != networks[i - 1]]
    highest = [timesteps[i] for i in starts]
    return tuple(
        StageEntry(
            checkpoint_path=files[networks[i]][0],
            config_path=files[networks[i]][1],
            t_min=lowest,
            t_max=t,
            guidance_scale=calibration.settings.guidance_scale or None,
        )
        for i, t, lowest in zip(starts, highest, [*(t + 1 for t in highest[1:]), 0], strict=True)
    )


def about(settings: Measurement, *, steps: int, n_images: int, random: bool, rule: str) -> dict[str, Any]:
    """The settings that decide the result of a calibration, of a switch or of a plan, and the rule, as plain values."""
    return {
        **record(settings.solver),
        "guidance_scale": settings.guidance_scale,
        "dataset": settings.choice.dataset,
        "seed": settings.seed,
        "steps": steps,
        "n_images": n_images,
        "precision": settings.precision,
        "batch_size": settings.batch_size,
        "measure": "divergence" if random else "squared shift",
        "rule": rule,
    }


def option_values(calibration: Calibration, option: Option) -> dict[str, Any]:
    dimensions = calibration.predictions.dimensions
    values: dict[str, Any] = {"steps_of_each": counts(calibration, option), "speed_up": option.speed_up}
    if calibration.of_switches:
        values = {"t_switch": option.t_switch(calibration.steps.timesteps)} | values
    for name in ("divergence", "excess"):
        mean, se = getattr(option, name), getattr(option, f"{name}_se")
        values |= {name: dimensions * mean, f"{name}_se": dimensions * se, f"{name}_per_dimension": mean}
    return values


def save(
    path: Path,
    calibration: Calibration,
    files: Sequence[tuple[Path, Path | None]],
    scores: Mapping[int, Sequence[float]] | None = None,
) -> None:
    """Write the stages to path (.yaml), all numbers to the .json and the picture to the .png of the same name.

    files: weights and YAML file of each network. scores: see `as_table`.
    """
    chosen, timesteps = calibration.chosen, calibration.steps.timesteps
    values, stages = option_values(calibration, chosen), stages_of(calibration, chosen, files)
    content = about(
        calibration.settings,
        steps=len(timesteps),
        n_images=calibration.predictions.error.shape[-1],
        random=calibration.random,
        rule=calibration.rule,
    )
    write_stages(path, StageFile(stages=stages, t_switch=values.get("t_switch"), calibration=content | values))
    networks = [
        {
            "checkpoint": str(network.path),
            "blocks": network.config.model_params.num_blocks,
            "ms_per_call": 1000 * float(seconds),
            **{name: over_images(values) for name, values in (("error", error), ("distance", distance))},
        }
        for network, seconds, error, distance in zip(
            calibration.networks,
            calibration.steps.costs,
            calibration.predictions.error,
            calibration.predictions.distance,
            strict=True,
        )
    ]
    options = [option_values(calibration, option) for option in calibration.options]
    for number, of_option in (scores or {}).items():
        options[number]["scores"] = list(of_option)
    content |= {
        "dimensions": calibration.predictions.dimensions,
        "timesteps": list(timesteps),
        "networks": networks,
        "options": options,
        "chosen": values,
    }
    write_json(path.with_suffix(".json"), content)
    draw(path.with_suffix(".png"), calibration, scores or {})


def over_images(values: np.ndarray) -> dict[str, list[float | None]]:
    """The mean and standard error over images of values (S, N); None for NaN."""
    mean, error = mean_and_se(values)
    return {
        name: [float(x) if np.isfinite(x) else None for x in numbers]
        for name, numbers in (("mean", mean), ("standard_error", error))
    }


def draw(path: Path, calibration: Calibration, scores: Mapping[int, Sequence[float]]) -> None:
    """Draw the divergence and speed-up of every option, the scores if any, and the errors of the networks over t.

    scores: see `as_table`.
    """
    panels = 3 if scores else 2
    figure = Figure(figsize=(6.5 * panels, 4.5), layout="constrained")
    left, *middle, right = figure.subplots(1, panels)
    options, timesteps = calibration.options, calibration.steps.timesteps
    speed_up = np.array([option.speed_up for option in options])
    x, x_label = speed_up, "predicted speed-up"
    if calibration.of_switches:
        x = np.array([option.t_switch(timesteps) for option in options])
        x_label = "t_switch (noise on the left, image on the right)"
    number = options.index(calibration.chosen)
    draw_divergence(left, calibration, x, number)
    if calibration.of_switches:
        other = left.twinx()
        other.plot(x, speed_up, color=plots.ORANGE, linestyle="--")
        other.set_ylabel("predicted speed-up", color=plots.ORANGE)
    for axes in middle:
        numbers = sorted(scores)
        means, spread = np.array([mean_and_se_of(scores[i]) for i in numbers]).T
        axes.errorbar(x[numbers], means, yerr=spread, color=plots.BLUE, marker="o", capsize=4)
        axes.set(ylabel="score", title="Scores of samples (mean and standard error over seeds)")
    for axes in (left, *middle):
        label = f"chosen: {name_of(calibration, calibration.chosen)}"
        axes.axvline(x[number], color=plots.GREY, linestyle=":", label=label)
        axes.set_xlabel(x_label)
        axes.grid(alpha=0.3)
        axes.margins(x=0)
        axes.legend(loc="upper left" if axes is left else "best")
        if calibration.of_switches:
            axes.invert_xaxis()
    labels = [f"{blocks_of(n)} ({n.path.parent.name}/{n.path.name})" for n in calibration.networks]
    draw_errors(right, labels, np.array(timesteps), calibration.predictions.error)
    plots.save(figure, path)


def draw_divergence(axes: Axes, calibration: Calibration, x: np.ndarray, chosen: int) -> None:
    """Draw the divergence. x: (O,), one value per option, rising in speed. chosen: the number of the chosen option."""
    dimensions = calibration.predictions.dimensions
    mean = dimensions * np.array([option.divergence for option in calibration.options])
    error = dimensions * np.array([option.divergence_se for option in calibration.options])
    label = "divergence (nats per image)" if calibration.random else "squared shift per image"
    axes.plot(x, mean, color=plots.BLUE, label=label)
    axes.fill_between(x, mean - 2 * error, mean + 2 * error, color=plots.BLUE, alpha=0.25, linewidth=0)
    axes.set_title("What a switch costs, and what it saves" if calibration.of_switches else "What speed costs")
    axes.set_ylabel(label, color=plots.BLUE)
    # Divergence grows extremely close to the image; the relevant part is before that.
    axes.set_ylim(0, max(4 * mean[chosen], mean[-1] / 20, 1e-12))


def draw_errors(axes: Axes, labels: Sequence[str], timesteps: np.ndarray, errors: np.ndarray) -> None:
    """Draw the errors. timesteps: (S,). errors: (K, S, N), squared errors of eps, NaN at timesteps without training."""
    lines = []
    for i, values in enumerate(errors):
        known = np.isfinite(values).all(axis=-1)
        t, (mean, error) = timesteps[known], mean_and_se(values[known])
        lines += axes.plot(t, mean, color=f"C{i}")
        axes.fill_between(t, mean - 2 * error, mean + 2 * error, color=f"C{i}", alpha=0.25, linewidth=0)
    axes.set(yscale="log", xlabel="timestep t (noise on the left, image on the right)")
    axes.set(ylabel="mean squared error of eps", title="Error of each network (band: 2 standard errors)")
    axes.margins(x=0)
    axes.invert_xaxis()
    axes.grid(alpha=0.3, which="both")
    plots.add_legend(axes, lines, labels)
