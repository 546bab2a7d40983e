"""ImageNet at 64 x 64 pixels: the downsampled batches (Chrabaszcz et al. 2017), or the full images, resized.

Both have the same labels here. The labels in the batches are those of the devkit of ILSVRC, 1..1000, which has another
order than the sorted WordNet ids.
"""

from __future__ import annotations

import hashlib
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError
from data import DEFAULT_PATH
from data.dataset import ImageDataset, check_labels, check_shape
from data.imagenet import SYNSETS, ImageNet, find_classes
from data.rows import RowsFile, content_offset, read_header

log = logging.getLogger(__name__)

MOST_IMAGES = 2**17  # in a batch; the real ones have 128,123
DEVKIT = Path(__file__).with_name("imagenet_devkit_synsets.txt")  # line k is the id with the number k of the devkit
NUMBERING = "sorted WordNet ids"  # of the labels; recorded, because earlier versions used the order of the devkit
BATCHES = tuple(f"train_data_batch_{k}.npz" for k in range(1, 11))


def open_imagenet64(
    data_path: Path | None, *, img_size: int, in_chans: int, num_classes: int, crop: str
) -> Downsampled | ImageNet:
    """The downsampled batches, or else a folder of class folders; in data_path or in imagenet64/ in it."""
    root = data_path or DEFAULT_PATH
    for folder in (root, root / "imagenet64"):
        if any((folder / name).is_file() for name in BATCHES):
            check_shape(f"{folder}: the downsampled images", (64, 3), (img_size, in_chans))
            return Downsampled(folder, num_classes, crop)
    folder = find_classes("imagenet64", root)
    return ImageNet("imagenet64", folder, img_size=img_size, in_chans=in_chans, num_classes=num_classes, crop=crop)


class Downsampled(ImageDataset):
    """train_data_batch_1.npz .. _10.npz: `data` (N, 12288) uint8, channels first, and `labels` 1..1000 of the devkit.

    The labels here are those of `ImageNet`: the position 0..999 among the sorted WordNet ids.

    Uncompressed batches are read from disk row by row. Compressed batches are loaded at their first use and kept.
    """

    labels: Tensor

    def __init__(self, folder: Path, num_classes: int, crop: str):
        self.folder, self.crop = folder, crop
        if lacking := [name for name in BATCHES if not (folder / name).is_file()]:
            raise InputError(f"{folder}: {', '.join(lacking)} missing; all of {BATCHES[0]} to _10.npz are needed")
        self.batches = [_Batch(folder / name) for name in BATCHES]
        if any(batch.stored is None for batch in self.batches):
            log.warning("%s: compressed batches stay in memory; pack the dataset with pack.py to avoid this", folder)
        self.starts = np.cumsum([0, *map(len, self.batches)])  # the number of each batch's first image, and the end
        self.labels = torch.from_numpy(label_of_number()[np.concatenate([batch.numbers for batch in self.batches])])
        check_labels(int(self.labels.max()), num_classes, folder)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = np.arange(len(self))[np.asarray(indices)] if min(indices) < 0 else np.asarray(indices)
        of_batch = np.searchsorted(self.starts, chosen, side="right") - 1
        images = np.empty((len(chosen), 3, 64, 64), np.uint8)
        for k in np.unique(of_batch):
            rows = of_batch == k
            images[rows] = self.batches[k].read(chosen[rows] - self.starts[k])
        return torch.from_numpy(images), self.labels[torch.from_numpy(chosen)]

    def whole_and_broken(self, indices: Sequence[int]) -> tuple[Tensor, dict[int, str]]:
        images = super().whole_and_broken(indices)
        for batch, end in zip(self.batches, self.starts[1:], strict=True):
            if end <= max(indices):
                batch.loaded = None  # packing reads in order, so it does not need this batch again
        return images

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256("".join(batch.fingerprint for batch in self.batches).encode())
        return {
            "dataset": "imagenet64",
            "source": str(self.folder.resolve()),
            "files_sha256": digest.hexdigest(),
            "images": len(self),
            "img_size": 64,
            "in_chans": 3,
            "crop": self.crop,  # does not change images of this size
            "labels": NUMBERING,
        }


def label_of_number() -> np.ndarray:
    """(1001,) int64: for each number 1..1000 of the devkit, the position among the sorted WordNet ids; 0 is unused."""
    place = {synset: label for label, synset in enumerate(SYNSETS.read_text(encoding="ascii").split())}
    return np.array([-1, *(place[synset] for synset in DEVKIT.read_text(encoding="ascii").split())], dtype=np.int64)


class _Batch:
    """One file: the devkit's numbers (N,) int64 in 1..1000, and its images. Raises InputError for a wrong file."""

    def __init__(self, path: Path):
        self.path = path
        self.loaded: np.ndarray | None = None
        try:
            with zipfile.ZipFile(path) as archive:
                info = archive.getinfo("data.npy")
                self.fingerprint = f"{path.name}\0{info.CRC}\0{archive.getinfo('labels.npy').CRC}\n"
                with archive.open(info) as member:
                    self.shape, fortran, dtype = read_header(member)
                    header = member.tell()
                if max(info.file_size / 12288, archive.getinfo("labels.npy").file_size / 8) > MOST_IMAGES:
                    raise ValueError(f"more than {MOST_IMAGES:,} images when unpacked")
            with np.load(path, allow_pickle=False) as arrays:
                labels = arrays["labels"]
            self.stored = None
            if info.compress_type == zipfile.ZIP_STORED:
                offset = content_offset(path, info) + header
                self.stored = RowsFile(path, offset, self.shape, dtype)
        except Exception as error:  # damaged bytes make zipfile and numpy raise any error
            raise InputError(
                f"{path}: not readable as .npz with data and labels, or cut short ({error!s:.120})"
            ) from None
        if len(self.shape) != 2 or self.shape[1] != 12288 or dtype != np.uint8 or fortran:
            raise InputError(f"{path}: wanted data of shape (N, 12288) uint8 in C order, got {self.shape} {dtype}")
        if labels.shape != self.shape[:1] or labels.dtype.kind not in "iu":
            raise InputError(f"{path}: wanted a label for each of the {len(self)} images")
        if len(labels) and not 1 <= labels.min() <= labels.max() <= 1000:
            raise InputError(f"{path}: labels are {labels.min()}..{labels.max()}, wanted 1..1000")
        self.numbers = labels.astype(np.int64)

    def __len__(self) -> int:
        return self.shape[0]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"loaded": None}

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Images as uint8 (B, 3, 64, 64). indices: (B,) in 0..N-1."""
        if self.stored is not None:
            return self.stored.read(indices).reshape(-1, 3, 64, 64)
        if self.loaded is None:
            with np.load(self.path, allow_pickle=False) as arrays:
                self.loaded = np.asarray(arrays["data"])
        images: np.ndarray = self.loaded[indices].reshape(-1, 3, 64, 64)
        return images
