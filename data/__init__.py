"""Datasets by name. To add one: a class like those in data/digits.py and a line in DATASETS."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from common.config import check_choice

if TYPE_CHECKING:
    from data.dataset import ImageDataset

# name: (module, class); a module is imported when its dataset is opened
DATASETS = {
    "digits": ("data.digits", "Digits"),
    "folder": ("data.folder", "ImageFolder"),
}


def open_dataset(
    name: str, data_path: Path | None, *, img_size: int, in_chans: int, num_classes: int = -1
) -> ImageDataset:
    """The training images of a dataset, as (in_chans, img_size, img_size).

    data_path: where it lies; not needed for one that ships with the project. num_classes: of the network;
    -1 asks for no labels. Raises InputError where the dataset is missing or does not fit.
    """
    check_choice("dataset", name, tuple(DATASETS))
    module, cls = DATASETS[name]
    return getattr(importlib.import_module(module), cls)(
        data_path, img_size=img_size, in_chans=in_chans, num_classes=num_classes
    )
