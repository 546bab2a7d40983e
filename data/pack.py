"""Decode a dataset once, into one array that training reads at the speed of the disk: python -m data.pack."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import shutil
import signal
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common.cli import Parser, add_common_options, existing_path, real, whole
from common.errors import InputError, command
from common.files import lock, read_json, replacing, writable_folder, write_json
from data import CROPS, DATASETS, crop_of, open_source
from data.dataset import ImageDataset
from data.packed import (
    FORMAT,
    IMAGES,
    LABELS,
    MANIFEST,
    Manifest,
    block_checksums,
    default_folder,
    differences,
    read_manifest,
    state_of,
)
from data.rows import RowsFile

CHUNK_IMAGES, CHUNK_BYTES = 64, 2**22  # a chunk, the unit of work, is the smaller of the two
PLAN, JOURNAL, LOCK, COMPACT = "plan.json", "journal.jsonl", "lock", "compact.npy"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--dataset", choices=tuple(DATASETS))
    parser.add_argument("--data_path", type=existing_path, help="where the dataset lies; datasets/ if not said")
    parser.add_argument("--download", action="store_true", help="fetch the dataset first, where that is possible")
    parser.add_argument("--img_size", type=whole(1), help="side of the packed images")
    parser.add_argument("--crop", choices=CROPS, help="how images are made square; the dataset's default if not said")
    parser.add_argument("--in_chans", type=whole(1), default=3, help="channels: 3 colour, 1 grey")
    parser.add_argument("--num_classes", type=whole(-1), default=-1, help="of --dataset folder, to pack labels with it")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder to make; packed/<name> under --data_path if not said; "
        "with --benchmark: where there is room for 3 GB for a while",
    )
    parser.add_argument("--num_workers", type=whole(0, 1024), default=num_cores(), help="processes that decode")
    parser.add_argument(
        "--autoencoder_checkpoint_path",
        type=existing_path,
        help="pack latents of this autoencoder: autoencoder_kl.pth or a folder of diffusers",
    )
    parser.add_argument(
        "--scale_factor", type=real(0, 1000, above=True), default=0.18215, help="that latents are multiplied by"
    )
    add_common_options(parser)
    parser.add_argument("--benchmark", action="store_true", help="measure packing and loading on images it makes")
    args = parser.parse_args(argv)
    if not args.benchmark and (args.dataset is None or args.img_size is None):
        parser.error("--dataset and --img_size are needed")
    return args


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.benchmark:
        from data.benchmark import run

        return run(args.output, max(1, args.num_workers))
    crop = crop_of(args.dataset, args.crop)
    shape = {"img_size": args.img_size, "in_chans": args.in_chans, "crop": crop}
    dataset = open_source(args.dataset, args.data_path, **shape, num_classes=args.num_classes, download=args.download)
    if args.autoencoder_checkpoint_path:
        dataset = encoded(dataset, args)
        shape |= {name: dataset.describe()[name] for name in ("img_size", "in_chans")}
    output = args.output or default_folder(args.dataset, args.data_path, **shape)
    manifest = pack(dataset, output, args.num_workers, args.quiet)
    size = (output / IMAGES).stat().st_size
    broken = f" ({len(manifest.left_out)} broken, left out)" if manifest.left_out else ""
    print(f"{manifest.shape[0]:,} images{broken} -> {output} ({size / 1e6:,.0f} MB)")


def encoded(images: ImageDataset, args: argparse.Namespace) -> ImageDataset:
    """The images as latents."""
    from common.devices import pick_device
    from data.latents import LatentSource
    from models.autoencoder import load_autoencoder

    device = pick_device(args.device)
    autoencoder = load_autoencoder(args.autoencoder_checkpoint_path, args.scale_factor, device)
    return LatentSource(images, autoencoder, args.autoencoder_checkpoint_path, device)


def num_cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pack(dataset: ImageDataset, output: Path, num_workers: int = 0, quiet: bool = True) -> Manifest:
    """Make the folder `output`, see data.packed; goes on where an earlier attempt stopped.

    It grows as <output>.partial beside it and is renamed when it is complete. num_workers: processes that
    decode image files; what needs no decoding is copied by this one. Raises InputError where `output` or the
    partial folder is of another source or transform, or something else.
    """
    source = dataset.describe()
    if (output / MANIFEST).is_file():
        manifest = read_manifest(output)
        _refuse_another(output, manifest.source, source)
        if dataset.labels is not None and manifest.labels_sha256 is None:
            raise InputError(f"{output} was packed without labels; remove it, or give another --output")
        return manifest
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is something else, not a packed dataset; give another --output")
    partial = output.with_name(f"{output.name}.partial")
    if not partial.exists():
        _check_space(writable_folder(output.parent), len(dataset) * dataset.row_bytes)
    writable_folder(partial)
    with lock(partial / LOCK, f"{partial}: another process is packing it"):
        if not (partial / MANIFEST).exists():
            work = _Work.begin_or_go_on(partial, dataset, source)
            work.decode(dataset, num_workers, quiet)
            work.complete(dataset, source, quiet)
        else:  # the attempt before was stopped at the very end
            _refuse_another(partial, read_manifest(partial).source, source)
        return _settle(partial, output)


class Chunk(NamedTuple):
    """A finished chunk, as a line of the journal holds it."""

    number: int
    crc32: int
    broken: dict[str, str]  # index of an image -> why; not int, for JSON's sake


class _Work:
    """A partial folder: images.npy at its full length, and a journal of the chunks that are in it."""

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
                raise InputError(f"{partial}: its images are not those of its plan; remove it and pack again")
            return work
        # The plan comes last: what lies here without one was begun a moment ago, and is begun anew.
        (partial / JOURNAL).write_bytes(b"")
        shape = (len(dataset), *dataset.row_shape)
        np.lib.format.open_memmap(partial / IMAGES, mode="w+", dtype=dataset.dtype, shape=shape)
        plan = {"source": source, "chunk_images": max(1, min(CHUNK_IMAGES, CHUNK_BYTES // dataset.row_bytes))}
        write_json(partial / PLAN, plan)
        return cls(partial, len(dataset), plan["chunk_images"])

    def range_of(self, chunk: int) -> range:
        return range(chunk * self.chunk_images, min((chunk + 1) * self.chunk_images, self.num_images))

    def _intact(self) -> Iterator[Chunk]:
        """Chunks that the journal names and that really are on disk: a power cut may have kept them from it."""
        lines = (self.partial / JOURNAL).read_bytes().split(b"\n")
        for line in lines[:-1]:  # what follows the last line break was cut off
            try:
                chunk = Chunk(**json.loads(line))
                whole = chunk.number in range(self.num_chunks) and all(int(i) < self.num_images for i in chunk.broken)
            except (ValueError, TypeError, RecursionError):
                continue
            if whole and zlib.crc32(self.rows.read(self.range_of(chunk.number))) == chunk.crc32:
                yield chunk

    def decode(self, dataset: ImageDataset, num_workers: int, quiet: bool) -> None:
        """Decode what is not done yet; each finished chunk is noted in the journal at once."""
        to_do = [(number, self.range_of(number)) for number in range(self.num_chunks) if number not in self.done]
        finished = self.num_images - sum(len(images) for _, images in to_do)
        with (
            (self.partial / JOURNAL).open("ab") as journal,
            tqdm(total=self.num_images, initial=finished, unit="image", disable=True if quiet else None) as bar,
        ):
            journal.write(b"\n")  # ends a line that was cut off
            for chunk in _run(dataset, self.rows, to_do, num_workers if dataset.needs_decoding else 0):
                journal.write(json.dumps(chunk._asdict()).encode() + b"\n")
                journal.flush()
                self.done[chunk.number] = chunk
                bar.update(len(self.range_of(chunk.number)))

    def complete(self, dataset: ImageDataset, source: dict[str, Any], quiet: bool) -> None:
        """Leave out broken images, and add labels and the manifest."""
        broken = {int(i): why for number in sorted(self.done) for i, why in self.done[number].broken.items()}
        if len(broken) == self.num_images:
            shutil.rmtree(self.partial)
            raise InputError(f"{source['source']}: no image can be read ({broken[0]})")
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
            labels_sha256 = hashlib.sha256(labels).hexdigest()
            with replacing(self.partial / LABELS) as temporary:
                np.save(temporary, labels, allow_pickle=False)
        names = getattr(dataset, "names", None)
        manifest = Manifest(
            format=FORMAT,
            kind=dataset.kind,
            source=source,
            source_state=state_of(source),
            shape=[int(keep.sum()), *self.rows.shape[1:]],
            random_flip=dataset.random_flip,
            left_out={**dataset.left_out, **{names[i] if names else str(i): why for i, why in broken.items()}},
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
                file.write(self.rows.read(kept[start : start + self.chunk_images]))


def _read_plan(path: Path) -> tuple[dict[str, Any], int]:
    """The source, and the images in a chunk."""
    plan = read_json(path)
    if isinstance(plan, dict):
        source, chunk_images = plan.get("source"), plan.get("chunk_images")
        if isinstance(source, dict) and type(chunk_images) is int and 1 <= chunk_images <= CHUNK_IMAGES:
            return source, chunk_images
    raise InputError(f"{path}: not as data.pack writes it; remove the folder and pack again")


def _settle(partial: Path, output: Path) -> Manifest:
    """Turn a partial folder that has its manifest into the packed dataset. May be stopped and done again."""
    if (partial / COMPACT).exists():
        (partial / COMPACT).replace(partial / IMAGES)
    for name in (JOURNAL, PLAN, LOCK):
        (partial / name).unlink(missing_ok=True)
    if output.exists():
        output.rmdir()  # it was found empty
    partial.rename(output)
    return read_manifest(output)


def _refuse_another(folder: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises InputError where a folder's images are of another source or transform; where it lies is no matter."""
    place = {"source": None}
    if different := differences(there | place, wanted | place):
        raise InputError(f"{folder} is of another source or transform ({different}); remove it or give --output")


