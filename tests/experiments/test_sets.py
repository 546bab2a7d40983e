"""experiments/sets.py: what npm has, unpacked into classes."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from common.errors import InputError
from common.files import sha256_of
from experiments import sets
from experiments.sets import FLUENT, GOOGLE

SMILE, WAVE, DARK, NUMBER = "1f600", "1f44b", "1f44b-1f3ff", "0023-fe0f-20e3"


def archive_of(path, content):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def vendors(tmp_path):
    """Both vendors with archives of a few files, where npm would put them."""
    names = [
        {"image": f"{SMILE}.png", "category": "Smileys & Emotion"},
        {"image": f"{WAVE}.png", "category": "People & Body", "skin_variations": {"1F3FF": {"image": f"{DARK}.png"}}},
        {"image": f"{NUMBER}.png", "category": "Symbols"},
        {"image": "1f3fb.png", "category": "Component"},
    ]
    google = {f"{GOOGLE.folder}{name}.png": name.encode() for name in (SMILE, WAVE, DARK, NUMBER, "1f3fb", "unknown")}
    google |= {sets.NAMES_AND_CATEGORIES: json.dumps(names).encode(), f"package/img/google/32/{SMILE}.png": b"small"}
    fluent = {f"{FLUENT.folder}{name}.webp": name.encode() for name in (SMILE, DARK, "23-fe0f-20e3", "unknown")}
    paths = [
        archive_of(tmp_path / "emoji-datasource-google-15.1.2.tgz", google),
        archive_of(tmp_path / "lobehub-fluent-emoji-3d-1.1.0.tgz", fluent),
    ]
    return [v._replace(sha256=sha256_of(path)) for v, path in zip((GOOGLE, FLUENT), paths, strict=True)]


def found_in(images):
    return {path.relative_to(images).as_posix() for path in images.glob("*/*")}


def test_emoji_of_one_vendor_have_a_folder_for_each_category(vendors, tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "GOOGLE", vendors[0])
    images = sets.fetched_emoji(tmp_path, vendors[0])
    assert found_in(images) == {
        f"smileys_emotion/{SMILE}.png",
        f"people_body/{WAVE}.png",
        f"people_body/{DARK}.png",
        f"symbols/{NUMBER}.png",
    }
    assert (images / "smileys_emotion" / f"{SMILE}.png").read_text() == SMILE
    assert [path.name for path in tmp_path.glob("*.tgz")] == ["lobehub-fluent-emoji-3d-1.1.0.tgz"]
    monkeypatch.setattr(sets, "npm_archive", lambda *_: pytest.fail("fetched again"))
    assert sets.fetched_emoji(tmp_path, vendors[0]) == images


def test_emoji_of_two_vendors_have_folders_of_both(vendors, tmp_path, monkeypatch):
    """The second vendor writes code points otherwise and has no categories of its own."""
    monkeypatch.setattr(sets, "GOOGLE", vendors[0])
    images = sets.fetched_emoji(tmp_path, *vendors)
    assert {name for name in found_in(images) if name.startswith("fluent")} == {
        f"fluent_smileys_emotion/{SMILE}.webp",
        f"fluent_people_body/{DARK}.webp",
        "fluent_symbols/23-fe0f-20e3.webp",
    }
    assert len(found_in(images)) == 7 and not list(tmp_path.glob("*.tgz"))


def test_another_archive_is_not_unpacked(tmp_path):
    (tmp_path / "emoji-datasource-google-15.1.2.tgz").write_bytes(b"other")
    with pytest.raises(InputError, match="SHA-256"):
        sets.fetched_emoji(tmp_path, GOOGLE)
    assert not (tmp_path / "emoji_google").exists()


def test_classes_are_folders_with_no_image_beside_them(tmp_path):
    for name in ("b/1.png", "a/1.png", "a/deep/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert sets.classes_of(tmp_path) == ["a", "b"]
    (tmp_path / "3.png").touch()
    assert sets.classes_of(tmp_path) == []


def test_changed_images_are_another_measurement(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(b"one")
    images = sets.colour(tmp_path / "images", is_emoji=False)
    for _ in range(2):
        sets.check_same(tmp_path, images)
    (tmp_path / "images" / "1.png").write_bytes(b"another")
    with pytest.raises(InputError, match="another images: remove it"):
        sets.check_same(tmp_path, images)


@pytest.mark.parametrize("images", [sets.garments(None), sets.digits()])
def test_a_quick_measurement_has_little_of_everything(images):
    few = sets.quick(images)
    assert few.n_samples == 20 and len(few.seeds) == 2 and few.samplers[0] == "ddpm-50" and few.data == images.data
    if isinstance(images, sets.TrainedSet):
        assert (few.full_steps, few.shallow_steps, few.exit_steps, few.timed_steps) == (100, 30, 20, 6)
