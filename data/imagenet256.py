"""ImageNet (ILSVRC 2012) at 256 x 256 pixels.

Networks of this size work on latents of an autoencoder, which are a packed dataset of kind "latents".
"""

from __future__ import annotations

from pathlib import Path

from common.errors import InputError
from data import DEFAULT_PATH
from data.imagenet import ImageNet, find_classes


def open_imagenet256(data_path: Path | None, *, img_size: int, in_chans: int, num_classes: int, crop: str) -> ImageNet:
    """The folder of class folders: data_path, or imagenet256/ or imagenet/ in it, or train/ in one of these.

    Raises InputError for a network of latents, because latents only exist as a packed dataset.
    """
    if in_chans not in (1, 3):
        raise InputError(
            f"in_chans={in_chans}: no packed latents of imagenet256 under {data_path or DEFAULT_PATH}; make them with "
            "python pack.py --dataset imagenet256 --img_size 256 --autoencoder_checkpoint_path FILE"
        )
    folder = find_classes("imagenet256", data_path or DEFAULT_PATH)
    return ImageNet("imagenet256", folder, img_size=img_size, in_chans=in_chans, num_classes=num_classes, crop=crop)
