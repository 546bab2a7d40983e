"""CIFAR-10 (Krizhevsky 2009): the 50,000 training images, from the batches as they are distributed or from PNGs."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import re
import shutil
import tarfile
import tempfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError
from common.files import writable_folder
from data import DEFAULT_PATH, missing
from data.dataset import InMemoryDataset, check_labels
from data.files import FolderSource, ImageFiles, lands_outside

ARCHIVE = "cifar-10-python.tar.gz"
URL = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
MD5 = "c58f30108f718f92721af3b95e74349a"
FOLDER = "cifar-10-batches-py"
BATCHES = tuple(f"data_batch_{k}" for k in range(1, 6))
MOST_BYTES = 2**26  # of a batch; the real ones have 30 MB
MOST_ARCHIVE_BYTES = 2**29  # unpacked; the real one has 180 MB
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def open_cifar10(
    data_path: Path | None, *, img_size: int, in_chans: int, num_classes: int, crop: str
) -> CIFAR10 | CIFAR10Pictures:
    """The archive, the extracted batches or a folder of PNGs: in this order, under data_path, or it itself.

    Also looked for in cifar10/ and, for PNGs, in train/.
    """
    if (img_size, in_chans) != (32, 3):
        raise InputError(
            f"the images of CIFAR-10 are 32 x 32 in colour: wanted img_size 32 and in_chans 3, got {img_size} and "
            f"{in_chans}"
        )
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

    path: cifar-10-python.tar.gz, which is read where it is, or the folder of the extracted batches.
    """

    def __init__(self, path: Path, num_classes: int = -1):
        self.path = path
        pieces = _read_archive(path) if path.is_file() else _read_folder(path)
        images, labels = zip(*(_parse(f"{path}: {name}", content) for name, content in pieces.items()), strict=True)
        self.images, self.labels = torch.cat(images), torch.cat(labels)
        check_labels(int(self.labels.max()), num_classes, path)

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.images.numpy())
        digest.update(self.labels.numpy())
        return {
            "dataset": "cifar10",
            "source": str(self.path.resolve()),
            "files_sha256": digest.hexdigest(),
            "images": len(self),
            "img_size": 32,
            "in_chans": 3,
            "crop": "none",
        }


class CIFAR10Pictures(ImageFiles):
    """A folder of PNGs. Sub-folders named by class (airplane, ... or 0..9) give the labels."""

    def __init__(self, folder: Path, num_classes: int = -1):
        source = FolderSource(folder)
        labels = [_CLASS_OF_FOLDER.get(name.split("/")[0]) for name in source.names]
        if not source.names:
            raise InputError(f"{folder}: no images in it")
        if None in labels:
            if num_classes > 0 or any(label is not None for label in labels):
                raise InputError(
                    f"{folder}: {source.names[labels.index(None)]} lies in no folder of a class "
                    f"({', '.join(CLASSES)}, or 0 to 9)"
                )
            labels = None
        else:
            check_labels(max(labels), num_classes, folder)
        super().__init__("cifar10", source, source.names, labels, crop="none", img_size=32, in_chans=3)


_CLASS_OF_FOLDER = {name: k for k, name in enumerate(CLASSES)} | {str(k): k for k in range(10)}


def download(root: Path) -> None:
    """Fetch the archive into `root`, unless it is there or further down. Raises InputError without network."""
    if any(path.exists() for base in (root, root / "cifar10") for path in (base / ARCHIVE, base / FOLDER)):
        return
    from torchvision.datasets.utils import download_url

    with tempfile.TemporaryDirectory(prefix=".download.", dir=writable_folder(root)) as folder:
        try:
            download_url(URL, folder, ARCHIVE, MD5)
        except (OSError, RuntimeError) as error:  # no network, no such page; not what was wanted
            raise InputError(f"--download: {URL} failed ({error}); get it by hand and put it into {root}") from None
        shutil.move(Path(folder) / ARCHIVE, root / ARCHIVE)


def _read_archive(path: Path) -> dict[str, BinaryIO]:
    """The training batches in a tar archive. Nothing is extracted; links are never followed."""
    found = {}
    try:
        with _bounded(path) as content, tarfile.open(fileobj=content, mode="r:") as archive:
            for member in archive:
                if member.offset_data + member.size > MOST_ARCHIVE_BYTES:
                    raise InputError(f"{path}: unpacks to far more than CIFAR-10; get {ARCHIVE} anew")
                if lands_outside(member.name) or (
                    (member.islnk() or member.issym()) and lands_outside(member.linkname)
                ):
                    raise InputError(
                        f"{path}: holds {member.name!r}, which would land outside its folder; get the archive anew"
                    )
                name = PurePosixPath(member.name)
                if name.parts == (FOLDER, name.name) and name.name in BATCHES and member.isreg():
                    _check_bytes(path, member.name, member.size)
                    found[name.name] = io.BytesIO(archive.extractfile(member).read())
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not readable as a tar archive; cut short, or not one? ({error})") from None
    return _complete(path, found)


