"""Intervals of KID over images: fid.py keeps a term for each image, compare.py makes intervals of them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import compare
import fid
from common.images import save_png
from evaluation import kid
from evaluation.comparison import over_images
from evaluation.scoring import kernel_distance
from experiments.kid import interval_of, resamplings, towards
from tests.folders import sampled_and_scored
from tests.kernels import by_hand, drawn


@pytest.mark.parametrize(("block", "partners"), [(2, 9), (1000, 9), (2, 3)])
def test_a_term_is_that_of_its_formula(block, partners, monkeypatch):
    """In blocks of any size; of many images the first, the last and some between are its partners."""
    samples, real = drawn(5, 0), drawn(4, 1)
    monkeypatch.setattr(kid, "BLOCK", block)
    monkeypatch.setattr(kid, "PARTNERS", partners)
    own, other = ([0, 2, 4], [0, 2, 3]) if partners == 3 else (range(5), range(4))
    for i, found in enumerate(kid.contributions(samples.float(), real.float()).tolist()):
        among = [by_hand(samples[i], samples[j]) for j in own if j != i]
        to_real = [by_hand(samples[i], real[m]) for m in other]
        assert found == pytest.approx(2 * (sum(among) / len(among) - sum(to_real) / len(to_real)), rel=1e-5)


def test_terms_have_the_spread_of_kid_over_draws():
    """Of 400 draws of 80 samples each against the standard error of one of them, which varies by a tenth."""
    real = drawn(50, 0)
    values = [kernel_distance(drawn(80, seed, 0.3), real)["kid"] for seed in range(1, 401)]
    errors = [kid.contributions(drawn(80, seed, 0.3), real).std().item() / 80**0.5 for seed in range(1, 21)]
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


def test_paired_terms_give_the_interval_of_the_bootstrap():
    real, one = drawn(40, 0), drawn(300, 1, 0.1)
    other = one + 0.05 * drawn(300, 2) + 0.1
    weights = resamplings(300, 0)
    low, high = interval_of([(towards(real, other, weights) - towards(real, one, weights))[1:]])
    terms = kid.contributions(other, real) - kid.contributions(one, real)
    assert 2 * 1.96 * terms.std().item() / 300**0.5 == pytest.approx(high - low, rel=0.12)


def scored(folder, kid_of, terms, seed=0, **settings):
    sampled_and_scored(folder, 0.0, 0.1, seed, **settings)
    path = folder / "report" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kid": kid_of, "n_samples": 4, "kid_terms": terms}))
    return f"{folder.name}={folder}"


def compared(run_quietly, tmp_path, *runs):
    argv = [*runs, "--metric", "kid", "--output", tmp_path / "x.png", "--json", tmp_path / "x.json"]
    said = run_quietly(compare.main, argv)
    return said, {label["label"]: label for label in json.loads((tmp_path / "x.json").read_text())["labels"]}


def test_one_seed_has_intervals_over_its_images(tmp_path, run_quietly):
    """Student's t of 3 degrees of freedom is 3.182; the terms of the difference are 0.5 but for one of them."""
    full, quick = scored(tmp_path / "full", 0.3, [1, 2, 3, 4]), scored(tmp_path / "quick", 0.4, [1.5, 2.5, 3.5, 4.9])
    said, labels = compared(run_quietly, tmp_path, full, quick)
    assert labels["full"]["score"] == {"mean": 0.3, "half_width": pytest.approx(3.182 * 1.2910 / 2, rel=1e-3)}
    of = labels["quick"]["difference"]
    assert of["mean"] == pytest.approx(0.1) and of["half_width"] == pytest.approx(3.182 * 0.2 / 2, rel=1e-3)
    assert "0.300 ± 2.054" in said and "+0.100 ± 0.318" in said and "minus full" in said
    assert "over its images" in said and "Student" not in said


def test_several_seeds_have_intervals_over_seeds(tmp_path, run_quietly):
    runs = [
        f"{label}={scored(tmp_path / f'{label}{seed}', score + seed, [1, 2, 3, 4], seed).rpartition('=')[2]}"
        for label, score in (("full", 0.3), ("quick", 0.4))
        for seed in (0, 1)
    ]
    said, labels = compared(run_quietly, tmp_path, *runs)
    assert labels["full"]["score"]["half_width"] == pytest.approx(12.706 * 0.5, rel=1e-3)
    assert "over 2 seeds" in said and "images" not in said


def test_older_scores_have_no_interval(tmp_path, run_quietly):
    full, old = scored(tmp_path / "full", 0.3, [1, 2, 3, 4]), scored(tmp_path / "old", 0.4, None)
    said, labels = compared(run_quietly, tmp_path, full, old)
    assert labels["old"]["score"]["half_width"] is None and "minus full" not in said


@pytest.mark.parametrize("terms", [[1, 2, 3], [1, 2, 3, math.nan], "four", [1, 2, 3, "4"], 7])
def test_broken_terms_are_refused(terms, tmp_path, fails):
    run = scored(tmp_path / "full", 0.3, terms)
    fails(compare.main, [run, "--metric", "kid", "--output", tmp_path / "x.png"], "report")


def test_fid_keeps_the_terms(tmp_path, run_quietly):
    """One for each sample."""
    for name, seed in (("samples", 0), ("real", 1)):
        (tmp_path / name).mkdir()
        pixels = torch.randint(0, 256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        for i, image in enumerate(pixels):
            save_png(tmp_path / name / f"{i:06d}.png", image)
    argv = ["--samples_path", tmp_path / "samples", "--reference", tmp_path / "real", "--metrics", "kid"]
    said = run_quietly(fid.main, [*argv, "--feature_extractor", "experiments/digits_classifier.pt"])
    about = json.loads((tmp_path / "samples" / "report" / "metrics.json").read_text())
    assert len(about["kid_terms"]) == about["n_samples"] == 20 and "kid_terms" not in said


def test_random_subsets_of_many_images_widen_the_interval():
    """KID of 50,000 images is a mean over 100 subsets of 1,000: a variance of 1 / 50,000 + 0.98 / 100,000."""
    terms = torch.randn(50_000, generator=torch.Generator().manual_seed(0)).tolist()
    found = over_images(0.5, terms)
    assert found.mean == 0.5 and found.half_width == pytest.approx(1.96 * (1 / 50e3 + 0.98 / 100e3) ** 0.5, rel=0.01)
