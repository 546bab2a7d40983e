"""experiments/features.py: each corruption grows with its strength, and a page says where scores do not."""

from __future__ import annotations

import hashlib
import io
import tarfile

import pytest
import torch

from common.errors import InputError
from experiments import features, sets
from experiments.features import BLUR, NOISE, PATCHES, SWAPPED, Row


def generator():
    return torch.Generator().manual_seed(0)


def images(n=40, channels=3, side=32):
    return torch.randint(60, 190, (n, channels, side, side), dtype=torch.uint8, generator=generator())


def test_blur_is_a_gaussian_of_a_share_of_the_side():
    """Of a white pixel it makes the Gaussian itself; 64 x 64 pixels at 5 % have a standard deviation of 3.2."""
    pixels = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    pixels[..., 20:44, 20:44] = 255
    spread = BLUR.apply(pixels, 0.05, generator())[0, 0, 32].double()
    edge = -spread.diff()[32:]  # of an edge the derivative is the Gaussian
    places = torch.arange(len(edge), dtype=torch.float64)
    mean = (edge * places).sum() / edge.sum()
    assert ((edge * (places - mean) ** 2).sum() / edge.sum()).sqrt() == pytest.approx(3.2, rel=0.05)


@pytest.mark.parametrize("levels", NOISE.strengths[:3])
def test_noise_has_its_standard_deviation(levels):
    before = torch.full((20, 3, 32, 32), 128, dtype=torch.uint8)
    apart = NOISE.apply(before, levels, generator()).double() - 128
    assert apart.std() == pytest.approx(levels, rel=0.02) and abs(apart.mean()) < 0.5


def test_the_swapped_images_are_a_share_that_grows():
    before, chosen = images(), set()
    for share in SWAPPED.strengths:
        after = SWAPPED.apply(before, share, generator())
        changed = {i for i in range(40) if not torch.equal(after[i], before[i])}
        assert len(changed) == 40 * share and changed > chosen
        assert all(torch.equal(after[i], before[i][[2, 0, 1]]) for i in changed)
        chosen = changed


def test_patches_are_added_to_those_of_a_smaller_count():
    before = images(8)
    done = before
    for count in PATCHES.strengths:
        after = PATCHES.apply(before, count, generator())
        touched = (after != before).any(dim=1)
        assert (touched >= (done != before).any(dim=1)).all() and set(after[after != before].tolist()) == {0, 255}
        assert touched.flatten(1).sum(1).max() <= 16 * count and touched.sum() > (done != before).any(dim=1).sum()
        done = after


@pytest.mark.parametrize("corruption", features.CORRUPTIONS, ids=lambda corruption: corruption.name)
def test_corruptions_leave_their_input_and_move_away_from_it(corruption):
    """Of all sizes that are measured, and grey where that is possible."""
    for channels, side in ((3, 32), (3, 16)) if corruption.colour_alone else ((1, 8), (1, 28), (3, 32)):
        kept = images(16, channels, side)
        before = kept.clone()
        apart = [
            (corruption.apply(before, strength, generator()).double() - before).square().mean().item()
            for strength in corruption.strengths
        ]
        assert torch.equal(before, kept) and apart == sorted(set(apart)) and apart[0] >= 0


def row(corruption, strength, *scores):
    return Row(corruption, strength, {"small": scores})


def test_falls_are_named():
    """Each corruption begins at the images that are whole."""
    rows = [row("", 0, 2.0, 0.1), row(NOISE.name, 5, 3.0, 0.2), row(NOISE.name, 15, 4.0, 0.2)]
    rows += [row(PATCHES.name, 1, 2.5, 0.15), row(PATCHES.name, 2, 2.4, 0.3)]
    assert features.falls(rows) == [
        "KID in small at noise, levels: 15",
        "Fréchet distance in small at broken patches an image: 2",
    ]
    assert features.falls([rows[0], rows[3]]) == [] and features.falls([rows[0], row(NOISE.name, 5, 2.0, 0.2)])
    table = features.as_table(rows)
    assert "| noise, levels: 15 | 4 | 200 |" in table and "**Not monotone: KID" in table


def test_the_page_of_the_digits(tmp_path, run_quietly, monkeypatch):
    """In the classifier of the digits alone, which needs no package."""
    monkeypatch.setitem(
        features.SETS, "digits", features.RealImages("digits", "digits", 8, 1, (features.CLASSIFIERS["digits"],))
    )
    argv = ["--sets", "digits", "--n_images", 30, "--output", tmp_path / "page.md"]
    assert f"-> {tmp_path / 'page.md'}" in run_quietly(features.main, argv)
    lines = (tmp_path / "page.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + 1 + 3 * 4 and "Digits, 8 x 8, 30 against 30 images." in lines
    assert not any("swapped" in line for line in rows)


def test_shaded_emoji_are_fetched_once(tmp_path, monkeypatch):
    def fake(package, sha256, folder):
        with tarfile.open(folder / "a.tgz", "w:gz") as tar:
            for name in ("package/assets/1f600.webp", "package/package.json", "../../evil.webp"):
                info = tarfile.TarInfo(name)
                info.size = 4
                tar.addfile(info, io.BytesIO(b"here"))
        return folder / "a.tgz"

    monkeypatch.setattr(features, "npm_archive", fake)
    folder = features.fetched_shaded(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["1f600.webp", "evil.webp"]
    assert not (tmp_path / "a.tgz").exists()
    monkeypatch.setattr(features, "npm_archive", lambda *_: pytest.fail("fetched again"))
    assert features.fetched_shaded(tmp_path) == folder


def test_scoped_packages_are_archives_without_their_sign(tmp_path):
    """npm pack names them so."""
    archive = tmp_path / "lobehub-fluent-emoji-3d-1.1.0.tgz"
    archive.write_bytes(b"there")
    assert sets.npm_archive(sets.FLUENT.package, hashlib.sha256(b"there").hexdigest(), tmp_path) == archive
    with pytest.raises(InputError, match="not the one that is expected"):
        sets.npm_archive(sets.FLUENT.package, sets.FLUENT.sha256, tmp_path)
