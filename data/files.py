"""Datasets whose images are files, in a folder or in a zip archive."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import torch
from torch import Tensor

from common.errors import InputError
from common.files import check_regular
from common.image_files import BrokenImage, decoding, read_image
from data.dataset import FIRST_FEW, ImageDataset
from data.transforms import to_square

log = logging.getLogger(__name__)

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
MOST_FILE_BYTES = 2**28  # limit for an image in an archive


class Source(ABC):
    """Image files with names, in a folder or an archive."""

    path: Path
    names: list[str]  # all names with an image suffix, sorted, with / between folders

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """Raises BrokenImage for a damaged archive member, OSError for faults of the disk or the permissions."""

    @abstractmethod
    def fingerprint(self, names: Sequence[str]) -> str:
        """A hash that changes when a file is added, removed or replaced."""

    def contents(self, names: Sequence[str]) -> str:
        """A hash that is equal for a copy of the files elsewhere."""
        return self.fingerprint(names)


def image_names(folder: Path) -> Iterator[str]:
    """Names with an image suffix below a folder, with / between folders and in no order, without hidden files.

    Pictures in the report of a folder of samples are skipped. Links to folders are followed, but each folder is visited
    once, because links may form a circle.
    """
    seen = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        about = Path(path).stat()
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".") and not _is_report(Path(path) / name)]
        within = Path(path).relative_to(folder).as_posix()
        prefix = "" if within == "." else f"{within}/"
        for name in files:
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("."):  # noqa: PTH122
                yield prefix + name


def _hash_of(lines: Iterable[str]) -> str:
    """The SHA-256 of lines in UTF-8. Python stores bytes of names that are not UTF-8 as surrogates, which are kept."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _is_report(folder: Path) -> bool:
    return folder.name == "report" and any((folder / f"{name}.json").exists() for name in ("run", "statistics"))


def lands_outside(member: str) -> bool:
    """Whether extraction of an archive member would write outside the folder."""
    windows = PureWindowsPath(member)  # accepts / and \\ as separators
    return bool(windows.anchor) or ".." in windows.parts or PurePosixPath(member).is_absolute()


class FolderSource(Source):
    """The images below a folder, without hidden ones."""

    def __init__(self, path: Path):
        self.path = path
        self.names = sorted(image_names(path))

    def open(self, name: str) -> BinaryIO:
        with decoding():  # a pipe or device is not an image
            check_regular(self.path / name)
        return (self.path / name).open("rb")

    def fingerprint(self, names: Sequence[str]) -> str:
        of_files = ((name, (self.path / name).stat()) for name in names)
        return _hash_of(f"{name}\0{about.st_size}\0{about.st_mtime_ns}" for name, about in of_files)

    def contents(self, names: Sequence[str]) -> str:
        return _hash_of(f"{name}\0{(self.path / name).stat().st_size}" for name in names)


class ZipSource(Source):
    """The images in a zip archive, read without extraction, so that no file is written outside the folder."""

    def __init__(self, path: Path):
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        self._process: int | None = None
        try:
            self.infos = {info.filename: info for info in self.archive.infolist()}
        except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
            raise InputError(
                f"{path}: not readable as a zip archive; cut short, or another format? ({error})"
            ) from None
        if outside := next(filter(lands_outside, self.infos), None):
            raise InputError(
                f"{path}: holds {outside!r}, which would be outside its folder; download the archive again"
            )
        self.names = sorted(name for name in self.infos if PurePosixPath(name).suffix.lower() in SUFFIXES)

    @property
    def archive(self) -> zipfile.ZipFile:
        """The archive, opened by each process itself because processes must not share a file position."""
        if self._archive is None or self._process != os.getpid():
            self._archive, self._process = zipfile.ZipFile(self.path), os.getpid()
        return self._archive

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_archive": None}

    def open(self, name: str) -> BinaryIO:
        if self.infos[name].file_size > MOST_FILE_BYTES:
            raise BrokenImage(f"the image is broken ({self.infos[name].file_size:,} bytes when unpacked)")
        with decoding():  # the whole member, so that its checksum is checked
            return io.BytesIO(self.archive.read(name))

    def fingerprint(self, names: Sequence[str]) -> str:
        return _hash_of(f"{name}\0{self.infos[name].CRC}" for name in names)


class ImageFiles(ImageDataset):
    """Image files with labels, made square by a named crop.

    The next readable file replaces an unreadable one, which is named once in a warning.
    """

    needs_decoding = True
    names: list[str]
    num_workers = min(8, os.cpu_count() or 1)  # decoding is work

    def __init__(
        self,
        dataset: str,
        source: Source,
        names: Sequence[str],
        labels: Sequence[int] | None,
        *,
        crop: str,
        img_size: int,
        in_chans: int,
    ):
        if in_chans not in (1, 3):
            raise InputError(f"in_chans={in_chans}: {dataset} gives 1 (grey) or 3 (RGB)")
        self.dataset, self.source, self.names, self.labels = dataset, source, list(names), labels
        self.crop, self.img_size, self.in_chans = crop, img_size, in_chans
        self.row_shape = (in_chans, img_size, img_size)
        self._broken: set[int] = set()

    def __len__(self) -> int:
        return len(self.names)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen, images = zip(*map(self._readable, indices), strict=True)
        labels = [0 if self.labels is None else self.labels[i] for i in chosen]
        return torch.stack(images), torch.tensor(labels)

    def _readable(self, index: int) -> tuple[int, Tensor]:
        """The index and image (C, H, W), or those of the next readable image, which is always the same."""
        for step in range(len(self.names)):
            i = (index + step) % len(self.names)
            if i in self._broken:
                continue
            try:
                return i, self.decode(i)
            except (BrokenImage, OSError) as error:
                if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                    raise  # too many open files in this process; the image is not broken
                self._broken.add(i)
                self._tell_of(i, error)
        raise InputError(f"{self.source.path}: no image can be read")

    def _tell_of(self, index: int, error: Exception) -> None:
        """Warn about the first broken files by name, and about many by their number."""
        count = len(self._broken)
        if count <= FIRST_FEW:
            log.warning("skipped %s in %s: %s", self.names[index], self.source.path, error)
        elif count in (10, 100, 1000, 10_000, 100_000):
            log.warning("skipped %d files in %s so far; python pack.py lists them all", count, self.source.path)

    def whole_and_broken(self, indices: Sequence[int]) -> tuple[Tensor, dict[int, str]]:
        images = torch.zeros(len(indices), self.in_chans, self.img_size, self.img_size, dtype=torch.uint8)
        broken = {}
        for row, index in enumerate(indices):
            try:
                images[row] = self.decode(index)
            except BrokenImage as error:
                broken[index] = str(error)
        return images, broken

    def decode(self, index: int) -> Tensor:
        """The image as uint8 (C, H, W). Raises BrokenImage, also for an image that does not fit the crop."""
        with self.source.open(self.names[index]) as file:
            image = read_image(file)
        with decoding():
            return to_square(image, self.crop, self.img_size, self.in_chans)

    def describe(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset,
            "source": str(self.source.path.resolve()),
            "files_sha256": self.source.fingerprint(self.names),
            "images": len(self),
            "img_size": self.img_size,
            "in_chans": self.in_chans,
            "crop": self.crop,
        }

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"contents_sha256": self.source.contents(self.names)}
