"""The settings of pack.py. No torch in here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from common.config import PUBLIC_SCALE_FACTOR
from common.errors import InputError
from common.options import MachineSettings
from common.settings import Checked, option, section
from data import CROPS, DATASETS


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
