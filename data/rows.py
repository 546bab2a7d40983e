"""Rows of equal size in a file, read when they are asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError
from common.files import check_regular


class RowsFile:
    """An array in a file of which only the rows that are read come into memory.

    Reading beats mapping the file here: pages of a map count as resident memory once they were touched, and
    giving them back costs more than the copy. Each process opens the file for itself; threads must not share.

    path: the file. offset: where the first row begins, in bytes. shape: (N, ...) of the array.
    """

    def __init__(self, path: Path, offset: int, shape: Sequence[int], dtype: np.dtype | type = np.uint8):
        self.path, self.offset, self.shape, self.dtype = path, offset, tuple(shape), np.dtype(dtype)
        self.row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        self._file: FileIO | None = None
        self._process: int | None = None

    @classmethod
    def of_npy(cls, path: Path) -> RowsFile:
        """Raises InputError for a file that is missing, no .npy, or shorter than its header says."""
        check_regular(path)
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy meets any bytes there are, and fails in any way there is
            raise InputError(f"{path}: not readable as .npy, or cut short ({error})") from None
        if not isinstance(array, np.memmap) or not array.flags.c_contiguous:
            raise InputError(f"{path}: wanted an array in C order")
        return cls(path, array.offset, array.shape, array.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def close(self) -> None:
        """Close the file, which the next read opens again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns (B, ...); indices: 0..N-1 in any order, or negative to count from the end."""
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
        if self._file.readinto(buffer) != len(buffer):
            raise InputError(f"{self.path}: the file ends before row {index}; was it changed?")
