"""Previews: a few samples of the network at each log step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from common.config import Config
from common.distributed import is_main
from common.images import save_grid, to_uint8
from common.seeds import nth_seed
from diffusion import NoiseSchedule
from diffusion.matching import predicting_noise
from diffusion.sampling import Denoiser, NotFinite, SeededNoise, Stage, random_classes, sample
from diffusion.solvers import Solver, spaced_timesteps
from models.autoencoder import image_maker
from training.settings import LogSettings
from training.step import Learner

log = logging.getLogger(__name__)


def preview_maker(
    settings: LogSettings, config: Config, learner: Learner, denoiser: Denoiser, folder: Path, fsdp: bool
) -> Callable[[int], None] | None:
    """A function that writes DDIM samples of the averaged weights to folder/previews. All processes must call it.

    None, with a warning, if the network is trained on a part of the timesteps, or on latents without a decoder.
    """
    if not settings.preview_steps:
        return None
    schedule, device = NoiseSchedule(**config.diffusion_params.schedule), learner.device
    steps = min(settings.preview_steps, schedule.num_timesteps)
    timesteps = spaced_timesteps(schedule.num_timesteps, steps)
    trained = config.trained_timesteps
    if not all(t in trained for t in timesteps):
        log.warning(
            "no previews: the network is trained on t = %d..%d, but an image needs every t",
            trained[0],
            trained[-1],
        )
        return None
    path = config.autoencoder and config.autoencoder.checkpoint_path
    if config.autoencoder and not (path and Path(path).exists()):
        log.warning("no previews: they need the autoencoder, %s", path or "--autoencoder_checkpoint_path")
        return None
    decode = image_maker(config, device)
    parametrization = config.parametrization
    if parametrization == "predict_velocity":  # the velocity belongs to a differently scaled image
        denoiser = predicting_noise(denoiser, schedule, parametrization, config.diffusion_params.toward_data)
        parametrization = "predict_noise"
    solver, stages = Solver("ddim", schedule, parametrization), [Stage(denoiser, timesteps)]
    shape, numbers = config.model_params.image_shape, range(settings.n_samples)
    y = random_classes(config.classes, settings.sample_seed, numbers).to(device) if config.classes else None

    def preview(step: int) -> None:
        if not (is_main() or fsdp):  # a sharded network needs all processes
            return
        noise = SeededNoise([nth_seed(settings.sample_seed, "samples", i) for i in numbers], device)
        learner.network.eval()
        try:
            with nullcontext() if learner.ema is None else learner.ema.in_place():
                images = sample(stages, solver, noise, shape, y)
        except NotFinite as error:  # early in training; it continues
            log.warning("no preview of step %d: %s", step, error)
            return
        finally:
            learner.network.train()
        if is_main():
            (folder / "previews").mkdir(exist_ok=True)
            save_grid(folder / "previews" / f"step-{step}.png", to_uint8(decode(images)), settings.n_samples)

    return preview
