"""MNIST and Fashion-MNIST: the same files under the same names, whose format is the simplest there is."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import struct
import threading
import tracemalloc
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets

import train
from common.errors import InputError
from data import open_dataset

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def load(path, name="mnist", **kwargs):
    return open_dataset(name, path, **({"img_size": 28, "in_chans": 1} | kwargs))


def check(dataset, mnist):
    images, labels = dataset.__getitems__(range(len(dataset)))
    assert np.array_equal(images[:, 0], mnist[0]) and labels.tolist() == mnist[1].tolist()


def write(folder, content, ending=""):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (folder / f"{name}{ending}").write_bytes(gzip.compress(data) if ending else data)


def of_the_test_set(files):
    """The same content under the names of the test set, which torchvision asks for too."""
    return {name.replace("train", "t10k"): content for name, content in files.items()}


PLACES = {
    "mnist": (".", "mnist", "MNIST/raw", "raw"),
    "fashion_mnist": (".", "fashion_mnist", "FashionMNIST/raw", "fashion-mnist"),
}


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("name, place", [(name, place) for name, places in PLACES.items() for place in places])
def test_files_as_people_have_them(name, place, ending, mnist, idx_files, tmp_path):
    write(tmp_path / place, idx_files, ending)
    check(load(tmp_path, name), mnist)


def test_a_peer_reads_the_same(mnist, idx_files, tmp_path):
    write(tmp_path / "MNIST" / "raw", idx_files | of_the_test_set(idx_files))
    theirs = torchvision.datasets.MNIST(tmp_path)
    check(load(tmp_path), (theirs.data.numpy(), theirs.targets.numpy()))


def test_each_dataset_takes_the_folder_of_its_name(mnist, idx_files, tmp_path):
    """The files in data_path itself may be of any of them."""
    for folder, added in ((".", 2), ("mnist", 0), ("fashion_mnist", 1)):
        pixels = (mnist[0] + added).astype(np.uint8).tobytes()
        write(tmp_path / folder, idx_files | {IMAGES: idx_files[IMAGES][:16] + pixels})
    check(load(tmp_path, "mnist"), mnist)
    check(load(tmp_path, "fashion_mnist"), ((mnist[0] + 1).astype(np.uint8), mnist[1]))


def test_garments_alone_are_mirrored(idx_files, tmp_path):
    write(tmp_path, idx_files)
    assert load(tmp_path, "fashion_mnist").random_flip and not load(tmp_path, "mnist").random_flip


def test_the_description_is_that_of_the_pixels(idx_files, tmp_path):
    write(tmp_path / "a", idx_files)
    write(tmp_path / "b", idx_files, ".gz")
    write(tmp_path / "c", idx_files | {LABELS: idx_files[LABELS][:-1] + b"\7"})
    one, same, other = (load(tmp_path / folder).identity() for folder in "abc")
    assert one == same != other
    assert load(tmp_path / "a", "fashion_mnist").identity() != one


@pytest.mark.parametrize("shape", [{"img_size": 32}, {"in_chans": 3}])
def test_another_size_is_refused(shape, idx_files, tmp_path):
    write(tmp_path, idx_files)
    with pytest.raises(InputError, match="28 x 28 and grey"):
        load(tmp_path, **shape)


def test_labels_must_fit_the_network(idx_files, tmp_path):
    write(tmp_path, idx_files)
    load(tmp_path, num_classes=11)
    with pytest.raises(InputError, match=r"labels 0\.\.9"):
        load(tmp_path, num_classes=9)


def header(*sizes: int, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes)


BROKEN = {
    "empty": (IMAGES, lambda c: b"", "does not begin"),
    "a page": (IMAGES, lambda c: b"<html> not found </html>", "does not begin"),
    "half a header": (IMAGES, lambda c: c[:9], "does not begin"),
    "labels for images": (IMAGES, lambda c: header(20) + bytes(20), "does not begin"),
    "images for labels": (LABELS, lambda c: header(20, 28, 28) + bytes(20 * 784), "does not begin"),
    "another side": (IMAGES, lambda c: header(20, 32, 32) + bytes(20 * 1024), "28 x 28"),
    "floats": (IMAGES, lambda c: header(20, 28, 28, kind=13) + bytes(20 * 784 * 4), "does not begin"),
    "no images": (IMAGES, lambda c: header(0, 28, 28), "announces 0 images"),
    "2^32 images": (IMAGES, lambda c: header(2**32 - 1, 28, 28), "announces 4,294,967,295 images"),
    "cut short": (IMAGES, lambda c: c[:-1], "15,680 bytes of values, but there are 15,679"),
    "too long": (IMAGES, lambda c: c + b"\0", "there are more"),
    "fewer labels": (LABELS, lambda c: header(19) + bytes(19), "20 images, but 19 labels"),
    "label 10": (LABELS, lambda c: c[:-1] + b"\n", "label 10 "),
}
ZIPPED = {
    "cut short": (lambda z: z[:-9], "cut short"),
    "no more than its first bytes": (lambda z: z[:2], "cut short"),
    "a bit is wrong": (lambda z: z[:-8] + bytes([z[-8] ^ 1]) + z[-7:], "CRC"),
    "no deflate": (lambda z: z[:10] + b"\xff" * 40, "not readable"),
}


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_end_in_one_line(kind, ending, idx_files, tmp_path):
    name, change, message = BROKEN[kind]
    write(tmp_path, idx_files | {name: change(idx_files[name])}, ending)
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ZIPPED)
def test_broken_gzip_ends_in_one_line(kind, idx_files, tmp_path):
    write(tmp_path, idx_files, ".gz")
    path, (change, message) = tmp_path / f"{IMAGES}.gz", ZIPPED[kind]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=rf"{IMAGES}.gz.*{message}"):
        load(tmp_path)


def test_a_gzip_bomb_is_not_unpacked(idx_files, tmp_path):
    """200 MB of zeros in 200 kB, behind a header of 20 images."""
    write(tmp_path, idx_files, ".gz")
    with gzip.open(tmp_path / f"{IMAGES}.gz", "wb", compresslevel=1) as file:
        file.write(header(20, 28, 28))
        for _ in range(100):
            file.write(bytes(2 * 2**20))
    tracemalloc.start()
    with pytest.raises(InputError, match="there are more"):
        load(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 2**20


@pytest.mark.parametrize("name", PLACES)
def test_what_to_fetch_is_said(name, tmp_path, fails):
    """Also where one file of the two is there."""
    (tmp_path / IMAGES).write_bytes(b"")
    network = ["--img_size=28", "--patch_size=4", "--in_chans=1", "--embed_dim=16", "--num_heads=2", "--depth=1"]
    flags = [f"--dataset={name}", f"--data_path={tmp_path}", "--n_steps=1", f"--log_path={tmp_path}"]
    fails(train.main, [*flags, *network], f"{LABELS}.gz")


@pytest.fixture
def server(idx_files, tmp_path, monkeypatch):
    """The folder of a web server on this machine that takes the place of torchvision's mirrors."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    write(tmp_path / "server", idx_files | of_the_test_set(idx_files), ".gz")
    files = sorted((tmp_path / "server").iterdir())
    sums = [(file.name, hashlib.md5(file.read_bytes()).hexdigest()) for file in files]
    serve = functools.partial(Quiet, directory=str(tmp_path / "server"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as web:
        for dataset in (torchvision.datasets.MNIST, torchvision.datasets.FashionMNIST):
            monkeypatch.setattr(dataset, "mirrors", [f"http://127.0.0.1:{web.server_port}/"])
            monkeypatch.setattr(dataset, "resources", sums)
        thread = threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield tmp_path / "server"
        web.shutdown()
        thread.join()


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_download(name, folder, server, mnist, tmp_path):
    root = tmp_path / "new"
    check(load(root, name, download=True), mnist)
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()) == [
        f"{folder}/raw/{IMAGES}",
        f"{folder}/raw/{LABELS}",
    ]
    for file in server.iterdir():
        file.unlink()
    check(load(root, name, download=True), mnist)  # it is there


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_bytes(b"<html>")])
def test_a_download_that_fails_leaves_nothing(change, server, tmp_path):
    change(server / f"{LABELS}.gz")
    with pytest.raises(InputError, match=r"--download: mnist failed .*by hand") as error:
        load(tmp_path / "new", download=True)
    assert "\n" not in str(error.value) and not list((tmp_path / "new").iterdir())


def test_no_network_is_said(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(InputError, match="no network"):
        load(tmp_path, "fashion_mnist", download=True)
