"""What the calibrations of a switch and of a plan share: the solver, the images, and where each network may run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from calibration.measure import choose_images
from calibration.settings import Measurement
from common.errors import InputError
from data import open_dataset
from data.dataset import ImageDataset
from diffusion.matching import own_timesteps
from diffusion.solvers import Solver
from generation.run import solver_of
from models.loading import Network, Runnable, check_range, knows


@dataclass(frozen=True, eq=False)
class Preparation:
    """The ground of a measurement of K networks, the full one last.

    times: of each network its own timestep at each of the sampler's. known: the sampler's timesteps at which it may
    run. dataset: None for sampled paths. indices: of the chosen images, or the numbers of the paths.
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


def prepare(settings: Measurement, networks: Sequence[Network[Runnable]], *, as_noise: bool = False) -> Preparation:
    """as_noise: see `generation.run.solver_of`. Raises InputError for networks or images that do not fit."""
    solver, timesteps = solver_of(settings.solver, [network.config for network in networks], as_noise)
    times = [own_timesteps(network.config.diffusion_params, solver.schedule, timesteps) for network in networks]
    known: list[Collection[int]] = [timesteps] * len(networks)
    if not settings.allow_outside_range:
        advice = "the network that the others are held against must know them all"
        check_range(networks[-1], list(times[-1].values()), advice)
        known = [
            {t for t, own in of_network.items() if knows(network, own)}
            for network, of_network in zip(networks, times, strict=True)
        ]
    if idle := [network for network, able in zip(networks, known, strict=True) if not able]:
        raise InputError(f"{idle[0].path} was trained on none of the timesteps of this sampler")
    choice, config = settings.choice, networks[-1].config
    if choice.paths == "sampled":
        return Preparation(solver, timesteps, times, known, None, range(choice.n_images))
    channels, side, _ = config.model_params.image_shape
    assert choice.dataset is not None, "a calibration without images"
    dataset = open_dataset(
        choice.dataset,
        choice.data_path,
        img_size=side,
        in_chans=channels,
        num_classes=config.model_params.num_classes,
        crop=choice.crop or (config.crop if config.dataset == choice.dataset else None),
    )
    indices = choose_images(dataset, choice.n_images, settings.seed)
    return Preparation(solver, timesteps, times, known, dataset, indices)
