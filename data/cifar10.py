"""CIFAR-10 (Krizhevsky 2009): the 50,000 training images, from the distributed batches or from PNGs."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import tarfile
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from common.errors import InputError
from common.files import writable_folder
from data import DEFAULT_PATH, missing
from data.dataset import InMemoryDataset, check_labels, check_shape
from data.files import FolderSource, ImageFiles

ARCHIVE = "cifar-10-python.tar.gz"
URL = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
FOLDER = "cifar-10-batches-py"
BATCHES = tuple(f"data_batch_{k}" for k in range(1, 6))
# MD5 of the distributed files. They are pickles, which can run any code, so no other files are opened.
MD5 = {
    ARCHIVE: "c58f30108f718f92721af3b95e74349a",
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def open_cifar10(
    data_path: Path | None, *, img_size: int, in_chans: int, num_classes: int, crop: str
) -> CIFAR10 | CIFAR10Pictures:
    """The archive, the extracted batches or a folder of PNGs, in this order; data_path or a path in it.

    Also searches in cifar10/ and, for PNGs, in train/.
    """
    check_shape("the images of CIFAR-10", (32, 3), (img_size, in_chans))
    root = data_path or DEFAULT_PATH
    if root.is_file():
        return CIFAR10(root, num_classes)
    bases = (root, root / "cifar10")
    for base in bases:
        for path in (base / ARCHIVE, base / FOLDER / BATCHES[0], base / BATCHES[0]):
            if path.is_file():
                return CIFAR10(path if path.name == ARCHIVE else path.parent, num_classes)
    for folder in (base / part for base in reversed(bases) for part in ("train", ".")):
        if any(folder.glob("*.png")) or any((folder / name).is_dir() for name in _CLASS_OF_FOLDER):
            return CIFAR10Pictures(folder, num_classes)
    raise missing("cifar10", root)


class CIFAR10(InMemoryDataset):
    """The images of the five pickled batches, held in memory (150 MB).

    path: cifar-10-python.tar.gz, which is read without extraction, or the folder of the extracted batches.
    """

    def __init__(self, path: Path, num_classes: int = -1):
        self.path = path
        images, labels = zip(*map(_parse, _read_archive(path) if path.is_file() else _read_folder(path)), strict=True)
        self.images, self.labels = torch.cat(images), torch.cat(labels)
        check_labels(int(self.labels.max()), num_classes, path)

    def describe(self) -> dict[str, Any]:
        return self.described("cifar10", self.path)


class CIFAR10Pictures(ImageFiles):
    """A folder of PNGs. Sub-folders named by class (airplane, ... or 0..9) give the labels."""

    def __init__(self, folder: Path, num_classes: int = -1):
        source = FolderSource(folder)
        classes = [_CLASS_OF_FOLDER.get(name.split("/")[0]) for name in source.names]
        labels = [label for label in classes if label is not None]
        if not source.names:
            raise InputError(f"{folder}: it contains no images")
        if len(labels) < len(classes):
            if num_classes > 0 or labels:
                raise InputError(
                    f"{folder}: {source.names[classes.index(None)]} is not in the folder of a class "
                    f"({', '.join(CLASSES)}, or 0 to 9)"
                )
        else:
            check_labels(max(labels), num_classes, folder)
        super().__init__("cifar10", source, source.names, labels or None, crop="none", img_size=32, in_chans=3)


_CLASS_OF_FOLDER = {name: k for k, name in enumerate(CLASSES)} | {str(k): k for k in range(10)}


def download(root: Path) -> None:
    """Download the archive to `root`, if the dataset is not there. Raises InputError without network."""
    if any(path.exists() for base in (root, root / "cifar10") for path in (base / ARCHIVE, base / FOLDER)):
        return
    from torchvision.datasets.utils import download_url

    with tempfile.TemporaryDirectory(prefix=".download.", dir=writable_folder(root)) as folder:
        try:
            download_url(URL, folder, ARCHIVE, MD5[ARCHIVE])
        except (OSError, RuntimeError) as error:  # no network, no such page, or a wrong file
            raise InputError(
                f"--download: {URL} failed ({error}); download it by hand and put it into {root}"
            ) from None
        shutil.move(Path(folder) / ARCHIVE, root / ARCHIVE)


def _read_archive(path: Path) -> Iterator[bytes]:
    """The training batches in the tar archive, read without extraction."""
    with path.open("rb") as file:
        _check(path, ARCHIVE, file)
        with tarfile.open(fileobj=file) as archive:
            for name in BATCHES:
                member = archive.extractfile(f"{FOLDER}/{name}")
                assert member is not None, f"the official archive has no {name}"
                yield member.read()


def _read_folder(path: Path) -> Iterator[bytes]:
    if lacking := [name for name in BATCHES if not (path / name).is_file()]:
        raise InputError(f"{path}: {', '.join(lacking)} missing; unpack {ARCHIVE} again")
    for name in BATCHES:
        with (path / name).open("rb") as file:
            _check(path / name, name, file)
            yield file.read()


def _check(path: Path, name: str, file: BinaryIO) -> None:
    """Raises InputError unless the file equals the distributed one of this name, by its MD5. Goes back to its start."""
    digest = hashlib.md5(usedforsecurity=False)
    while block := file.read(2**20):
        digest.update(block)
    if digest.hexdigest() != MD5[name]:
        raise InputError(
            f"{path}: its MD5 is {digest.hexdigest()}, that of the official {name} is {MD5[name]}; cut short, or "
            f"another file? Download {URL} again, or remove the file and give --download"
        )
    file.seek(0)


def _parse(content: bytes) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64 of an official batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns about the old format of the arrays
        batch = pickle.loads(content, encoding="bytes")  # its MD5 was checked
    return torch.from_numpy(batch[b"data"].reshape(-1, 3, 32, 32)), torch.tensor(batch[b"labels"])
