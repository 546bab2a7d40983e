from __future__ import annotations

import hashlib
import os
import pickle
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10 as TorchvisionCIFAR10
from torchvision.datasets import utils as torchvision_utils

import data.cifar10
from common.errors import InputError
from data import open_dataset

ARCHIVE = "cifar-10-python.tar.gz"


def load(path, num_classes=10, **kwargs):
    return open_dataset("cifar10", path, num_classes=num_classes, **({"img_size": 32, "in_chans": 3} | kwargs))


@pytest.fixture
def archive(make_cifar10_archive, tmp_path):
    return make_cifar10_archive(tmp_path / ARCHIVE)


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
        with pytest.raises(InputError, match="not in the folder of a class"):
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


def test_what_pixels_depend_on_changes_the_description(archive, batches, cifar10, official):
    """Wherever they came from: the hash is that of the pixels."""
    both = load(archive).describe(), load(batches).describe()
    assert both[0]["files_sha256"] == both[1]["files_sha256"]
    (batches / "data_batch_5").write_bytes(cifar10[0]["data_batch_1"])
    official("data_batch_5", cifar10[0]["data_batch_1"])
    assert load(batches).describe()["files_sha256"] != both[0]["files_sha256"]


def test_the_official_files_are_known():
    """By the MD5 sums of a peer."""
    official = dict(TorchvisionCIFAR10.train_list) | {TorchvisionCIFAR10.filename: TorchvisionCIFAR10.tgz_md5}
    assert official == data.cifar10.MD5


class Command:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_no_other_pickle_is_opened(batches, tmp_path):
    content = pickle.dumps({b"data": Command(tmp_path / "trace"), b"labels": [0]})
    (batches / "data_batch_3").write_bytes(content)
    with pytest.raises(InputError, match=rf"data_batch_3: its MD5 is {hashlib.md5(content).hexdigest()}.*--download"):
        load(batches)
    assert not (tmp_path / "trace").exists()
    pickle.loads(content)
    assert (tmp_path / "trace").exists()  # it would have


@pytest.mark.parametrize("change", [lambda c: c[:-2000], lambda c: c[:-1] + b"x", lambda c: b"<html>", lambda c: b""])
def test_no_other_archive_is_opened(change, archive, monkeypatch):
    archive.write_bytes(change(archive.read_bytes()))
    monkeypatch.setattr("tarfile.open", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(InputError, match=f"{ARCHIVE}: its MD5 is .*Download https"):
        load(archive)


def test_a_batch_that_is_not_there(archive, batches):
    (batches / "data_batch_4").unlink()
    with pytest.raises(InputError, match="data_batch_4 missing"):
        load(batches)


def test_what_to_fetch_is_said(tmp_path):
    with pytest.raises(InputError, match=r"cifar-10-python\.tar\.gz .*--download"):
        load(tmp_path)


def test_download(archive, cifar10, tmp_path, monkeypatch):
    calls, md5_of_archive = [], hashlib.md5(archive.read_bytes()).hexdigest()

    def fake(url, root, filename, md5):
        calls.append((url, md5))
        archive.rename(f"{root}/{filename}")

    monkeypatch.setattr(torchvision_utils, "download_url", fake)
    target = tmp_path / "new"
    for _ in range(2):  # the second time it is there
        check(load(target, download=True), cifar10)
    assert calls == [("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", md5_of_archive)]
    assert [file.name for file in target.iterdir()] == [ARCHIVE]


@pytest.mark.parametrize("error", [urllib.error.URLError("no network"), RuntimeError("File not found or corrupted.")])
def test_a_download_that_fails_leaves_nothing(error, tmp_path, monkeypatch):
    def fake(url, root, filename, md5):
        raise error

    monkeypatch.setattr(torchvision_utils, "download_url", fake)
    with pytest.raises(InputError, match="download it by hand"):
        load(tmp_path, download=True)
    assert not list(tmp_path.iterdir())
