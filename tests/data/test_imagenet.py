from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import InputError
from data import open_dataset
from data.imagenet import SYNSETS, label_of_name
from data.imagenet64 import DEVKIT

# Numbers in the devkit's map of classes, and torchvision's names of them.
NUMBERED = {
    **{1: "kit fox", 80: "zebra", 125: "golden retriever", 171: "Shetland sheepdog", 220: "umbrella", 319: "orange"},
    **{361: "alp", 449: "tench", 490: "sea snake", 560: "joystick", 590: "ski", 630: "bee", 700: "totem pole"},
    **{748: "jean", 889: "toilet tissue", 948: "pizza", 994: "parallel bars", 1000: "dumbbell"},
}


def imagenet(path, name="imagenet64", **kwargs):
    return open_dataset(name, path, **({"img_size": 64, "in_chans": 3, "num_classes": 1000} | kwargs))


@pytest.fixture(params=[np.savez, np.savez_compressed])
def downsampled(request, tmp_path):
    """Ten batches of three images, and their pixels and labels; in the files are the devkit's numbers."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 12288), dtype=np.uint8)
    numbers = rng.choice(list(NUMBERED), 30)
    for k in range(10):
        part = slice(3 * k, 3 * k + 3)
        request.param(
            tmp_path / f"train_data_batch_{k + 1}.npz",
            data=pixels[part],
            labels=numbers[part],
            mean=np.zeros(12288),
        )
    return tmp_path, pixels.reshape(30, 3, 64, 64), np.array([label_of_name(NUMBERED[n]) for n in numbers])


def test_the_ids_are_the_thousand():
    ids = SYNSETS.read_text().split()
    assert len(set(ids)) == 1000 and ids == sorted(ids)
    # Places that everybody knows: tench, goldfish, tabby cat, toilet tissue.
    assert [ids.index(i) for i in ("n01440764", "n01443537", "n02123045", "n15075141")] == [0, 1, 281, 999]
    assert sorted(DEVKIT.read_text().split()) == ids


@pytest.mark.parametrize("name", ["imagenet64", "imagenet256"])
def test_a_subset_keeps_the_true_labels(name, synset_folders):
    for path in (synset_folders, synset_folders.parent, synset_folders.parent.parent):
        dataset = imagenet(path, name)
        assert dataset.labels == [0, 0, 1, 1, 999, 999] and dataset.random_flip
        assert dataset.__getitems__([0, 5])[1].tolist() == [0, 999]


def test_other_names_are_counted_in_their_order(tmp_path, picture_of):
    for name in ("dog", "cat", "packed"):
        (tmp_path / "imagenet" / name).mkdir(parents=True)
    for name in ("dog", "cat"):
        picture_of((70, 70)).save(tmp_path / "imagenet" / name / "x.png")
    assert imagenet(tmp_path, num_classes=2).labels == [0, 1]
    with pytest.raises(InputError, match=r"labels 0\.\.1"):
        imagenet(tmp_path, num_classes=1)


def test_classes_may_be_links(synset_folders, tmp_path):
    """A subset is often made of links; one that leads in a circle is no reason to go round for ever."""
    subset = tmp_path / "subset"
    subset.mkdir()
    for name in ("n01443537", "n15075141"):
        (subset / name).symlink_to(synset_folders / name, target_is_directory=True)
    (synset_folders / "n15075141" / "up").symlink_to(subset, target_is_directory=True)
    assert imagenet(subset).labels == [1, 1, 999, 999]


def test_labels_must_fit_the_network(synset_folders):
    with pytest.raises(InputError, match=r"labels 0\.\.999, but the network has num_classes=10"):
        imagenet(synset_folders, num_classes=10)


def test_a_class_without_images_is_named(synset_folders):
    (synset_folders / "n02123045").mkdir()
    with pytest.raises(InputError, match="n02123045: a class folder without images"):
        imagenet(synset_folders)


def test_images_are_halved_then_cropped(tmp_path):
    """A picture of 2 x 2 squares on a checkerboard that is as fine as the squares: halving by boxes keeps it."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (64, 100, 3), dtype=np.uint8)
    (tmp_path / "n01440764").mkdir()
    Image.fromarray(small.repeat(2, 0).repeat(2, 1)).save(tmp_path / "n01440764" / "x.png")
    pixels = imagenet(tmp_path)[0][0].permute(1, 2, 0).numpy()
    assert (pixels == small[:, 18:82]).all()


@pytest.mark.parametrize("name", ["imagenet64", "imagenet256"])
def test_what_to_fetch_is_said(name, tmp_path):
    with pytest.raises(InputError, match=r"ILSVRC 2012"):
        imagenet(tmp_path, name)
    with pytest.raises(InputError, match="cannot be downloaded"):
        imagenet(tmp_path, name, download=True)


def test_downsampled_batches(downsampled):
    folder, pixels, labels = downsampled
    dataset = imagenet(folder)
    for indices in (range(30), [29, 0, 3, 2, 3], [4]):
        images, got = dataset.__getitems__(indices)
        assert images.dtype == torch.uint8 and np.array_equal(images, pixels[list(indices)])
        assert got.tolist() == labels[list(indices)].tolist()
    copy = pickle.loads(pickle.dumps(dataset))  # as a spawned worker gets it
    assert np.array_equal(copy.__getitems__([7, 28])[0], pixels[[7, 28]])


def test_downsampled_batches_have_their_size(downsampled):
    with pytest.raises(InputError, match="64 x 64"):
        imagenet(downsampled[0], img_size=32)
    (downsampled[0] / "train_data_batch_7.npz").unlink()
    with pytest.raises(InputError, match=r"train_data_batch_7\.npz missing"):
        imagenet(downsampled[0])


@pytest.mark.parametrize(
    "change",
    [
        {"data": np.zeros((3, 3072), np.uint8)},
        {"data": np.zeros((3, 12288), np.float32)},
        {"data": np.array([{}, {}, {}])},
        {"labels": np.array([0, 1, 2])},
        {"labels": np.array([1, 2, 1001])},
        {"labels": np.array([1, 2])},
        {"labels": np.array([{}, {}, {}])},
        {"labels": None},
    ],
)
def test_a_batch_that_does_not_fit_is_named(change, downsampled):
    content = {"data": np.zeros((3, 12288), np.uint8), "labels": np.array([1, 2, 3])} | change
    content = {name: array for name, array in content.items() if array is not None}
    np.savez(downsampled[0] / "train_data_batch_2.npz", **content)
    with pytest.raises(InputError, match=r"train_data_batch_2\.npz"):
        imagenet(downsampled[0])


def test_a_batch_cut_short(downsampled):
    path = downsampled[0] / "train_data_batch_3.npz"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InputError, match=r"train_data_batch_3\.npz: not readable"):
        imagenet(downsampled[0])
