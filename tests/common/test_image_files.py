"""Image files of all kinds, against pixels that numpy computes and against files made byte by byte."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

import pack
from common.image_files import BrokenImage, decoding, in_chans_of, read_image
from data import open_dataset
from data.transforms import halve
from evaluation.images import FinishedImages

SIDE = 6
# What a viewer does with the rows and columns as they are stored, by the value of the EXIF tag.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(samples: np.ndarray, colour_type: int, bits: int, *, before: bytes = b"", after: bytes = b"") -> bytes:
    """samples: (H, W, C) of `bits` bits. before, after: chunks on either side of the pixels."""
    height, width = samples.shape[:2]
    rows = samples.reshape(height, -1)
    shifts = np.arange(bits - 1, -1, -1)
    packed = np.packbits((rows[..., None] >> shifts & 1).reshape(height, -1).astype(np.uint8), axis=1)
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed))
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), before, chunk(b"IDAT", content), after, chunk(b"IEND", b"")]
    )


def tiff(samples: np.ndarray, order: str, tags: dict[int, tuple[str, list[int]]], planes: bool = False) -> bytes:
    """samples: (H, W, C) uint8 or uint16, not compressed. order: < or >. tags: beside those of size and place."""
    height, width, channels = samples.shape
    content = (np.moveaxis(samples, -1, 0) if planes else samples).astype(samples.dtype.newbyteorder(order)).tobytes()
    strips = channels if planes else 1
    entries = {256: ("H", [width]), 257: ("H", [height]), 258: ("H", [8 * samples.itemsize] * channels)}
    entries |= {259: ("H", [1]), 273: ("I", [0] * strips), 277: ("H", [channels]), 278: ("H", [height])}
    entries |= {279: ("I", [len(content) // strips] * strips), 284: ("H", [1 + planes])} | tags
    start = 8 + 2 + 12 * len(entries) + 4
    first = start + sum(len(v) * struct.calcsize(k) for k, v in entries.values() if len(v) * struct.calcsize(k) > 4)
    entries[273] = ("I", [first + k * len(content) // strips for k in range(strips)])
    directory, values = b"", b""
    for tag, (kind, numbers) in sorted(entries.items()):
        value = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        directory += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[kind], len(numbers))
        if len(value) > 4:
            directory += struct.pack(f"{order}I", start + len(values))
            values += value
        else:
            directory += value.ljust(4, b"\0")
    head = {"<": b"II*\0\x08\0\0\0", ">": b"MM\0*\0\0\0\x08"}[order]
    return head + struct.pack(f"{order}H", len(entries)) + directory + bytes(4) + values + content


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def on_white(colours: np.ndarray, alpha: np.ndarray, most: int) -> np.ndarray:
    """colours (H, W, C), alpha (H, W, 1), both 0..most, as 0..255, rounded once."""
    colours, alpha = colours.astype(np.float64), alpha.astype(np.float64)
    return np.floor(255 * (colours * alpha + most * (most - alpha)) / most**2 + 0.5).astype(np.uint8)


def read(content: bytes) -> np.ndarray:
    """(H, W) or (H, W, 3)."""
    return np.asarray(read_image(io.BytesIO(content)))


def plain(expected: np.ndarray) -> np.ndarray:
    return expected[..., 0] if expected.shape[-1] == 1 else expected


# PNG colour types: of each the channels and the depths there are.
PNG_TYPES = {0: (1, (1, 2, 4, 8, 16)), 2: (3, (8, 16)), 3: (1, (1, 2, 4, 8)), 4: (2, (8, 16)), 6: (4, (8, 16))}


@st.composite
def pngs(draw: st.DrawFn, rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
    colour_type = draw(st.sampled_from(sorted(PNG_TYPES)))
    channels, depths = PNG_TYPES[colour_type]
    bits = draw(st.sampled_from(depths))
    most = 2**bits - 1
    samples = rng.integers(0, most + 1, (SIDE, SIDE, channels))
    samples[0, :2] = samples[0, 0]  # so that a transparent colour can be met twice
    before = b""
    if colour_type == 3:
        palette = rng.integers(0, 256, (most + 1, 3))
        if draw(st.booleans()):
            palette[:] = palette[:, :1]
        before = chunk(b"PLTE", palette.astype(np.uint8).tobytes())
        alpha = np.full(most + 1, 255)
        if draw(st.booleans()):
            alpha[: most // 2 + 1] = rng.integers(0, 256, most // 2 + 1)
            before += chunk(b"tRNS", alpha.astype(np.uint8).tobytes())
        index = samples[..., 0]
        grey = (palette == palette[:, :1]).all()
        expected = on_white(palette[index][..., : 1 if grey else 3], alpha[index][..., None], 255)
    elif colour_type in (4, 6):
        expected = on_white(samples[..., :-1], samples[..., -1:], most)
    else:
        expected = np.floor(samples * 255 / most + 0.5).astype(np.uint8)
        if draw(st.booleans()):
            key = samples[0, 0]
            before = chunk(b"tRNS", struct.pack(f">{channels}H", *key))
            expected[(samples == key).all(axis=-1)] = 255
    orientation = draw(st.sampled_from(sorted(UPRIGHT)))
    turned = chunk(b"eXIf", exif(orientation)[6:])
    texts = draw(st.sampled_from([b"", chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 1_100_000))]))
    sides = draw(st.permutations([texts, turned]))
    content = png(samples, colour_type, bits, before=before + sides[0], after=sides[1])
    return content, UPRIGHT[orientation](expected)


@st.composite
def tiffs(draw: st.DrawFn, rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
    kind = draw(
        st.sampled_from(["grey", "grey, 0 is white", "colour", "unused channel", "alpha", "times alpha", "ink"])
    )
    dtype = draw(st.sampled_from([np.uint8, np.uint16]))
    most = np.iinfo(dtype).max
    channels = 1 if kind.startswith("grey") else 3 if kind == "colour" else 4
    samples = rng.integers(0, most + 1, (SIDE, SIDE, channels)).astype(dtype)
    order, orientation = draw(st.sampled_from("<>")), draw(st.sampled_from(sorted(UPRIGHT)))
    tags = {262: ("H", [{"grey": 1, "grey, 0 is white": 0, "ink": 5}.get(kind, 2)]), 274: ("H", [orientation])}
    if channels == 4 and kind != "ink":
        tags[338] = ("H", [{"alpha": 2, "times alpha": 1}.get(kind, 0)])
    values = most - samples if kind == "grey, 0 is white" else samples
    if kind == "alpha":
        expected = on_white(values[..., :3], values[..., 3:], most)
    elif kind == "times alpha":
        samples[..., :3] = np.minimum(samples[..., :3], samples[..., 3:])
        behind = most - samples[..., 3:].astype(np.float64)  # the light of the white
        expected = np.floor(255 * (samples[..., :3] + behind) / most + 0.5).astype(np.uint8)
    elif kind == "ink":
        ink = np.floor(samples.astype(np.float64) * 255 / most + 0.5)
        light = 255 - ink[..., 3:]  # that black leaves
        expected = (light - np.floor(ink[..., :3] * light / 255 + 0.5)).astype(np.uint8)
    else:
        expected = np.floor(values[..., :3].astype(np.float64) * 255 / most + 0.5).astype(np.uint8)
    if (kind, dtype, order) == ("grey, 0 is white", np.uint16, ">"):  # Pillow does not know these
        order = "<"
    return tiff(samples, order, tags), UPRIGHT[orientation](expected)


@st.composite
def pnms(draw: st.DrawFn, rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
    channels, most = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 5, 255, 257, 1023, 65535]))
    samples = rng.integers(0, most + 1, (SIDE, SIDE, channels))
    as_text = draw(st.booleans()) and not (channels == 3 and most > 255)  # of that Pillow keeps too few bits
    magic = {(1, True): "P2", (3, True): "P3", (1, False): "P5", (3, False): "P6"}[channels, as_text]
    text = " ".join(map(str, samples.ravel())).encode() + b"\n"
    content = text if as_text else samples.astype(">u2" if most > 255 else np.uint8).tobytes()
    return f"{magic}\n{SIDE} {SIDE}\n{most}\n".encode() + content, np.floor(samples * 255 / most + 0.5).astype(np.uint8)


@st.composite
def others(draw: st.DrawFn, rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
    """Formats without loss that Pillow writes."""
    name = draw(st.sampled_from(["BMP", "WEBP", "GIF"]))
    file = io.BytesIO()
    if name == "GIF":
        palette, index = rng.integers(0, 256, (4, 3)), rng.integers(0, 4, (SIDE, SIDE))
        image = Image.frombytes("P", (SIDE, SIDE), index.astype(np.uint8).tobytes())
        image.putpalette(palette.astype(np.uint8).tobytes())
        hidden = draw(st.sampled_from([None, 1]))
        image.save(file, name, **({} if hidden is None else {"transparency": hidden}))
        expected = palette[index].astype(np.uint8)
        if hidden is not None:
            expected[index == hidden] = 255
        return file.getvalue(), expected
    alpha = name == "WEBP" and draw(st.booleans())
    samples = rng.integers(0, 256, (SIDE, SIDE, 4 if alpha else 3)).astype(np.uint8)
    orientation = draw(st.sampled_from(sorted(UPRIGHT))) if name == "WEBP" else 1
    more = {"lossless": True, "exact": True, "exif": exif(orientation)} if name == "WEBP" else {}
    Image.fromarray(samples).save(file, name, **more)
    expected = on_white(samples[..., :3], samples[..., 3:], 255) if alpha else samples
    return file.getvalue(), UPRIGHT[orientation](expected)


@given(data=st.data())
def test_training_packing_and_scoring_read_the_same_pixels(data, tmp_path_factory):
    """And these are what numpy makes of what was drawn: mode, depth, transparency, orientation, container."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    expected = []
    for number in range(data.draw(st.integers(1, 3))):
        make, suffix = data.draw(st.sampled_from([(pngs, "png"), (tiffs, "tif"), (pnms, "ppm"), (others, "bmp")]))
        content, pixels = data.draw(make(rng))
        (folder / f"{number}.{suffix}").write_bytes(content)
        assert in_chans_of(io.BytesIO(content)) == pixels.shape[-1]
        np.testing.assert_array_equal(read(content), plain(pixels))
        expected.append(pixels)
    in_chans = max(pixels.shape[-1] for pixels in expected)
    want = torch.from_numpy(np.stack([np.broadcast_to(p, (SIDE, SIDE, in_chans)) for p in expected])).movedim(-1, 1)

    scored = FinishedImages(folder)
    assert scored.in_chans == in_chans and scored.size == (SIDE, SIDE)
    assert torch.equal(torch.cat(list(scored.batches(2))), want)
    dataset = open_dataset("folder", folder, img_size=SIDE, in_chans=in_chans)
    assert torch.equal(dataset.__getitems__(range(len(expected)))[0], want)
    argv = [f"--data_path={folder}", f"--img_size={SIDE}", f"--in_chans={in_chans}", f"--output={folder / 'packed'}"]
    pack.main(["--dataset=folder", *argv, "--num_workers=0", "--quiet"])
    assert np.array_equal(np.load(folder / "packed" / "images.npy"), want.numpy())


