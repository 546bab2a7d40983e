"""How much each image contributes to KID, for confidence intervals over images."""

from __future__ import annotations

import torch
from torch import Tensor

from evaluation.images import evenly_spaced

BLOCK = 1000  # images whose kernels are in memory at a time
PARTNERS = 5000  # images that each sample is compared with, at most: enough for means, and minutes less for 50,000


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
    chosen = evenly_spaced(len(samples), min(len(samples), PARTNERS))
    samples, real = samples.double(), real[evenly_spaced(len(real), min(len(real), PARTNERS))].double()
    partners, is_partner = samples[chosen], torch.zeros(len(samples), dtype=torch.double, device=samples.device)
    is_partner[chosen] = 1
    found = []
    for block, itself in zip(samples.split(BLOCK), is_partner.split(BLOCK), strict=True):
        of_itself = itself * (block.square().mean(dim=1) + 1) ** 3
        among_samples = (kernel(block, partners).sum(dim=1) - of_itself) / (len(partners) - itself)
        found.append(2 * (among_samples - kernel(block, real).mean(dim=1)))
    return torch.cat(found)
