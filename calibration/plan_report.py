"""Report the calibration of a plan as text, as tables, as files and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from calibration.choice import KNEE_RATIO
from calibration.plan import PlanCalibration, planned_stages
from calibration.planning import PlanOption, best_plan
from calibration.report import about, divergence_cells, with_error
from common import plots
from common.errors import InputError
from common.files import write_json
from common.tables import table
from generation.stages import PlannedStage, StageEntry, StageFile, write_stages

MECHANISMS = {
    "network": "switch of networks",
    "exit": "one exit layer per stage",
    "correct": "corrected",
    "reuse": "middle reused",
    "hold": "noise held",
}


def unit_of(calibration: PlanCalibration) -> str:
    return "nats" if calibration.random else "shift^2"


def in_words(calibration: PlanCalibration) -> str:
    """The choice, its rule, and its measurement as a whole, as text."""
    chosen, measured, unit = calibration.chosen, calibration.measured, unit_of(calibration)
    d = calibration.dimensions
    rule = calibration.rule
    if rule == "knee":
        rule = f"the knee: beyond it a second saved costs more than {KNEE_RATIO:g} times the average so far"
    count = len(calibration.stages)
    predicted = with_error(d * chosen.divergence, d * chosen.divergence_se)
    found = with_error(d * measured.divergence, d * measured.divergence_se)
    return "\n".join(
        [
            f"chosen: {count} stage{'s' * (count > 1)}, predicted {chosen.speed_up:.2f}x ({rule})",
            f"predicted {predicted} {unit} per image; the whole plan on other paths: {found} {unit}, "
            f"{measured.speed_up:.2f}x",
        ]
    )


def stage_table(calibration: PlanCalibration) -> str:
    """The denoisers and their timesteps, as a table."""
    timesteps, stages = calibration.prices.timesteps, calibration.stages
    ends = [*(start for _, start in stages[1:]), len(timesteps)]
    rows = [
        [f"{timesteps[start]}..{timesteps[end - 1]}", end - start, way.name]
        for (way, start), end in zip(stages, ends, strict=True)
    ]
    return table(["t", "steps", "runs"], rows)


def same_speed(calibration: PlanCalibration) -> dict[str, PlanOption | None]:
    """The best plan of each mechanism alone that is as fast as the chosen plan; None if there is none."""
    found: dict[str, PlanOption | None] = {}
    for name in calibration.alone:
        try:
            found[name] = best_plan(calibration.prices.only(name), seconds=calibration.chosen.seconds)
        except InputError:
            found[name] = None
    return found


def mechanism_table(calibration: PlanCalibration) -> str:
    """The cost of each mechanism alone at the speed of the chosen plan, and of the chosen plan, as a table."""
    d, unit = calibration.dimensions, unit_of(calibration)
    rows: list[list[object]] = []
    for name, option in same_speed(calibration).items():
        if option is None:
            most = max(o.speed_up for o in calibration.alone[name])
            rows.append([MECHANISMS[name], f"at most {most:.2f}x", "", ""])
        else:
            rows.append([MECHANISMS[name], *divergence_cells(option, d)])
    rows.append(["plan of all", *divergence_cells(calibration.chosen, d)])
    note = (
        f"{unit}: the divergence of the sampler's path from the full network's"
        if calibration.random
        else f"{unit}: the sum of squared shifts of the image off the full network's steps"
    )
    head = table(["alone, at this speed", "speed-up", unit, f"{unit}/dim"], rows)
    return f"{head}\n{note}, per image and per dimension"


def entries_of(
    planned: Sequence[PlannedStage], files: Sequence[tuple[Path, Path | None]], t_max: int
) -> tuple[StageEntry, ...]:
    """Stages for a file of stages. files: weights and YAML file of each network. t_max: of the first stage."""
    entries = []
    for stage in planned:
        (path, config), (cheap, cheap_config) = files[stage.network], (None, None)
        if stage.cheap is not None:
            cheap, cheap_config = files[stage.cheap]
        entries.append(
            StageEntry(
                checkpoint_path=path,
                config_path=config,
                t_min=stage.t_min,
                t_max=t_max,
                guidance_scale=stage.guidance_scale or None,
                correct_with=cheap,
                correct_with_config=cheap_config,
                **stage.saving.described,
            )
        )
        t_max = stage.t_min - 1
    return tuple(entries)


def about_plan(calibration: PlanCalibration) -> dict[str, Any]:
    """The settings that decide the result, the rule, and the plan's numbers, as plain values."""
    chosen, d = calibration.chosen, calibration.dimensions
    settings = about(
        calibration.settings,
        steps=len(calibration.prices.timesteps),
        n_images=calibration.n_paths,
        random=calibration.random,
        rule=calibration.rule,
    )
    return settings | {
        "paths": calibration.settings.choice.paths,
        "speed_up": chosen.speed_up,
        "divergence": d * chosen.divergence,
        "divergence_se": d * chosen.divergence_se,
        "divergence_per_dimension": chosen.divergence,
        "measured_divergence": d * calibration.measured.divergence,
        "measured_divergence_se": d * calibration.measured.divergence_se,
        "measured_speed_up": calibration.measured.speed_up,
    }


