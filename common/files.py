"""Write files so that a crash leaves the old file or the new one, and read untrusted files safely."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import socket
import stat
import tempfile
import zipfile
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import InputError, at_end_of_command, writing

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

MOST_ARRAY_BYTES = 2**29  # of all arrays in one .npz
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}  # of file systems without locks
LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}(\.\w+)?")  # temporary names of `replacing`


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A context that yields a temporary path in the same folder, and renames it to `path` at a successful end.

    durable: flush the file to disk first, so that it survives a power cut; slow for many small files. Raises WriteError
    if the disk is full or fails; the old file stays.
    """
    with writing(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    temporary = Path(name)
    try:
        with writing(path, temporary):
            yield temporary
            if durable:
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())  # mkstemp's files are private
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed processes from a folder that only this process writes."""
    for path in folder.glob(".*"):
        if LEFTOVER.fullmatch(path.name) and path.is_file():
            path.unlink()


def lock(path: Path, busy: str) -> AbstractContextManager[object]:
    """Lock a file until the end of the `with` block, or without one until the end of the command or process.

    path: the file of the lock, which is not removed; the lock always ends with the process. busy: the message of the
    InputError if another process has the lock; the process is appended.
    """
    from filelock import FileLock, Timeout

    held = FileLock(path, on_acquired=_sign, preserve_lock_file=True)
    try:
        taken = held.acquire(blocking=False)
    except Timeout:
        raise InputError(f"{busy}{_signature(path)}; wait until it ends") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("%s cannot be locked: make sure that no other process writes there", path.parent)
        return nullcontext()

    def release() -> None:
        if held.is_locked:
            with suppress(OSError):
                os.truncate(path, 0)
            held.release()

    at_end_of_command(release)
    return taken


def _sign(descriptor: int) -> None:
    """Write the owner into the lock file. The first byte is locked, and Windows refuses to read it, so skip it."""
    with suppress(OSError):  # a full disk
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f" {os.getpid()} {socket.gethostname()}".encode())


def _signature(path: Path) -> str:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(1)
            pid, host = file.read(300).decode().split()
        return f" (process {int(pid)} on {host})"
    except (OSError, ValueError):  # written by another program, or on a full disk
        return ""


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def check_regular(path: Path) -> None:
    """Raises InputError for a folder, FIFO, device or socket instead of a file: opening one may block for ever.

    Missing paths pass. Links are followed.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: is a {'folder' if stat.S_ISDIR(mode) else 'pipe or device'}, wanted a file")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises InputError if it is missing, is not JSON, or has numbers that are not finite."""
    check_regular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text:.20} is not a finite number")
    return value


def read_arrays(path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an .npz by name. names: read only these arrays, if they exist; the others may have any size.

    Raises InputError for other files, for pickles, and for arrays that are too large.
    """
    import numpy as np

    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            wanted = [
                info for info in archive.infolist() if names is None or info.filename.removesuffix(".npy") in names
            ]
            if (size := sum(info.file_size for info in wanted)) > MOST_ARRAY_BYTES:
                raise ValueError(f"{size:,} bytes when unpacked, at most {MOST_ARRAY_BYTES:,} are allowed")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if names is None or name in names}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # damaged bytes make zipfile and numpy raise any error
        raise InputError(f"{path}: not readable as .npz; cut short, or another format? ({error!s:.120})") from None


def array_names(path: Path) -> list[str]:
    """The names of the arrays in an .npz, without reading them. Raises InputError for other files."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except Exception as error:  # damaged bytes make zipfile raise any error
        raise InputError(f"{path}: not readable as .npz; cut short, or another format? ({error!s:.120})") from None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, or of the .safetensors files in a folder and its subfolders."""
    digest = hashlib.sha256()
    for part in [path] if path.is_file() else sorted(path.rglob("*.safetensors")):
        with part.open("rb", buffering=0) as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def writable_folder(path: Path) -> Path:
    """Make the folder if needed and try to write into it. Raises InputError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({error.strerror})") from None
    return path
