"""Images for scores, in a folder or in one .npz, without resizing or cropping."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.distributed import share
from common.errors import InputError
from common.image_files import BrokenImage, in_chans_of, read_image
from common.images import to_tensor
from data.files import SUFFIXES
from data.rows import RowsInZip

T = TypeVar("T")
log = logging.getLogger(__name__)

ARRAY = "arr_0"  # the name that np.savez gives to an unnamed array


class ManyImages(Protocol):
    """Images of one size."""

    path: Path
    size: tuple[int, int]  # width, height
    in_chans: int  # 1 or 3

    def __len__(self) -> int: ...

    def keep(self, n: int) -> None:
        """Keep only n evenly spaced images."""

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """The share of this process, uint8 (B, C, H, W). Raises InputError for an unreadable image."""


class FinishedImages:
    """The images directly in a folder, all of one size; in colour if any of them is (see `in_chans_of`).

    first: take only so many, the first by name. Raises InputError for a folder without images. Other files are named in
    a warning.
    """

    def __init__(self, folder: Path, first: int | None = None):
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        self.path = folder
        self.files = [path for path in entries if path.suffix.lower() in SUFFIXES and path.is_file()]
        stray = [path for path in entries if path not in set(self.files) and path.name != "report"]
        if stray:
            log.warning("%s: ignored %d other files (%s, ...)", folder, len(stray), stray[0].name)
        if not self.files:
            raise InputError(f"{folder}: no images in this folder ({', '.join(sorted(SUFFIXES))})")
        self.files = self.files[:first]
        self.size = self.open(self.files[0]).size
        self.in_chans = 3 if any(_read(in_chans_of, path) == 3 for path in self.files) else 1

    def __len__(self) -> int:
        return len(self.files)

    @staticmethod
    def open(path: Path) -> Image.Image:
        """The image: upright, opaque, of mode L or RGB. Raises InputError for an unreadable file."""
        return _read(read_image, path)

    def keep(self, n: int) -> None:
        self.files = [self.files[i] for i in evenly_spaced(len(self), n)]

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """The share of this process, uint8 (B, C, H, W). Raises InputError for a broken image or another size."""
        for start in share(range(0, len(self), batch_size)):
            yield torch.stack([self._tensor(path) for path in self.files[start : start + batch_size]])

    def _tensor(self, path: Path) -> Tensor:
        image = self.open(path)
        if image.size != self.size:
            raise InputError(
                f"{path} is {image.size[0]} x {image.size[1]}, but {self.files[0].name} {self.size[0]} x "
                f"{self.size[1]}: images of one size are wanted"
            )
        return to_tensor(image, self.in_chans)


class ImageArray:
    """The images of an .npz with arr_0, uint8 (N, H, W, 3), (N, H, W, 1) or (N, H, W), a common format of samples.

    Reads one batch at a time, so the file may be larger than memory. Raises InputError for other files.
    """

    def __init__(self, path: Path):
        self.path, self.rows = path, RowsInZip(path, ARRAY)
        shape = self.rows.shape
        if self.rows.dtype != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in ((), (1,), (3,)):
            raise InputError(f"{path}: {ARRAY} is {shape} {self.rows.dtype}, wanted (N, H, W, 3) or (N, H, W) uint8")
        if min(shape) < 1 or shape[1] * shape[2] > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise InputError(f"{path}: {ARRAY} is {shape}; it has no images, or too large ones")
        self.size, self.in_chans = (shape[2], shape[1]), 3 if shape[3:] == (3,) else 1
        self.chosen: Sequence[int] = range(shape[0])

    def __len__(self) -> int:
        return len(self.chosen)

    def keep(self, n: int) -> None:
        self.chosen = evenly_spaced(len(self), n)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """The share of this process, uint8 (B, C, H, W). Raises InputError if the file is damaged."""
        starts = share(range(0, len(self), batch_size))
        parts = [self.chosen[start : start + batch_size] for start in starts]
        width, height = self.size
        for pixels in self.rows.read(parts):
            yield torch.from_numpy(pixels.reshape(-1, height, width, self.in_chans)).permute(0, 3, 1, 2).contiguous()


def open_images(path: Path) -> ManyImages:
    """A folder, or an .npz with arr_0."""
    return FinishedImages(path) if path.is_dir() else ImageArray(path)


def evenly_spaced(total: int, n: int) -> list[int]:
    """n evenly spaced numbers of 0..total - 1, including the first and the last."""
    indices: list[int] = np.linspace(0, total - 1, n).round().astype(int).tolist()
    return indices


def _read(read: Callable[[Path], T], path: Path) -> T:
    try:
        return read(path)
    except BrokenImage as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
