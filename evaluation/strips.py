"""Strips for the web page of compare.py: the networks of a run over its timesteps, read from the reports."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.errors import InputError
from common.files import read_arrays, read_json
from evaluation.comparison import Run, flops_unit

COLOURS, NETWORK_COLOURS = 8, 4  # of runs and of networks in webpage.css
HEIGHT = 34  # of a strip


class Stage(NamedTuple):
    """The part of a strip where one network runs."""

    t_max: int
    t_min: int
    network: str  # the file of its weights
    name: str
    flops: float  # of a call, per image
    about: str


class Strip(NamedTuple):
    """The stages of a run, from its noisiest timestep to its image."""

    stages: list[Stage]
    about: str  # the solver, and notes on the calls from the report
    timesteps: NDArray[np.int64] | None  # (S,), falling; only for early exit
    depths: NDArray[np.float64] | None  # (S,) in 0..1: the mean exit layer at each, as a part of all layers


def read_strip(run: Run) -> Strip:
    """Raises InputError for a report that sampler.py or eesampler.py did not write."""
    path, exits = (run.folder / "report" / name for name in ("statistics.json", "exits.npz"))
    statistics = read_json(path)
    try:
        stages = _stages(statistics)
        about = _about(statistics)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: not in the format of sampler.py ({error})") from None
    return Strip(stages, about, *(_exits(exits) if exits.exists() else (None, None)))


def _stages(statistics: Any) -> list[Stage]:
    networks, found = statistics.get("backbones") or [], []
    for stage in statistics["stages"]:
        number, t_max, t_min = (int(stage[key]) for key in ("network", "t_max", "t_min"))
        if not 0 <= t_min <= t_max:
            raise ValueError(f"t_min {t_min}, t_max {t_max}")
        network = networks[number] if number < len(networks) else {}
        name = str(network.get("name", f"network {number + 1}"))
        known = ("network", "t_max", "t_min")
        details = [f"{key.replace('_', ' ')} {value}" for key, value in stage.items() if key not in known and value]
        about = f"at t = {t_max}…{t_min}" + (f" ({', '.join(details)})" if details else "")
        flops = float(network.get("flops_per_image_call", 0)) or 1.0
        found.append(Stage(t_max, t_min, str(network.get("checkpoint", name)), name, flops, about))
    if not found:
        raise ValueError("no stages")
    return found


def _about(statistics: Any) -> str:
    settings, said = statistics["settings"], []
    if settings.get("steps"):
        said.append(f"{settings.get('solver', 'ddpm')}, {settings['steps']} steps")
    for network in statistics.get("backbones") or []:
        if "mean_exit_layer" in network:
            said.append(f"{network['mean_exit_layer']:.2f} blocks on average")
        if "timesteps_reusing" in network:
            said.append(f"middle blocks reused at {network['timesteps_reusing']} of {network['timesteps']} steps")
    return "; ".join(said)


def _exits(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The timesteps (S,) and the mean exit layers (S,), as a part of all. Raises InputError for another file."""
    arrays = read_arrays(path, ("timesteps", "exit_layer", "uncertainty"))
    try:
        timesteps, layers = arrays["timesteps"].astype(np.int64), arrays["exit_layer"].mean(axis=1)
        steps, depth = arrays["uncertainty"].shape
        if not steps or timesteps.shape != (steps,) or layers.shape != (steps,):
            raise ValueError(f"{timesteps.shape}, {layers.shape} and {steps} timesteps")
        return timesteps, layers / depth
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{path}: not in the format of eesampler.py ({error})") from None


def colour(number: int) -> str:
    """The colour of a label, in CSS."""
    return f"var(--run-{number % COLOURS})"


def badge(number: int) -> str:
    """The number of a label in its colour: the mark of the label in the table, the plot and the samples."""
    return f'<span class="badge" style="--run: {colour(number)}">{number + 1}</span>'


def what_ran(labels: Sequence[str], strips: Sequence[Strip]) -> str:
    """The strips as HTML, one per label: time runs from left to right, the height is the work of a call."""
    stages = [stage for strip in strips for stage in strip.stages]
    names: dict[str, str] = {}  # of networks, by their files
    works: dict[str, float] = {}
    for stage in stages:
        if names.get(stage.network, "backbone") == "backbone":  # the name of a network that runs alone
            names[stage.network] = stage.name
        works[stage.network] = max(works.get(stage.network, 0.0), stage.flops)
    colours = {network: f"var(--net-{i % NETWORK_COLOURS})" for i, network in enumerate(names)}
    most = max(works.values())
    unit, unit_name = flops_unit(most)
    key = "".join(
        f'<li><i style="background: {colours[network]}"></i>'
        f"{escape(name)}, {works[network] / unit:.3g} {unit_name}</li>"
        for network, name in names.items()
    )
    rows = []
    for number, (label, strip) in enumerate(zip(labels, strips, strict=True)):
        said = [f"{names[stage.network]} {stage.about}" for stage in strip.stages]
        paths = "".join(
            f'<path fill="{colours[stage.network]}" d="{outline(stage, strip, most)}">'
            f"<title>{escape(text)}</title></path>"
            for stage, text in zip(strip.stages, said, strict=True)
        )
        length = strip.stages[0].t_max + 1
        rows.append(
            f"<div><dt>{badge(number)}<span>{escape(label)}</span></dt>"
            f'<dd><svg class="strip" viewBox="0 0 {length} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">'
            f'{paths}</svg><span class="soft">{escape("; ".join([*said, strip.about]).rstrip("; "))}</span></dd></div>'
        )
    return (
        f'<ul class="key soft">{key}</ul><dl class="ran">{"".join(rows)}</dl><p class="soft under-strips">From noise '
        "on the left to the image on the right; the height is the work of a call.</p>"
    )


def outline(stage: Stage, strip: Strip, most: float) -> str:
    """The path of a stage in its strip: a box; for early exit a step per timestep. most: FLOPs of the full height."""
    first = strip.stages[0].t_max  # on the left
    left, right, height = first - stage.t_max, first + 1 - stage.t_min, HEIGHT * stage.flops / most
    if strip.timesteps is None or strip.depths is None:
        steps = f"V{HEIGHT - height:.1f}"
    else:
        starts, tops = (first - strip.timesteps).tolist(), (HEIGHT - height * strip.depths).tolist()
        steps = "".join(f"H{start}V{top:.1f}" for start, top in zip(starts, tops, strict=True))
    return f"M{left} {HEIGHT}{steps}H{right}V{HEIGHT}Z"
