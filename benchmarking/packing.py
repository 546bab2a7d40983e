"""Compare the speed of a packed dataset with that of decoding JPEGs: python pack.py --benchmark."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from common.files import writable_folder
from data import open_dataset
from data.dataset import ImageDataset, training_batches
from data.packing.packed import PackedDataset, read_manifest
from data.packing.work import pack

NUM_JPEGS, SIZE, IMG_SIZE, BATCH = 5000, (178, 218), 64, 128
NUM_LARGE = 250_000  # number of images in the measurement of memory: 3 GB


class Generated(ImageDataset):
    """A dataset of random images without decoding."""

    def __init__(self, num_images: int):
        self.num_images = num_images
        self.pixels = torch.randint(0, 256, (BATCH, 3, IMG_SIZE, IMG_SIZE), dtype=torch.uint8)

    def __len__(self) -> int:
        return self.num_images

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.pixels[torch.as_tensor(indices) % BATCH], torch.zeros(len(indices), dtype=torch.int64)

    def describe(self) -> dict[str, Any]:
        return {"dataset": "generated", "images": len(self), "img_size": IMG_SIZE, "in_chans": 3, "crop": "none"}


def run(place: Path | None, num_workers: int) -> None:
    """Measure and print. place: the folder for temporary images."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=place and writable_folder(place)) as folder:
        root = Path(folder)
        print(f"{NUM_JPEGS:,} JPEGs of {SIZE[0]} x {SIZE[1]} to {IMG_SIZE} x {IMG_SIZE}, {os.cpu_count()} cores")
        make_jpegs(root / "jpegs" / "class")
        jpegs = jpeg_rate(root / "jpegs", num_workers)
        report(f"decoding JPEGs, torchvision, {num_workers} workers", jpegs)

        dataset = open_dataset("folder", root / "jpegs", img_size=IMG_SIZE, in_chans=3, packed=False)
        single = packing_rate(dataset, root / "packed1", 1)
        several = packing_rate(dataset, root / "packed", num_workers)
        report("packing, 1 process", single)
        report(f"packing, {num_workers} processes", several, f"{several / single:.2f} times one")

        packed = PackedDataset(root / "packed", read_manifest(root / "packed"))
        beside = loading_rate(packed, num_workers)
        report(f"packed, {num_workers} workers", beside, f"{beside / jpegs:.0f} times the JPEGs")
        report("packed, one process", loading_rate(packed, 0))

        pack(Generated(NUM_LARGE), root / "large")
        size = (root / "large" / "images.npy").stat().st_size
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rate, resident = pool.apply(random_reads, (root / "large",))
        report(f"packed, one process, {size / 1e9:.1f} GB", rate, resident)


def report(what: str, images_per_second: float, remark: str = "") -> None:
    print(f"{what:42}{images_per_second:10,.0f} images/s  {remark}".rstrip())


def make_jpegs(folder: Path) -> None:
    """Write JPEGs of smooth noise, with about the size of photographs."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(NUM_JPEGS):
        coarse = Image.fromarray(rng.integers(0, 256, (28, 23, 3), dtype=np.uint8))
        coarse.resize(SIZE, Image.Resampling.BICUBIC).save(folder / f"{i:06d}.jpg", quality=90)


def jpeg_rate(root: Path, num_workers: int) -> float:
    steps = [transforms.CenterCrop(SIZE[0]), transforms.Resize(IMG_SIZE), transforms.ToTensor()]
    dataset = ImageFolder(str(root), transforms.Compose(steps))
    loader = DataLoader(
        dataset, BATCH, shuffle=True, drop_last=True, num_workers=num_workers, persistent_workers=num_workers > 0
    )
    return rate_of((batch for _ in itertools.count() for batch in loader), warm_up=4, batches=2 * len(loader))


def loading_rate(packed: PackedDataset, num_workers: int) -> float:
    batches = training_batches(packed, BATCH, 0, 0, num_workers, pin_memory=False)
    return rate_of(batches, warm_up=50, batches=1500)


def rate_of(loader: Iterable[tuple[Tensor, Tensor]], warm_up: int, batches: int) -> float:
    """Images per second."""
    loader = iter(loader)
    for _ in range(warm_up):
        next(loader)
    start = time.perf_counter()
    count = sum(len(next(loader)[0]) for _ in range(batches))
    return count / (time.perf_counter() - start)


def packing_rate(dataset: ImageDataset, output: Path, num_workers: int) -> float:
    start = time.perf_counter()
    pack(dataset, output, num_workers)
    return len(dataset) / (time.perf_counter() - start)


def random_reads(folder: Path) -> tuple[float, str]:
    """The images per second over one epoch in random order, and the peak resident memory."""
    before, most = resident_bytes(), 0
    packed = PackedDataset(folder, read_manifest(folder))
    batches = training_batches(packed, BATCH, 0, 0, 0, pin_memory=False)
    start, count = time.perf_counter(), len(packed) // BATCH
    for _ in range(count):
        next(batches)
        most = max(most, resident_bytes())
    rate = count * BATCH / (time.perf_counter() - start)
    return (
        rate,
        f"{(most - before) / 1e6:.0f} MB of memory more than at its start"
        if before
        else "memory not measured on this system",
    )


def resident_bytes() -> int:
    """The resident memory of this process; 0 if the system does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
