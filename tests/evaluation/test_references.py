"""What a score was measured on: broken files, colour, folders against themselves, and images in an .npz."""

from __future__ import annotations

import errno
import io
import json
import logging
import struct
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import fid
import pack
from common.errors import InputError, WriteError
from data import open_dataset
from data.files import ImageFiles
from evaluation import references
from evaluation.images import FinishedImages, ImageArray
from evaluation.references import DatasetReference
from evaluation.scoring import kernel_distance, precision_recall
from evaluation.statistics import Statistics, frechet_distance, load_statistics, statistics_of

SIDE = 8


class Corners(torch.nn.Module):
    """Features that tell pixels apart: the means of the quarters, of all channels together."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = torch.nn.functional.adaptive_avg_pool2d(images.float().mean(dim=1, keepdim=True), 2)
        return means.flatten(1)


def features_of(pixels: np.ndarray) -> torch.Tensor:
    """(N, H, W, C) -> (N, 4), by numpy."""
    half = SIDE // 2
    quarters = pixels.astype(np.float64).mean(axis=3).reshape(len(pixels), 2, half, 2, half)
    return torch.from_numpy(quarters.mean(axis=(2, 4)).reshape(len(pixels), 4))


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    path = tmp_path_factory.mktemp("extractor") / "corners.pt"
    torch.jit.trace(Corners(), torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8)).save(str(path))
    return ["--feature_extractor", path, "--device", "cpu", "--quiet", "--batch_size", 4]


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (12, SIDE, SIDE, 3), dtype=np.uint8)


def saved(folder, pixels):
    folder.mkdir()
    for n, image in enumerate(pixels):
        Image.fromarray(image.squeeze()).save(folder / f"{n:02d}.png")
    return folder


def metrics(path):
    return json.loads((path / "metrics.json").read_text())


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-60])


@pytest.fixture
def broken(tmp_path, pixels):
    """A dataset of 12 files: two cut short, the last of them the first of its batch, and one that is no image."""
    folder = saved(tmp_path / "real", pixels)
    for name in ("03.png", "08.png"):
        cut_short(folder / name)
    (folder / "html.png").write_text("<html>")
    return folder, np.delete(pixels, [3, 8], axis=0)


class TestBrokenFiles:
    def test_they_are_no_part_of_any_score(self, broken, tmp_path, pixels, flags, run_quietly, caplog):
        """Scores are those of the whole images, and the second run, from the cache, says what the first said."""
        folder, whole = broken
        samples = saved(tmp_path / "samples", pixels[::2] // 2)
        argv = [*flags, "--cache_dir", tmp_path / "cache", "--samples_path", samples]
        argv += ["--dataset", "folder", "--data_path", folder, "--metrics", "fid,kid,prc"]
        said, scores = [], []
        for _ in range(2):
            caplog.clear()
            run_quietly(fid.main, argv)
            said.append([record.message for record in caplog.records if "left out" in record.message])
            scores.append(metrics(samples / "report"))
        assert said[0] == said[1] and scores[0] == scores[1]
        opened, read = said[0]  # each file is named once, when it is met
        assert "1 file left out: html.png" in opened and "html.png" not in read
        assert all(name in read for name in ("2 files left out", "03.png", "08.png"))
        reference = scores[0]["reference"]
        assert reference["n_reference"] == reference["images"] == 10
        assert sorted(reference["left_out"]) == ["03.png", "08.png", "html.png"]

        mine, real = features_of(pixels[::2] // 2), features_of(whole)
        assert scores[0]["fid"] == pytest.approx(frechet_distance(statistics_of([mine]), statistics_of([real])))
        for name, want in {**kernel_distance(mine, real), **precision_recall(mine, real)}.items():
            assert scores[0][name] == pytest.approx(want, rel=1e-6, abs=1e-6)
        (kept,) = (tmp_path / "cache").iterdir()
        assert load_statistics(kept).n == 10

    def test_a_warm_cache_decodes_nothing_and_a_cold_one_each_file_once(
        self, broken, tmp_path, flags, run_quietly, monkeypatch
    ):
        folder, whole = broken
        samples = saved(tmp_path / "samples", whole)
        decoded, decode = [], ImageFiles.decode
        monkeypatch.setattr(ImageFiles, "decode", lambda self, index: decoded.append(index) or decode(self, index))
        argv = [*flags, "--cache_dir", tmp_path / "cache", "--samples_path", samples]
        argv += ["--dataset", "folder", "--data_path", folder]
        run_quietly(fid.main, argv)
        assert sorted(decoded) == list(range(12))
        assert metrics(samples / "report")["fid"] == pytest.approx(0, abs=1e-6)
        run_quietly(fid.main, argv)
        assert len(decoded) == 12
        # A file that is mended, and one more that breaks, are other references.
        Image.fromarray(whole[0]).save(folder / "03.png")
        run_quietly(fid.main, argv)
        assert metrics(samples / "report")["reference"]["n_reference"] == 11
        cut_short(folder / "00.png")
        run_quietly(fid.main, argv)
        assert metrics(samples / "report")["reference"]["n_reference"] == 10
        assert len(list((tmp_path / "cache").iterdir())) == 3

    def test_a_packed_copy_is_the_same_reference(self, broken, tmp_path, flags, run_quietly, caplog):
        folder, whole = broken
        samples = saved(tmp_path / "samples", whole)
        argv = [*flags, "--cache_dir", tmp_path / "cache", "--samples_path", samples]
        argv += ["--dataset", "folder", "--data_path", folder]
        run_quietly(fid.main, argv)
        loose = metrics(samples / "report")
        size = ["--img_size", SIDE, "--num_workers", 0, "--quiet"]
        run_quietly(pack.main, ["--dataset", "folder", "--data_path", folder, *size])
        caplog.clear()
        run_quietly(fid.main, argv)
        packed = metrics(samples / "report")
        assert packed["reference"] == loose["reference"]
        assert packed["fid"] == pytest.approx(loose["fid"], abs=1e-6)
        assert "03.png" in caplog.text and "html.png" in caplog.text

    def test_the_count_is_of_those_that_were_read(self, broken, tmp_path, flags, run_quietly):
        """4 of 12 files, evenly spaced: 0, 4, 7, 11; and 5: 0, 3, 6, 8, 11, two of which are broken."""
        folder, whole = broken
        samples = saved(tmp_path / "samples", whole)
        argv = [*flags, "--cache_dir", tmp_path / "cache", "--samples_path", samples]
        argv += ["--dataset", "folder", "--data_path", folder, "--n_reference"]
        for n, read in ((4, 4), (5, 3)):
            run_quietly(fid.main, [*argv, n])
            assert metrics(samples / "report")["reference"]["n_reference"] == read

    def test_nothing_but_broken_files(self, tmp_path, pixels, flags, fails):
        samples = saved(tmp_path / "samples", pixels)
        real = saved(tmp_path / "real", pixels[:2])
        for path in real.iterdir():
            cut_short(path)
        argv = [*flags, "--cache_dir", tmp_path / "cache", "--samples_path", samples]
        argv += ["--dataset", "folder", "--data_path", real, "--metrics"]
        for chosen in ("fid", "kid"):
            fails(fid.main, [*argv, chosen], "no image can be read", "00.png")

    @pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
    @pytest.mark.slow
    def test_several_processes_say_it_once(self, broken, tmp_path, flags, run_quietly, torchrun):
        folder, whole = broken
        samples = saved(tmp_path / "samples", whole // 2)
        argv = [*flags, "--samples_path", samples, "--dataset", "folder", "--data_path", folder]
        run_quietly(fid.main, [*argv, "--cache_dir", tmp_path / "one"])
        alone = metrics(samples / "report")
        done = torchrun("fid.py", [*argv, "--cache_dir", tmp_path / "two"], processes=2)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("03.png") == done.stderr.count("08.png") == 1
        together = metrics(samples / "report")
        run_quietly(fid.main, [*argv, "--cache_dir", tmp_path / "two"])
        for other in (together, metrics(samples / "report")):  # what they computed, and what they kept
            assert other["reference"] == alone["reference"]
            assert other["fid"] == pytest.approx(alone["fid"], rel=1e-9)


def test_the_cache_of_another_way_to_read_is_not_used(tmp_path, pixels, flags, run_quietly):
    """Nor an entry that does not say what was left out, or does not add up."""
    samples = saved(tmp_path / "samples", pixels)
    argv = [*flags, "--cache_dir", tmp_path / "cache", "--samples_path", samples]
    argv += ["--dataset", "folder", "--data_path", samples]
    run_quietly(fid.main, argv)
    (kept,) = (tmp_path / "cache").iterdir()
    whole = dict(np.load(kept))
    for change in ({"left_out": None}, {"left_out": np.asarray('{"00.png": "x"}')}, {"n": np.asarray(7)}):
        entry = {name: value for name, value in (whole | change).items() if value is not None}
        np.savez(kept, **(entry | {"mu": whole["mu"] + 9}))
        run_quietly(fid.main, argv)
        assert metrics(samples / "report")["fid"] == pytest.approx(0, abs=1e-6)


class TestAgainstItself:
    """A folder of images of one size scores 0 against itself, by both ways to name it."""

    def images(self, kind: str, folder) -> None:
        rng = np.random.default_rng(1)
        for n in range(8):
            colour = rng.integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8)
            path, odd = folder / f"{n}.png", n % 2 == 0
            if kind in ("alpha", "mixed") and odd:
                Image.fromarray(colour).save(path)
            elif kind in ("turned", "mixed") and n % 4 == 1:
                tags = Image.Exif()
                tags[0x0112] = n % 8 + 1
                Image.fromarray(colour[..., :3]).save(path.with_suffix(".jpg"), exif=tags)
            elif kind in ("16 bits", "mixed") and n % 4 == 3:
                grey = rng.integers(0, 65536, (SIDE, SIDE)).astype(np.uint16)
                Image.frombytes("I;16", (SIDE, SIDE), grey.tobytes()).save(path)
            elif kind in ("palette", "mixed") and n == 7:
                Image.fromarray(colour[..., :3]).quantize(8).save(path.with_suffix(".gif"))
            elif kind in ("grey", "16 bits"):
                Image.fromarray(colour[..., 0]).save(path)
            else:
                Image.fromarray(colour[..., :3]).save(path)

    @pytest.mark.parametrize("kind", ["alpha", "turned", "16 bits", "palette", "grey", "mixed"])
    @pytest.mark.parametrize("crop", ["fit", "halve"])
    def test_it_scores_0(self, kind, crop, tmp_path, flags, run_quietly):
        folder = tmp_path / "images"
        folder.mkdir()
        self.images(kind, folder)
        argv = [*flags, "--cache_dir", tmp_path / "cache", "--samples_path", folder]
        ways = [["--reference", folder], ["--dataset", "folder", "--data_path", folder, "--crop", crop]]
        for way in ways:
            run_quietly(fid.main, [*argv, *way])
            assert metrics(folder / "report")["fid"] == pytest.approx(0, abs=1e-6)
            assert metrics(folder / "report")["reference"]["n_reference"] == 8

    def test_the_pictures_in_the_report_are_not_its_images(self, tmp_path, pixels, flags, run_quietly):
        folder = saved(tmp_path / "images", pixels)
        (folder / "report").mkdir()
        (folder / "report" / "statistics.json").write_text("{}")
        Image.new("RGB", (90, 90), "red").save(folder / "report" / "grid_image.png")
        argv = [*flags, "--cache_dir", tmp_path / "cache", "--samples_path", folder]
        run_quietly(fid.main, [*argv, "--dataset", "folder", "--data_path", folder])
        assert metrics(folder / "report")["fid"] == pytest.approx(0, abs=1e-6)

    def test_images_that_exif_turns_and_are_no_squares(self, tmp_path, flags, run_quietly):
        """Their size is the one after turning: one that needs no turning is as large."""
        folder = tmp_path / "images"
        folder.mkdir()
        tags = Image.Exif()
        tags[0x0112] = 6
        for n in range(3):
            colour = np.random.default_rng(n).integers(0, 256, (16, 8, 3), dtype=np.uint8)
            Image.fromarray(colour).save(folder / f"{n}.jpg", exif=tags)
        Image.fromarray(np.zeros((8, 16, 3), np.uint8)).save(folder / "9.png")
        assert FinishedImages(folder).size == (16, 8)
        run_quietly(fid.main, [*flags, "--samples_path", folder, "--reference", folder])
        assert metrics(folder / "report")["fid"] == pytest.approx(0, abs=1e-6)


class TestColour:
    @pytest.mark.parametrize("name", ["a.png", "z.png"])
    def test_one_grey_file_does_not_make_a_folder_grey(self, name, tmp_path, pixels):
        folder = saved(tmp_path / "images", pixels[:3])
        Image.fromarray(pixels[3, ..., 0]).save(folder / name)
        images = FinishedImages(folder)
        (batch,) = images.batches(9)
        assert images.in_chans == 3 and batch.shape == (4, 3, SIDE, SIDE)
        colours = [image for image in batch if not torch.equal(image[0], image[1])]
        assert torch.equal(torch.stack(colours), torch.from_numpy(pixels[:3]).permute(0, 3, 1, 2))

    def test_grey_in_every_mode_is_grey(self, tmp_path):
        grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
        for mode in ("1", "L", "LA", "I;16"):
            grey.convert(mode).save(tmp_path / f"{mode[0]}{len(mode)}.png")
        palette = grey.convert("P")
        palette.putpalette(np.repeat(np.arange(256, dtype=np.uint8)[::-1], 3).tobytes())
        palette.save(tmp_path / "palette.png")
        assert FinishedImages(tmp_path).in_chans == 1
        palette.putpalette([1, 2, 3] * 256)
        palette.save(tmp_path / "zalette.png")
        assert FinishedImages(tmp_path).in_chans == 3

    def test_no_pixels_are_decoded_to_find_out(self, tmp_path, pixels, monkeypatch):
        folder = saved(tmp_path / "images", pixels[..., :1])
        decoded, prepare = [], PngImagePlugin.PngImageFile.load_prepare
        monkeypatch.setattr(
            PngImagePlugin.PngImageFile, "load_prepare", lambda self: decoded.append(self) or prepare(self)
        )
        assert FinishedImages(folder).in_chans == 1
        assert len(decoded) == 1  # for its size


# Images in an .npz


@pytest.fixture
def adm(tmp_path, pixels):
    """mu and sigma of other images than those beside them, as ADM's batches have; and more of no interest."""
    statistics = statistics_of([features_of(np.concatenate([pixels, 255 - pixels]))])
    arrays = {"mu": statistics.mu, "sigma": statistics.sigma.astype(np.float32)}
    np.savez(tmp_path / "adm.npz", arr_0=pixels, mu_s=np.zeros(3), sigma_s=np.eye(3), **arrays)
    return tmp_path / "adm.npz", statistics


