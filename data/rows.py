"""Read single rows of an array in a file."""

from __future__ import annotations

import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import IO, Any

import numpy as np

from common.errors import InputError
from common.files import check_regular

_READ_HEADER: dict[tuple[int, int], Callable[..., Any]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def load_npy(path: Path, *, mapped: bool = False) -> np.ndarray:
    """The array of an .npy file. Raises InputError if it is missing, not an .npy file, or cut short."""
    check_regular(path)
    try:
        array: np.ndarray = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
        return array
    except Exception as error:  # damaged bytes make numpy raise any error
        raise InputError(f"{path}: not readable as .npy, or cut short ({error})") from None


class RowsFile:
    """An array in a file, of which only the requested rows are read into memory.

    Reading is better than mapping the file here: touched pages of a map count as resident memory, and releasing them
    costs more than the copy. Each process opens the file itself; threads must not share it.

    path: the file. offset: the start of the first row, in bytes. shape: (N, ...), the shape of the array.
    """

    def __init__(self, path: Path, offset: int, shape: Sequence[int], dtype: np.dtype[Any] | type = np.uint8):
        self.path, self.offset, self.shape, self.dtype = path, offset, tuple(shape), np.dtype(dtype)
        self.row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        self._file: FileIO | None = None
        self._process: int | None = None

    @classmethod
    def of_npy(cls, path: Path) -> RowsFile:
        """Open an .npy file. Raises InputError if it is no array in C order, see `load_npy` too."""
        array = load_npy(path, mapped=True)
        if not isinstance(array, np.memmap) or not array.flags.c_contiguous:
            raise InputError(f"{path}: wanted an array in C order")
        return cls(path, array.offset, array.shape, array.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The rows (B, ...). indices: B numbers in 0..N-1 in any order; negative ones count from the end."""
        indices = np.asarray(indices, dtype=np.int64)
        if not len(indices):
            return np.empty((0, *self.shape[1:]), self.dtype)
        indices = np.where(indices < 0, indices + len(self), indices)
        if indices.min() < 0 or indices.max() >= len(self):
            raise IndexError(f"rows 0..{len(self) - 1}, asked for {indices.min()}..{indices.max()}")
        rows = np.empty((len(indices), self.row_bytes), np.uint8)
        if (np.diff(indices) == 1).all():
            self._read_into(rows.reshape(-1), int(indices[0]))
        else:
            for row, index in zip(rows, indices.tolist(), strict=True):
                self._read_into(row, index)
        return rows.view(self.dtype).reshape(len(indices), *self.shape[1:])

    def _read_into(self, buffer: np.ndarray, index: int) -> None:
        if self._file is None or self._process != os.getpid():  # processes must not share a position
            self._file, self._process = FileIO(self.path), os.getpid()
        self._file.seek(self.offset + index * self.row_bytes)
        if self._file.readinto(buffer.data) != len(buffer):
            raise InputError(f"{self.path}: the file ends before row {index}; was it changed?")


class RowsInZip:
    """An array of an .npz, compressed or not, of which only the requested rows are kept in memory.

    path: the .npz. name: the name of the array. Raises InputError for other files, a missing array, or an array whose
    size differs from its header.
    """

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        try:
            with zipfile.ZipFile(path) as archive:
                self.info = archive.getinfo(f"{name}.npy")
                with archive.open(self.info) as member:
                    self.shape, fortran, self.dtype = read_header(member)
                    self.header_bytes = member.tell()
        except KeyError:
            raise InputError(f"{path}: it contains no {name}") from None
        except Exception as error:  # damaged bytes make zipfile and numpy raise any error
            raise InputError(f"{path}: not readable as .npz; cut short, or another format? ({error!s:.120})") from None
        self.row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        if self.dtype.hasobject or fortran or not self.shape or min(self.shape) < 0:
            raise InputError(f"{path}: {name} is {self.shape} {self.dtype}, wanted plain numbers in C order")
        if self.info.file_size != self.header_bytes + self.shape[0] * self.row_bytes:
            raise InputError(
                f"{path}: {name} has {self.info.file_size:,} bytes, which is not {self.shape} {self.dtype}"
            )

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, parts: Iterable[Sequence[int]]) -> Iterator[np.ndarray]:
        """The rows of each part, (B, ...). Indices must rise, also from part to part, because the file is read once.

        It is read to its end, so that the checksum is checked. Raises InputError if the file is damaged.
        """
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.info) as member:
                _take(member, self.header_bytes, keep=False)
                row = 0
                for part in parts:
                    rows = bytearray()
                    for index in part:
                        _take(member, (index - row) * self.row_bytes, keep=False)
                        rows += _take(member, self.row_bytes)
                        row = index + 1
                    yield np.frombuffer(rows, self.dtype).reshape(len(part), *self.shape[1:])
                while member.read(2**20):
                    pass
        except InputError:
            raise
        except Exception as error:  # as above
            raise InputError(f"{self.path}: {self.name} is damaged ({error!s:.120})") from None


def read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """The shape, the Fortran order flag and the dtype from the header of an .npy."""
    header: tuple[tuple[int, ...], bool, np.dtype[Any]] = _READ_HEADER[np.lib.format.read_magic(member)](member)
    return header


def content_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """The offset of a stored member's bytes in the archive: after its local header and two fields of any length."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
    lengths: tuple[int, int] = struct.unpack("<HH", header[26:30])
    return info.header_offset + 30 + sum(lengths)


def _take(member: IO[bytes], count: int, keep: bool = True) -> bytearray:
    """The next `count` bytes. Raises EOFError if there are fewer."""
    taken = bytearray()
    while count:
        if not (block := member.read(min(count, 2**20))):
            raise EOFError("it ends too soon")
        count -= len(block)
        if keep:
            taken += block
    return taken
