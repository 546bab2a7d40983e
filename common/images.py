"""Convert pixels between 8 bits and the range of the networks, and write and read pictures."""

from __future__ import annotations

import io
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from common.files import replacing
from common.image_files import read_image


def from_uint8(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], of any shape."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 of the same shape, clipped and rounded; the inverse of `from_uint8`."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def save_png(path: str | os.PathLike[str], pixels: Tensor) -> int:
    """pixels: uint8 (C, H, W) with C = 1, 3 or 4. Returns the CRC-32 of the file."""
    array = rearrange(pixels.cpu().numpy(), "c h w -> h w c")
    content = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(content, "PNG")
    with replacing(Path(path), durable=False) as temporary:
        temporary.write_bytes(content.getbuffer())
    return zlib.crc32(content.getbuffer())


def read_png(path: Path) -> Tensor:
    """Read a file of `save_png`: uint8 (C, H, W)."""
    image = read_image(path)
    return to_tensor(image, in_chans=1 if image.mode == "L" else 3)


def save_grid(path: str | os.PathLike[str], pixels: Tensor, at_most: int = 100, least_side: int = 64) -> None:
    """Save the first images as one picture, nearly square.

    Small images are enlarged smoothly, because a smooth 8 x 8 digit is easier to read than one of squares.
    pixels: uint8 (N, C, H, W).
    """
    tiles = enlarge(pixels[:at_most].cpu(), least_side)
    tiles = F.pad(tiles, (1, 1, 1, 1), value=255)
    columns = math.ceil(len(tiles) ** 0.5)
    rows = math.ceil(len(tiles) / columns)
    blank = tiles.new_full((rows * columns - len(tiles), *tiles.shape[1:]), 255)
    grid = rearrange(torch.cat([tiles, blank]), "(r k) c h w -> c (r h) (k w)", r=rows)
    save_png(path, grid)


def captions(texts: Sequence[str], width: int) -> Tensor:
    """Short texts in black on white, each in the middle of a cell. Returns uint8 (1, H, len(texts) * width)."""
    size = max(12, width // 8)
    font = ImageFont.load_default(size)
    image = Image.new("L", (len(texts) * width, size + 8), 255)
    draw = ImageDraw.Draw(image)
    for number, text in enumerate(texts):
        draw.text(((number + 0.5) * width, image.height / 2), text, fill=0, font=font, anchor="mm")
    return to_tensor(image, in_chans=1)


def enlarge(pixels: Tensor, least_side: int) -> Tensor:
    """Enlarge images smaller than least_side by a whole factor. uint8 (N, C, H, W) -> uint8 (N, C, zoom H, zoom W)."""
    zoom = max(1, least_side // pixels.shape[-1])
    if zoom == 1:
        return pixels
    larger = F.interpolate(pixels.float(), scale_factor=zoom, mode="bicubic")
    return larger.clamp(0, 255).round().to(torch.uint8)


def to_tensor(image: Image.Image, in_chans: int) -> Tensor:
    """A Pillow image as uint8 (C, H, W), grey or RGB."""
    array = np.array(image.convert("L" if in_chans == 1 else "RGB"))
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1).contiguous()
