"""A calibration from the networks to the choice."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from calibration.choice import (
    Option,
    Steps,
    cascades,
    check_reachable,
    choose,
    chosen_of_other_images,
    evaluated,
    switches,
)
from calibration.measure import Predictions, measure_predictions, seconds_per_call
from calibration.preparation import prepare
from calibration.settings import Measurement
from common.devices import DTYPES
from common.errors import InputError
from diffusion.divergence import step_weights
from diffusion.solvers import Solver, make_solver
from generation.denoisers import Call, flops_of
from generation.run import readable
from generation.settings import CalibrationSettings
from models.inference import BackboneDenoiser
from models.loading import Network, Runnable

log = logging.getLogger(__name__)

KNEE, KNEE_OF_DDPM = "knee", "knee of ddpm"  # rules; the others are called by their option


class Calibration(NamedTuple):
    """The measurement of K networks, the full one last, the options and the choice.

    last_shift: (K,) squared shift per dimension at the last step, which adds no noise; NaN for a network that was not
    trained there.
    """

    settings: Measurement
    networks: Sequence[Network[Runnable]]
    of_switches: bool  # two networks and one switch: each option is a switch
    predictions: Predictions
    steps: Steps
    random: bool  # a stochastic sampler: divergence in nats; else squared shifts
    last_shift: np.ndarray
    options: list[Option]  # rising in speed
    last_judged: Option  # the last option that the rule considered
    chosen: Option
    others: list[Option]  # choices for resampled images
    rule: str
    images_there: int  # in the dataset


def calibrate(settings: Measurement, networks: Sequence[Network[Runnable]], device: torch.device) -> Calibration:
    """Measure the networks and choose. Converts the networks to the working precision.

    Raises InputError if they do not fit each other, or cannot reach the requested speed-up.
    """
    choice, config = settings.choice, networks[-1].config
    check_growing(networks)
    ground = prepare(settings, networks, device)
    solver, timesteps, known, dataset = ground.solver, ground.timesteps, ground.known, ground.dataset
    assert dataset is not None, "a switch is measured on real images"
    denoisers = [
        readable(
            BackboneDenoiser(network.module, of_network, DTYPES[settings.precision], device),
            network.config,
            solver,
            settings.guidance_scale,
        )
        for network, of_network in zip(networks, ground.times, strict=True)
    ]
    shape, classes = config.model_params.image_shape, len(config.classes)
    costs = seconds_per_call(denoisers, ground.first, shape, classes, settings.batch_size, device)
    of_switches = len(networks) == 2 and not settings.free

    def options_of(steps: Steps) -> list[Option]:
        return switches(steps) if of_switches else cascades(steps, settings.free)

    if choice.speedup is not None:  # refuse an impossible speed-up before the measurement
        able = np.array([[0.0 if t in of_one else np.nan for t in timesteps] for of_one in known])
        both = np.stack([able, able], axis=-1)
        blank = Predictions(both, both, dimensions=1)
        check_reachable(options_of(weighed(blank, solver, timesteps, costs)[0]), choice.speedup)
    predictions = measure_predictions(
        *(denoisers, known, solver, timesteps, dataset, ground.indices),
        conditional=bool(config.classes),
        batch_size=settings.batch_size,
        seed=settings.seed,
        device=device,
        quiet=settings.quiet,
    )
    ask_if_trained(predictions)

    steps, random = weighed(predictions, solver, timesteps, costs)
    rule, judge = rule_of(choice), steps
    if rule == KNEE and not random:
        # Squared shifts grow too evenly to have a knee where scores begin to suffer.
        rule, ancestral = KNEE_OF_DDPM, make_solver("ddpm", solver.schedule, solver.parametrization)
        judge, _ = weighed(predictions, ancestral, timesteps, costs)
    judged = options_of(judge)
    choices = [
        choose(judged, choice.speedup, choice.budget),
        *chosen_of_other_images(judge, judged, choice.speedup, choice.budget),
    ]
    # The switches of ddpm are the first of the solver's own, which may include the shallow network at the last step.
    options = options_of(steps) if of_switches else [evaluated(steps, option.networks) for option in judged]
    chosen, *others = (options[judged.index(option)] for option in choices)
    last = step_weights(solver, timesteps).shift[-1] ** 2 * predictions.distance[:, -1].mean(axis=-1)
    return Calibration(
        settings=settings,
        networks=networks,
        of_switches=of_switches,
        predictions=predictions,
        steps=steps,
        random=random,
        last_shift=last,
        options=options,
        last_judged=options[len(judged) - 1],
        chosen=chosen,
        others=others,
        rule=rule,
        images_there=len(dataset),
    )


def ask_if_trained(predictions: Predictions) -> None:
    """Warn if the first network predicts better than the full one at most steps, on average over the images."""
    error = predictions.error.mean(axis=-1)  # (K, S)
    count, steps = int((error[0] < error[-1]).sum()), error.shape[1]  # a NaN is not smaller
    if count > steps / 2:
        log.warning(
            "the shallow network predicts better than the full one at %d of %d steps: is the full network trained?",
            *(count, steps),
        )


def weighed(
    predictions: Predictions, solver: Solver, timesteps: Sequence[int], costs: Sequence[float]
) -> tuple[Steps, bool]:
    """The divergence (or squared shift) at each step of a solver, and whether the solver is stochastic."""
    weights = step_weights(solver, timesteps)
    weight = weights.divergence[:, None]  # (S, 1)
    divergence, excess = weight * predictions.distance, weight * (predictions.error - predictions.error[-1])
    if random := bool(weights.random.any()):
        # The last step adds no noise: another network than the full one would be infinitely far from it.
        divergence[:-1, -1] = excess[:-1, -1] = np.nan
    return Steps(timesteps, np.array(costs), divergence, excess), random


def rule_of(choice: CalibrationSettings) -> str:
    if choice.speedup is not None:
        return f"--speedup {choice.speedup:g}"
    return KNEE if choice.budget is None else f"--budget {choice.budget:g}"


def check_growing(networks: Sequence[Network[Runnable]]) -> None:
    """Raises InputError unless each network has at least as many FLOPs as the one before it."""
    flops = [flops_of(Call(k, passes=1), networks) for k in range(len(networks))]
    for (one, less), (other, more) in itertools.pairwise(zip(networks, flops, strict=True)):
        if less > more:
            raise InputError(
                f"{one.path} is larger than {other.path}: give the networks from small to large, the full one last"
            )