class _BoundedGzip(gzip.GzipFile):
    """Refuses to unpack at once what no member of CIFAR-10 has: tarfile takes a header's word for sizes."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MOST_BYTES:
            raise tarfile.ReadError(f"a part of {size} bytes")
        return super().read(size)


def _bounded(path: Path) -> BinaryIO:
    """A tar archive as it was before it was gzipped, if it was."""
    with path.open("rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    return _BoundedGzip(path) if gzipped else path.open("rb")


def _read_folder(path: Path) -> dict[str, BinaryIO]:
    found = {}
    for name in BATCHES:
        if (path / name).is_file():
            _check_bytes(path, name, (path / name).stat().st_size)
            found[name] = io.BytesIO((path / name).read_bytes())
    return _complete(path, found)


def _check_bytes(path: Path, name: str, size: int) -> None:
    if size > MOST_BYTES:
        raise InputError(f"{path}: {name} has {size:,} bytes, a batch of CIFAR-10 has about 31,000,000")


def _complete(path: Path, found: dict[str, BinaryIO]) -> dict[str, BinaryIO]:
    if lacking := [name for name in BATCHES if name not in found]:
        raise InputError(f"{path}: no {', '.join(lacking)} in it; get {ARCHIVE} anew")
    return {name: found[name] for name in BATCHES}


class _Array:
    """An array as a pickle tells it. numpy's own way back trusts what it is told, down to pointers."""

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.dtype, self.fortran, self.content = state

    def to_numpy(self) -> np.ndarray:
        array = np.frombuffer(self.content, self.dtype.to_numpy())
        return array.reshape(self.shape, order="F" if self.fortran else "C")


class _Dtype:
    """A dtype as a pickle tells it."""

    order = "|"

    def __init__(self, name: bytes | str, *_: object):
        self.name = name.decode() if isinstance(name, bytes) else name

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1].decode() if isinstance(state[1], bytes) else state[1]

    def to_numpy(self) -> np.dtype:
        if not re.fullmatch(r"[iu][1248]", self.name) or self.order not in ("<", ">", "|"):
            raise ValueError(f"an array of {self.name!r:.20}")
        return np.dtype(self.order + self.name)


class _Reconstruct:
    def __new__(cls, *_: object) -> _Array:
        return _Array()


class _Encode:
    """How Python 3 writes bytes for Python 2."""

    def __new__(cls, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise ValueError(f"it asks for the encoding {encoding!r:.20}")
        return text.encode(encoding)


_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Encode,
}


class _PlainUnpickler(pickle._Unpickler):
    """Admits arrays, bytes and plain values: what the batches are made of. Nothing else is looked up.

    The one in Python: that in C makes a table as long as the largest number it is told. BUILD serves arrays alone.
    """

    dispatch = {  # noqa: RUF012
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module: str, name: str) -> Any:
        module = re.sub(r"^numpy\.(_core|core)\.", "numpy.core.", module)  # numpy 2 and numpy 1
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], _Array | _Dtype):
            raise pickle.UnpicklingError(f"it changes a {type(self.stack[-2]).__name__}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def _parse(where: str, content: BinaryIO) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64 of a batch."""
    try:
        batch = _PlainUnpickler(content, encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        data, labels = batch["data"].to_numpy(), batch["labels"]
        if isinstance(labels, _Array):
            labels = labels.to_numpy()
        elif all(type(label) is int for label in labels):  # lists of lists could make an array of any size
            labels = np.asarray(labels)
        else:
            raise ValueError("its labels are no numbers")
    except Exception as error:  # a pickle that is broken or wants too much can raise anything
        raise InputError(f"{where} is no batch of CIFAR-10 ({' '.join(str(error).split()):.200})") from None
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072 or not 0 < data.nbytes <= MOST_BYTES:
        raise InputError(f"{where}: wanted data of shape (N, 3072) uint8, got {data.shape} {data.dtype}")
    if labels.shape != data.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > 9:
        raise InputError(f"{where}: wanted a label in 0..9 for each of the {len(data)} images")
    images = np.array(data, order="C").reshape(-1, 3, 32, 32)
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
