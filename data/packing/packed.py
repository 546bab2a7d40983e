"""Packed datasets: every image decoded once, in one array on disk. Made by pack.py.

A folder of
    images.npy      (N, C, H, W) uint8
    labels.npy      (N,) int64, if the dataset has labels
    manifest.json   its source and transform, see Manifest
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import zlib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError
from common.files import read_json
from common.settings import check_types, differences
from data import DEFAULT_PATH
from data.dataset import ImageDataset, check_labels, say_left_out
from data.files import image_names
from data.rows import RowsFile, load_npy

log = logging.getLogger(__name__)

FORMAT = 1
IMAGES, LABELS, MANIFEST = "images.npy", "labels.npy", "manifest.json"
NUM_BLOCKS, BLOCK_BYTES = 64, 2**16  # blocks of images.npy that are checked at opening


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """manifest.json: the fields are its keys."""

    format: int  # FORMAT
    kind: str  # of KINDS
    source: dict[str, Any]  # `describe()` of the source: its files, their hash, and the transform
    source_state: dict[str, int] | None  # see `state_of`; None: the source was not found
    shape: tuple[int, ...]  # of images.npy
    random_flip: bool  # whether training mirrors images by default
    left_out: dict[str, str]  # reasons by name of broken images
    images_sha256: str
    labels_sha256: str | None  # None: no labels
    blocks_crc32: tuple[int, ...]  # of NUM_BLOCKS blocks of images.npy, see `block_checksums`

    @property
    def transform(self) -> dict[str, Any]:
        return {key: self.source.get(key) for key in ("dataset", "img_size", "in_chans", "crop")}


class PackedDataset(ImageDataset):
    """The images of a packed dataset, read from disk on demand, so that it may be larger than memory.

    Raises InputError if manifest and files disagree, or labels do not fit num_classes.
    """

    labels: np.ndarray | None = None

    def __init__(self, folder: Path, manifest: Manifest, num_classes: int = -1):
        self.folder, self.manifest = folder, manifest
        self.random_flip, self.left_out = manifest.random_flip, manifest.left_out
        self.row_shape = manifest.shape[1:]
        self.images = RowsFile.of_npy(folder / IMAGES)
        if self.images.shape != manifest.shape or self.images.dtype != self.dtype:
            raise _disagree(
                folder / IMAGES, f"it contains {self.images.shape} {self.images.dtype}, not {manifest.shape}"
            )
        if block_checksums(folder / IMAGES) != manifest.blocks_crc32:
            raise _disagree(folder / IMAGES, "its bytes were changed")
        if manifest.labels_sha256 is not None:
            self.labels = _read_labels(folder / LABELS, manifest)
            if num_classes > 0:
                _check_numbering(folder, manifest, self.labels)
            check_labels(int(self.labels.max()), num_classes, folder)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = np.asarray(indices, dtype=np.int64)
        labels = np.zeros(len(rows), np.int64) if self.labels is None else self.labels[rows]
        return torch.from_numpy(self.images.read(rows)), torch.from_numpy(labels)

    def describe(self) -> dict[str, Any]:
        """The description of the source, so that caches stay valid, with the number of readable images."""
        return self.manifest.source | {"images": len(self)}


# To add a kind, write a class like PackedDataset and add its module and name.
KINDS = {"pixels": ("data.packing.packed", "PackedDataset"), "latents": ("data.packing.latents", "PackedLatents")}


def default_folder(name: str, data_path: Path | None, *, img_size: int, in_chans: int, crop: str) -> Path:
    """The default folder of a packed dataset: packed/celeba_64_center178/ in data_path, or next to a file."""
    root = data_path or DEFAULT_PATH
    colour = "" if in_chans == 3 else f"_{in_chans}ch"
    return (root.parent if root.is_file() else root) / "packed" / f"{name}_{img_size}_{crop}{colour}"


def find_packed(
    name: str, data_path: Path | None, *, img_size: int, in_chans: int, num_classes: int, crop: str
) -> ImageDataset | None:
    """The packed dataset that fits, at its default place or as data_path itself.

    Raises InputError if its files are damaged, or if data_path is a packed dataset that does not fit.
    """
    given = data_path if data_path is not None and (data_path / MANIFEST).is_file() else None
    wanted: dict[str, Any] = {"img_size": img_size, "in_chans": in_chans, "crop": crop}
    folder = given or default_folder(name, data_path, **wanted)
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    if problem := _misfit(manifest, {"dataset": name, **wanted}, num_classes, look_at_source=not given):
        if given:
            raise InputError(f"{folder}: the packed dataset does not fit: {problem}")
        log.warning("ignoring %s: %s", folder, problem)
        return None
    log.warning("using the packed dataset %s", folder)
    say_left_out(manifest.left_out, folder)
    module, cls = KINDS[manifest.kind]
    packed: PackedDataset = getattr(importlib.import_module(module), cls)(folder, manifest, num_classes)
    return packed


def _misfit(manifest: Manifest, wanted: dict[str, Any], num_classes: int, look_at_source: bool) -> str | None:
    """The reason why a packed dataset does not fit; None if it fits."""
    if different := differences(manifest.transform, wanted):
        return f"another transform: {', '.join(different)}"
    if num_classes > 0 and manifest.labels_sha256 is None:
        return "it has no labels; remove it and pack again with --num_classes"
    now = state_of(manifest.source)
    if look_at_source and None not in (now, manifest.source_state) and now != manifest.source_state:
        return f"{manifest.source['source']} changed since it was packed; remove it and pack again"
    return None


def state_of(source: dict[str, Any]) -> dict[str, int] | None:
    """A quick summary of a source that shows whether it changed; None if the source is missing."""
    path = Path(str(source.get("source") or ""))
    if path.is_file():
        return {"bytes": path.stat().st_size}
    if source.get("source") and path.is_dir():
        return {"images": sum(1 for _ in image_names(path))}
    return None


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest. Raises InputError if it is incomplete, or its format or kind is unknown."""
    path = folder / MANIFEST
    given = read_json(path)
    if not isinstance(given, dict) or given.get("format") != FORMAT or given.get("kind") not in KINDS:
        raise InputError(f"{path}: wanted a packed dataset of format {FORMAT}, kind {' or '.join(KINDS)}; pack again")
    given = check_types(Manifest, given, str(path))
    if lacking := [f.name for f in fields(Manifest) if f.name not in given and f.default is MISSING]:
        raise InputError(f"{path}: {', '.join(lacking)} not given; pack again")
    return Manifest(**given)


