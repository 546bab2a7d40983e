"""Read image files: upright, opaque, 8 bits. All code that reads images uses this module."""

from __future__ import annotations

import errno
import io
import re
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from common.files import check_regular

T = TypeVar("T")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

BITS_PER_SAMPLE, PHOTOMETRIC, ORIENTATION = 258, 262, 274  # tags of TIFF; the last one is also in EXIF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # the chunks that the pixels need
MOST_OF_16_BITS, MOST_OF_FEW_BITS = 65535, {"L;2": 3, "L;4": 15}
DEEP_COLOUR = re.compile(r"(RGB|RGBA|RGBa|RGBX|CMYK);16([BLN])")  # Pillow's name of a layout, and the byte order


class BrokenImage(ValueError):
    """A file is not an image, or is incomplete. The message gives the reason, and is the same every time."""


def read_image(file: Path | BinaryIO) -> Image.Image:
    """Read an image file: upright, opaque, 8 bits, mode L, or RGB if `in_chans_of` is 3.

    Transparent pixels are blended with white. 16 bits are divided by 257 and rounded. Only the first frame is read.
    Only common formats within Pillow's limit of pixels are decoded, because decoders of others start programs.

    file: a path, or a stream that can seek. Raises BrokenImage; OSError for faults of the disk or the permissions.
    """
    return _with_opened(file, _as_looked_at)


def in_chans_of(file: Path | BinaryIO) -> int:
    """3 for a colour image, 1 for a grey one, from its header without decoding. Raises the errors of `read_image`.

    A grey image in RGB counts as colour, a palette counts as colour if any of its entries is.
    """
    return _with_opened(file, lambda image: 3 if _has_colour(image) else 1)


@contextmanager
def decoding() -> Iterator[None]:
    """A context that turns all errors of a decoder into BrokenImage, because damaged bytes make it raise any error.

    Errors with other causes pass: the disk, the permissions, the memory.
    """
    try:
        yield
    except (BrokenImage, MemoryError):
        raise
    except UnidentifiedImageError:  # its message contains a memory address
        raise BrokenImage("not readable as an image") from None
    except Exception as error:
        # EINVAL: a damaged header gives a wrong position for a seek.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        why = " ".join(str(error).split()) or type(error).__name__
        raise BrokenImage(f"the image is broken ({why:.200})") from None


def _with_opened(file: Path | BinaryIO, work: Callable[[ImageFile.ImageFile], T]) -> T:
    """Apply `work` to the opened image, whose pixels are not decoded yet."""
    if isinstance(file, Path):
        with decoding():
            check_regular(file)
        with file.open("rb") as stream:
            return _with_opened(stream, work)
    try:
        return _attempt(file, work)
    except BrokenImage:
        if (bare := _bare_png(file)) is None:
            raise
    return _attempt(bare, work)


