from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import InputError
from common.images import from_uint8, save_grid, save_png, to_uint8
from data import open_dataset
from data.dataset import SeededBatches, training_batches


def write(path, size=(9, 7), mode="RGB", seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def folder(path, **kwargs):
    return open_dataset("folder", path, **({"img_size": 4, "in_chans": 3} | kwargs))


def test_digits_are_what_they_say():
    digits = open_dataset("digits", None, img_size=8, in_chans=1, num_classes=10)
    images, labels = digits.__getitems__(range(len(digits)))
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.uint8
    assert images.unique().tolist() == [round(255 * level / 16) for level in range(17)]
    assert min(Counter(labels.tolist()).values()) > 170
    # A zero has a hole in its middle, a one has not.
    assert images[labels == 0, 0, 3:5, 3:5].float().mean() < 60 < images[labels == 1, 0, 3:5, 3:5].float().mean()


def test_digits_refuse_another_shape():
    with pytest.raises(InputError, match="8 x 8"):
        open_dataset("digits", None, img_size=16, in_chans=1)


def test_8_bits_survive_the_way_to_the_network_and_back():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    there = from_uint8(levels)
    assert torch.equal(to_uint8(there), levels)
    assert there.min() == -1 and there.max() == 1
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize("start_step", [0, 3, 8])
def test_the_order_is_that_of_an_unbroken_run(start_step):
    unbroken = list(itertools.islice(SeededBatches(10, 4, seed=1), 20))
    resumed = list(itertools.islice(SeededBatches(10, 4, seed=1, start_step=start_step), 20 - start_step))
    assert resumed == unbroken[start_step:]


def test_every_image_is_seen_once_an_epoch():
    order = [i for batch in itertools.islice(SeededBatches(10, 4, seed=1), 5) for i in batch]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]
    assert order != [i for batch in itertools.islice(SeededBatches(10, 4, seed=2), 5) for i in batch]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_of_a_loader(num_workers):
    digits = open_dataset("digits", None, img_size=8, in_chans=1)
    batches = training_batches(digits, 6, 3, 2, num_workers, pin_memory=False)
    order = itertools.islice(SeededBatches(1797, 6, seed=3, start_step=2), 3)
    for indices, (images, labels) in zip(order, batches, strict=False):
        want = digits.__getitems__(indices)
        assert torch.equal(images, want[0]) and torch.equal(labels, want[1])


def test_a_folder_nested_and_mixed(tmp_path):
    write(tmp_path / "a" / "b" / "one.JPG")
    write(tmp_path / "two.png", mode="RGBA")
    write(tmp_path / "three.gif", mode="P")
    write(tmp_path / "four.webp", mode="L")
    write(tmp_path / ".hidden" / "five.png")
    (tmp_path / "notes.txt").write_text("not an image")
    images = folder(tmp_path)
    assert [name.split("/")[-1] for name in images.names] == ["one.JPG", "four.webp", "three.gif", "two.png"]
    pixels, labels = images.__getitems__(range(4))
    assert pixels.shape == (4, 3, 4, 4) and labels.tolist() == [0] * 4
    assert folder(tmp_path, in_chans=1).__getitems__([0])[0].shape == (1, 1, 4, 4)


def test_images_are_cropped_at_the_centre(tmp_path):
    """A wide picture, red left, green in the middle, blue right: only the middle square stays."""
    bands = np.zeros((4, 12, 3), np.uint8)
    for i in range(3):
        bands[:, 4 * i : 4 * i + 4, i] = 255
    Image.fromarray(bands).save(tmp_path / "bands.png")
    pixels = folder(tmp_path)[0][0]
    assert pixels[:, :, 1:3].float().mean(dim=(1, 2)).tolist() == [0, 255, 0]


def test_classes_are_the_sub_folders(tmp_path):
    for name in ("b", "a", "c"):
        write(tmp_path / name / "deep" / "x.png")
    images = folder(tmp_path, num_classes=3)
    assert images.classes == ["a", "b", "c"] and images.__getitems__([0, 1, 2])[1].tolist() == [0, 1, 2]
    with pytest.raises(InputError, match="labels"):
        folder(tmp_path, num_classes=2)
    write(tmp_path / "loose.png")
    with pytest.raises(InputError, match=r"loose\.png"):
        folder(tmp_path, num_classes=3)


def test_broken_files_are_named_and_passed_over(tmp_path, caplog):
    for i in range(3):
        write(tmp_path / f"{i}.png", size=(40, 40), seed=i)
    (tmp_path / "html.png").write_text("<html>")
    cut = tmp_path / "1.png"
    cut.write_bytes(cut.read_bytes()[:500])  # the header is whole, the pixels are not
    images = folder(tmp_path)
    assert "html.png" in caplog.text and len(images) == 3
    assert torch.equal(images.__getitems__([1])[0], images.__getitems__([2])[0])
    assert "1.png" in caplog.text


@pytest.mark.parametrize("content", [None, "empty", "broken"])
def test_a_folder_of_no_use_is_named(content, tmp_path):
    path = tmp_path / "images"
    if content:
        path.mkdir()
    if content == "broken":
        (path / "x.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="images"):
        folder(path)


def test_what_pixels_depend_on_changes_the_description(tmp_path):
    write(tmp_path / "x.png")
    before = folder(tmp_path).describe()
    assert folder(tmp_path).describe() == before != folder(tmp_path, img_size=5).describe()
    write(tmp_path / "y.png")
    assert folder(tmp_path).describe() != before


def test_pictures(tmp_path):
    pixels = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    save_png(tmp_path / "one.png", pixels[0])
    assert torch.equal(torch.from_numpy(np.array(Image.open(tmp_path / "one.png"))), pixels[0].permute(1, 2, 0))
    save_grid(tmp_path / "grid.png", pixels)
    grid = np.array(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 66, 3 * 66, 3)
    assert (grid[1:65, 67:131] == pixels[1].permute(1, 2, 0).numpy()).all() and (grid[67:, 133:] == 255).all()
