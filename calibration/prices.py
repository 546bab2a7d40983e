"""Measure the price of every way to save work, at each step: seconds, and divergence from the full network."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calibration.measure import At, Walk, check_finite, mean_square, seconds_of
from calibration.planning import Way
from diffusion.forecast import extrapolated
from diffusion.sampling import Denoiser, SeededNoise
from diffusion.solvers import Solver
from generation.settings import SavingSettings
from models.inference import Around

EVERY = (2, 3, 4, 6, 8)  # the intervals that are tried
EVERY_MIDDLE = (2, 3, 4)  # intervals of middle blocks; the measurement of each needs network calls
ORDERS = (0, 1)


class Source(NamedTuple):
    """The computation behind a prediction: "network" k; "exit", network k at a layer; or one of "correct" (with network
    k), "hold" (network k) and "reuse" (the middle of network k), of an order, `age` steps after it was computed.

    every: the steps between the last two computations, on which a forecast of order 1 depends; 0 for order 0.
    """

    kind: str
    network: int
    layer: int = 0
    order: int = 0
    age: int = 0
    every: int = 0


@dataclass(frozen=True, eq=False)
class Predictors:
    """The networks of a calibration as denoisers that predict eps, guided.

    networks: K of them, the full one last. savings: how a stage runs each alone. exits: {(k, layer): denoiser} of
    early-exit models. middles: {k: a network whose middle may be given}. outer: blocks on each side of a middle.
    """

    networks: Sequence[Denoiser]
    savings: Sequence[SavingSettings]
    exits: Mapping[tuple[int, int], Denoiser]
    middles: Mapping[int, GivenMiddle]
    outer: int = 1

    @property
    def full(self) -> int:
        return len(self.networks) - 1


class GivenMiddle:
    """A network around its middle, as a denoiser of eps: with the residual `given`, or computed for None.

    denoiser: made of `raw`, with guidance and so on. added: the residual of the last call.
    """

    def __init__(self, around: Around):
        self.around = around
        self.given: Tensor | None = None
        self.added: Tensor | None = None
        self.denoiser: Denoiser = self.raw

    def raw(self, x_t: Tensor, t: int, y: Tensor | None) -> Tensor:
        output, self.added = self.around(x_t, t, y, self.given)
        return output

    def __call__(self, x_t: Tensor, t: int, y: Tensor | None, given: Tensor | None = None) -> Tensor:
        self.given = given
        return self.denoiser(x_t, t, y)


class Seconds(NamedTuple):
    """Of a call of each predictor at one batch size; without: of a step without a network."""

    networks: Sequence[float]
    exits: Mapping[tuple[int, int], float]
    middles: Mapping[int, float]  # each with a given residual of the middle
    overhead: float


def ways_of(predictors: Predictors, seconds: Seconds, names: Sequence[str]) -> tuple[list[Way], list[Source]]:
    """The ways, the full network alone first, and the sources of the rows of their prices.

    names: of the networks. Ways that are not faster than the full network are left out.
    """
    full = predictors.full
    sources: dict[Source, int] = {}

    def row(source: Source) -> int:
        return sources.setdefault(source, len(sources))

    def plain(k: int, name: str, mechanism: str, source: Source, cost: float, saving: SavingSettings) -> Way:
        return Way(name, mechanism, k, saving, None, np.array([cost]), np.full((2, 1), row(source)))

    def periodic(
        name: str, kind: str, k: int, first: Source, costs: tuple[float, float], every: int, order: int
    ) -> Way:
        """costs: of the step that computes, and of those that forecast."""
        rows = [
            [row(first), *(row(_forecast(kind, k, order if later else 0, age, every)) for age in range(1, every))]
            for later in (False, True)
        ]
        cheap, network = (k, full) if kind == "correct" else (None, k)
        more = predictors.savings[network].described | {f"{kind}_every": every, f"{kind}_order": order}
        if kind == "reuse":
            more["reuse_outer"] = predictors.outer
        words = f"{name}, every {every}" + (", extrapolated" if order else "")
        costs_of_period = np.array([costs[0], *[costs[1]] * (every - 1)])
        return Way(words, kind, network, SavingSettings(**more), cheap, costs_of_period, np.array(rows))

    def whole(k: int) -> Source:
        return Source("network", k)

    ways = []
    for k in (full, *range(full)):
        ways.append(plain(k, names[k], "network", whole(k), seconds.networks[k], predictors.savings[k]))
    for (k, layer), cost in seconds.exits.items():
        saving = SavingSettings(exit_layer=layer)
        ways.append(plain(k, f"{names[k]} to layer {layer}", "exit", Source("exit", k, layer), cost, saving))
    for order in ORDERS:
        for every in EVERY:
            for k in range(len(names)):
                cost = seconds.networks[k]
                ways.append(periodic(f"{names[k]} held", "hold", k, whole(k), (cost, 0.0), every, order))
                if k != full and not predictors.savings[k].described:  # an early-exit model does not correct another
                    costs = (cost + seconds.networks[full], cost)
                    name = f"{names[full]} by {names[k]}, corrected"
                    ways.append(periodic(name, "correct", k, whole(full), costs, every, order))
        for every in EVERY_MIDDLE:
            for k, cost in seconds.middles.items():
                costs = (seconds.networks[k], cost)
                ways.append(periodic(f"{names[k]} with its middle reused", "reuse", k, whole(k), costs, every, order))
    quick = [way for way in ways[1:] if way.seconds.mean() < seconds.networks[full]]
    return [ways[0], *quick], list(sources)


def _forecast(kind: str, k: int, order: int, age: int, every: int) -> Source:
    return Source(kind, k, order=order, age=age, every=every if order else 0)


@torch.inference_mode()
def measure_divergence(
    predictors: Predictors,
    known: Sequence[Collection[int]],
    sources: Sequence[Source],
    walk: Walk,
    weights: np.ndarray,
) -> np.ndarray:
    """The divergence of each source from the full network along the paths: (R, S, N), per dimension.

    known: the allowed timesteps of each network. weights: (S,) of a squared distance of eps. NaN if a network may not
    run, or if nothing was computed so many steps before. Raises InputError for a prediction that is not finite.
    """
    distance = np.full((len(sources), len(walk.timesteps), len(walk.indices)), np.nan, np.float32)
    memory = Memory(predictors, known, max((source.age + source.every for source in sources), default=0))
    for at in walk:
        memory.note(at)
        of_full = walk.solver.eps(memory.outputs[predictors.full], at.x_t, at.t)
        for r, source in enumerate(sources):
            output = memory.prediction(source, at)
            if output is not None:
                values = mean_square(walk.solver.eps(output, at.x_t, at.t) - of_full)
                check_finite(values, f"network {source.network + 1} ({source.kind})", at.t)
                distance[r, at.step, at.rows] = weights[at.step] * values
    return distance[..., walk.whole]


class Memory:
    """The outputs of the predictors at the last steps of a batch of paths.

    span: the number of steps to remember.
    """

    def __init__(self, predictors: Predictors, known: Sequence[Collection[int]], span: int):
        self.predictors, self.known = predictors, known
        self.outputs: dict[int, Tensor] = {}  # of each network that may run at this step
        self.kept: deque[tuple[int, dict[tuple[str, int], Tensor]]] = deque(maxlen=span + 1)  # t, values; the last here

    def note(self, at: At) -> None:
        """Call all networks at a step; the full one was called for the path."""
        if at.step == 0:
            self.kept.clear()
        full, values = self.predictors.full, {}
        self.outputs = {full: at.output}
        for k, denoiser in enumerate(self.predictors.networks):
            if k != full and at.t in self.known[k]:
                self.outputs[k] = denoiser(at.x_t, at.t, at.y)
        for k, output in self.outputs.items():
            values["hold", k], values["correct", k] = output, at.output - output
            if k in self.predictors.middles:
                added = self.predictors.middles[k].added
                assert added is not None, "the network was called around its middle"
                values["reuse", k] = added
        self.kept.append((at.t, values))

    def prediction(self, source: Source, at: At) -> Tensor | None:
        """The output of a source at a step; None if it has none."""
        kind, k = source.kind, source.network
        if at.t not in self.known[k]:
            return None
        if kind == "network":
            return self.outputs[k]
        if kind == "exit":
            return self.predictors.exits[k, source.layer](at.x_t, at.t, at.y)
        ages = (source.age + source.every, source.age) if source.order else (source.age,)
        if max(ages) >= len(self.kept):
            return None
        known = [(t, values[kind, k]) for t, values in (self.kept[-1 - age] for age in ages) if (kind, k) in values]
        if len(known) < len(ages):
            return None
        forecast = extrapolated(known, at.t)
        if kind == "hold":
            return forecast
        if kind == "correct":
            return self.outputs[k] + forecast
        return self.predictors.middles[k](at.x_t, at.t, at.y, forecast)


@torch.inference_mode()
def time_predictors(
    predictors: Predictors,
    known: Sequence[Collection[int]],
    solver: Solver,
    timesteps: Sequence[int],
    image_shape: tuple[int, int, int],
    classes: int,
    batch_size: int,
    device: torch.device,
) -> Seconds:
    """Seconds of a call of each predictor, and of a step without a network; see `seconds_of`.

    classes: the number of classes of the networks; 0 for unconditional ones.
    """
    x = torch.randn(batch_size, *image_shape, device=device)
    y = torch.arange(batch_size, device=device) % classes if classes else None
    first = [next(t for t in timesteps if t in able) for able in known]
    tasks = {f"network {k}": partial(denoiser, x, first[k], y) for k, denoiser in enumerate(predictors.networks)}
    for (k, layer), denoiser in predictors.exits.items():
        tasks[f"network {k} to layer {layer}"] = partial(denoiser, x, first[k], y)
    for k, middle in predictors.middles.items():
        middle(x, first[k], y)
        tasks[f"network {k} around"] = partial(middle, x, first[k], y, middle.added)

    noise = SeededNoise(range(batch_size), device)
    # The noise is drawn for this many steps at once.
    few = list(zip(timesteps, [*timesteps[1:], -1], strict=True))[: SeededNoise.MOST_CALLS]

    def steps() -> None:
        solver.begin(timesteps)
        for t, s in few:
            solver.step(x, x, t, s, lambda: noise(*image_shape))

    seconds = seconds_of({**tasks, "steps": steps}, f"network {predictors.full}", device)
    return Seconds(
        [seconds[f"network {k}"] for k in range(len(predictors.networks))],
        {(k, layer): seconds[f"network {k} to layer {layer}"] for k, layer in predictors.exits},
        {k: seconds[f"network {k} around"] for k in predictors.middles},
        seconds["steps"] / len(few),
    )
