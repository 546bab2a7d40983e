"""experiments/kid.py: KID and its intervals, against loops over pairs of images."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from evaluation.scoring import kernel_distance
from experiments import kid
from tests.kernels import by_hand, drawn


def test_pairs_of_a_resampling_are_those_of_unlike_images():
    x, counts = drawn(4, 0), [2, 0, 3, 1]
    copies = [i for i, count in enumerate(counts) for _ in range(count)]
    values = [by_hand(x[i], x[j]) for i, j in itertools.product(copies, copies) if i != j]
    found = kid.within(x, torch.tensor([counts], dtype=torch.float64))
    assert found.item() == pytest.approx(sum(values) / len(values))


def test_the_term_of_the_real_images_does_not_depend_on_the_samples():
    real, samples = drawn(9, 1), drawn(5, 2, 0.3)
    whole = kid.towards(real, samples) + kid.within(real)
    assert whole.item() == pytest.approx(kid.kid(samples, real))


def test_the_interval_is_that_of_resampled_pairs():
    """Against a loop that draws images with replacement; both resample the samples of one noise together."""
    real, standard = drawn(40, 3), drawn(60, 4, 0.1)
    samples = standard + 0.05 * drawn(60, 5) + 0.1
    weights = kid.resamplings(60, 0)
    differences = kid.towards(real, samples, weights) - kid.towards(real, standard, weights)
    found, (low, high) = float(differences[0]), kid.interval_of([differences[1:]])
    assert found == pytest.approx(kid.kid(samples, real) - kid.kid(standard, real))
    generator, values = np.random.default_rng(1), []
    for _ in range(400):
        rows = generator.integers(60, size=60)
        unlike = torch.from_numpy(rows[:, None] != rows[None])

        def term(x, rows=rows, unlike=unlike):
            within = kid.kernel(x[rows], x[rows])[unlike].mean()
            return float(within - 2 * kid.kernel(x[rows], real).mean())

        values.append(term(samples) - term(standard))
    assert [low, high] == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=0.12 * (high - low))
    assert low < found < high


def test_an_interval_over_seeds_is_that_of_their_mean():
    """Two seeds that are resampled on their own: half the variance of one."""
    one, other = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = kid.interval_of([one, other])
    assert (low, high) == pytest.approx((-1.96 / 2**0.5, 1.96 / 2**0.5), abs=0.06)


def test_resamplings_draw_as_many_images():
    weights = kid.resamplings(7, 3)
    assert weights[0].tolist() == [1] * 7 and weights.sum(dim=1).unique().tolist() == [7]
    assert torch.equal(weights, kid.resamplings(7, 3)) and not torch.equal(weights, kid.resamplings(7, 4))


def test_kid_is_that_of_the_peer_over_all_images():
    a = torch.randn(60, 20, generator=torch.Generator().manual_seed(0))
    b = 0.3 + 1.2 * torch.randn(60, 20, generator=torch.Generator().manual_seed(1))
    assert kid.kid(a.double(), b.double()) == pytest.approx(kernel_distance(a, b)["kid"], rel=1e-6)
