"""How much each image contributes to KID, for confidence intervals over images."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1000  # images whose kernels are in memory at a time


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x . y / D + 1)^3, the kernel of KID (Binkowski et al. 2018, Sec. 3). (N, D), (M, D) -> (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def contributions(samples: Tensor, real: Tensor) -> Tensor:
    """By how much each sample moves KID, to first order. samples: (N, D). real: (M, D). Returns (N,) in float64.

    KID is a U-statistic in the samples. Its projection on single samples (Serfling 1980, Sec. 5.3) gives sample i the
    term 2 (mean of k(x_i, x_j) over j != i - mean of k(x_i, y_m) over m). Over N samples KID then has the variance
    var(terms) / N, and the difference of two KIDs of paired samples var(differences of the terms) / N. The real images
    count as fixed.
    """
    samples, real = samples.double(), real.double()
    n, found = len(samples), []
    for start in range(0, n, BLOCK):
        block = samples[start : start + BLOCK]
        itself = (block.square().mean(dim=1) + 1) ** 3
        among_samples = (kernel(block, samples).sum(dim=1) - itself) / (n - 1)
        to_real = sum(kernel(block, some).sum(dim=1) for some in real.split(BLOCK)) / len(real)
        found.append(2 * (among_samples - to_real))
    return torch.cat(found)
