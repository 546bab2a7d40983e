"""What every dataset offers, and the order in which training sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.errors import InputError


class ImageDataset(Dataset, ABC):
    """Images as uint8 tensors, with labels 0..K-1 (0 where it has none)."""

    random_flip = True  # whether training mirrors images unless told otherwise

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns images (B, C, H, W) uint8 and labels (B,) int64."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Everything the pixels depend on, as plain values: the provenance of scores, the key of caches."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]


class SeededBatches(Sampler[list[int]]):
    """Batches of indices from `start_step` on, for ever; each epoch is a permutation of its own.

    Which images make the batch of a step follows from (seed, step) alone, so training can go on from
    any step. A batch may reach over the end of an epoch, so that every image is seen equally often.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, start_step: int = 0):
        self.num_images, self.batch_size = num_images, batch_size
        self.seed, self.start_step = seed, start_step

    def permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_images)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, position = divmod(self.start_step * self.batch_size, self.num_images)
        order = self.permutation(epoch)
        while True:
            batch = order[position : position + self.batch_size]
            position += self.batch_size
            while position >= self.num_images:
                epoch, position = epoch + 1, position - self.num_images
                order = self.permutation(epoch)
                if position:
                    batch = np.concatenate([batch, order[:position]])
            yield batch.tolist()


def training_batches(
    dataset: ImageDataset, batch_size: int, seed: int, start_step: int, num_workers: int, pin_memory: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (images uint8 (B, C, H, W), labels (B,)); the batch of each step follows from the seed."""
    if batch_size > len(dataset):
        raise InputError(f"--batch_size {batch_size} is more than the {len(dataset)} images of the dataset")
    loader = DataLoader(
        dataset,
        batch_sampler=SeededBatches(len(dataset), batch_size, seed, start_step),
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )
    return iter(loader)


def in_order(dataset: ImageDataset, batch_size: int) -> Iterator[Tensor]:
    """All images once: uint8 (B, C, H, W) with B <= batch_size."""
    for start in range(0, len(dataset), batch_size):
        yield dataset.__getitems__(range(start, min(start + batch_size, len(dataset))))[0]


def check_labels(highest: int, num_classes: int, source: object) -> None:
    """Raises InputError if labels 0..highest do not fit a network of num_classes."""
    if 0 < num_classes <= highest:
        raise InputError(f"{source} has labels 0..{highest}, the network takes num_classes={num_classes}")


def _as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return tuple(torch.as_tensor(part) for part in batch)
