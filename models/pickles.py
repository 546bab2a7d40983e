"""Checks of a torch file before it is read: the functions that it would call, and its size in memory.

torch's restricted unpickler runs no code from a file. But it allows a few calls that turn a number into as many bytes,
and unpacks archives of any size, so that a file of a few bytes could fill the memory.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO

from common.files import check_regular

# The names in pickles of state dicts and training states: module, space, name.
ADMITTED = re.compile(
    r"collections OrderedDict|torch (Size|device|\w+Storage|bool|b?float\w+|u?int\w+|complex\w+)"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)|torch\.storage \w+Storage"
    r"|torch\.nn\.parameter Parameter|torch\.serialization _get_layout|_codecs encode|argparse Namespace"
)
LEGACY_PICKLES = 5  # number of pickles in a file of torch before 1.6: magic number, version, machine, content, storages


def check_pickles(path: Path) -> None:
    """Raises ValueError, or an error of the standard library, for a file that must not be read.

    Raises InputError for a folder, pipe or device.
    """
    check_regular(path)
    with path.open("rb") as file:
        if is_zip(path):
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                    raise ValueError("it is compressed, but torch writes no compressed files")
                if sum(member.file_size for member in members) > path.stat().st_size:
                    raise ValueError("its parts overlap")
                for member in members:
                    if member.filename.endswith(".pkl"):
                        with archive.open(member) as pickled:
                            _check(pickled)
        else:
            for _ in range(LEGACY_PICKLES):
                _check(file)


def is_zip(path: Path) -> bool:
    """Whether the file is an archive, the format of torch since 1.6."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def check_sums(path: Path) -> None:
    """Raises ValueError for an entry with a wrong checksum, which torch does not check."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"damaged: {damaged} has a wrong checksum")


def _check(file: IO[bytes]) -> None:
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST") and not ADMITTED.fullmatch(name := str(argument)):
            raise ValueError(f"it imports {name.replace(' ', '.')}")
