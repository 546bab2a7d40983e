"""Any folder of images: nested, of mixed formats and sizes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.errors import InputError
from common.images import to_tensor
from data.dataset import ImageDataset, check_labels

log = logging.getLogger(__name__)

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
# What Pillow raises on files that are cut short, no image at all, or unreasonably large.
BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class ImageFolder(ImageDataset):
    """The images below a folder, resized and centre-cropped to squares.

    With num_classes > 0 the first level of sub-folders, in sorted order, gives labels 0..K-1.
    A file that cannot be read is named in a warning, once, and the next readable one takes its place.
    """

    def __init__(self, data_path: Path | None, *, img_size: int, in_chans: int, num_classes: int = -1):
        if data_path is None:
            raise InputError("--dataset folder: say where with --data_path")
        if not data_path.is_dir():
            raise InputError(f"--data_path {data_path}: no such folder")
        if in_chans not in (1, 3):
            raise InputError(f"in_chans={in_chans}: a folder of images gives 1 (grey) or 3 (RGB)")
        self.root, self.img_size, self.in_chans = data_path, img_size, in_chans
        self.files = [path for path in find_images(data_path) if self._opens(path)]
        if not self.files:
            raise InputError(f"--data_path {data_path}: no readable images ({', '.join(sorted(SUFFIXES))})")
        self.classes = self._find_classes() if num_classes > 0 else []
        check_labels(len(self.classes) - 1, num_classes, data_path)
        self._broken: set[int] = set()

    def _find_classes(self) -> list[str]:
        if loose := [path for path in self.files if path.parent == self.root]:
            raise InputError(
                f"--data_path {self.root}: {loose[0].name} lies in no sub-folder, so it has no class; "
                "give every class a folder, or train without classes (--num_classes -1)"
            )
        return sorted({path.relative_to(self.root).parts[0] for path in self.files})

    @staticmethod
    def _opens(path: Path) -> bool:
        """Whether the header is that of an image; the pixels are met when they are needed."""
        try:
            with Image.open(path):
                return True
        except BROKEN as error:
            log.warning("skipped %s: not readable as an image (%s)", path, error)
            return False

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen, images = zip(*map(self._readable, indices), strict=True)
        labels = [
            self.classes.index(self.files[i].relative_to(self.root).parts[0]) if self.classes else 0 for i in chosen
        ]
        return torch.stack(images), torch.tensor(labels)

    def _readable(self, index: int) -> tuple[int, Tensor]:
        """The image, or the next one that can be read: the same one every time, so runs can be repeated."""
        for step in range(len(self.files)):
            i = (index + step) % len(self.files)
            if i in self._broken:
                continue
            try:
                return i, self._decode(self.files[i])
            except BROKEN as error:
                self._broken.add(i)
                log.warning("skipped %s: the image is broken (%s)", self.files[i], error)
        raise InputError(f"--data_path {self.root}: no image can be read")

    def _decode(self, path: Path) -> Tensor:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("P", "LA", "RGBA", "PA"):  # transparent pixels become white, not arbitrary
                rgba = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            square = ImageOps.fit(upright.convert("RGB"), (self.img_size,) * 2, Image.Resampling.BICUBIC)
            return to_tensor(square, self.in_chans)

    def describe(self) -> dict[str, Any]:
        listing = hashlib.sha256()
        for path in self.files:
            about = path.stat()
            listing.update(f"{path.relative_to(self.root)}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
        return {
            "dataset": "folder",
            "folder": str(self.root.resolve()),
            "files_sha256": listing.hexdigest(),
            "images": len(self),
            "img_size": self.img_size,
            "in_chans": self.in_chans,
            "transform": "resize the shorter side (bicubic), centre crop",
        }


def find_images(folder: Path) -> list[Path]:
    """Files below the folder that are named like images, sorted; hidden ones are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
