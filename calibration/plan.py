"""A calibration of everything that the networks can do, from the networks to the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    Source,
    divergence_weights,
    measure_divergence,
    time_predictors,
    ways_of,
)
from calibration.settings import Measurement
from common.devices import DTYPES, Stopwatch
from diffusion.sampling import Denoiser
from generation.denoisers import stage_denoiser
from generation.run import denoiser_of, guide
from generation.settings import SavingSettings
from generation.stages import PlannedStage
from models.backbone import Backbone
from models.early_exit import EarlyExitUViT
from models.inference import BackboneDenoiser
from models.loading import Network, Runnable

MOST_EXITS = 6  # layers of an early-exit model that are tried
ALONE = ("network", "exit", "correct", "reuse", "hold")  # mechanisms, in the order of tables


class Measured(NamedTuple):
    """A plan as a whole, along paths that it was not chosen on: means and standard errors, per dimension."""

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


def calibrate_plan(
    settings: Measurement, networks: Sequence[Network[Runnable]], device: torch.device
) -> PlanCalibration:
    """Measure the prices and choose the plan. Converts the networks to the working precision.

    Raises InputError if the networks do not fit each other, or no plan is as fast as asked.
    """
    ground = prepare(settings, networks, device, as_noise=True)
    running = [
        BackboneDenoiser(network.module, of_network, DTYPES[settings.precision], device)
        for network, of_network in zip(networks, ground.times, strict=True)
    ]
    predictors = make_predictors(settings, networks, running, ground)
    config = networks[-1].config
    shape, classes = config.model_params.image_shape, config.classes
    seconds = time_predictors(
        *(predictors, ground.known, ground.solver, ground.timesteps, shape, len(classes), settings.batch_size, device)
    )
    ways, sources = ways_of(predictors, seconds, names_of(networks))

    def walk(indices: Sequence[int], purpose: str) -> Walk:
        return Walk(
            predictors.networks[-1],
            *(ground.solver, ground.timesteps, ground.dataset, indices),
            conditional=bool(classes),
            batch_size=settings.batch_size,
            seed=settings.seed,
            device=device,
            image_shape=shape,
            classes=classes,
            purpose=purpose,
            quiet=settings.quiet,
        )

    weights, random = divergence_weights(ground.solver, ground.timesteps)
    blank = np.zeros((len(sources), len(ground.timesteps), 2))
    choose(settings, Prices(ground.timesteps, blank, ways, seconds.overhead), only_seconds=True)  # before long work
    divergence = measure_divergence(predictors, ground.known, sources, walk(ground.indices, "calibration"), weights)
    if random:  # the last step draws no noise: another network than the full one would be infinitely far from it
        divergence[[source != Source("network", predictors.full) for source in sources], -1] = np.nan
    prices = Prices(ground.timesteps, divergence.astype(float), ways, seconds.overhead)
    joint = frontier(prices)
    chosen, rule = choose(settings, prices, joint)
    fresh = walk(other_images(settings, ground), "checking a plan")
    denoisers = denoisers_of(prices, chosen, networks, running, settings, ground)
    return PlanCalibration(
        settings=settings,
        networks=networks,
        prices=prices,
        joint=joint,
        alone={name: frontier(prices.only(name)) for name in ALONE if any(way.mechanism == name for way in ways[1:])},
        chosen=chosen,
        rule=rule,
        measured=measure_plan(denoisers, fresh, weights, seconds.overhead, device),
        random=random,
        dimensions=int(np.prod(shape)),
        n_paths=divergence.shape[-1],
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
    def readable(k: int, denoiser: Denoiser) -> Denoiser:
        config = networks[k].config
        return guide(config, denoiser_of(denoiser, config, ground.solver), settings.guidance_scale)

    denoisers, savings, outer = [], [], 1
    exits: dict[tuple[int, int], Denoiser] = {}
    middles: dict[int, GivenMiddle] = {}
    for k, (network, runs) in enumerate(zip(networks, running, strict=True)):
        module = network.module
        if isinstance(module, EarlyExitUViT):
            depth = module.num_layers
            layers = np.linspace(0, depth, min(depth, MOST_EXITS) + 1).round().astype(int).tolist()[:-1]
            exits |= {(k, layer): readable(k, runs.leaving_at(layer)) for layer in layers}
            savings.append(SavingSettings(exit_layer=depth))
        else:
            savings.append(SavingSettings())
            if can_reuse(module, outer):
                middles[k] = GivenMiddle(runs.around(outer))
                middles[k].denoiser = readable(k, middles[k].raw)
        denoisers.append(middles.get(k) or readable(k, runs))
    return Predictors(denoisers, savings, exits, middles, outer)


def can_reuse(module: Backbone, outer: int) -> bool:
    """Whether most blocks of a network lie in its middle."""
    return module.has_middle and 2 * len(module.middle(outer)) > module.config.num_blocks


def choose(
    settings: Measurement, prices: Prices, joint: Sequence[PlanOption] = (), *, only_seconds: bool = False
) -> tuple[PlanOption, str]:
    """The plan and the rule. only_seconds: to see whether the rule can be kept; the divergence is not known yet."""
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
    """Indices of as many images, other ones if there are enough; of the same number of paths."""
    if ground.dataset is None:
        return ground.indices
    others = sorted(set(range(len(ground.dataset))) - set(ground.indices))
    if len(others) < len(ground.indices):
        return choose_images(ground.dataset, len(ground.indices), settings.seed + 1)
    picked = np.random.default_rng(settings.seed).choice(len(others), len(ground.indices), replace=False)
    return sorted(others[i] for i in picked)


def planned_stages(stages: Sequence[tuple[Way, int]], timesteps: Sequence[int], scale: float) -> list[PlannedStage]:
    """The stages of a plan, as sampler.py has them. scale: of guidance."""
    lowest = [*(timesteps[s] + 1 for _, s in stages[1:]), 0]
    return [
        PlannedStage(way.network, t_min, scale, "--guidance_scale", saving=way.saving, cheap=way.cheap)
        for (way, _), t_min in zip(stages, lowest, strict=True)
    ]


def denoisers_of(
    prices: Prices,
    option: PlanOption,
    networks: Sequence[Network[Runnable]],
    running: Sequence[BackboneDenoiser],
    settings: Measurement,
    ground: Preparation,
) -> list[Denoiser]:
    """The denoiser of each step of a plan, as sampler.py runs it."""
    stages, timesteps = stages_of_states(prices, option.states), ground.timesteps
    ends = [*(s for _, s in stages[1:]), len(timesteps)]
    denoisers: list[Denoiser] = []
    for planned, (_, start), end in zip(
        planned_stages(stages, timesteps, settings.guidance_scale), stages, ends, strict=True
    ):
        denoiser = stage_denoiser(planned, timesteps[start:end], networks, running, ground.solver)
        denoisers += [denoiser] * (end - start)
    return denoisers


@torch.inference_mode()
def measure_plan(
    denoisers: Sequence[Denoiser], walk: Walk, weights: np.ndarray, overhead: float, device: torch.device
) -> Measured:
    """Measure a plan as a whole along paths. overhead: seconds of a step outside the networks.

    denoisers: (S,) of each step. The times are those of the first batch, in which the full network runs beside it.
    """
    divergence = np.zeros(len(walk.indices))
    seconds = {"plan": 0.0, "full": 0.0}
    for at in walk:
        of_full = walk.solver.eps(at.output, at.x_t, at.t)
        timed = 0 in at.rows
        calls = {"full": walk.full, "plan": denoisers[at.step]} if timed else {"plan": denoisers[at.step]}
        for name, denoiser in calls.items():
            with (watch := Stopwatch(device)):
                output = denoiser(at.x_t, at.t, at.y)
            seconds[name] += watch.seconds if timed else 0.0
        values = mean_square(walk.solver.eps(output, at.x_t, at.t) - of_full)
        check_finite(values, "the plan", at.t)
        divergence[at.rows] += np.where(values == 0, 0.0, weights[at.step] * values)
    mean, se = mean_and_se(divergence[walk.whole])
    steps = len(walk.timesteps) * overhead
    return Measured(float(mean), float(se), (seconds["full"] + steps) / (seconds["plan"] + steps))
