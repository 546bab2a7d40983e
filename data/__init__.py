"""Datasets by name. To add a dataset, write a module in this package and an entry in DATASETS.

No torch in here, so that reading options stays quick; a module is imported when its dataset is opened.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import check_choice
from common.errors import InputError

if TYPE_CHECKING:
    from data.dataset import ImageDataset

DEFAULT_PATH = Path("datasets")  # the default of --data_path


@dataclass(frozen=True)
class Entry:
    """The facts about a dataset that are needed before it is opened."""

    module: str
    opener: str  # a class or function of the module; for its arguments see `open_dataset`
    crops: tuple[str, ...]  # the possible crops, the default first
    num_classes: int | None  # real classes, without "no class"; None: no classes, or any number
    fetch: str | None = None  # the files to download by hand if it is missing; None: there are none
    can_download: bool = False


IMAGENET_TRAIN = (
    "the training images of ILSVRC 2012 from image-net.org, a folder per class (n01440764/, ...) in imagenet/"
)
DATASETS = {
    "digits": Entry("data.digits", "Digits", ("none",), 10),
    "folder": Entry("data.folder", "ImageFolder", ("fit", "halve"), None),
    "celeba": Entry(
        *("data.celeba", "CelebA", ("center178", "uvit128"), None),
        fetch="img_align_celeba.zip (Align&Cropped Images, from the CelebA page at mmlab.ie.cuhk.edu.hk)",
    ),
    "cifar10": Entry(
        *("data.cifar10", "open_cifar10", ("none",), 10),
        fetch="cifar-10-python.tar.gz (from www.cs.toronto.edu/~kriz/cifar.html, or with --download)",
        can_download=True,
    ),
    "mnist": Entry(
        *("data.mnist", "MNIST", ("none",), 10),
        fetch="train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz of MNIST (for mnist/, or with --download)",
        can_download=True,
    ),
    "fashion_mnist": Entry(
        *("data.fashion_mnist", "FashionMNIST", ("none",), 10),
        fetch="train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz of Fashion-MNIST (for fashion_mnist/, or "
        "with --download, or as Debian's package dataset-fashion-mnist with --data_path /usr/share/datasets)",
        can_download=True,
    ),
    "imagenet64": Entry(
        *("data.imagenet64", "open_imagenet64", ("halve",), 1000),
        fetch="train_data_batch_1.npz to _10.npz (downsampled ImageNet 64 x 64, image-net.org) for imagenet64/, "
        f"or {IMAGENET_TRAIN}",
    ),
    "imagenet256": Entry("data.imagenet256", "open_imagenet256", ("halve",), 1000, fetch=IMAGENET_TRAIN),
}
CROPS = tuple(sorted({crop for entry in DATASETS.values() for crop in entry.crops}))


def crop_of(name: str, crop: str | None) -> str:
    """The crop, or for None the default of the dataset. Raises InputError for a crop that the dataset does not have."""
    check_choice("dataset", name, tuple(DATASETS))
    crops = DATASETS[name].crops
    if crop is not None:
        check_choice(f"crop of {name}", crop, crops)
    return crop or crops[0]


def open_dataset(
    name: str,
    data_path: str | os.PathLike[str] | None,
    *,
    img_size: int,
    in_chans: int,
    num_classes: int = -1,
    crop: str | None = None,
    download: bool = False,
    packed: bool = True,
) -> ImageDataset:
    """The training images of a dataset, as (in_chans, img_size, img_size).

    data_path: the path of the dataset or of a packed dataset, `datasets/` for None; not needed for the digits.
    num_classes: the classes of the network; -1 for no labels. crop: a crop of the dataset, its default for None.
    download: download the dataset first, if it is missing. packed: use a packed copy (see data.packing) if there is one
    that fits. Raises InputError if the dataset is missing or does not fit.
    """
    crop, entry = crop_of(name, crop), DATASETS[name]
    data_path = None if data_path is None else Path(data_path)
    wanted: dict[str, Any] = {"img_size": img_size, "in_chans": in_chans, "num_classes": num_classes, "crop": crop}
    dataset: ImageDataset | None = None
    if packed:
        dataset = importlib.import_module("data.packing.packed").find_packed(name, data_path, **wanted)
    if dataset is not None:
        return dataset
    if download and not entry.can_download:
        by_hand = f"get {entry.fetch}; put it under {data_path or DEFAULT_PATH}" if entry.fetch else "leave it out"
        raise InputError(f"--download: {name} cannot be downloaded; {by_hand}")
    module = importlib.import_module(entry.module)
    if download:
        module.download(data_path or DEFAULT_PATH)
    opened: ImageDataset = getattr(module, entry.opener)(data_path, **wanted)
    return opened


def missing(name: str, root: Path) -> InputError:
    """The error for a dataset that is not under `root`, with the files to download and their place."""
    return InputError(f"{name} is not in {root}: get {DATASETS[name].fetch} and put it there, or give --data_path")
