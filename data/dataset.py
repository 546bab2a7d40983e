"""The interface of datasets, and the batches of training."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.errors import InputError
from common.images import from_uint8
from common.signals import ASKING_TO_END, ignore
from data.workers import check_open_files

log = logging.getLogger(__name__)


class ImageDataset(Dataset[tuple[Tensor, Tensor]], ABC):
    """Images as uint8 tensors, with labels 0..K-1 (all 0 for a dataset without labels)."""

    random_flip = True  # whether training mirrors images by default
    needs_decoding = False  # whether its images are files that must be decoded
    kind: str = "pixels"  # the kind of its packed dataset, see data.packing.packed
    dtype: type[np.generic] = np.uint8  # type of its packed rows
    names: Sequence[str] | None = None  # file names of the images; None: the images are not single files
    labels: Sequence[int] | np.ndarray | Tensor | None = None  # labels of all images, 0..K-1; None: no labels
    left_out: Mapping[str, str] = MappingProxyType({})  # unreadable files and the reasons

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns images (B, C, H, W) uint8 and labels (B,) int64."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """All facts that decide the pixels, as plain values: the provenance of scores, and the key of caches."""

    def identity(self) -> dict[str, Any]:
        """Plain values that identify the images independently of their path.

        Two datasets are equal if `files_sha256` or `contents_sha256` (where present) is equal, and all else.
        """
        return {key: value for key, value in self.describe().items() if key != "source"}

    @cached_property
    def row_shape(self) -> tuple[int, ...]:
        """The shape (C, H, W) of one image."""
        return tuple(self[0][0].shape)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * np.dtype(self.dtype).itemsize

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def to_x0(self, images: Tensor, mirrored: Tensor | None, normal: Callable[..., Tensor]) -> Tensor:
        """Convert images of `__getitems__`, on any device, to training images: float (B, C, H, W).

        mirrored: (B,) bool, the images to mirror; None for no image. normal: called with a shape, returns noise
        (B, *shape), for datasets that draw latents.
        """
        x0 = from_uint8(images)
        return x0 if mirrored is None else torch.where(mirrored.view(-1, 1, 1, 1), x0.flip(-1), x0)

    def whole_and_broken(self, indices: Sequence[int]) -> tuple[Tensor, dict[int, str]]:
        """Images (B, C, H, W) in the order of the indices, and the reasons for broken ones by index.

        Packing, scores and calibration use it. Broken images are zeros here; `__getitems__` replaces them by others.
        """
        return self.__getitems__(indices)[0], {}

    def check_rows(self, rows: np.ndarray) -> None:
        """Check the first packed rows (N, *row_shape). Raises InputError if they cannot be right."""

    def name_of(self, index: int) -> str:
        """The file name of an image, or its number if the images are not single files."""
        return self.names[index] if self.names else str(index)


class InMemoryDataset(ImageDataset):
    """All images (N, C, H, W) uint8 and labels (N,) int64 as tensors."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        return self.images[chosen], self.labels[chosen]

    def described(self, dataset: str, source: Path) -> dict[str, Any]:
        """`describe` for images that were read from files. source: their file or folder."""
        digest = hashlib.sha256(self.images.numpy().data)
        digest.update(self.labels.numpy().data)
        _, channels, side, _ = self.images.shape
        return {
            "dataset": dataset,
            "source": str(source.resolve()),
            "files_sha256": digest.hexdigest(),
            "images": len(self),
            "img_size": side,
            "in_chans": channels,
            "crop": "none",
        }


