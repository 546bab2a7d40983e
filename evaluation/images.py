"""Folders of finished images, as they are scored: nothing is resized or cropped."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from common.distributed import share
from common.errors import InputError
from common.images import open_image, to_tensor
from data.files import BROKEN, SUFFIXES

log = logging.getLogger(__name__)


class FinishedImages:
    """The images that lie directly in a folder, all of one size.

    Raises InputError for a folder without images. Other files are named in a warning.
    """

    def __init__(self, folder: Path):
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        self.folder = folder
        self.files = [path for path in entries if path.suffix.lower() in SUFFIXES and path.is_file()]
        stray = [path for path in entries if path not in set(self.files) and path.name != "report"]
        if stray:
            log.warning("%s: %d other files left out (%s, ...)", folder, len(stray), stray[0].name)
        if not self.files:
            raise InputError(f"{folder}: no images in this folder ({', '.join(sorted(SUFFIXES))})")
        first = self.open(self.files[0])
        self.in_chans = 1 if first.mode in ("L", "1", "I;16") else 3
        self.size = first.size

    def __len__(self) -> int:
        return len(self.files)

    @staticmethod
    def open(path: Path) -> Image.Image:
        try:
            with open_image(path) as image:
                image.load()
                return image
        except BROKEN as error:
            raise InputError(f"{path}: not readable as an image ({error})") from None

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """This process's share, uint8 (B, C, H, W). Raises InputError at an image that is broken or of another size."""
        for start in share(range(0, len(self.files), batch_size)):
            yield torch.stack([self._read(path) for path in self.files[start : start + batch_size]])

    def _read(self, path: Path) -> Tensor:
        image = self.open(path)
        if image.size != self.size:
            raise InputError(
                f"{path} is {image.size[0]} x {image.size[1]}, but {self.files[0].name} {self.size[0]} x "
                f"{self.size[1]}: images of one size are wanted"
            )
        return to_tensor(image, self.in_chans)
