"""Latents of an autoencoder instead of pixels: pack.py encodes them once, and training samples from them. Calibration
encodes the few images that it needs.

A row is float16 (2, 2, C, h, w): the image and its mirror image, each with the mean and the standard deviation of its
unscaled latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError
from common.files import sha256_of
from common.images import from_uint8
from data.dataset import ImageDataset
from data.packing.packed import Manifest, PackedDataset

if TYPE_CHECKING:
    from models.autoencoder import Autoencoder

ENCODE_AT_ONCE = 8  # images; the encoder takes far more memory than the pixels
STD_RANGE = (0.2, 4.0)  # of scaled latents: about 1 is right, the unscaled public latents have 5.5


class LatentSource(ImageDataset):
    """The images of a dataset as latents, encoded on demand.

    images: pixels, of a size that the autoencoder accepts. checkpoint: the file of the autoencoder, for the
    description.
    """

    kind, dtype = "latents", np.float16

    def __init__(self, images: ImageDataset, autoencoder: Autoencoder, checkpoint: Path, device: torch.device):
        about = images.describe()
        if about["in_chans"] != 3 or about["img_size"] % autoencoder.downsampling:
            raise InputError(
                f"the autoencoder takes RGB images whose side is a multiple of {autoencoder.downsampling}, not "
                f"{about['in_chans']} channels of {about['img_size']} x {about['img_size']}"
            )
        self.images, self.autoencoder, self.device = images, autoencoder, device
        self.names, self.labels, self.left_out = images.names, images.labels, images.left_out
        channels, side = autoencoder.latent_channels, about["img_size"] // autoencoder.downsampling
        self.about = about | {
            "img_size": side,
            "in_chans": channels,
            "pixels": about["img_size"],
            "scale_factor": autoencoder.scale_factor,
            "autoencoder_sha256": sha256_of(checkpoint),
        }

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        pixels, labels = self.images.__getitems__(indices)
        return self._encode(pixels), labels

    def whole_and_broken(self, indices: Sequence[int]) -> tuple[Tensor, dict[int, str]]:
        pixels, broken = self.images.whole_and_broken(indices)
        return self._encode(pixels), broken

    def _encode(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> (B, 2, 2, C, h, w)."""
        parts = []
        for part in pixels.split(ENCODE_AT_ONCE):
            images = from_uint8(part.to(self.device))
            views = [torch.stack(self.autoencoder.encode(view), dim=1) for view in (images, images.flip(-1))]
            parts.append(torch.stack(views, dim=1).half().cpu())
        return torch.cat(parts)

    def to_x0(self, rows: Tensor, mirrored: Tensor | None, normal: Callable[..., Tensor]) -> Tensor:
        return draw_latents(rows, mirrored, normal, self.autoencoder.scale_factor)

    def check_rows(self, rows: np.ndarray) -> None:
        check_scale(rows, self.autoencoder.scale_factor, self.about["source"])

    def describe(self) -> dict[str, Any]:
        return self.about


def check_scale(rows: np.ndarray, scale_factor: float, where: object) -> None:
    """Raises InputError if the standard deviation of the scaled means of rows (N, 2, 2, C, h, w) is far from 1."""
    std = float(rows[:, 0, 0].astype(np.float32).std()) * scale_factor
    if not STD_RANGE[0] < std < STD_RANGE[1]:
        raise InputError(
            f"{where}: the standard deviation of the latents is {std:.2f} after scaling by {scale_factor}, wanted "
            "about 1; pack with the right --scale_factor"
        )


class PackedLatents(PackedDataset):
    """A packed dataset of latents. Also raises InputError if the scale of the latents is wrong."""

    dtype = np.float16

    def __init__(self, folder: Path, manifest: Manifest, num_classes: int = -1):
        super().__init__(folder, manifest, num_classes)
        scale_factor = manifest.source.get("scale_factor")
        if not isinstance(scale_factor, float):
            raise InputError(
                f"{folder}: the manifest names no scale_factor, so the latents cannot be scaled; pack again"
            )
        self.scale_factor = scale_factor
        some = self.images.read(np.linspace(0, len(self) - 1, min(len(self), 64)).astype(int))
        check_scale(some, self.scale_factor, folder)

    def to_x0(self, rows: Tensor, mirrored: Tensor | None, normal: Callable[..., Tensor]) -> Tensor:
        return draw_latents(rows, mirrored, normal, self.scale_factor)


def draw_latents(rows: Tensor, mirrored: Tensor | None, normal: Callable[..., Tensor], scale_factor: float) -> Tensor:
    """Draw latents (B, C, h, w), scaled, from rows (B, 2, 2, C, h, w). The rest is as in `ImageDataset.to_x0`."""
    view = torch.zeros(len(rows), dtype=torch.long, device=rows.device) if mirrored is None else mirrored.long()
    mean, std = rows[torch.arange(len(rows), device=rows.device), view].float().unbind(1)
    return (mean + std * normal(*mean.shape[1:])) * scale_factor
