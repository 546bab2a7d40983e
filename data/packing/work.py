"""The work of packing: processes decode chunks of images in parallel, and a stopped run can continue."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict
from multiprocessing import active_children
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common.errors import InputError, WriteError
from common.files import check_regular, lock, read_json, remove_leftovers, replacing, writable_folder, write_json
from common.progress import Progress
from common.settings import differences
from data.dataset import ImageDataset
from data.packing.packed import (
    FORMAT,
    IMAGES,
    LABELS,
    MANIFEST,
    Manifest,
    block_checksums,
    read_manifest,
    state_of,
)
from data.rows import RowsFile
from data.workers import check_open_files, end_with_parent, signals_held

CHUNK_IMAGES, CHUNK_BYTES = 64, 2**22  # a chunk, the unit of work, is the smaller of the two
PLAN, JOURNAL, COMPACT = "plan.json", "journal.jsonl", "compact.npy"
FILES_PER_WORKER = 2  # open in this process: the ends of pipes


class Useless(InputError):
    """The images packed so far are useless, and are removed."""


def pack(dataset: ImageDataset, output: Path, num_workers: int = 0, quiet: bool = True) -> Manifest:
    """Make the folder `output`, see data.packing.packed; continues an earlier attempt.

    The files are written to <output>.partial, which is renamed when it is complete. num_workers: processes that
    decode image files; this process copies images that need no decoding. Raises InputError if `output` or the partial
    folder has another source or transform or other files, and if the disk is full.
    """
    output, source = output.resolve(), dataset.describe()
    if manifest := _finished(output, dataset, source):
        return manifest
    place, partial = writable_folder(output.parent), output.with_name(f"{output.name}.partial")
    if not partial.exists():
        _check_space(place, len(dataset) * dataset.row_bytes)
    # Not in the folder itself: Windows cannot rename a folder with an open file.
    lock_file = output.with_name(f"{output.name}.lock")
    with lock(lock_file, f"{partial}: another process is packing it"), _explaining_a_full_disk(partial):
        try:
            return _finished(output, dataset, source) or _go_on(dataset, source, partial, output, num_workers, quiet)
        finally:
            if not partial.exists():
                with suppress(OSError):  # Windows: the file is open
                    lock_file.unlink()


def _finished(output: Path, dataset: ImageDataset, source: dict[str, Any]) -> Manifest | None:
    """The manifest of an existing packed dataset; None if there is none."""
    if (output / MANIFEST).is_file():
        manifest = read_manifest(output)
        _refuse_another(output, manifest.source, source)
        if dataset.labels is not None and manifest.labels_sha256 is None:
            raise InputError(f"{output} was packed without labels; remove it, or give another --output")
        return manifest
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is not a packed dataset; give another --output")
    return None


def _go_on(
    dataset: ImageDataset, source: dict[str, Any], partial: Path, output: Path, num_workers: int, quiet: bool
) -> Manifest:
    """Fill the partial folder and turn it into the packed dataset."""
    remove_leftovers(writable_folder(partial))
    if (partial / MANIFEST).exists():  # the earlier attempt was stopped just before its end
        _refuse_another(partial, read_manifest(partial).source, source)
        return _settle(partial, output)
    work = _Work.begin_or_go_on(partial, dataset, source)
    try:
        work.decode(dataset, num_workers, quiet)
        work.complete(dataset, source, quiet)
    except Useless:
        work.rows.close()
        shutil.rmtree(partial)
        raise
    finally:
        work.rows.close()  # Windows cannot rename a folder with an open file
    return _settle(partial, output)


@contextmanager
def _explaining_a_full_disk(partial: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, WriteError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        why = str(error) if isinstance(error, WriteError) else f"{partial}: {error.strerror}"
        raise InputError(
            f"{why}; the images packed so far are kept in {partial}: make room, then give the same command again"
        ) from None


class Chunk(NamedTuple):
    """A finished chunk: the content of a line of the journal."""

    number: int
    crc32: int
    broken: dict[str, str]  # the reason, by the index of the image; a str, because JSON has no other keys


class _Work:
    """A partial folder: images.npy at its full length, and a journal of the finished chunks."""

    def __init__(self, partial: Path, num_images: int, chunk_images: int):
        self.partial, self.num_images, self.chunk_images = partial, num_images, chunk_images
        self.num_chunks = -(-num_images // chunk_images)
        self.rows = RowsFile.of_npy(partial / IMAGES)
        self.done = {chunk.number: chunk for chunk in self._intact()}

    @classmethod
    def begin_or_go_on(cls, partial: Path, dataset: ImageDataset, source: dict[str, Any]) -> _Work:
        if (partial / PLAN).exists():
            there, chunk_images = _read_plan(partial / PLAN)
            _refuse_another(partial, there, source)
            work = cls(partial, len(dataset), chunk_images)
            if work.rows.shape != (len(dataset), *dataset.row_shape):
                raise InputError(f"{partial}: its images do not fit its plan; remove it and pack again")
            return work
        # The plan is written last: a folder without one is begun again.
        (partial / JOURNAL).write_bytes(b"")
        shape = (len(dataset), *dataset.row_shape)
        np.lib.format.open_memmap(partial / IMAGES, mode="w+", dtype=dataset.dtype, shape=shape)
        plan: dict[str, Any] = {
            "source": source,
            "chunk_images": max(1, min(CHUNK_IMAGES, CHUNK_BYTES // dataset.row_bytes)),
        }
        write_json(partial / PLAN, plan)
        return cls(partial, len(dataset), plan["chunk_images"])

    def range_of(self, chunk: int) -> range:
        return range(chunk * self.chunk_images, min((chunk + 1) * self.chunk_images, self.num_images))

    def _intact(self) -> Iterator[Chunk]:
        """The chunks of the journal that are complete on disk; after a power cut some may be missing."""
        check_regular(self.partial / JOURNAL)
        lines = (self.partial / JOURNAL).read_bytes().split(b"\n")
        for line in lines[:-1]:  # the text after the last line break is incomplete
            try:
                chunk = Chunk(**json.loads(line))
                whole = chunk.number in range(self.num_chunks) and all(int(i) < self.num_images for i in chunk.broken)
            except (ValueError, TypeError, RecursionError):
                continue
            if whole and zlib.crc32(self.rows.read(self.range_of(chunk.number)).data) == chunk.crc32:
                yield chunk

    def decode(self, dataset: ImageDataset, num_workers: int, quiet: bool) -> None:
        """Decode the missing chunks; each finished chunk is noted in the journal at once."""
        to_do = [(number, self.range_of(number)) for number in range(self.num_chunks) if number not in self.done]
        finished = self.num_images - sum(len(images) for _, images in to_do)
        with (
            (self.partial / JOURNAL).open("ab") as journal,
            Progress("packing", self.num_images, initial=finished, quiet=quiet) as bar,
        ):
            journal.write(b"\n")  # ends an incomplete line
            checked = False
            for chunk in _run(dataset, self.rows, to_do, num_workers if dataset.needs_decoding else 0):
                checked = checked or self._check_rows(dataset, chunk)
                journal.write(json.dumps(chunk._asdict()).encode() + b"\n")
                journal.flush()
                self.done[chunk.number] = chunk
                bar.update(len(self.range_of(chunk.number)))

    def _check_rows(self, dataset: ImageDataset, chunk: Chunk) -> bool:
        """Whether the chunk has readable images for a check. Raises Useless if they cannot be right."""
        whole = [i for i in self.range_of(chunk.number) if str(i) not in chunk.broken]
        if whole:
            try:
                dataset.check_rows(self.rows.read(whole))
            except InputError as error:
                raise Useless(str(error)) from None
        return bool(whole)

    def complete(self, dataset: ImageDataset, source: dict[str, Any], quiet: bool) -> None:
        """Leave out broken images, and add labels and the manifest."""
        broken = {int(i): why for number in sorted(self.done) for i, why in self.done[number].broken.items()}
        if len(broken) == self.num_images:
            raise Useless(f"{source['source']}: no image can be read ({broken[0]})")
        path, keep = self.partial / IMAGES, np.ones(self.num_images, bool)
        keep[list(broken)] = False
        if broken:
            path = self.partial / COMPACT
            self._compact(path, np.flatnonzero(keep))
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        labels_sha256 = None
        if dataset.labels is not None:
            labels = np.asarray(dataset.labels, dtype=np.int64)[keep]
            labels_sha256 = hashlib.sha256(labels.data).hexdigest()
            with replacing(self.partial / LABELS) as temporary:
                np.save(temporary, labels, allow_pickle=False)
        manifest = Manifest(
            format=FORMAT,
            kind=dataset.kind,
            source=source,
            source_state=state_of(source),
            shape=(int(keep.sum()), *self.rows.shape[1:]),
            random_flip=dataset.random_flip,
            left_out={**dataset.left_out, **{dataset.name_of(i): why for i, why in broken.items()}},
            images_sha256=_sha256(path, quiet),
            labels_sha256=labels_sha256,
            blocks_crc32=block_checksums(path),
        )
        write_json(self.partial / MANIFEST, asdict(manifest))

    def _compact(self, path: Path, kept: np.ndarray) -> None:
        """Write images.npy again without the broken images."""
        shape = (len(kept), *self.rows.shape[1:])
        _check_space(self.partial, len(kept) * self.rows.row_bytes)
        with path.open("wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(self.rows.dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, len(kept), self.chunk_images):
                file.write(self.rows.read(kept[start : start + self.chunk_images]).data)


def _read_plan(path: Path) -> tuple[dict[str, Any], int]:
    """The source, and the number of images in a chunk."""
    plan = read_json(path)
    if isinstance(plan, dict):
        source, chunk_images = plan.get("source"), plan.get("chunk_images")
        if isinstance(source, dict) and type(chunk_images) is int and 1 <= chunk_images <= CHUNK_IMAGES:
            return source, chunk_images
    raise InputError(f"{path}: not in the format of pack.py; remove the folder and pack again")


def _settle(partial: Path, output: Path) -> Manifest:
    """Turn a partial folder that has its manifest into the packed dataset. May be stopped and repeated."""
    if (partial / COMPACT).exists():
        (partial / COMPACT).replace(partial / IMAGES)
    for name in (JOURNAL, PLAN):
        (partial / name).unlink(missing_ok=True)
    if output.exists():
        output.rmdir()  # it is empty
    partial.rename(output)
    return read_manifest(output)


def _refuse_another(folder: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises InputError if the images of a folder have another source or transform; its path does not matter."""
    place = {"source": None}
    if different := differences(there | place, wanted | place):
        raise InputError(
            f"{folder} was packed from another source or with another transform ({', '.join(different)}); "
            "remove it or give --output"
        )