def _attempt(stream: BinaryIO, work: Callable[[ImageFile.ImageFile], T]) -> T:
    stream.seek(0)
    with decoding(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged metadata, without a file name
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(stream, formats=FORMATS) as image:
            return work(image)


def _bare_png(stream: BinaryIO) -> BinaryIO | None:
    """A PNG without its texts and profiles, whose size Pillow limits; None for other files.

    Damage to these chunks does not affect the image. Undamaged EXIF stays, for its orientation.
    """
    stream.seek(0)
    if stream.read(8) != PNG_SIGNATURE:
        return None
    bare = io.BytesIO()
    bare.write(PNG_SIGNATURE)
    while len(header := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if kind not in (*PNG_PIXELS, b"eXIf"):
            stream.seek(length + 4, io.SEEK_CUR)
            continue
        content, checksum = stream.read(length), stream.read(4)
        if kind in PNG_PIXELS or zlib.crc32(kind + content).to_bytes(4, "big") == checksum:
            bare.write(header + content + checksum)
    return bare


def _as_looked_at(image: ImageFile.ImageFile) -> Image.Image:
    mode = "RGB" if _has_colour(image) else "L"
    flat = _opaque(image).convert(mode)
    # Pillow rotates TIFFs itself.
    turn = None if isinstance(image, TiffImageFile) else TURNS.get(_orientation(image))
    return flat if turn is None else flat.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """The orientation in EXIF, independent of damage to other tags; 1 (upright) if it cannot be read."""
    try:
        value = image.getexif().get(ORIENTATION)
    except Exception:  # EXIF may be any bytes
        return 1
    return value if isinstance(value, int) else 1


def _has_colour(image: ImageFile.ImageFile) -> bool:
    if image.mode in ("P", "PA"):
        if image.palette is None:
            raise BrokenImage("its pixels are numbers of a palette, but the file has no palette")
        one = Image.new("P", (1, 1))
        one.putpalette(image.palette)
        colours = np.array(one.getpalette("RGB")).reshape(-1, 3)
        return bool((colours != colours[:, :1]).any())
    grey = image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")
    return not grey and _layout(image) != "LA;16B"


def _opaque(image: ImageFile.ImageFile) -> Image.Image:
    """The image with 8 bits, blended with white, in any colour space."""
    key = None if image.mode in ("P", "PA") else image.info.get("transparency")  # one transparent colour
    mode = "RGBa" if _layout(image).startswith("RGBa") else image.mode
    deep = _pixels_of_16_bits(image)
    if deep is not None:
        return _opaque_of_16_bits(deep, mode, key)
    if image.mode in ("I", "F"):
        raise BrokenImage(f"its pixels (mode {image.mode} of Pillow) have no known range; wanted 8 or 16 bits")
    if key is not None:
        most = MOST_OF_FEW_BITS.get(_layout(image))  # the key has the file's few bits, the pixels have 8
        pixels = np.array(image.convert("L") if image.mode == "1" else image)
        pixels[_equal(pixels, key * 255 // most if most else key)] = 255
        return Image.fromarray(pixels)
    image.load()
    straight: Image.Image = image
    if image.mode in ("La", "RGBa"):  # multiplied by alpha
        straight = image.convert("LA" if image.mode == "La" else "RGBA")
    if straight.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = straight.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return straight


def _opaque_of_16_bits(pixels: np.ndarray, mode: str, key: int | tuple[int, ...] | None) -> Image.Image:
    """pixels: (H, W), (H, W, 3), CMYK or RGBX (H, W, 4), or with alpha (H, W, 2), (H, W, 4). Rounded at the end.

    mode: that of Pillow, or RGBa for colours that are multiplied by alpha.
    """
    pixels = pixels.astype(np.uint64)
    if mode == "RGBa":
        pixels = (pixels[..., :3] + (MOST_OF_16_BITS - pixels[..., 3:])).clip(max=MOST_OF_16_BITS)
    if mode == "RGBX":  # colours and an unused channel in some releases of Pillow
        pixels = pixels[..., :3]
    if pixels.shape[2:] == (2,) or mode == "RGBA":
        alpha = pixels[..., -1:]
        pixels = pixels[..., :-1] * alpha + MOST_OF_16_BITS * (MOST_OF_16_BITS - alpha)
        most = MOST_OF_16_BITS**2
    else:
        most = MOST_OF_16_BITS
        if key is not None:
            pixels[_equal(pixels, key)] = most
    content = ((pixels * 255 + most // 2) // most).astype(np.uint8).tobytes()
    height, width = pixels.shape[:2]
    return Image.frombytes(
        "CMYK" if mode == "CMYK" else "L" if pixels[0, 0].size == 1 else "RGB", (width, height), content
    )


def _equal(pixels: np.ndarray, colour: int | tuple[int, ...]) -> np.ndarray:
    """Whether each pixel of (H, W) or (H, W, C) has this colour: (H, W) bool."""
    equal: np.ndarray = (pixels == np.asarray(colour)).reshape(*pixels.shape[:2], -1).all(axis=-1)
    return equal


def _pixels_of_16_bits(image: ImageFile.ImageFile) -> np.ndarray | None:
    """Pixels (H, W) or (H, W, C) in 0..65535, if they have more than 8 bits or are multiplied by alpha; else None.

    Pillow keeps 16 bits only for grey. For colours it keeps the high bytes; a second reading with swapped byte order
    gives the low bytes.
    """
    layout, stream = _layout(image), image.fp
    if isinstance(image, TiffImageFile) and len(layout) == 1 and max(image.tag_v2.get(BITS_PER_SAMPLE, (1,))) > 8:
        raise BrokenImage("its 16-bit colours are stored in separate planes; wanted them pixel by pixel")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = np.asarray(image).astype(np.uint64)
        if isinstance(image, TiffImageFile):
            most = 2 ** image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0] - 1  # may also be 12 bits
            grey = (grey * MOST_OF_16_BITS + most // 2) // most
            if image.tag_v2.get(PHOTOMETRIC) == 0:  # 0 is white
                grey = MOST_OF_16_BITS - grey
        return grey
    if layout == "LA;16B":  # four bytes per pixel, as in RGBA
        both = np.asarray(_laid_out(image, "RGBA")).astype(np.uint32)
        deep: np.ndarray = both[..., 0::2] * 256 + both[..., 1::2]
        return deep
    if found := DEEP_COLOUR.fullmatch(layout):
        order = found[2] if found[2] != "N" else sys.byteorder[0].upper()
        stored = found[1].upper() + ";16"  # Pillow would divide RGBa by its alpha
        high = np.asarray(_laid_out(image, stored + order)).astype(np.uint32)
        assert stream is not None, "the file was closed before its low bytes were read"
        stream.seek(0)
        with Image.open(stream, formats=FORMATS) as again:
            deep = high * 256 + np.asarray(_laid_out(again, stored + {"B": "L", "L": "B"}[order]))
            return deep
    if layout == "RGBa":  # 8 bits, but exact
        return np.asarray(_laid_out(image, "RGBA")).astype(np.uint32) * 257
    return None


def _layout(image: ImageFile.ImageFile) -> str:
    """The layout of the pixels in the file, Pillow's "rawmode"."""
    about = image.tile[0][3] if image.tile else ""
    return str(about[0] if isinstance(about, tuple) else about)


def _laid_out(image: ImageFile.ImageFile, layout: str) -> ImageFile.ImageFile:
    """The image read with another layout of its pixels."""
    image.tile = [
        # A named tuple since Pillow 11.
        (decoder, extents, offset, (layout, *about[1:]) if isinstance(about, tuple) else layout)  # type: ignore[misc]
        for decoder, extents, offset, about in image.tile
    ]
    return image