def _check_space(folder: Path, wanted: int) -> None:
    if (free := shutil.disk_usage(folder).free) < wanted:
        raise InputError(f"{folder}: {wanted / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; give --output")


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
    """Decode chunks and write them to their place; yields them as they are finished."""
    about = (dataset, rows)
    if num_workers == 0 or len(to_do) < 2:
        _become_worker(*about)
        yield from (_decode(*task) for task in to_do)
        return
    pool = ProcessPoolExecutor(min(num_workers, len(to_do)), initializer=_start_worker, initargs=about)
    try:
        for future in as_completed([pool.submit(_decode, *task) for task in to_do]):
            yield future.result()
    except BrokenProcessPool:
        raise InputError(
            "a decoding process was ended from outside, perhaps for want of memory; the same command with fewer "
            "--num_workers goes on from here"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(*about: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _become_worker(*about)


def _become_worker(*about: Any) -> None:
    global _worker
    _worker = about


def _end_with_parent() -> None:
    """A pool's processes would wait for ever for the next task of a parent that was killed."""
    wait([parent_process().sentinel])
    os._exit(1)


def _decode(number: int, images: range) -> Chunk:
    dataset, rows = _worker
    pixels, broken = dataset.whole_and_broken(images)
    content = np.ascontiguousarray(pixels.numpy())
    with rows.path.open("rb+", buffering=0) as file:
        file.seek(rows.offset + images.start * rows.row_bytes)
        if file.write(content) != content.nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(rows.path))
    return Chunk(number, zlib.crc32(content), {str(i): why for i, why in broken.items()})


if __name__ == "__main__":
    main()