def whole_files() -> dict[str, bytes]:
    """A file of each container, and of each compression, that is read to its end."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    image, files = Image.fromarray(colours), {}
    saved = {
        **{name: (name, {}) for name in ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF")},
        **{"WEBP": ("WEBP", {"lossless": True}), "lossy WEBP": ("WEBP", {})},
        "progressive JPEG": ("JPEG", {"progressive": True}),
        **{f"TIFF, {kind}": ("TIFF", {"compression": kind}) for kind in ("tiff_lzw", "tiff_adobe_deflate", "jpeg")},
    }
    for name, (container, options) in saved.items():
        file = io.BytesIO()
        image.save(file, container, **options)
        files[name] = file.getvalue()
    for colour_type, (channels, _) in PNG_TYPES.items():
        if colour_type != 3:
            files[f"PNG of 16 bits, {channels} channels"] = png(
                rng.integers(0, 65536, (9, 7, channels)), colour_type, 16
            )
    files["TIFF of 16 bits"] = tiff(rng.integers(0, 65536, (9, 7, 3)).astype(np.uint16), "<", {262: ("H", [2])})
    files["PGM of 16 bits"] = b"P5 7 9 65535\n" + rng.integers(0, 65536, (9, 7)).astype(">u2").tobytes()
    return files


@pytest.mark.parametrize("name", whole_files())
def test_a_file_that_is_cut_short_is_broken_or_whole(name):
    """Wherever it is cut: never an image whose end is grey."""
    content = whole_files()[name]
    whole, broken = read(content), 0
    for length in range(len(content)):
        try:
            assert np.array_equal(read(content[:length]), whole)
        except BrokenImage:
            broken += 1
    assert broken > len(content) // 2


@pytest.mark.parametrize("container", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_the_image(container):
    """Also in a GIF, where a later frame is a change of the one before."""
    levels = np.random.default_rng(0).integers(0, 4, (3, SIDE, SIDE), dtype=np.uint8) * 80
    frames = [Image.fromarray(level).convert("RGB") for level in levels]
    file = io.BytesIO()
    options = {"lossless": True} if container == "WEBP" else {}
    frames[0].save(file, container, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(file.getvalue())) as image:
        assert image.n_frames == 3
    assert (read(file.getvalue()).reshape(SIDE, SIDE, -1) == levels[0][..., None]).all()


def test_every_value_of_16_bits():
    """Divided by 257 and rounded, in grey and in colour: Pillow would clip the one and cut off bits of the other."""
    values = np.arange(65536).reshape(256, 256)
    want = np.rint(values / 257)
    for channels, colour_type in ((1, 0), (3, 2)):
        samples = np.stack([values, values[::-1], values.T][:channels], axis=-1)
        got = read(png(samples, colour_type, 16)).reshape(256, 256, channels)
        assert np.array_equal(got[..., 0], want) and got.dtype == np.uint8
        if channels == 3:
            assert np.array_equal(got[..., 1], want[::-1]) and np.array_equal(got[..., 2], want.T)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_compressed_tiffs_of_16_bits(mode, compression):
    values = np.random.default_rng(0).integers(0, 65536, (5, 7))
    file = io.BytesIO()
    content = values.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    Image.frombytes(mode, (7, 5), content).save(file, "TIFF", compression=compression)
    assert np.array_equal(read(file.getvalue()), np.rint(values / 257))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_ranges_that_are_not_known_are_refused_by_name(mode, tmp_path, caplog):
    Image.new(mode, (SIDE, SIDE), 7).save(tmp_path / "a.tif")
    Image.new("L", (SIDE, SIDE), 7).save(tmp_path / "b.png")
    with pytest.raises(BrokenImage, match="no known range"):
        read_image(tmp_path / "a.tif")
    dataset = open_dataset("folder", tmp_path, img_size=SIDE, in_chans=1)
    assert dataset.whole_and_broken([0, 1])[1].keys() == {0}
    assert dataset.__getitems__([0])[0].unique().tolist() == [7] and "a.tif" in caplog.text


def test_numbers_of_colours_without_the_colours_are_refused():
    indices = np.zeros((SIDE, SIDE, 1), np.uint8)
    black = chunk(b"PLTE", bytes(3))
    assert np.array_equal(read(png(indices, colour_type=3, bits=8, before=black)), np.zeros((SIDE, SIDE)))
    with pytest.raises(BrokenImage, match="has no palette"):
        read(png(indices, colour_type=3, bits=8))


def test_16_bits_in_planes_are_refused():
    """Pillow would take bytes of one pixel for those of others."""
    samples = np.random.default_rng(0).integers(0, 65536, (4, 4, 3)).astype(np.uint16)
    with pytest.raises(BrokenImage, match="planes"):
        read(tiff(samples, "<", {262: ("H", [2])}, planes=True))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
def test_other_colour_spaces_become_rgb(mode):
    file = io.BytesIO()
    image = Image.new("RGB", (SIDE, SIDE), (200, 30, 90))
    (image.convert("YCbCr").convert("RGB") if mode == "LAB" else image.convert(mode)).save(file, "TIFF")
    got = read(file.getvalue())
    assert got.shape == (SIDE, SIDE, 3) and np.abs(got[0, 0] - [200, 30, 90]).max() <= 2


@pytest.mark.parametrize("orientation", sorted(UPRIGHT))
def test_jpegs_are_turned(orientation):
    """Against the same JPEG without the tag."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)
    files = [io.BytesIO(), io.BytesIO()]
    Image.fromarray(pixels).save(files[0], "JPEG")
    Image.fromarray(pixels).save(files[1], "JPEG", exif=exif(orientation))
    assert np.array_equal(read(files[1].getvalue()), UPRIGHT[orientation](read(files[0].getvalue())))


