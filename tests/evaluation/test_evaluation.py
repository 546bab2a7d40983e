from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from common.errors import InputError
from evaluation.scoring import inception_score, kernel_distance, precision_recall
from evaluation.statistics import (
    RunningStatistics,
    Statistics,
    frechet_distance,
    load_statistics,
    save_statistics,
    statistics_of,
)


def test_streamed_statistics_are_those_of_all_features():
    features = torch.randn(1000, 6) * torch.arange(1, 7) + 1e4
    got = statistics_of(features.split(37))
    np.testing.assert_allclose(got.mu, features.double().mean(0).numpy())
    np.testing.assert_allclose(got.sigma, np.cov(features.double().numpy().T), rtol=1e-6, atol=1e-8)
    assert got.n == 1000


def test_frechet_distance_with_a_matrix_root():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(50, 8)) @ rng.normal(size=(8, 8)) + rng.normal() for _ in range(2))
    first, second = (statistics_of([torch.from_numpy(x)]) for x in (a, b))
    root = scipy.linalg.sqrtm(first.sigma @ second.sigma).real
    want = np.sum((first.mu - second.mu) ** 2) + np.trace(first.sigma + second.sigma - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(want, rel=1e-8)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-8)


def test_frechet_distance_of_two_lines():
    """In one dimension it is the squared difference of means and of standard deviations."""
    a, b = Statistics(np.array([1.0]), np.array([[4.0]]), 9), Statistics(np.array([3.0]), np.array([[25.0]]), 9)
    assert frechet_distance(a, b) == pytest.approx(2**2 + 3**2)
    with pytest.raises(InputError, match="1 and 2 dimensions"):
        frechet_distance(a, Statistics(np.zeros(2), np.eye(2), 9))


def test_frechet_distance_with_fewer_images_than_features():
    few, other = (statistics_of([torch.randn(5, 20)]) for _ in range(2))
    assert np.isfinite(frechet_distance(few, other)) and frechet_distance(few, few) < 1e-6


def test_one_image_has_no_statistics():
    running = RunningStatistics()
    running.add(torch.randn(1, 3))
    with pytest.raises(InputError, match="too few"):
        running.finish()


def test_statistics_files(tmp_path):
    want = statistics_of([torch.randn(30, 4)])
    save_statistics(tmp_path / "s.npz", want)
    got = load_statistics(tmp_path / "s.npz")
    assert got.n == 30 and np.array_equal(got.sigma, want.sigma)
    np.savez(tmp_path / "published.npz", mu=want.mu, sigma=want.sigma)
    assert load_statistics(tmp_path / "published.npz").n is None


@pytest.mark.parametrize(
    "arrays",
    [
        {"mu": np.zeros(3)},
        {"mu": np.zeros(3), "sigma": np.eye(2)},
        {"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)},
        {"mu": np.array([object()]), "sigma": np.eye(1)},
    ],
)
def test_statistics_files_that_are_none(arrays, tmp_path):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(InputError, match="npz"):
        load_statistics(tmp_path / "s.npz")
    (tmp_path / "t.npz").write_bytes((tmp_path / "s.npz").read_bytes()[:50])
    with pytest.raises(InputError, match="npz"):
        load_statistics(tmp_path / "t.npz")


def test_samples_from_the_real_distribution_score_better():
    real, good, bad = torch.randn(300, 5), torch.randn(300, 5), 3 * torch.randn(300, 5) + 2
    assert kernel_distance(good, real)["kid"] < kernel_distance(bad, real)["kid"]
    assert precision_recall(good, real)["precision"] > 0.8 > precision_recall(bad, real)["precision"]


def test_inception_score_of_sure_and_even_guesses_is_the_number_of_classes():
    sure = 100 * torch.eye(4).repeat(1000, 1)
    assert inception_score(sure)["is"] == pytest.approx(4, rel=0.05)
    assert inception_score(torch.zeros(200, 4))["is"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("sigma", "said"),
    [
        ([[1.0, 2.0], [2.0, 1.0]], "eigenvalue -1"),  # 3 and -1
        ([[-1.0, 0.0], [0.0, -2.0]], "eigenvalue -2"),
        ([[1.0, 0.0], [0.0, -0.01]], "eigenvalue -0.01"),
        ([[1.0, 0.5], [0.2, 1.0]], "symmetric"),
        ([[1.0, 1j], [-1j, 1.0]], "real"),
    ],
)
def test_a_sigma_that_is_no_covariance_is_refused(sigma, said, tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(2), sigma=np.array(sigma))
    with pytest.raises(InputError, match=said):
        load_statistics(tmp_path / "s.npz")


def test_published_statistics_are_of_low_rank_and_rounded(tmp_path):
    """Fewer images than features, large means, float32 sums: eigenvalues that should be 0 are a little below."""
    features = (np.random.default_rng(0).normal(size=(20, 60)) + 3).astype(np.float32)
    centred = features - features.mean(axis=0)
    sigma = (centred.T @ centred / np.float32(19)).astype(np.float32)
    assert scipy.linalg.eigvalsh(sigma.astype(np.float64))[0] < 0
    np.savez(tmp_path / "s.npz", mu=features.mean(axis=0), sigma=sigma)
    assert load_statistics(tmp_path / "s.npz").sigma.shape == (60, 60)
    np.savez(tmp_path / "zero.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    load_statistics(tmp_path / "zero.npz")
