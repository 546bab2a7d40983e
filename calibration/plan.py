"""A calibration of a plan, from the networks to the stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from calibration.choice import knee, mean_and_se
from calibration.measure import Walk, check_finite, choose_images, mean_square
from calibration.planning import PlanOption, Prices, Way, best_plan, frontier, stages_of_states
from calibration.preparation import Preparation, prepare
from calibration.prices import (
    GivenMiddle,
    Predictors,
    Seconds,
    Source,
    measure_divergence,
    time_predictors,
    ways_of,
)
from calibration.settings import Measurement
from common.devices import DTYPES, Stopwatch
from diffusion.divergence import step_weights
from diffusion.sampling import Denoiser, split_timesteps
from generation.denoisers import stage_denoiser
from generation.run import readable
from generation.settings import SavingSettings
from generation.stages import PlannedStage
from models.backbone import Backbone
from models.early_exit import EarlyExitUViT
from models.inference import BackboneDenoiser
from models.loading import Network, Runnable

MOST_EXITS = 6  # layers of an early-exit model that are tried
ALONE = ("network", "exit", "correct", "reuse", "hold")  # mechanisms, in the order of tables


class Measured(NamedTuple):
    """A measurement of a whole plan on paths that the choice did not use: means and standard errors, per dimension."""

    divergence: float
    divergence_se: float
    speed_up: float  # of its calls, overhead included


@dataclass(frozen=True, eq=False)
class PlanCalibration:
    """The prices of the ways of K networks, the full one last, the choice, and its measurement.

    joint: the plans that are best at some price of a second, rising in speed. alone: the same for each mechanism.
    random: the sampler draws noise, so that divergence is in nats; else it is the sum of squared shifts.
    """

    settings: Measurement
    networks: Sequence[Network[Runnable]]
    prices: Prices
    joint: Sequence[PlanOption]
    alone: Mapping[str, Sequence[PlanOption]]
    chosen: PlanOption
    rule: str
    measured: Measured
    random: bool
    dimensions: int  # numbers in an image
    n_paths: int

    @property
    def stages(self) -> list[tuple[Way, int]]:
        """The stages of the chosen plan: each way, and the position of its first step."""
        return stages_of_states(self.prices, self.chosen.states)


class PlanMeasurement:
    """The predictors of K networks, the full one last, at the steps of a sampler, and the paths of the measurement.

    random: see `PlanCalibration`. Converts the networks to the working precision. Raises InputError if they do not
    fit each other.
    """

    def __init__(self, settings: Measurement, networks: Sequence[Network[Runnable]], device: torch.device):
        self.settings, self.networks, self.device = settings, networks, device
        self.ground = prepare(settings, networks, device, as_noise=True)
        self.running = [
            BackboneDenoiser(network.module, of_network, DTYPES[settings.precision], device)
            for network, of_network in zip(networks, self.ground.times, strict=True)
        ]
        self.predictors = make_predictors(settings, networks, self.running, self.ground)
        config = networks[-1].config
        self.shape, self.classes = config.model_params.image_shape, config.classes
        weights = step_weights(self.ground.solver, self.ground.timesteps)
        self.weights, self.random = weights.divergence, bool(weights.random.any())

    @cached_property
    def seconds(self) -> Seconds:
        ground, batch_size = self.ground, self.settings.batch_size
        return time_predictors(
            *(self.predictors, ground.known, ground.solver, ground.timesteps),
            *(self.shape, len(self.classes), batch_size, self.device),
        )

    @cached_property
    def ways(self) -> tuple[list[Way], list[Source]]:
        return ways_of(self.predictors, self.seconds, names_of(self.networks))

    @property
    def blank(self) -> Prices:
        """The prices in seconds, without divergence."""
        ways, sources = self.ways
        divergence = np.zeros((len(sources), len(self.ground.timesteps), 2))
        return Prices(self.ground.timesteps, divergence, ways, self.seconds.overhead)

    def prices(self) -> Prices:
        ways, sources = self.ways
        walk = self.walk(self.ground.indices, "calibration")
        divergence = measure_divergence(self.predictors, self.ground.known, sources, walk, self.weights)
        if self.random:  # the last step draws no noise: another network than the full one would be infinitely far
            divergence[[source != Source("network", self.predictors.full) for source in sources], -1] = np.nan
        return Prices(self.ground.timesteps, divergence.astype(float), ways, self.seconds.overhead)

    def measured(self, stages: Sequence[PlannedStage]) -> Measured:
        """Measure a whole plan on other paths than the prices.

        The last step of a random solver draws no noise and has no divergence; it is left out.
        """
        denoisers = denoisers_of(stages, self.networks, self.running, self.ground)
        walk = self.walk(other_images(self.settings, self.ground), "checking a plan")
        weights = np.where(np.arange(len(denoisers)) < len(denoisers) - self.random, self.weights, 0.0)
        return measure_plan(denoisers, walk, weights, self.seconds.overhead, self.device)

    def walk(self, indices: Sequence[int], purpose: str) -> Walk:
        return Walk(
            self.predictors.networks[-1],
            *(self.ground.solver, self.ground.timesteps, self.ground.dataset, indices),
            conditional=bool(self.classes),
            batch_size=self.settings.batch_size,
            seed=self.settings.seed,
            device=self.device,
            image_shape=self.shape,
            classes=self.classes,
            purpose=purpose,
            quiet=self.settings.quiet,
        )


def calibrate_plan(
    settings: Measurement, networks: Sequence[Network[Runnable]], device: torch.device
) -> PlanCalibration:
    """Measure the prices and choose the plan. Converts the networks to the working precision.

    Raises InputError if the networks do not fit each other, or no plan is as fast as asked.
    """
    measurement = PlanMeasurement(settings, networks, device)
    choose(settings, measurement.blank, only_seconds=True)  # before long work
    prices = measurement.prices()
    joint = frontier(prices)
    chosen, rule = choose(settings, prices, joint)
    return PlanCalibration(
        settings=settings,
        networks=networks,
        prices=prices,
        joint=joint,
        alone={name: frontier(prices.only(name)) for name in ALONE if prices.has(name)},
        chosen=chosen,
        rule=rule,
        measured=measurement.measured(planned_stages(prices, chosen, settings.guidance_scale)),
        random=measurement.random,
        dimensions=int(np.prod(measurement.shape)),
        n_paths=prices.divergence.shape[-1],
    )


def names_of(networks: Sequence[Network[Runnable]]) -> list[str]:
    """Short names of the networks."""
    if len(networks) == 1:
        return ["full"]
    if len(networks) == 2:
        return ["shallow", "full"]
    return [*(f"network {n}" for n in range(1, len(networks))), "full"]


def make_predictors(
    settings: Measurement,
    networks: Sequence[Network[Runnable]],
    running: Sequence[BackboneDenoiser],
    ground: Preparation,
) -> Predictors:
    def of_network(k: int, denoiser: Denoiser) -> Denoiser:
        return readable(denoiser, networks[k].config, ground.solver, settings.guidance_scale)

    denoisers, savings, outer = [], [], 1
    exits: dict[tuple[int, int], Denoiser] = {}
    middles: dict[int, GivenMiddle] = {}
    for k, (network, runs) in enumerate(zip(networks, running, strict=True)):
        module = network.module
        if isinstance(module, EarlyExitUViT):
            depth = module.num_layers
            layers = np.linspace(0, depth, min(depth, MOST_EXITS) + 1).round().astype(int).tolist()[:-1]
            exits |= {(k, layer): of_network(k, runs.leaving_at(layer)) for layer in layers}
            savings.append(SavingSettings(exit_layer=depth))
        else:
            savings.append(SavingSettings())
            if can_reuse(module, outer):
                middles[k] = GivenMiddle(runs.around(outer))
                middles[k].denoiser = of_network(k, middles[k].raw)
        denoisers.append(middles.get(k) or of_network(k, runs))
    return Predictors(denoisers, savings, exits, middles, outer)


def can_reuse(module: Backbone, outer: int) -> bool:
    """Whether most blocks of a network lie in its middle."""
    return module.has_middle and 2 * len(module.middle(outer)) > module.config.num_blocks


def choose(
    settings: Measurement, prices: Prices, joint: Sequence[PlanOption] = (), *, only_seconds: bool = False
) -> tuple[PlanOption, str]:
    """The plan and the rule. only_seconds: check only the speed; the divergence is not known yet."""
    choice = settings.choice
    if choice.speedup is not None:
        return best_plan(prices, seconds=prices.seconds_full / choice.speedup), f"--speedup {choice.speedup:g}"
    if choice.seconds is not None:
        return best_plan(prices, seconds=choice.seconds * settings.batch_size), f"--seconds {choice.seconds:g}"
    if only_seconds:
        return best_plan(prices, seconds=prices.seconds_full), ""
    if choice.budget is not None:
        return best_plan(prices, budget=choice.budget), f"--budget {choice.budget:g}"
    return knee(joint), "knee"


def other_images(settings: Measurement, ground: Preparation) -> Sequence[int]:
    """Indices of as many other images, if there are enough, or of as many paths."""
    if ground.dataset is None:
        return ground.indices
    others = sorted(set(range(len(ground.dataset))) - set(ground.indices))
    if len(others) < len(ground.indices):
        return choose_images(ground.dataset, len(ground.indices), settings.seed + 1)
    picked = np.random.default_rng(settings.seed).choice(len(others), len(ground.indices), replace=False)
    return sorted(others[i] for i in picked)


def planned_stages(prices: Prices, option: PlanOption, scale: float) -> list[PlannedStage]:
    """The stages of a plan for sampler.py. scale: the guidance scale."""
    stages = stages_of_states(prices, option.states)
    lowest = [*(prices.timesteps[s] + 1 for _, s in stages[1:]), 0]
    return [
        PlannedStage(way.network, t_min, scale, "--guidance_scale", saving=way.saving, cheap=way.cheap)
        for (way, _), t_min in zip(stages, lowest, strict=True)
    ]


def denoisers_of(
    stages: Sequence[PlannedStage],
    networks: Sequence[Network[Runnable]],
    running: Sequence[BackboneDenoiser],
    ground: Preparation,
) -> list[Denoiser]:
    """The denoiser of each step of a plan, the same as in sampler.py."""
    denoisers: list[Denoiser] = []
    own = split_timesteps(ground.timesteps, [stage.t_min for stage in stages])
    for stage, visited in zip(stages, own, strict=True):
        denoisers += [stage_denoiser(stage, visited, networks, running, ground.solver)] * len(visited)
    return denoisers


@torch.inference_mode()
def measure_plan(
    denoisers: Sequence[Denoiser], walk: Walk, weights: np.ndarray, overhead: float, device: torch.device
) -> Measured:
    """Measure a plan as a whole along paths. overhead: seconds of a step outside the networks.

    denoisers: (S,) of each step. The times are those of the first batch, in which the full network runs beside it.
    """
    divergence = np.zeros(len(walk.indices))
    of_plan, of_full_alone = Stopwatch(device), Stopwatch(device)
    for at in walk:
        of_full = walk.solver.eps(at.output, at.x_t, at.t)
        timed = len(of_plan.laps) < len(walk.timesteps)
        if timed:
            with of_full_alone:
                walk.full(at.x_t, at.t, at.y)
        with of_plan if timed else nullcontext():
            output = denoisers[at.step](at.x_t, at.t, at.y)
        values = mean_square(walk.solver.eps(output, at.x_t, at.t) - of_full)
        check_finite(values, "the plan", at.t)
        divergence[at.rows] += np.where(values == 0, 0.0, weights[at.step] * values)
    mean, se = mean_and_se(divergence[walk.whole])
    steps = len(walk.timesteps) * overhead
    return Measured(float(mean), float(se), (of_full_alone.seconds + steps) / (of_plan.seconds + steps))