@pytest.mark.parametrize("damage", ["a tag of another type", "cut short", "noise", "empty"])
def test_damaged_exif_costs_nothing(damage):
    """The tag is followed where it can be read, and nothing else in there matters."""
    good = exif(6)
    if damage == "a tag of another type":  # what Pillow cannot write again: software as a number of 4 bytes
        entry = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x0131, 3, 2, 9)
        good = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entry + bytes(4)
    bad = {"cut short": good[:12], "noise": b"Exif\0\0" + bytes(range(200)), "empty": b"Exif\0\0"}.get(damage, good)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)
    file, without = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", exif=bad)
    Image.fromarray(pixels).save(without, "JPEG")
    want = read(without.getvalue())
    assert np.array_equal(read(file.getvalue()), np.rot90(want, -1) if damage == "a tag of another type" else want)


def test_texts_of_a_png_are_no_part_of_the_image(modest_memory):
    """Too long, damaged or a bomb: the image is whole. A pixel that is damaged is not forgiven with them."""
    samples = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3))
    bomb = zlib.compress(bytes(2**26))
    long = chunk(b"tEXt", b"Comment\0" + b"a" * (PngImagePlugin.MAX_TEXT_MEMORY + 1))
    odd = [
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 1_100_000)),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + bomb),
        chunk(b"iCCP", b"profile\0\0" + bomb),
        chunk(b"zTXt", b"Comment\0\0no zlib"),
        chunk(b"tEXt", b"Comment\0text")[:-1] + b"?",  # the checksum
        long,
    ]
    turned = chunk(b"eXIf", exif(3)[6:])
    for text in odd:
        assert np.array_equal(read(png(samples, 2, 8, before=text)), samples)
        assert np.array_equal(read(png(samples, 2, 8, before=turned, after=text)), samples[::-1, ::-1])
    content = png(samples, 2, 8, before=odd[0])
    with pytest.raises(BrokenImage):
        read(content[:-30])


