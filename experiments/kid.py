"""KID (Binkowski et al. 2018) of few images, and intervals of its differences by resampling the images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from evaluation.kid import kernel

RESAMPLINGS, PERCENTILES = 1000, (2.5, 97.5)


def kid(a: Tensor, b: Tensor) -> float:
    """The unbiased squared MMD with the kernel (x . y / D + 1)^3, of all images at once. a: (N, D). b: (M, D)."""
    return float(within(b) + towards(b, a))


def within(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean of the kernel over pairs of unlike rows of x, (N, D) -> (R,).

    weights: (R, N), how often each row counts in each of R resamplings (default: once, R = 1). A row and its own copy
    are no pair, because resamplings would be biased with them.
    """
    weights = x.new_ones(1, len(x)) if weights is None else weights
    pairs = weights.sum(dim=1) ** 2 - (weights**2).sum(dim=1)
    return ((weights @ kernel(x, x).fill_diagonal_(0)) * weights).sum(dim=1) / pairs


def towards(real: Tensor, samples: Tensor, weights: Tensor | None = None) -> Tensor:
    """KID but for the term of the real images alone, which does not depend on the samples.

    real: (M, D). samples: (N, D). weights: (R, N), see `within`. Returns (R,).
    """
    weights = samples.new_ones(1, len(samples)) if weights is None else weights
    return within(samples, weights) - 2 * weights @ kernel(samples, real).mean(dim=1) / weights.sum(dim=1)


def resamplings(n: int, seed: int) -> Tensor:
    """How often each of n images counts, (1 + RESAMPLINGS, N): first each once, then as drawn with replacement."""
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLINGS)
    return torch.from_numpy(np.concatenate([np.ones((1, n)), drawn]))


def interval_of(resampled: Sequence[Tensor]) -> list[float]:
    """The 95 % interval of the mean over seeds. resampled: of each seed (R,), the value in each resampling."""
    ends: list[float] = np.percentile(torch.stack(list(resampled)).mean(dim=0).numpy(), PERCENTILES).tolist()
    return ends
