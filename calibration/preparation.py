"""The common part of the calibrations of a switch and of a plan: solver, images, allowed timesteps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibration.measure import choose_images
from calibration.settings import Measurement
from common.config import Config
from common.errors import InputError
from data import crop_of, open_dataset
from data.dataset import ImageDataset
from data.packing.latents import LatentSource, PackedLatents
from data.packing.packed import find_packed
from diffusion.matching import own_timesteps
from diffusion.solvers import Solver
from generation.run import shared_config, solver_of
from generation.settings import CalibrationSettings
from models.autoencoder import load_autoencoder
from models.loading import Network, Runnable, check_range, knows


@dataclass(frozen=True, eq=False)
class Preparation:
    """The inputs of a measurement of K networks, the full one last.

    times: for each network, its own timestep at each timestep of the sampler. known: the timesteps of the sampler at
    which it may run. dataset: None for sampled paths. indices: of the chosen images, or the numbers of the paths.
    """

    solver: Solver
    timesteps: Sequence[int]
    times: Sequence[Mapping[int, float]]
    known: Sequence[Collection[int]]
    dataset: ImageDataset | None
    indices: Sequence[int]

    @property
    def first(self) -> list[int]:
        """The first timestep of each network."""
        return [next(t for t in self.timesteps if t in able) for able in self.known]


def prepare(
    settings: Measurement, networks: Sequence[Network[Runnable]], device: torch.device, *, as_noise: bool = False
) -> Preparation:
    """as_noise: see `generation.run.solver_of`. Raises InputError for networks or images that do not fit."""
    solver, timesteps = solver_of(settings.solver, [network.config for network in networks], as_noise)
    times = [own_timesteps(network.config.diffusion_params, solver.schedule, timesteps) for network in networks]
    known: list[Collection[int]] = [timesteps] * len(networks)
    if not settings.allow_outside_range:
        advice = "the full network, to which the others are compared, must be trained on all timesteps"
        check_range(networks[-1], list(times[-1].values()), advice)
        known = [
            {t for t, own in of_network.items() if knows(network, own)}
            for network, of_network in zip(networks, times, strict=True)
        ]
    if idle := [network for network, able in zip(networks, known, strict=True) if not able]:
        raise InputError(f"{idle[0].path} was trained on none of the timesteps of this sampler")
    choice = settings.choice
    if choice.paths == "sampled":
        return Preparation(solver, timesteps, times, known, None, range(choice.n_images))
    dataset = open_images(choice, shared_config([network.config for network in networks]), device)
    indices = choose_images(dataset, choice.n_images, settings.seed)
    return Preparation(solver, timesteps, times, known, dataset, indices)


def open_images(choice: CalibrationSettings, config: Config, device: torch.device) -> ImageDataset:
    """The real images in the form that a network with this description takes.

    For a network of latents these are the packed latents of the dataset if there are any, else its images, which the
    autoencoder of the description encodes on demand. Raises InputError if they do not fit the network.
    """
    assert choice.dataset is not None, "a calibration without images"
    channels, side, _ = config.model_params.image_shape
    crop = crop_of(choice.dataset, choice.crop or (config.crop if config.dataset == choice.dataset else None))
    wanted: dict[str, Any] = {"num_classes": config.model_params.num_classes, "crop": crop}
    autoencoder = config.autoencoder
    packed = find_packed(choice.dataset, choice.data_path, img_size=side, in_chans=channels, **wanted)
    if isinstance(packed, PackedLatents) and autoencoder and packed.scale_factor != autoencoder.scale_factor:
        raise InputError(
            f"{packed.folder} was packed with scale_factor {packed.scale_factor}, but the networks have "
            f"{autoencoder.scale_factor}"
        )
    if packed is not None:
        return packed
    if autoencoder is None:
        return open_dataset(choice.dataset, choice.data_path, img_size=side, in_chans=channels, **wanted, packed=False)
    if autoencoder.checkpoint_path is None:
        raise InputError(
            "the networks make latents: give --autoencoder_checkpoint_path to encode the images, or pack their latents "
            "with pack.py"
        )
    path = Path(autoencoder.checkpoint_path)
    encoder = load_autoencoder(path, autoencoder.scale_factor, device)
    pixels = side * encoder.downsampling
    images = open_dataset(choice.dataset, choice.data_path, img_size=pixels, in_chans=3, **wanted, packed=False)
    return LatentSource(images, encoder, path, device)