def block_checksums(path: Path) -> tuple[int, ...]:
    """CRC-32 of blocks spread evenly over a file, its first and last bytes among them."""
    size = path.stat().st_size
    offsets = np.linspace(0, max(0, size - BLOCK_BYTES), NUM_BLOCKS).astype(np.int64)
    with path.open("rb", buffering=0) as file:
        checksums = []
        for offset in offsets.tolist():
            file.seek(offset)
            checksums.append(zlib.crc32(file.read(BLOCK_BYTES)))
    return tuple(checksums)


def _read_labels(path: Path, manifest: Manifest) -> np.ndarray:
    labels = load_npy(path)
    if labels.shape != manifest.shape[:1] or labels.dtype != np.int64:
        raise _disagree(path, f"it contains {labels.shape} {labels.dtype}, not a label for each image")
    if hashlib.sha256(labels.data).hexdigest() != manifest.labels_sha256:
        raise _disagree(path, "its bytes were changed")
    return labels


def _check_numbering(folder: Path, manifest: Manifest, labels: np.ndarray) -> None:
    """Raises InputError for labels that an earlier version packed from the downsampled batches of ImageNet.

    They have the numbers of the devkit, not the positions of the sorted WordNet ids. The batches are in random order;
    labels from class folders rise.
    """
    older = manifest.source.get("dataset") == "imagenet64" and "labels" not in manifest.source
    if older and (np.diff(labels) < 0).any():
        raise InputError(
            f"{folder} has the labels of the devkit of ImageNet, which have another order than the classes here; "
            "remove the folder and pack again"
        )


def _disagree(path: Path, why: str) -> InputError:
    return InputError(f"{path} and {MANIFEST} disagree: {why}; remove the folder and pack again")
