"""The parts of a sampling run that both scripts share: solver, labels, noise, guidance, warm-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from common.config import SAMPLING_SCHEDULES, Config
from common.devices import check_compiler, pick_precision
from common.errors import InputError
from common.options import SolverSettings
from common.seeds import nth_seed
from data.imagenet import IMAGENET_CLASSES, label_of_name
from diffusion import NoiseSchedule
from diffusion.matching import predicting_noise
from diffusion.sampling import Denoiser, SeededNoise, Stage, guided, random_classes
from diffusion.solvers import Solver, make_solver, spaced_timesteps
from generation.settings import RunSettings

Settings = TypeVar("Settings", bound=RunSettings)
Labels = Callable[[Sequence[int]], Tensor | None]


def settled_speed(settings: Settings, device: torch.device) -> Settings:
    """The settings with the precision filled in. Raises InputError if the device does not support them."""
    speed = settings.speed
    if speed.compile:
        check_compiler(device)
    return replace(settings, speed=replace(speed, precision=pick_precision(speed.precision, device)))


def solver_of(settings: SolverSettings, configs: Sequence[Config], as_noise: bool = False) -> tuple[Solver, list[int]]:
    """The solver and its timesteps, falling. Raises InputError if a network does not support the settings.

    configs: of the networks. The noise schedule is that of the last network, unless the settings name another. Networks
    with one schedule and output keep their own, unless as_noise is set; any others become predictors of noise, see
    `readable`.
    """
    if settings.clip_x0 and any(config.autoencoder for config in configs):
        raise InputError("--clip_x0 is for pixels; latents reach beyond [-1, 1]")
    diffusion = configs[-1].diffusion_params.schedule
    if settings.sampling_schedule is not None:
        diffusion = SAMPLING_SCHEDULES[settings.sampling_schedule] | {"num_timesteps": diffusion["num_timesteps"]}
    schedule = NoiseSchedule(**diffusion)
    timesteps = spaced_timesteps(schedule.num_timesteps, settings.steps)
    alike = all(
        (config.diffusion_params.schedule, config.parametrization) == (diffusion, configs[-1].parametrization)
        for config in configs
    )
    native = alike and not as_noise and configs[-1].parametrization != "predict_velocity"
    parametrization = configs[-1].parametrization if native else "predict_noise"
    solver = make_solver(settings.solver, schedule, parametrization, settings.eta or 0.0, settings.clip_x0)
    return solver, timesteps


def shared_config(configs: Sequence[Config]) -> Config:
    """The description of the last network, with the last autoencoder that one of the networks names."""
    named = [each.autoencoder for each in configs if each.autoencoder and each.autoencoder.checkpoint_path]
    return replace(configs[-1], autoencoder=named[-1]) if named else configs[-1]


def settled_steps(settings: Settings, timesteps: Sequence[int]) -> Settings:
    """The settings with the number of steps filled in. Raises InputError for frames at timesteps outside the run."""
    if unmet := sorted(set(settings.timesteps_save) - set(timesteps)):
        raise InputError(f"--timesteps_save {unmet[0]}: not one of the {len(timesteps)} timesteps of this run")
    return replace(settings, solver=replace(settings.solver, steps=len(timesteps)))


def with_named_classes(settings: Settings, config: Config) -> Settings:
    """The settings with numbers for the names of --class_name.

    config: of the network. Raises InputError for a network without the classes of ImageNet, and for unknown names.
    """
    if not settings.class_name:
        return settings
    if len(config.classes) != IMAGENET_CLASSES or not (config.dataset or "imagenet").startswith("imagenet"):
        raise InputError(
            f"--class_name {settings.class_name[0]}: a class of the {IMAGENET_CLASSES} of ImageNet, but the network "
            f"has {len(config.classes)}{f' of {config.dataset}' if config.dataset else ''}; give --class_id"
        )
    return replace(settings, class_id=tuple(map(label_of_name, settings.class_name)), class_name=())


def labels_of(settings: RunSettings, config: Config, device: torch.device) -> Labels:
    """A function from the indices of B samples to their classes, (B,) int64; to None for an unconditional network.

    Raises InputError for a class that the network does not have.
    """
    classes, asked = config.classes, settings.class_id
    if asked == ("random",):
        return lambda indices: random_classes(classes, settings.seed, indices).to(device) if classes else None
    if not classes:
        raise InputError(f"--class_id {asked[0]}: the network is unconditional; leave it out")
    if wrong := [class_id for class_id in asked if class_id not in classes]:
        raise InputError(f"--class_id {wrong[0]}: the network has the classes 0..{classes[-1]}")
    return lambda indices: torch.tensor([asked[i % len(asked)] for i in indices], device=device)


def noise_of(seed: int, indices: Sequence[int], device: torch.device) -> SeededNoise:
    """The noise source of these samples: called with (C, H, W), it returns (B, C, H, W)."""
    return SeededNoise([nth_seed(seed, "samples", i) for i in indices], device)


def readable(
    denoiser: Denoiser,
    config: Config,
    solver: Solver,
    scale: float,
    option: str = "--guidance_scale",
    guides: Callable[[int], bool] = lambda t: True,
) -> Denoiser:
    """The denoiser of a network with guidance and the kind of output that the solver takes.

    config: of the network. scale: 0 turns guidance off. guides: whether there is guidance at t. Raises InputError for
    an output that cannot be converted, and for guidance of a network without a "no class", with the flag `option`.
    """
    if config.parametrization != solver.parametrization:
        if config.parametrization == "predict_previous":
            raise InputError(
                "a network that predicts x_{t-1} (predict_previous) works only with the steps of its own noise "
                "schedule, and cannot be held or corrected; leave out --sampling_schedule, hold_every and correct_every"
            )
        toward_data = config.diffusion_params.toward_data
        denoiser = predicting_noise(denoiser, solver.schedule, config.parametrization, toward_data)
    if scale == 0:
        return denoiser
    if config.no_class is None:
        raise InputError(
            f'{option} {scale:g}: the network has no "no class" '
            f"(num_classes={config.model_params.num_classes}, {len(config.classes)} of them real); leave it out"
        )
    return guided(denoiser, scale, config.no_class, guides)


@torch.inference_mode()
def warm_up(
    stages: Sequence[Stage],
    batches: Sequence[Sequence[int]],
    image_shape: tuple[int, int, int],
    labels: Labels,
    device: torch.device,
    *,
    compiled: bool,
    saving: bool = False,
) -> None:
    """Run the network of each stage once, so that the timing does not include the first calls.

    batches: the batches of this process; the warm-up has the size of the first. image_shape: (C, H, W). saving: a
    stage may forecast some of its steps, see `diffusion.forecast`.
    """
    if not batches:
        return
    x = torch.zeros(len(batches[0]), *image_shape, device=device)
    for stage in stages:
        with stage.session():
            for t in stage.timesteps[: 2 if saving else 1]:  # computed at the first, forecast at the second
                for _ in range(3 if compiled else 1):  # CUDA graphs are recorded on the second call
                    stage.denoiser(x, t, labels(batches[0]))
