"""MNIST (LeCun et al. 1998): the 60,000 training images of handwritten digits, from the IDX files."""

from __future__ import annotations

import gzip
import math
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import InputError
from common.files import writable_folder
from data import DEFAULT_PATH, missing
from data.dataset import InMemoryDataset, check_labels, check_shape

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"  # or these with .gz
SIDE = 28
MOST_IMAGES = 2**17
GZIP = b"\x1f\x8b"  # the first bytes of a gzip file
UNSIGNED_BYTES = b"\0\0\x08"  # the first bytes of an IDX file of 8 bits; the next is the number of dimensions


class MNIST(InMemoryDataset):
    """Images and labels of the training set, held in memory (47 MB).

    The files are in one of `folders` in data_path, or in data_path itself. Raises InputError for a missing or a
    wrong file.
    """

    name = "mnist"
    folders: tuple[str, ...] = ("mnist", "MNIST/raw", "raw")  # the last two are torchvision's
    random_flip = False  # a mirrored 3 is not a digit

    def __init__(self, data_path: Path | None, *, img_size: int, in_chans: int, num_classes: int, crop: str):
        check_shape(f"the images of {self.name}", (SIDE, 1), (img_size, in_chans))
        root = data_path or DEFAULT_PATH
        folder = self.find(root)
        if folder is None:
            raise missing(self.name, root)
        self.folder = folder
        self.images = _read_idx(folder, IMAGES, (SIDE, SIDE))[:, None]
        self.labels = _read_idx(folder, LABELS, ()).long()
        if len(self.images) != len(self.labels):
            raise InputError(f"{folder}: {len(self.images):,} images, but {len(self.labels):,} labels")
        if self.labels.max() > 9:
            raise InputError(f"{folder}: label {self.labels.max()} in {LABELS}, wanted 0..9")
        check_labels(9, num_classes, self.name)

    @classmethod
    def find(cls, root: Path) -> Path | None:
        """The folder of the two files, `root` or a folder in it; None if they are missing.

        All datasets of this format give their files the same names, so a folder named after the dataset comes first.
        """
        for folder in (*(root / name for name in cls.folders), root):
            if _file(folder, IMAGES) and _file(folder, LABELS):
                return folder
        return None

    @classmethod
    def download(cls, root: Path) -> None:
        """Download the files to `root`, if they are not there. Raises InputError without network."""
        if cls.find(root):
            return
        from torchvision import datasets

        with tempfile.TemporaryDirectory(prefix=".download.", dir=writable_folder(root)) as temporary:
            try:
                raw = Path(getattr(datasets, cls.__name__)(temporary, download=True).raw_folder)
            except (OSError, RuntimeError) as error:  # no network, no such page, or a wrong file
                why = " ".join(str(error).split())
                raise InputError(
                    f"--download: {cls.name} failed ({why}); get {IMAGES}.gz and {LABELS}.gz by hand and put them "
                    f"into {root / cls.folders[0]}"
                ) from None
            folder = writable_folder(root / raw.relative_to(temporary))
            for name in (IMAGES, LABELS):
                (raw / name).replace(folder / name)

    def describe(self) -> dict[str, Any]:
        return self.described(self.name, self.folder)


download = MNIST.download


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_idx(folder: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    """uint8 (N, *shape) of an IDX file, gzipped or not.

    IDX: the type and the number of dimensions in four bytes, each size as a big-endian integer of four bytes, then the
    values. Unpacks at most as many values as the header announces. N is bounded. Raises InputError for other files.
    """
    path = _file(folder, name)
    assert path, "the folder was chosen because it has both files"
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == GZIP
        with gzip.open(path) if zipped else path.open("rb") as file:
            head = file.read(8 + 4 * len(shape))
            count, *sizes = (
                int.from_bytes(head[start : start + 4], "big") for start in range(4, 8 + 4 * len(shape), 4)
            )
            if head[:4] != UNSIGNED_BYTES + bytes([1 + len(shape)]) or tuple(sizes) != shape:
                wanted = " x ".join(["N", *map(str, shape)])
                raise InputError(f"{path}: does not begin like an IDX file of {wanted} bytes; is it {name}?")
            if not 0 < count <= MOST_IMAGES:
                raise InputError(f"{path}: its header announces {count:,} images, wanted 1 to {MOST_IMAGES:,}")
            length = count * math.prod(shape)
            values = file.read(length + 1)
    except (OSError, EOFError, zlib.error) as error:  # no permission, cut short, damaged
        raise InputError(f"{path}: not readable, or cut short ({error})") from None
    if len(values) != length:
        found = "more" if len(values) > length else f"{len(values):,}"
        raise InputError(
            f"{path}: its header announces {length:,} bytes of values, but there are {found}; download the file again"
        )
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).view(count, *shape)