def save(path: Path, calibration: PlanCalibration, files: Sequence[tuple[Path, Path | None]]) -> None:
    """Write the stages to path (.yaml), all numbers to the .json and the picture to the .png of the same name.

    files: weights and YAML file of each network.
    """
    content, d = about_plan(calibration), calibration.dimensions
    planned = planned_stages(calibration.prices, calibration.chosen, calibration.settings.guidance_scale)
    stages = entries_of(planned, files, calibration.prices.timesteps[0])
    write_stages(path, StageFile(stages=stages, calibration=content))

    def curve(options: Sequence[PlanOption]) -> list[dict[str, float]]:
        return [
            {
                "speed_up": option.speed_up,
                "seconds_per_image": option.seconds / calibration.settings.batch_size,
                "divergence": d * option.divergence,
                "divergence_se": d * option.divergence_se,
            }
            for option in options
        ]

    content |= {
        "dimensions": d,
        "timesteps": list(calibration.prices.timesteps),
        "networks": [str(network.path) for network in calibration.networks],
        "ways": [
            {"name": way.name, "seconds_of_steps": way.seconds.tolist(), **way.saving.described}
            for way in calibration.prices.ways
        ],
        "joint": curve(calibration.joint),
        "alone": {name: curve(options) for name, options in calibration.alone.items()},
    }
    write_json(path.with_suffix(".json"), content)
    draw(path.with_suffix(".png"), calibration)


def draw(path: Path, calibration: PlanCalibration) -> None:
    """Draw divergence against time for each mechanism and the joint plan, and the ways of the chosen plan over t."""
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    curves, strip = figure.subplots(2, 1, height_ratios=[4, 1])
    draw_curves(curves, calibration)
    draw_strip(strip, calibration)
    plots.save(figure, path)


def draw_curves(axes: Axes, calibration: PlanCalibration) -> None:
    d, batch = calibration.dimensions, calibration.settings.batch_size
    series = [(MECHANISMS[name], options, "--", 1.2) for name, options in calibration.alone.items()]
    series.append(("plan of all", calibration.joint, "-", 2.4))
    for name, options, style, width in series:
        shown = [option for option in options if option.divergence > 0]  # the axis is logarithmic
        seconds = [option.seconds / batch for option in shown]
        axes.plot(seconds, [d * option.divergence for option in shown], style, linewidth=width, label=name)
    chosen = calibration.chosen
    if chosen.divergence > 0:
        axes.plot(chosen.seconds / batch, d * chosen.divergence, "o", color="black", label="chosen")
        measured = d * calibration.measured.divergence
        label = "chosen, measured as a whole"
        axes.plot(chosen.seconds / batch, measured, "o", color="black", fillstyle="none", label=label)
    whole = calibration.prices.seconds_full / batch
    axes.axvline(whole, color=plots.GREY, linestyle=":", label="full network")
    axes.set(
        yscale="log",
        xlim=(0, 1.03 * whole),
        xlabel="seconds per image",
        ylabel=f"{'divergence (nats)' if calibration.random else 'squared shift'} per image",
        title="Price of each way to save work",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="best")


def draw_strip(axes: Axes, calibration: PlanCalibration) -> None:
    """Draw a bar of the chosen plan's stages over the steps."""
    timesteps, stages = calibration.prices.timesteps, calibration.stages
    ends = [*(start for _, start in stages[1:]), len(timesteps)]
    names = list(dict.fromkeys(way.name for way, _ in stages))
    for (way, start), end in zip(stages, ends, strict=True):
        colour, first = f"C{names.index(way.name) % 10}", [w.name for w, _ in stages].index(way.name)
        label = way.name if stages[first][1] == start else None
        axes.barh(0, end - start, left=start, color=colour, edgecolor="white", label=label)
    ticks = np.unique(np.linspace(0, len(timesteps) - 1, min(len(timesteps), 6)).round().astype(int))
    axes.set_xticks(ticks + 0.5, [str(timesteps[i]) for i in ticks])
    axes.set(xlim=(0, len(timesteps)), yticks=[], xlabel="timestep t (noise on the left, image on the right)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.6), ncols=2, frameon=False)
