"""Datasets by name. To add one: a class like those beside this file, and an entry in DATASETS.

No torch in here, so that reading options stays quick; a module is imported when its dataset is opened.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.config import check_choice

if TYPE_CHECKING:
    from data.dataset import ImageDataset


@dataclass(frozen=True)
class Entry:
    """Where a dataset's class is, and the crops it offers, the default first."""

    module: str
    cls: str
    crops: tuple[str, ...]


DATASETS = {
    "digits": Entry("data.digits", "Digits", ("none",)),
    "folder": Entry("data.folder", "ImageFolder", ("fit", "halve")),
    "celeba": Entry("data.celeba", "CelebA", ("center178", "uvit128")),
}
CROPS = tuple(sorted({crop for entry in DATASETS.values() for crop in entry.crops}))


def crop_of(name: str, crop: str | None) -> str:
    """The crop to use: the one asked for, if the dataset offers it, or the dataset's default."""
    check_choice("dataset", name, tuple(DATASETS))
    crops = DATASETS[name].crops
    if crop is not None:
        check_choice(f"crop of {name}", crop, crops)
    return crop or crops[0]


def open_dataset(
    name: str,
    data_path: Path | None,
    *,
    img_size: int,
    in_chans: int,
    num_classes: int = -1,
    crop: str | None = None,
) -> ImageDataset:
    """The training images of a dataset, as (in_chans, img_size, img_size).

    data_path: where it lies; not needed for one that ships with the project. num_classes: of the network;
    -1 asks for no labels. crop: one of the dataset's, its default for None. Raises InputError where the
    dataset is missing or does not fit.
    """
    crop = crop_of(name, crop)
    entry = DATASETS[name]
    cls = getattr(importlib.import_module(entry.module), entry.cls)
    return cls(data_path, img_size=img_size, in_chans=in_chans, num_classes=num_classes, crop=crop)
