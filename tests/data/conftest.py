"""Datasets in their true formats, small."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

import data.cifar10


def picture(size, seed=0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def picture_of():
    """(width, height), seed -> a picture of noise."""
    return picture


@pytest.fixture
def celeba_folder(tmp_path):
    """img_align_celeba/ with pictures 1, 2, 162770 of the training split and 162771 of the next."""
    folder = tmp_path / "img_align_celeba"
    folder.mkdir()
    for number in (1, 2, 162770, 162771):
        picture((178, 218), number).save(folder / f"{number:06d}.jpg")
    return folder


@pytest.fixture
def synset_folders(tmp_path):
    """Three classes of ImageNet, two pictures each, in imagenet/train/."""
    folder = tmp_path / "imagenet" / "train"
    for k, synset in enumerate(("n15075141", "n01440764", "n01443537")):
        (folder / synset).mkdir(parents=True)
        for i in range(2):
            picture((90 + k, 70), 10 * k + i).save(folder / synset / f"{synset}_{i}.JPEG")
    return folder


def python2_pickle(data: np.ndarray, labels: list[int]) -> bytes:
    """A batch as Python 2 and numpy 1 wrote it: str keys and str pixels, which are bytes now."""

    def text(content: bytes) -> bytes:
        if len(content) < 256:
            return pickle.SHORT_BINSTRING + bytes([len(content)]) + content
        return pickle.BINSTRING + len(content).to_bytes(4, "little") + content

    def number(value: int) -> bytes:
        return pickle.BININT + value.to_bytes(4, "little", signed=True)

    dtype = (
        b"cnumpy\ndtype\n(" + text(b"u1") + number(0) + number(1) + b"tR"
        b"(" + number(3) + text(b"|") + b"NNN" + number(-1) * 2 + number(0) + b"tb"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + number(0) + b"t" + text(b"b") + b"tR"
        b"(" + number(1) + b"(" + number(data.shape[0]) + number(data.shape[1]) + b"t" + dtype
    )
    array += pickle.NEWFALSE + text(data.tobytes()) + b"tb"
    listed = b"](" + b"".join(map(number, labels)) + b"e"
    entries = text(b"data") + array + text(b"labels") + listed + text(b"batch_label") + text(b"training batch")
    return pickle.PROTO + b"\x02}(" + entries + b"u."


@pytest.fixture
def official(monkeypatch):
    """(name, content): from now on this content is the official file of CIFAR-10 by that name."""

    def declare(name, content):
        monkeypatch.setitem(data.cifar10.MD5, name, hashlib.md5(content).hexdigest())

    return declare


@pytest.fixture
def cifar10(official):
    """Five training batches of four images: pickled as they are distributed, the pixels and the labels."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    labels = [k % 10 for k in range(20)]
    pickled = {
        f"data_batch_{k + 1}": python2_pickle(pixels[4 * k : 4 * k + 4].reshape(4, 3072), labels[4 * k : 4 * k + 4])
        for k in range(5)
    }
    for name, content in pickled.items():
        official(name, content)
    return pickled, pixels, labels


@pytest.fixture
def mnist():
    """Twenty images (20, 28, 28) and their labels (20,)."""
    return np.random.default_rng(0).integers(0, 250, (20, 28, 28), dtype=np.uint8), np.arange(20, dtype=np.uint8) % 10


@pytest.fixture
def idx_files(mnist):
    """They, as the content of the two files by name."""
    return {
        "train-images-idx3-ubyte": struct.pack(">IIII", 0x803, 20, 28, 28) + mnist[0].tobytes(),
        "train-labels-idx1-ubyte": struct.pack(">II", 0x801, 20) + mnist[1].tobytes(),
    }


@pytest.fixture
def make_cifar10_archive(cifar10, official):
    """(path) -> the batches in a gzipped tar, as the official archive."""

    def make(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w:gz") as archive:
            for name, content in {"test_batch": b"not read", **cifar10[0]}.items():
                info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        official("cifar-10-python.tar.gz", path.read_bytes())
        return path

    return make
