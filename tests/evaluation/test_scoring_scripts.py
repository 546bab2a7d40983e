"""fid.py and compare.py."""

from __future__ import annotations

import json
import pwd
import shutil
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

import compare
import evaluation.features
import fid
import sampler
from common.files import sha256_of
from data import open_dataset
from evaluation import comparison
from evaluation.picture import first_samples
from evaluation.statistics import load_statistics, sums_of
from tests.folders import sampled_and_scored

CLASSIFIER = Path(__file__).parents[2] / "experiments" / "digits_classifier.pt"
WAYS_OUT = "--feature_extractor_weights", "--feature_extractor efficientnet-lite0, which needs no download"


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Every other digit as a PNG."""
    folder = tmp_path_factory.mktemp("real")
    digits = open_dataset("digits", None, img_size=8, in_chans=1)
    for n, image in enumerate(digits.images[::2]):
        Image.fromarray(image[0].numpy()).save(folder / f"{n:06d}.png")
    return folder


@pytest.fixture
def scored(full, tmp_path, run_quietly):
    """Two scored runs."""
    for name, steps in (("slow", 20), ("quick", 5)):
        folder = tmp_path / name
        argv = ["--checkpoint_path", full, "--n_samples", 80, "--steps", steps, "--output_folder", folder]
        run_quietly(sampler.main, argv)
        run_quietly(fid.main, [*flags(tmp_path), "--samples_path", folder, "--dataset", "digits"])
    return tmp_path


def flags(tmp_path):
    return ["--feature_extractor", CLASSIFIER, "--cache_dir", tmp_path / "cache", "--device", "cpu"]


def metrics(folder):
    return json.loads((folder / "report" / "metrics.json").read_text())


@pytest.mark.slow
def test_digits_score_near_0_and_noise_far(real, tmp_path, run_quietly):
    noise = tmp_path / "noise"
    noise.mkdir()
    for n in range(100):
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (8, 8), dtype=np.uint8)).save(noise / f"{n:06d}.png")
    run_quietly(fid.main, [*flags(tmp_path), "--samples_path", real, "--dataset", "digits", "--metrics", "fid,kid,prc"])
    run_quietly(
        fid.main, [*flags(tmp_path), "--samples_path", noise, "--dataset", "digits", "--metrics", "fid,kid,prc"]
    )
    near, far = metrics(real), metrics(noise)
    assert near["fid"] < 1 < 30 < far["fid"]
    assert near["kid"] < far["kid"] and near["precision"] > 0.9 > far["precision"]
    assert near["n_samples"] == 899 and near["reference"]["n_reference"] == 1797
    assert near["feature_extractor"]["sha256"]
    shutil.rmtree(real / "report")


@pytest.mark.slow
def test_statistics_of_a_dataset_are_kept(real, tmp_path, run_quietly):
    argv = [*flags(tmp_path), "--samples_path", real, "--dataset", "digits"]
    said = run_quietly(fid.main, argv)
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.name.startswith("digits_1797_digits_classifier_")
    before = kept.stat().st_mtime_ns
    assert run_quietly(fid.main, argv) == said and kept.stat().st_mtime_ns == before
    run_quietly(fid.main, [*argv, "--n_reference", 500])
    assert len(list((tmp_path / "cache").iterdir())) == 2
    kept.write_bytes(b"broken")
    assert run_quietly(fid.main, argv) == said
    shutil.rmtree(real / "report")


@pytest.mark.slow
def test_references(real, tmp_path, run_quietly):
    samples = tmp_path / "samples"
    shutil.copytree(real, samples)
    base = [*flags(tmp_path), "--samples_path", samples]
    run_quietly(fid.main, [*base, "--reference", real])
    assert metrics(samples)["fid"] == pytest.approx(0, abs=1e-4)
    assert "statistics of 899" in run_quietly(fid.main, [*base, "--save_stats", tmp_path / "s.npz"])
    run_quietly(fid.main, [*base, "--reference", tmp_path / "s.npz"])
    assert metrics(samples)["fid"] == pytest.approx(0, abs=1e-4)


def test_a_report_with_other_images_than_it_counts(scored, fails):
    (scored / "slow" / "000003.png").unlink()
    fails(
        fid.main, [*flags(scored), "--samples_path", scored / "slow", "--dataset", "digits"], "79 images", "counts 80"
    )


def test_the_score_knows_where_it_came_from(scored):
    about = metrics(scored / "slow")
    assert about["run"]["settings"]["seed"] == 0
    assert about["run"]["backbones"][0]["weights"] == "ema"
    assert about["reference"]["dataset"] == "digits" and about["n_samples"] == 80


@pytest.mark.slow
def test_inception_takes_its_own_path(real, tmp_path, run_quietly, fails, monkeypatch):
    """Its weights are not here: random ones, behind a check that is told to accept them."""
    weights = tmp_path / "weights.pth"
    torch.save({}, weights)
    argv = ["--samples_path", real, "--device", "cpu", "--feature_extractor_weights", weights]
    fails(fid.main, [*argv, "--reference", real], "SHA-256")
    network = "torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3.load_state_dict"
    monkeypatch.setattr(network, lambda self, state_dict: None)
    monkeypatch.setattr(evaluation.features, "INCEPTION_SHA256", sha256_of(weights))
    few = tmp_path / "few"
    few.mkdir()
    for n in range(6):
        shutil.copy(real / f"{n:06d}.png", few)
    argv = ["--samples_path", few, "--device", "cpu", "--feature_extractor_weights", weights]
    run_quietly(fid.main, [*argv, "--reference", few, "--metrics", "fid,is"])
    about = metrics(few)
    assert about["fid"] == pytest.approx(0, abs=1e-3) and about["is"] >= 1
    assert "2048" in about["feature_extractor"]["extractor"]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
@pytest.mark.slow
def test_several_processes_give_the_same_score(real, tmp_path, run_quietly, torchrun):
    shutil.copytree(real, tmp_path / "samples")
    argv = ["--samples_path", tmp_path / "samples", "--dataset", "digits", "--metrics", "fid,kid,prc"]
    run_quietly(fid.main, [*flags(tmp_path / "one"), *argv, "--save_stats", tmp_path / "one.npz"])
    alone = metrics(tmp_path / "samples")
    done = torchrun("fid.py", [*flags(tmp_path / "three"), *argv, "--save_stats", tmp_path / "three.npz"], processes=3)
    assert done.returncode == 0, done.stderr
    together = metrics(tmp_path / "samples")
    for name in ("fid", "kid", "precision", "recall"):
        assert together[name] == pytest.approx(alone[name], rel=1e-9, abs=1e-12)
    one, three = load_statistics(tmp_path / "one.npz"), load_statistics(tmp_path / "three.npz")
    np.testing.assert_allclose(three.sigma, one.sigma, rtol=1e-10, atol=1e-12)
    assert one.n == three.n == 899


def test_a_process_without_images_adds_nothing():
    features = torch.randn(10, 4)
    whole, parts = sums_of([features]), [sums_of(part) for part in ([], [features[:3]], [], [features[3:]])]
    for part in parts[1:]:
        parts[0].include(part)
    for a, b in zip(parts[0].finish(), whole.finish(), strict=True):
        np.testing.assert_allclose(a, b)


@pytest.mark.slow
def test_statistics_whose_writing_was_killed_are_made_again(real, tmp_path, run_quietly, monkeypatch):
    argv = [*flags(tmp_path), "--samples_path", real, "--dataset", "digits"]

    def killed(file, **arrays):
        file.write(b"PK half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(np, "savez", killed)
        fid.main([str(arg) for arg in argv])
    assert not list((tmp_path / "cache").iterdir())
    run_quietly(fid.main, argv)
    shutil.rmtree(real / "report")


def test_no_network_for_the_download(real, tmp_path, fails, monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    fails(fid.main, ["--samples_path", real, "--reference", real], "no network", *WAYS_OUT)


class TestWithoutAHome:
    """HOME is not set, and the user is unknown: a container that runs under any number."""

    @pytest.fixture(autouse=True)
    def _homeless(self, monkeypatch):
        def unknown(uid):
            raise KeyError(f"getpwuid(): uid not found: {uid}")

        for name in ("HOME", "XDG_CACHE_HOME", "TORCH_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(pwd, "getpwuid", unknown)
        with pytest.raises(RuntimeError):
            Path.home()

    def test_help_and_what_needs_no_cache(self, real, tmp_path, capsys, run_quietly):
        with pytest.raises(SystemExit) as ended:
            fid.main(["--help"])
        assert ended.value.code == 0 and "~/.cache/duodiff" in capsys.readouterr().out
        argv = ["--samples_path", real, "--feature_extractor", CLASSIFIER, "--device", "cpu"]
        run_quietly(fid.main, [*argv, "--reference", real])
        run_quietly(fid.main, [*argv, "--dataset", "digits", "--cache_dir", tmp_path / "cache"])
        assert list((tmp_path / "cache").iterdir())
        shutil.rmtree(real / "report")

    def test_what_needs_one_asks_for_a_place(self, real, tmp_path, fails, monkeypatch):
        monkeypatch.chdir(tmp_path)
        fails(fid.main, ["--samples_path", real, "--dataset", "digits"], "no home folder", "--cache_dir")
        argv = ["--samples_path", real, "--reference", real, "--device", "cpu"]
        fails(fid.main, argv, "no home folder", *WAYS_OUT)
        assert not list(tmp_path.glob("~*"))


class TestBadInput:
    def test_options(self, real, tmp_path, fails):
        base = ["--samples_path", real]
        stats = tmp_path / "s.npz"
        np.savez(stats, mu=np.zeros(2), sigma=np.eye(2))
        fails(fid.main, base, "--dataset")
        fails(fid.main, [*base, "--dataset", "digits", "--reference", real], "--reference")
        fails(fid.main, [*base, "--reference", real, "--metrics", "fid,lpips"], "'lpips'")
        fails(fid.main, [*flags(tmp_path), *base, "--reference", real, "--metrics", "is"], "Inception")
        fails(fid.main, [*flags(tmp_path), *base, "--reference", stats, "--metrics", "kid"], "statistics")
        fails(fid.main, [*flags(tmp_path), *base, "--reference", stats], "2 dimensions")
        fails(fid.main, [*flags(tmp_path), *base, "--reference", real, "--n_reference", 5000], "899 images")
        fails(fid.main, [*base, "--reference", real, "--feature_extractor", "nowhere.pt"], "nowhere.pt")
        fails(fid.main, ["--samples_path", tmp_path / "none", "--dataset", "digits"], "none")

    def test_folders(self, real, tmp_path, fails, caplog):
        folder = tmp_path / "samples"
        folder.mkdir()
        argv = [*flags(tmp_path), "--samples_path", folder, "--reference", real]
        fails(fid.main, argv, "no images")
        shutil.copy(real / "000000.png", folder)
        (folder / "notes.txt").write_text("stray")
        fails(fid.main, argv, "1 images are too few")
        assert "notes.txt" in caplog.text
        Image.new("L", (9, 9)).save(folder / "other.png")
        fails(fid.main, argv, "other.png", "9 x 9")
        (folder / "other.png").write_bytes(b"broken")
        fails(fid.main, argv, "other.png")

    def test_extractors(self, real, tmp_path, fails):
        (tmp_path / "none.pt").write_bytes(b"no network")
        argv = ["--samples_path", real, "--reference", real, "--device", "cpu", "--feature_extractor"]
        fails(fid.main, [*argv, tmp_path / "none.pt"], "none.pt")


def test_compare(scored, run_quietly):
    picture = scored / "picture.png"
    argv = [f"slow one={scored / 'slow'}", f"quick={scored / 'quick'}", "--output", picture]
    lines = run_quietly(compare.main, argv).splitlines()
    assert lines[0].split() == ["run", "FID", *["PSNR", "to", "slow", "one"], "s/image", "MFLOP/image", "speed-up"]
    assert "(noise)" in lines[3], "ddpm draws it at each step, and their steps differ"
    slow, quick = (json.loads((scored / n / "report" / "statistics.json").read_text()) for n in ("slow", "quick"))
    want = slow["seconds_per_image"] / quick["seconds_per_image"]
    assert lines[2].startswith("slow one ") and lines[2].endswith("1.00x")
    assert lines[3].split()[-1] == f"{want:.2f}x"
    assert f"{metrics(scored / 'quick')['fid']:.3f}" in lines[3]
    assert Image.open(picture).size[0] > 300


def test_the_strip_of_samples_of_many_kinds(tmp_path):
    """Grey beside colour, 16 bits and alpha, as every other reader sees them."""
    Image.new("L", (8, 8), 50).save(tmp_path / "000000.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "000001.png")
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "000002.png")
    Image.frombytes("I;16", (8, 8), np.full(64, 257 * 9, "<u2").tobytes()).save(tmp_path / "000003.png")
    strip = first_samples(tmp_path)
    gap = 64 // 16
    assert strip.shape == (64, 4 * 64 + 3 * gap, 3)
    assert strip[32, 32 :: 64 + gap].tolist() == [[50] * 3, [255] * 3, [1, 2, 3], [9] * 3]
    assert all((strip[:, 64 * k + gap * (k - 1) :][:, :gap] == 255).all() for k in (1, 2, 3))


def test_compare_over_seeds(tmp_path, run_quietly, fails):
    """Against scipy's own intervals; the paired one is the narrower where seeds shift both alike."""
    scores = {"full": [10.0, 12.0, 14.5], "quick": [11.0, 13.1, 15.4]}
    runs = [
        f"{label}={sampled_and_scored(tmp_path / f'{label}_{seed}', score, 0.01 if label == 'full' else 0.004, seed)}"
        for label, of_label in scores.items()
        for seed, score in enumerate(of_label)
    ]
    out, numbers = ["--output", tmp_path / "x.png"], tmp_path / "x.json"
    lines = run_quietly(compare.main, [*runs, *out, "--json", numbers]).splitlines()
    full, quick = json.loads(numbers.read_text())["labels"]
    for told, values in ((full["score"], scores["full"]), (quick["score"], scores["quick"])):
        low, high = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
        assert told["mean"] - told["half_width"] == pytest.approx(low)
        assert told["mean"] + told["half_width"] == pytest.approx(high)
    assert quick["difference"]["mean"] == pytest.approx(1.0)
    assert quick["difference"]["half_width"] == pytest.approx(0.1 * 4.3027 / np.sqrt(3), rel=1e-4)
    assert full["seeds"] == [0, 1, 2] and quick["speed_up"] == pytest.approx(2.5)
    assert "minus full" in lines[0] and "+1.000 ± 0.248" in lines[3] and lines[3].endswith("2.50x")
    assert "3 seeds" in lines[4]

    read = [comparison.read_run(label, folder, "fid") for label, folder in map(compare.labelled, runs)]
    widths = [bar.half_width for bar in comparison.bars(comparison.summarised(read))]
    assert widths == [0, quick["difference"]["half_width"]], "the picture shows what tells labels apart"
    for some in (read[:-1], read[:3]):  # other seeds, and nothing to differ from
        assert comparison.bars(comparison.summarised(some))[0].half_width == full["score"]["half_width"]

    without_one = run_quietly(compare.main, [*runs[:-1], *out]).splitlines()
    assert "seeds" in without_one[0] and "minus" not in without_one[0]
    other = sampled_and_scored(tmp_path / "other", 9.0, 0.01, 3, steps=20)
    fails(compare.main, [*runs, f"full={other}", *out], "label full", "steps (50 and 20)")
    again = sampled_and_scored(tmp_path / "again", 9.0, 0.01, 2)
    fails(compare.main, [*runs, f"full={again}", *out], "label full", "seed 2")
    exits = sampled_and_scored(tmp_path / "exits", 11.0, 0.01, seed=4, threshold=0.1)
    fails(compare.main, [*runs, f"full={exits}", *out], "label full", "threshold (none and 0.1)")


def test_compare_with_bad_input(scored, real, fails):
    fails(compare.main, ["slow"], "LABEL=FOLDER")
    fails(compare.main, [f"a={scored / 'slow'}", f"a={scored / 'quick'}"], "label a", "steps (20 and 5)")
    fails(compare.main, [f"a={scored / 'slow'}", f"b={real}"], "statistics.json")
    fails(compare.main, [f"a={scored / 'slow'}", "--metric", "kid"], "no kid")
    path = scored / "quick" / "report" / "metrics.json"
    path.write_text(json.dumps(metrics(scored / "quick") | {"n_samples": 7}))
    fails(compare.main, [f"a={scored / 'slow'}", f"b={scored / 'quick'}"], "n_samples")
    path.write_text("{")
    fails(compare.main, [f"b={scored / 'quick'}"], "JSON")