def add_zeros(path, shape):
    """Write arr_0 of zeros into an .npz, compressed, an image at a time."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(shape[0]):
            member.write(bytes(int(np.prod(shape[1:]))))


class TestArrays:
    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    @pytest.mark.parametrize("as_samples", [True, False])
    def test_they_score_as_a_folder_does(self, save, as_samples, tmp_path, pixels, flags, run_quietly):
        folder, other = saved(tmp_path / "folder", pixels), saved(tmp_path / "other", pixels[::-1] // 3)
        save(tmp_path / "images.npz", pixels, np.arange(12))
        metric = ["--metrics", "fid,kid,prc"]
        places = ((folder, other), (tmp_path / "images.npz", other)) if as_samples else ((other, folder), (other, None))
        found = []
        for samples, reference in places:
            argv = ["--samples_path", samples, "--reference", reference or tmp_path / "images.npz"]
            run_quietly(fid.main, [*flags, *argv, *metric])
            report = samples / "report" if samples.is_dir() else tmp_path / "images_report"
            found.append(metrics(report))
        for name in ("fid", "kid", "kid_std", "precision", "recall", "n_samples"):
            assert found[0][name] == pytest.approx(found[1][name], rel=1e-12)
        assert found[0]["fid"] > 1 and found[1]["reference"]["n_reference"] == 12

    def test_samples_against_a_dataset_and_their_statistics(self, tmp_path, pixels, flags, run_quietly):
        folder, path = saved(tmp_path / "folder", pixels), tmp_path / "images.npz"
        np.savez(path, pixels)
        argv = ["--samples_path", path, "--dataset", "folder", "--data_path", folder, "--cache_dir", tmp_path / "cache"]
        run_quietly(fid.main, [*flags, *argv, "--save_stats", tmp_path / "s.npz"])
        assert metrics(tmp_path / "images_report")["fid"] == pytest.approx(0, abs=1e-6)
        np.testing.assert_allclose(load_statistics(tmp_path / "s.npz").mu, features_of(pixels).mean(0), rtol=1e-6)

    def test_some_of_them(self, tmp_path, pixels, flags, run_quietly):
        folder = saved(tmp_path / "folder", pixels[[0, 4, 7, 11]])
        np.savez(tmp_path / "images.npz", pixels)
        argv = ["--samples_path", folder, "--reference", tmp_path / "images.npz", "--n_reference", 4]
        run_quietly(fid.main, [*flags, *argv])
        about = metrics(folder / "report")
        assert about["fid"] == pytest.approx(0, abs=1e-6) and about["reference"]["n_reference"] == 4

    @pytest.mark.parametrize("shape", [(12, SIDE, SIDE, 3), (12, SIDE, SIDE, 1), (12, SIDE, SIDE)])
    def test_shapes(self, shape, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        np.savez_compressed(tmp_path / "x.npz", pixels)
        images = ImageArray(tmp_path / "x.npz")
        got = torch.cat(list(images.batches(5)))
        want = pixels.reshape(12, SIDE, SIDE, -1).transpose(0, 3, 1, 2)
        assert np.array_equal(got, want) and images.in_chans == want.shape[1] and images.size == (SIDE, SIDE)

    def test_statistics_are_taken_before_images(self, adm, tmp_path, pixels, flags, run_quietly, fails):
        path, statistics = adm
        folder = saved(tmp_path / "folder", pixels // 2)
        run_quietly(fid.main, [*flags, "--samples_path", folder, "--reference", path, "--metrics", "fid,kid"])
        about, mine = metrics(folder / "report"), features_of(pixels // 2)
        assert about["fid"] == pytest.approx(frechet_distance(statistics_of([mine]), statistics), rel=1e-4)
        assert about["kid"] == pytest.approx(kernel_distance(mine, features_of(pixels))["kid"], rel=1e-5)
        assert about["reference"] == {"reference": str(path), "n_reference": None, "n_images": 12}
        argv = [*flags, "--samples_path", folder, "--reference", path, "--n_reference", 4]
        fails(fid.main, argv, "cannot be reduced")

    def test_what_is_not_needed_may_be_of_any_size(self, tmp_path, pixels, flags, run_quietly, modest_memory):
        """600 MB of images beside mu and sigma, of which there is only the header and zeros."""
        statistics = statistics_of([features_of(pixels)])
        np.savez(tmp_path / "s.npz", mu=statistics.mu, sigma=statistics.sigma)
        add_zeros(tmp_path / "s.npz", (600, 1024, 1024))
        folder = saved(tmp_path / "folder", pixels)
        run_quietly(fid.main, [*flags, "--samples_path", folder, "--reference", tmp_path / "s.npz"])
        assert metrics(folder / "report")["fid"] == pytest.approx(0, abs=1e-5)

    def test_many_images_take_little_memory(self, tmp_path, monkeypatch):
        import tracemalloc

        add_zeros(tmp_path / "x.npz", (300, 256, 256, 3))
        tracemalloc.start()
        count = sum(len(batch) for batch in ImageArray(tmp_path / "x.npz").batches(8))
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 300 and highest < 2**24  # of 59 MB

    @pytest.mark.parametrize(
        ("array", "said"),
        [
            (np.zeros((4, 8, 8, 3), np.float32), "uint8"),
            (np.zeros((4, 8, 8, 4), np.uint8), "(4, 8, 8, 4)"),
            (np.zeros((0, 8, 8, 3), np.uint8), "no images"),
            (np.zeros((4, 8, 0, 3), np.uint8), "no images"),
            (np.zeros(5, np.uint8), "(5,)"),
            (np.asfortranarray(np.zeros((4, 8, 8, 3), np.uint8)), "C order"),
            (np.array([object()]), "evil.npz"),
        ],
    )
    def test_arrays_that_are_no_images(self, array, said, tmp_path, pixels, flags, fails):
        folder, path = saved(tmp_path / "folder", pixels), tmp_path / "evil.npz"
        np.savez(path, array)
        for argv in (["--samples_path", folder, "--reference", path], ["--samples_path", path, "--reference", folder]):
            fails(fid.main, [*flags, *argv], "evil.npz", said)

    @pytest.mark.parametrize("shape", [(2**60, 8, 8, 3), (2, 8, 8, 3), (-2, -8, 8, 3), (2**20, 2**20, 2**20, 3)])
    def test_sizes_that_are_claimed(self, shape, tmp_path, pixels, flags, fails, modest_memory):
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}\n".encode()
        content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(8 * 8 * 3)
        with zipfile.ZipFile(tmp_path / "evil.npz", "w") as archive:
            archive.writestr("arr_0.npy", content)
        folder = saved(tmp_path / "folder", pixels)
        fails(fid.main, [*flags, "--samples_path", tmp_path / "evil.npz", "--reference", folder], "evil.npz")

    def test_damage_is_found(self, tmp_path, pixels, flags, fails):
        folder, path = saved(tmp_path / "folder", pixels), tmp_path / "evil.npz"
        for save in (np.savez, np.savez_compressed):
            save(path, pixels)
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
            fails(
                fid.main,
                [*flags, "--samples_path", path, "--reference", folder],
                "evil.npz",
                "CRC" if save is np.savez else "",
            )
            file = io.BytesIO()
            save(file, pixels)
            path.write_bytes(file.getvalue()[:-100])
            fails(fid.main, [*flags, "--samples_path", path, "--reference", folder], "evil.npz")

    def test_other_arrays_are_named(self, tmp_path, pixels, flags, fails):
        folder, path = saved(tmp_path / "folder", pixels), tmp_path / "x.npz"
        np.savez(path, images=pixels)
        fails(fid.main, [*flags, "--samples_path", folder, "--reference", path], "arr_0", "images")
        fails(fid.main, [*flags, "--samples_path", path, "--reference", folder], "no arr_0", "x.npz")
        (tmp_path / "x.txt").write_text("x")
        fails(fid.main, [*flags, "--samples_path", tmp_path / "x.txt", "--reference", folder], "x.txt", ".npz")


def test_save_stats_is_checked_before_the_work(tmp_path, pixels, flags, fails, monkeypatch):
    folder, path = saved(tmp_path / "folder", pixels), tmp_path / "images.npz"
    np.savez(path, pixels)
    monkeypatch.setattr("evaluation.images.FinishedImages.batches", None)
    fails(fid.main, [*flags, "--samples_path", folder, "--save_stats", tmp_path], "--save_stats", "folder")
    fails(fid.main, [*flags, "--samples_path", path, "--save_stats", path], "--save_stats", "--samples_path")
    fails(
        fid.main, [*flags, "--samples_path", folder, "--reference", path, "--save_stats", path], "replace --reference"
    )
    assert np.array_equal(np.load(path)["arr_0"], pixels)


def test_calibration_leaves_broken_images_out(tmp_path, pixels, caplog):
    """The predictions are those on the whole images, whose noise is the one they have beside broken ones."""
    from calibration.measure import measure_predictions
    from data import open_dataset
    from diffusion import NoiseSchedule
    from diffusion.solvers import make_solver

    folder = saved(tmp_path / "real", pixels)
    whole = open_dataset("folder", folder, img_size=SIDE, in_chans=3)
    solver = make_solver("ddpm", NoiseSchedule(), "predict_noise")

    def measured(dataset, indices):
        networks = [lambda x_t, t, y: 0.5 * x_t, lambda x_t, t, y: 0.4 * x_t]
        more = {"conditional": False, "batch_size": 4, "seed": 0, "device": torch.device("cpu"), "quiet": True}
        return measure_predictions(networks, [range(1000)] * 2, solver, [900, 100], dataset, indices, **more)

    want = measured(whole, range(12))
    for name in ("03.png", "08.png"):
        cut_short(folder / name)
    with caplog.at_level(logging.WARNING):
        got = measured(open_dataset("folder", folder, img_size=SIDE, in_chans=3), range(12))
    assert "03.png" in caplog.text and "08.png" in caplog.text
    keep = [i for i in range(12) if i not in (3, 8)]
    np.testing.assert_array_equal(got.error, want.error[..., keep])
    np.testing.assert_array_equal(got.distance, want.distance[..., keep])
    for path in folder.glob("*.png"):
        path.write_bytes(path.read_bytes()[:80])
    with pytest.raises(InputError, match="at least 2"):
        measured(whole, range(12))


def test_statistics_that_cannot_be_kept_are_not_lost(tmp_path, monkeypatch, caplog):
    """A full disk in the place of the cache costs the next run its time, and this one nothing."""
    found = Statistics(np.zeros(2), np.eye(2), 10)

    def refuse(path, statistics, left_out):
        raise WriteError(path, errno.ENOSPC)

    monkeypatch.setattr(references.Reference, "statistics", lambda *_: found)
    monkeypatch.setattr(references, "save_statistics", refuse)
    dataset = open_dataset("digits", None, img_size=8, in_chans=1, num_classes=-1, crop=None)
    extractor = SimpleNamespace(name="none", describe=lambda: {})
    assert DatasetReference(dataset, 10, tmp_path).statistics(extractor, 4, quiet=True) is found
    assert "No space left on device" in caplog.text and str(tmp_path) in caplog.text
