"""Crops that make images of any size square. Checkpoints and scores record the name of the crop."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image, ImageOps
from torch import Tensor

from common.images import to_tensor

Resampling = Image.Resampling
MOST_ENLARGED = 32  # largest ratio of the sides of an image that `halve` enlarges


def none(image: Image.Image, size: int) -> Image.Image:
    """No crop. Raises ValueError for an image of another size."""
    if image.size != (size, size):
        raise ValueError(f"it is {image.width} x {image.height}, wanted {size} x {size}")
    return image


def fit(image: Image.Image, size: int) -> Image.Image:
    """The largest square at the centre."""
    return ImageOps.fit(image, (size, size), Resampling.BICUBIC)


def center178(image: Image.Image, size: int) -> Image.Image:
    """CelebA as in the DuoDiff paper: the 178 x 178 box at the centre."""
    return _box(image, image.height / 2, image.width / 2, 178, size)


def uvit128(image: Image.Image, size: int) -> Image.Image:
    """CelebA as U-ViT was trained on it: the 128 x 128 box centred at row 121, column 89."""
    return _box(image, 121, 89, 128, size)


def _box(image: Image.Image, row: float, column: float, side: int, size: int) -> Image.Image:
    """Raises ValueError for an image that does not contain the box: Pillow would add black to it."""
    left, top = round(column - side / 2), round(row - side / 2)
    if min(left, top) < 0 or left + side > image.width or top + side > image.height:
        raise ValueError(f"it is {image.width} x {image.height}, too small for the crop of CelebA, wanted 178 x 218")
    return image.crop((left, top, left + side, top + side)).resize((size, size), Resampling.BILINEAR)


def halve(image: Image.Image, size: int) -> Image.Image:
    """The usual crop of ImageNet for diffusion models (Dhariwal and Nichol 2021): halve with a box filter while the
    image stays large enough, resize bicubically, and take the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    if min(image.size) < size:
        image = _middle(image)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _middle(image: Image.Image) -> Image.Image:
    """Cut the ends of a long strip, which `halve` removes anyway: the whole strip, enlarged, can take gigabytes.

    Removes the same number of whole squares from both ends, so the middle does not shift by parts of a pixel.
    """
    short = min(image.size)
    left, top = (max(0, side // short - MOST_ENLARGED) // 2 * short for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image


CROPS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "none": none,
    "fit": fit,
    "center178": center178,
    "uvit128": uvit128,
    "halve": halve,
}


def to_square(image: Image.Image, crop: str, size: int, in_chans: int) -> Tensor:
    """uint8 (in_chans, size, size) of an image of mode L or RGB."""
    return to_tensor(CROPS[crop](image, size), in_chans)
