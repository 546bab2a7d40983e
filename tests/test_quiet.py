"""With --quiet a script prints nothing as long as all is well; its files have the results."""

from __future__ import annotations

import importlib
import logging
import sys

import pytest

from tests.conftest import TINY_FLAGS, TRAINING_FLAGS

SAMPLING = ["--solver", "ddim", "--steps", 2, "--n_samples", 80, "--precision", "fp32", "--device", "cpu"]
TRAINING = [*TINY_FLAGS, *TRAINING_FLAGS, "--depth", 1, "--n_steps", 4]


@pytest.fixture
def words(full, shallow, early_exit, tmp_path):
    """The command line of each script, in an order in which each finds its input; {} is the folder of results."""
    out, samples = tmp_path / "out", tmp_path / "samples"
    classifier = ["--feature_extractor", "experiments/digits_classifier.pt", "--device", "cpu"]
    return {
        "train": [*TRAINING, "--log_path", out, "--exp_name", "a"],
        "main": [*TRAINING, "--model", "uvit", "--log_path", out, "--exp_name", "b"],
        "sampler": [*SAMPLING, "--checkpoint_path", full, "--output_folder", samples],
        "eesampler": [*SAMPLING, "--checkpoint_path", early_exit, "--threshold", 0.5, "--output_folder", out / "exits"],
        "fid": [*classifier, "--samples_path", samples, "--dataset", "digits", "--cache_dir", out / "cache"],
        "compare": [f"a={samples}", "--output", out / "picture.png"],
        "calibrate": [
            *("--checkpoint_path", shallow, full, "--dataset", "digits", "--n_images", 4, "--device", "cpu"),
            *("--speedup", 1, "--output", out / "stages.yaml"),
        ],
        "benchmark": ["train", "--model", full, "--rounds", 1, "--device", "cpu", "--output_folder", out / "speed"],
        "pack": ["--dataset", "digits", "--img_size", 8, "--in_chans", 1, "--output", out / "packed"],
    }


@pytest.mark.slow
def test_nothing_is_printed(words, tmp_path, capfd, monkeypatch):
    """On a terminal too, where progress bars are shown."""
    monkeypatch.setattr("common.timing.LEAST_SECONDS", 0.0)
    (tmp_path / "out").mkdir()
    for script, argv in words.items():
        before = {path for path in tmp_path.rglob("*") if path.is_file()}
        capfd.readouterr()
        with monkeypatch.context() as patched:
            patched.setattr(sys.stderr, "isatty", lambda: True)
            importlib.import_module(script).main([str(word) for word in [*argv, "--quiet"]])
        assert tuple(capfd.readouterr()) == ("", ""), script
        assert {path for path in tmp_path.rglob("*") if path.is_file()} - before, f"{script} did nothing"
    print("said")
    assert capfd.readouterr().out == "said\n"  # later output is not lost


def test_warnings_and_errors_are_printed(words, tmp_path, fails, caplog):
    sampler = importlib.import_module("sampler")
    argv = [*words["sampler"], "--quiet"]
    fails(sampler.main, [*argv, "--checkpoint_path", tmp_path / "none.pth"], "none.pth")
    with caplog.at_level(logging.WARNING):
        importlib.import_module("train").main([*map(str, words["train"]), "--quiet", "--num_warmup_steps", "9"])
    assert "--num_warmup_steps 9" in caplog.text
