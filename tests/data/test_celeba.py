from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import InputError
from data import open_dataset


def celeba(path, img_size=64, crop=None, num_classes=-1):
    return open_dataset("celeba", path, img_size=img_size, in_chans=3, crop=crop, num_classes=num_classes)


@pytest.fixture
def archive(celeba_folder, tmp_path):
    """The same pictures in img_align_celeba.zip, in a place of its own."""
    path = tmp_path / "zipped" / "img_align_celeba.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(celeba_folder.iterdir()):
            archive.write(file, f"img_align_celeba/{file.name}")
        archive.writestr("__MACOSX/img_align_celeba/._000001.jpg", b"not a picture")
    return path


def test_archive_and_folder_are_one_dataset(archive, celeba_folder):
    places = (celeba_folder, celeba_folder.parent, archive, archive.parent)
    datasets = [celeba(place) for place in places]
    for dataset in datasets:
        assert [name.split("/")[-1] for name in dataset.names] == ["000001.jpg", "000002.jpg", "162770.jpg"]
        assert torch.equal(dataset.__getitems__(range(3))[0], datasets[0].__getitems__(range(3))[0])
        assert dataset.labels is None


def test_the_split_file_names_the_training_images(archive, celeba_folder):
    for path in (archive, celeba_folder):
        lines = "000001.jpg 1\n000002.jpg 0\n162770.jpg 2\n162771.jpg 0\n"
        (path.parent / "list_eval_partition.txt").write_text(lines)
        assert [name.split("/")[-1] for name in celeba(path.parent).names] == ["000002.jpg", "162771.jpg"]
    (archive.parent / "list_eval_partition.txt").write_text("<html>\n")
    with pytest.raises(InputError, match=r"list_eval_partition\.txt"):
        celeba(archive.parent)


@pytest.mark.parametrize(
    "crop, rows, columns",
    [("center178", slice(20, 198), slice(0, 178)), ("uvit128", slice(57, 185), slice(25, 153))],
)
def test_crops_are_slices(crop, rows, columns, celeba_folder):
    """At the size of the box nothing is resized, so what is left is the slice itself."""
    whole = np.array(Image.open(celeba_folder / "000002.jpg"))
    side = rows.stop - rows.start
    pixels = celeba(celeba_folder, side, crop)[1][0]
    assert (pixels.permute(1, 2, 0).numpy() == whole[rows, columns]).all()


@pytest.mark.parametrize("crop, size", [("center178", (178, 177)), ("center178", (64, 64)), ("uvit128", (178, 184))])
def test_an_image_without_the_box_is_left_out(crop, size, celeba_folder, picture_of, caplog):
    """Such as a copy of CelebA that was made smaller: it is not filled up with black."""
    picture_of(size).save(celeba_folder / "000001.jpg")
    dataset = celeba(celeba_folder, crop=crop)
    (reason,) = dataset.whole_and_broken(range(3))[1].values()
    assert f"it is {size[0]} x {size[1]}" in reason and "178 x 218" in reason
    whole = [dataset[number][0] for number in range(3)]
    assert torch.equal(whole[0], whole[1]) and "000001.jpg" in caplog.text
    for path in celeba_folder.iterdir():
        picture_of(size).save(path)
    with pytest.raises(InputError, match="no image can be read"):
        celeba(celeba_folder, crop=crop).__getitems__([0])


def test_the_crop_is_the_papers_unless_told(celeba_folder):
    assert celeba(celeba_folder).describe()["crop"] == "center178"
    with pytest.raises(InputError, match="center178, uvit128"):
        celeba(celeba_folder, crop="halve")


def test_celeba_has_no_classes(celeba_folder):
    with pytest.raises(InputError, match="no classes"):
        celeba(celeba_folder, num_classes=2)


def test_a_zip_cut_short(archive):
    archive.write_bytes(archive.read_bytes()[:-300])
    with pytest.raises(InputError, match=r"img_align_celeba\.zip: not readable as a zip archive"):
        celeba(archive)


def test_a_page_saved_as_zip(archive):
    archive.write_text("<html>quota exceeded</html>")
    with pytest.raises(InputError, match="not readable as a zip archive"):
        celeba(archive)


@pytest.mark.parametrize(
    "name", ["../../evil.jpg", "/etc/evil.jpg", "a/../../evil.jpg", "C:\\evil.jpg", "..\\evil.jpg"]
)
def test_a_member_that_would_land_outside(name, archive):
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(name, b"")
    with pytest.raises(InputError, match="outside its folder"):
        celeba(archive)


def test_a_member_with_bytes_changed_is_passed_over(archive, caplog):
    """Another picture takes its place, as for any broken file."""
    content = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as file:
        start = file.getinfo("img_align_celeba/000002.jpg").header_offset
    content[start + 1000 : start + 1010] = bytes(10)
    archive.write_bytes(content)
    dataset = celeba(archive)
    assert torch.equal(dataset[1][0], dataset[2][0]) and "000002.jpg" in caplog.text


def test_what_to_fetch_is_said(tmp_path):
    with pytest.raises(InputError, match=r"img_align_celeba\.zip .*mmlab") as said:
        celeba(tmp_path)
    assert str(tmp_path) in str(said.value)
    with pytest.raises(InputError, match=r"cannot be downloaded; get img_align_celeba\.zip"):
        open_dataset("celeba", tmp_path, img_size=64, in_chans=3, download=True)