class SeededBatches(Sampler[list[int]]):
    """Endless batches of indices from `start_step` on; each epoch is a new permutation.

    The images of a batch depend only on the seed and the step, so training can continue from any step. A batch may
    cross the end of an epoch, so that all images occur equally often.

    part: the rows of each batch for this process.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, start_step: int = 0, part: slice = slice(None)):
        self.num_images, self.batch_size, self.part = num_images, batch_size, part
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
            yield batch[self.part].tolist()


def training_batches(
    dataset: ImageDataset,
    batch_size: int,
    seed: int,
    start_step: int,
    num_workers: int,
    pin_memory: bool,
    part: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless pairs of images uint8 (B, C, H, W) and labels (B,); each batch depends only on the seed and the step.

    part: the rows of each batch for this process; the others are not read.
    """
    if batch_size > len(dataset):
        raise InputError(f"--batch_size {batch_size} is more than the {len(dataset)} images of the dataset")
    wanted = len(range(batch_size)[part])
    check_open_files(num_workers, FILES_PER_WORKER)
    per_message = _batches_per_message(dataset, wanted) if num_workers else 1
    loader = DataLoader(
        dataset,
        batch_sampler=_joined(iter(SeededBatches(len(dataset), batch_size, seed, start_step, part)), per_message),
        collate_fn=_as_message,
        num_workers=num_workers,
        worker_init_fn=_obey_parent_alone,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )
    return _apart(iter(loader), wanted)


FIRST_FEW = 3  # files that are named in a message, out of possibly thousands


def some_of(left_out: Mapping[str, str]) -> str:
    """ "755 files left out: a.png (why), b.png (why), c.png (why), ...", from names with reasons."""
    named = [f"{name} ({why})" for name, why in itertools.islice(left_out.items(), FIRST_FEW)]
    more = ["..."] if len(left_out) > FIRST_FEW else []
    text = f"{len(left_out):,} file{'s' * (len(left_out) > 1)} left out: {', '.join(named + more)}"
    return text.encode("utf-8", "backslashreplace").decode()  # not every name is UTF-8


def say_left_out(left_out: Mapping[str, str], source: object) -> None:
    """Warn about skipped files in one line. left_out: reasons by file name."""
    if left_out:
        log.warning("%s: %s", source, some_of(left_out))


def check_shape(images: str, wanted: tuple[int, int], given: tuple[int, int]) -> None:
    """Raises InputError unless the network takes images of this shape. wanted, given: img_size and in_chans."""
    if given != wanted:
        side, channels = wanted
        raise InputError(
            f"{images} are {side} x {side} {'in colour' if channels == 3 else 'and grey'}: wanted img_size {side} and "
            f"in_chans {channels}, got {given[0]} and {given[1]}"
        )


def check_labels(highest: int, num_classes: int, source: object) -> None:
    """Raises InputError if labels 0..highest do not fit a network of num_classes."""
    if 0 < num_classes <= highest:
        raise InputError(f"{source} has labels 0..{highest}, but the network has num_classes={num_classes}")


# Messages from a worker to its parent. A message takes about a millisecond, more than a batch of small images without
# decoding, so a message contains several batches. A tensor takes half of that, so labels are sent as an array.

MESSAGE_BYTES, MOST_BATCHES = 2**23, 4
FILES_PER_WORKER = 6  # in the parent: four ends of pipes, and the memory of two queued messages


def _batches_per_message(dataset: ImageDataset, batch_size: int) -> int:
    if dataset.needs_decoding:
        return 1
    return max(1, min(MOST_BATCHES, MESSAGE_BYTES // (batch_size * dataset.row_bytes)))


def _joined(batches: Iterator[list[int]], count: int) -> Iterator[list[int]]:
    """Endless batches of indices, several joined into one."""
    while True:
        yield list(itertools.chain.from_iterable(itertools.islice(batches, count)))


def _as_message(batch: Any) -> tuple[Tensor, np.ndarray]:
    images, labels = batch  # of `ImageDataset.__getitems__`, which the loader passes on like a list of items
    return images, labels.numpy()


def _apart(messages: Iterator[tuple[Tensor, np.ndarray]], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    try:
        for images, labels in messages:
            yield from zip(images.split(batch_size), torch.from_numpy(labels).split(batch_size), strict=True)
    except (OSError, RuntimeError) as error:  # the loader's error includes the traceback of a worker
        if "Too many open files" not in str(error):
            raise
        raise InputError("too many open files; raise their limit (ulimit -n), or give fewer --num_workers") from None


def _obey_parent_alone(worker: int) -> None:
    """In a loading process: ignore Ctrl-C and other signals, and end only on a SIGTERM by the parent."""
    ignore({signal.SIGINT, *ASKING_TO_END} - {signal.SIGTERM})
    if not hasattr(signal, "sigwaitinfo"):  # macOS, Windows
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
