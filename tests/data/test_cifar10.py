from __future__ import annotations

import contextlib
import pickle
import tarfile
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import utils as torchvision_utils

import data.cifar10
from common.errors import InputError
from data import open_dataset

ARCHIVE = "cifar-10-python.tar.gz"


def load(path, num_classes=10, **kwargs):
    return open_dataset("cifar10", path, num_classes=num_classes, **({"img_size": 32, "in_chans": 3} | kwargs))


@pytest.fixture
def archive(cifar10, make_tar, tmp_path):
    names = {f"cifar-10-batches-py/{name}": content for name, content in cifar10[0].items()}
    names["cifar-10-batches-py/test_batch"] = b"not read"
    return make_tar(tmp_path / ARCHIVE, names)


@pytest.fixture
def batches(cifar10, tmp_path):
    folder = tmp_path / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, content in cifar10[0].items():
        (folder / name).write_bytes(content)
    return folder


def check(dataset, cifar10):
    images, labels = dataset.__getitems__(range(len(dataset)))
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64 and dataset.random_flip
    assert np.array_equal(images, cifar10[1]) and labels.tolist() == cifar10[2]


def test_the_archive_is_read_in_place(archive, cifar10):
    for path in (archive, archive.parent):
        check(load(path), cifar10)
    assert [file.name for file in archive.parent.iterdir()] == [ARCHIVE]


def test_extracted_batches(batches, cifar10):
    for path in (batches, batches.parent, batches.parent.parent):
        check(load(path), cifar10)


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize("key", [str, str.encode])
def test_batches_pickled_anew(protocol, key, batches, cifar10):
    """By Python 3, which writes bytes through _codecs for old protocols."""
    for k in range(5):
        part = slice(4 * k, 4 * k + 4)
        batch = {key("data"): cifar10[1][part].reshape(4, -1), key("labels"): cifar10[2][part]}
        (batches / f"data_batch_{k + 1}").write_bytes(pickle.dumps(batch, protocol=min(protocol, 4)))
    check(load(batches), cifar10)


@pytest.mark.parametrize("by_class", [True, False])
@pytest.mark.parametrize("place", ["cifar10", "cifar10/train", "."])
def test_a_folder_of_pngs(by_class, place, tmp_path, cifar10):
    for i, (pixels, label) in enumerate(zip(cifar10[1], cifar10[2], strict=True)):
        folder = tmp_path / place / data.cifar10.CLASSES[label] if by_class else tmp_path / place
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{i:05d}.png")
    dataset = load(tmp_path, num_classes=-1)
    order = sorted(range(20), key=lambda i: (cifar10[2][i] if by_class else 0, i))
    images, labels = dataset.__getitems__(range(20))
    assert np.array_equal(images, cifar10[1][order])
    assert labels.tolist() == ([cifar10[2][i] for i in order] if by_class else [0] * 20)
    if not by_class:
        with pytest.raises(InputError, match="no folder of a class"):
            load(tmp_path)


def test_pngs_of_another_size_are_no_cifar(tmp_path, picture_of):
    picture_of((40, 32)).save(tmp_path / "0.png")
    with pytest.raises(InputError, match="no image can be read"):
        load(tmp_path, num_classes=-1)[0]


@pytest.mark.parametrize("shape", [{"img_size": 64}, {"in_chans": 1}])
def test_another_shape_is_refused(shape, archive):
    with pytest.raises(InputError, match="32 x 32"):
        load(archive, **shape)


def test_labels_must_fit_the_network(archive):
    load(archive, num_classes=11)
    with pytest.raises(InputError, match=r"labels 0\.\.9"):
        load(archive, num_classes=9)


def test_what_pixels_depend_on_changes_the_description(archive, batches, cifar10):
    """Wherever they came from: the hash is that of the pixels."""
    both = load(archive).describe(), load(batches).describe()
    assert both[0]["files_sha256"] == both[1]["files_sha256"]
    (batches / "data_batch_5").write_bytes(cifar10[0]["data_batch_1"])
    assert load(batches).describe()["files_sha256"] != both[0]["files_sha256"]


