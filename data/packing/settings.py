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

    dataset: str | None = option(None, "dataset to pack", choices=tuple(DATASETS))
    data_path: Path | None = option(None, "path of the dataset (default: datasets/)", exists="path")
    download: bool = option(False, "download the dataset first, if that is possible")
    img_size: int | None = option(None, "side of the packed images", least=1, most=4096)
    crop: str | None = option(None, "crop that makes images square (default: the crop of the dataset)", choices=CROPS)
    in_chans: int = option(3, "channels of the images, 3 for colour and 1 for grey", least=1, most=256)
    num_classes: int = option(-1, "number of classes of --dataset folder; -1 packs no labels", least=-1, most=1_000_000)
    output: Path | None = option(
        None,
        "folder to write, or with --benchmark a folder with room for 3 GB of temporary files (default: packed/<name> "
        "under --data_path)",
    )
    num_workers: int = option(num_cores(), "number of decoding processes", least=0, most=1024)
    autoencoder_checkpoint_path: Path | None = option(
        None, "pack latents of this autoencoder, autoencoder_kl.pth or a folder of diffusers", exists="path"
    )
    scale_factor: float = option(
        PUBLIC_SCALE_FACTOR, "factor by which latents are multiplied", least=0, most=1000, above=True
    )
    benchmark: bool = option(False, "measure the speed of packing and loading on generated images")
    machine: MachineSettings = section("machine", MachineSettings())

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.benchmark and (self.dataset is None or self.img_size is None):
            raise InputError("--dataset and --img_size are needed")