@pytest.mark.parametrize("kind", [RuntimeError, KeyError, NotImplementedError, RecursionError, AttributeError, OSError])
def test_whatever_a_decoder_raises_is_a_broken_file(kind, tmp_path, monkeypatch, caplog, fails):
    import fid

    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "a.png")
    Image.new("RGB", (SIDE, SIDE), "red").save(tmp_path / "b.bmp")

    def fail(self):
        raise kind("of some kind")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", fail)
    dataset = open_dataset("folder", tmp_path, img_size=SIDE, in_chans=3)
    assert dataset.__getitems__([0])[0][0, :, 0, 0].tolist() == [255, 0, 0] and "a.png" in caplog.text
    assert list(dataset.whole_and_broken([0, 1])[1]) == [0]
    fails(fid.main, ["--samples_path", tmp_path, "--reference", tmp_path, "--device", "cpu"], "a.png", "of some kind")


def test_what_is_not_the_files_fault_passes():
    for error in (MemoryError(), PermissionError(13, "Permission denied"), OSError(5, "Input/output error")):
        with pytest.raises(type(error)), decoding():
            raise error
    for error in (OSError("cut short"), OSError(22, "a seek before the file")):
        with pytest.raises(BrokenImage), decoding():
            raise error


@pytest.mark.parametrize(
    ("size", "side"),
    [((30_000, 1), 256), ((1, 30_000), 256), ((1001, 7), 64), ((301, 4), 32), ((301, 3), 32), ((4, 999), 32)],
)
def test_strips_are_cut_before_they_are_enlarged(size, side, modest_memory):
    """The middle is what a longer piece gives: to the last bit where a pixel becomes a whole number of pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    got = np.asarray(halve(image, side)).astype(int)
    short = min(size)
    left, top = (max(0, length // short - 60) // 2 * short for length in size)
    middle = image.crop((left, top, size[0] - left, size[1] - top))
    large = middle.resize([round(length * side / short) for length in middle.size], Image.Resampling.BICUBIC)
    left, top = ((length - side) // 2 for length in large.size)
    want = np.asarray(large.crop((left, top, left + side, top + side))).astype(int)
    assert np.abs(got - want).max() <= (0 if max(size) * side % short == 0 else 2)


@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(1, 40), seed=st.integers(0, 99))
def test_ordinary_images_are_halved_as_before(width, height, size, seed):
    """Dhariwal and Nichol's crop, whole before it is cut: bit for bit."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = whole = Image.fromarray(pixels)
    if max(width, height) > 32 * min(width, height):
        return
    while min(*whole.size) >= 2 * size:
        whole = whole.resize(tuple(x // 2 for x in whole.size), resample=Image.Resampling.BOX)
    scale = size / min(*whole.size)
    whole = whole.resize(tuple(round(x * scale) for x in whole.size), resample=Image.Resampling.BICUBIC)
    array = np.array(whole)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    assert np.array_equal(np.asarray(halve(image, size)), array[y : y + size, x : x + size])