class Command:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class Nested(Command):
    def __reduce__(self):
        return np.ndarray, ((1,), Command(self.path))


@pytest.mark.parametrize("kind", [Command, Nested])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_would_do_something_does_not(kind, protocol, batches, tmp_path):
    trace = tmp_path / "trace"
    content = pickle.dumps({"data": kind(trace), "labels": [0]}, protocol)
    (batches / "data_batch_3").write_bytes(content)
    with pytest.raises(InputError, match=r"data_batch_3 is no batch of CIFAR-10 \(it asks for (_?io|builtins)\.open"):
        load(batches)
    assert not trace.exists()
    with contextlib.suppress(TypeError):
        pickle.loads(content)
    assert trace.exists()  # it would have


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        pickle.dumps([1, 2]),
        pickle.dumps({"data": "text", "labels": [0]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, 1]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}, 4),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, 4),
        pickle.dumps({"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]}, 4),
        pickle.dumps({"data": np.zeros((2, 1024), np.uint8), "labels": [0, 1]}, 4),
    ],
)
def test_what_is_no_batch_is_named(content, batches):
    (batches / "data_batch_2").write_bytes(content)
    with pytest.raises(InputError, match="data_batch_2"):
        load(batches)


@pytest.mark.parametrize("content", [b"<html>", "cut"])
def test_an_archive_cut_short_or_none(content, archive):
    archive.write_bytes(archive.read_bytes()[:-2000] if content == "cut" else content)
    with pytest.raises(InputError, match="not readable as a tar archive"):
        load(archive)


def test_a_batch_that_is_not_there(archive, batches):
    (batches / "data_batch_4").unlink()
    with pytest.raises(InputError, match="no data_batch_4 in it"):
        load(batches)


@pytest.mark.parametrize("name", ["../data_batch_1", "/tmp/data_batch_1"])
def test_a_member_that_would_land_outside(name, make_tar, tmp_path):
    with pytest.raises(InputError, match="outside its folder"):
        load(make_tar(tmp_path / ARCHIVE, {name: b"x"}))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("target, said", [("/etc/passwd", "outside"), ("test_batch", "no data_batch_1 in it")])
def test_links_are_not_followed(kind, target, said, cifar10, make_tar, tmp_path):
    link = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    link.type, link.linkname = kind, target
    files = {f"cifar-10-batches-py/data_batch_{k}": cifar10[0][f"data_batch_{k}"] for k in range(2, 6)}
    with pytest.raises(InputError, match=said):
        load(make_tar(tmp_path / ARCHIVE, files, [link]))


def test_what_to_fetch_is_said(tmp_path):
    with pytest.raises(InputError, match=r"cifar-10-python\.tar\.gz .*--download"):
        load(tmp_path)


def test_download(archive, cifar10, tmp_path, monkeypatch):
    calls = []

    def fake(url, root, filename, md5):
        calls.append((url, md5))
        archive.rename(f"{root}/{filename}")

    monkeypatch.setattr(torchvision_utils, "download_url", fake)
    target = tmp_path / "new"
    for _ in range(2):  # the second time it is there
        check(load(target, download=True), cifar10)
    assert calls == [("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a")]
    assert [file.name for file in target.iterdir()] == [ARCHIVE]


@pytest.mark.parametrize("error", [urllib.error.URLError("no network"), RuntimeError("File not found or corrupted.")])
def test_a_download_that_fails_leaves_nothing(error, tmp_path, monkeypatch):
    def fake(url, root, filename, md5):
        raise error

    monkeypatch.setattr(torchvision_utils, "download_url", fake)
    with pytest.raises(InputError, match="get it by hand"):
        load(tmp_path, download=True)
    assert not list(tmp_path.iterdir())
