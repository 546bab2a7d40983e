"""Turn images into training batches of noisy images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from common.config import Config
from common.seeds import nth_seed
from data.dataset import ImageDataset
from diffusion import NoiseSchedule
from diffusion.ddpm import network_input, training_target


class Batch(NamedTuple):
    """The rows of a batch for this process."""

    x_t: Tensor  # (B, C, H, W)
    t: Tensor  # (B,) int64
    y: Tensor | None  # (B,) int64
    target: Tensor  # (B, C, H, W)

    def part(self, k: int, parts: int) -> Batch:
        """The k-th of `parts` parts of about equal size."""
        x_t, t, target = (rows.tensor_split(parts)[k] for rows in (self.x_t, self.t, self.target))
        return Batch(x_t, t, None if self.y is None else self.y.tensor_split(parts)[k], target)


class Draws:
    """Random numbers for some rows of a batch. Drawn for the whole batch, so that they depend only on the step."""

    def __init__(self, seed: int, batch_size: int, part: slice, device: torch.device):
        self.batch_size, self.part, self.device = batch_size, part, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def uniform(self) -> Tensor:
        """(rows,) in [0, 1)."""
        return torch.rand(self.batch_size, generator=self.generator, device=self.device)[self.part]

    def below(self, limit: int) -> Tensor:
        """(rows,) int64 in 0..limit - 1."""
        return torch.randint(limit, (self.batch_size,), generator=self.generator, device=self.device)[self.part]

    def normal(self, *shape: int) -> Tensor:
        """(rows, *shape)."""
        return torch.randn((self.batch_size, *shape), generator=self.generator, device=self.device)[self.part]


class BatchMaker:
    """Adds noise to images. The batch depends only on the seed, the step and the images.

    part: the rows of each batch for this process. label_dropout: the probability of "no class" instead of the class.
    """

    def __init__(
        self,
        config: Config,
        dataset: ImageDataset,
        *,
        seed: int,
        batch_size: int,
        part: slice,
        device: torch.device,
        random_flip: bool,
        label_dropout: float,
    ):
        self.config, self.dataset = config, dataset
        self.seed, self.batch_size, self.part, self.device = seed, batch_size, part, device
        self.random_flip, self.label_dropout = random_flip, label_dropout
        self.schedule = NoiseSchedule(**config.diffusion_params.schedule)

    def __call__(self, step: int, images: Tensor, labels: Tensor) -> Batch:
        """images, labels: B rows of `ImageDataset.__getitems__`. step: the number of finished optimiser steps."""
        draws = Draws(nth_seed(self.seed, "training steps", step), self.batch_size, self.part, self.device)
        mirrored = draws.uniform() < 0.5 if self.random_flip else None
        x0 = self.dataset.to_x0(images.to(self.device, non_blocking=True), mirrored, draws.normal)
        trained = self.config.trained_timesteps
        t = trained[0] + draws.below(len(trained))
        eps = draws.normal(*x0.shape[1:])
        x_t = self.schedule.q_sample(x0, t, eps)
        y = labels.to(self.device, non_blocking=True) if self.config.classes else None
        if self.label_dropout:
            no_class = self.config.no_class
            assert y is not None and no_class is not None, "label dropout without a class for none"
            y = torch.where(draws.uniform() < self.label_dropout, no_class, y)
        parametrization = self.config.parametrization
        target = training_target(self.schedule, x0, x_t, t, eps, parametrization)
        if self.config.diffusion_params.toward_data and parametrization == "predict_velocity":
            target = -target
        alpha_bar = self.schedule.at(self.schedule.alphas_cumprod, t, x0)
        return Batch(network_input(alpha_bar, x_t, parametrization), t, y, target)
