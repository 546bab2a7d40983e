"""Decode a dataset once, into one array that training reads at the speed of the disk: python -m data.pack."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser
from common.config import PUBLIC_SCALE_FACTOR
from common.errors import InputError, command
from common.options import MachineSettings
from common.settings import Checked, option, section
from data import CROPS, DATASETS, crop_of, open_source

if TYPE_CHECKING:
    from data.dataset import ImageDataset


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class PackSettings(Checked):
    """Settings of pack.py."""

    dataset: str | None = option(None, "the images", choices=tuple(DATASETS))
    data_path: Path | None = option(None, "where the dataset lies (default: datasets/)", exists="path")
    download: bool = option(False, "fetch the dataset first, where that is possible")
    img_size: int | None = option(None, "side of the packed images", least=1, most=4096)
    crop: str | None = option(None, "how images are made square (default: the dataset's)", choices=CROPS)
    in_chans: int = option(3, "channels: 3 colour, 1 grey", least=1, most=256)
    num_classes: int = option(-1, "of --dataset folder, to pack labels with it", least=-1, most=1_000_000)
    output: Path | None = option(
        None,
        "folder to make (default: packed/<name> under --data_path); with --benchmark: where there is room for 3 GB for "
        "a while",
    )
    num_workers: int = option(num_cores(), "processes that decode", least=0, most=1024)
    autoencoder_checkpoint_path: Path | None = option(
        None, "pack latents of this autoencoder: autoencoder_kl.pth or a folder of diffusers", exists="path"
    )
    scale_factor: float = option(PUBLIC_SCALE_FACTOR, "latents are multiplied by it", least=0, most=1000, above=True)
    benchmark: bool = option(False, "measure packing and loading on images it makes")
    machine: MachineSettings = section("machine", MachineSettings())

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.benchmark and (self.dataset is None or self.img_size is None):
            raise InputError("--dataset and --img_size are needed")


def parse_settings(argv: Sequence[str] | PackSettings | None) -> PackSettings:
    return Parser(prog="pack.py", description=__doc__).settings(PackSettings, argv, network=False)


@command
def main(argv: Sequence[str] | PackSettings | None = None) -> None:
    settings = parse_settings(argv)
    if settings.benchmark:
        from data.benchmark import run

        return run(settings.output, max(1, settings.num_workers))
    assert settings.dataset is not None, "PackSettings lets none pass but for the benchmark"
    crop = crop_of(settings.dataset, settings.crop)
    shape: dict[str, Any] = {"img_size": settings.img_size, "in_chans": settings.in_chans, "crop": crop}
    dataset = open_source(
        settings.dataset, settings.data_path, **shape, num_classes=settings.num_classes, download=settings.download
    )

    from data.dataset import some_of
    from data.packed import IMAGES, MANIFEST, default_folder
    from data.packing import in_bytes, pack

    if path := settings.autoencoder_checkpoint_path:
        dataset = encoded(dataset, path, settings)
        shape |= {name: dataset.describe()[name] for name in ("img_size", "in_chans")}
    output = settings.output or default_folder(settings.dataset, settings.data_path, **shape)
    manifest = pack(dataset, output, settings.num_workers, settings.machine.quiet)
    print(f"{manifest.shape[0]:,} images -> {output} ({in_bytes((output / IMAGES).stat().st_size)})")
    if manifest.left_out:
        print(f"{some_of(manifest.left_out)}; all are named in {output / MANIFEST}")


def encoded(images: ImageDataset, path: Path, settings: PackSettings) -> ImageDataset:
    """The images as latents of the autoencoder in `path`."""
    from common.devices import pick_device
    from data.latents import LatentSource
    from models.autoencoder import load_autoencoder

    device = pick_device(settings.machine.device)
    autoencoder = load_autoencoder(path, settings.scale_factor, device)
    return LatentSource(images, autoencoder, path, device)


if __name__ == "__main__":
    main()