def _check_space(folder: Path, wanted: int) -> None:
    if (free := shutil.disk_usage(folder).free) < wanted:
        raise InputError(
            f"{folder}: {in_bytes(wanted)} are needed, but only {in_bytes(free)} are free, "
            f"{in_bytes(wanted - free)} too few; make room, or give --output"
        )


def in_bytes(count: float) -> str:
    """ "3.07 GB", "12.3 kB", "7 bytes": three digits of it."""
    unit = 0
    while count >= 999.5 and unit < 4:
        count, unit = count / 1000, unit + 1
    return f"{float(f'{count:.3g}'):g} {('bytes', 'kB', 'MB', 'GB', 'TB')[unit]}"


def _sha256(path: Path, quiet: bool) -> str:
    digest = hashlib.sha256()
    with (
        path.open("rb", buffering=0) as file,
        tqdm(
            total=path.stat().st_size, desc="checksum", unit="B", unit_scale=True, disable=True if quiet else None
        ) as bar,
    ):
        while block := file.read(2**20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


# Decoding, in this process or in others

_worker: tuple[ImageDataset, RowsFile]  # the dataset, and where its rows go


def _run(dataset: ImageDataset, rows: RowsFile, to_do: list[tuple[int, range]], num_workers: int) -> Iterable[Chunk]:
    """Decode chunks and write their images; yields the chunks as they are finished."""
    about = (dataset, rows)
    if num_workers == 0 or len(to_do) < 2:
        _become_worker(*about)
        yield from (_decode(*task) for task in to_do)
        return
    num_workers = min(num_workers, len(to_do))
    check_open_files(num_workers, FILES_PER_WORKER)
    pool = ProcessPoolExecutor(num_workers, initializer=_start_worker, initargs=about)
    try:
        for future in as_completed(_submit(pool, to_do)):
            yield future.result()
    except BrokenProcessPool:
        raise InputError(
            "the system ended a decoding process, perhaps for lack of memory; give the same command with fewer "
            "--num_workers to continue"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, to_do: Sequence[tuple[int, range]]) -> list[Future[Chunk]]:
    """Submit the chunks, which starts the processes. If that fails, end all: the interpreter would wait for them."""
    before = set(active_children())
    try:
        with signals_held():
            return [pool.submit(_decode, *task) for task in to_do]
    except BaseException:
        for process in set(active_children()) - before:
            process.kill()
        raise


def _start_worker(*about: Any) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    _become_worker(*about)


def _become_worker(*about: Any) -> None:
    global _worker
    _worker = about


def _decode(number: int, images: range) -> Chunk:
    dataset, rows = _worker
    pixels, broken = dataset.whole_and_broken(images)
    content = np.ascontiguousarray(pixels.numpy())
    with rows.path.open("rb+", buffering=0) as file:
        file.seek(rows.offset + images.start * rows.row_bytes)
        if file.write(content.data) != content.nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(rows.path))
    return Chunk(number, zlib.crc32(content.data), {str(i): why for i, why in broken.items()})
