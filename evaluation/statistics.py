"""Means and covariances of features, streamed, saved, and compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.distributed import gather
from common.errors import InputError
from common.files import read_arrays, replacing

ROUNDING = 1e-4  # of covariances from other programs, relative to the largest eigenvalue; float32 gives 1e-5


class Statistics(NamedTuple):
    mu: NDArray[np.float64]  # (D,) float64
    sigma: NDArray[np.float64]  # (D, D) float64
    n: int | None  # number of images, if known


class RunningStatistics:
    """Mean and covariance of batches of features, summed in float64."""

    def __init__(self) -> None:
        self.n = 0

    def add(self, features: Tensor) -> None:
        """features: (B, D)."""
        features = features.double()
        if self.n == 0:
            dim = features.shape[1]
            self._shift = features.mean(dim=0)  # near the mean, so that the sums stay small
            self._sum = torch.zeros(dim, dtype=torch.float64)
            self._outer = torch.zeros(dim, dim, dtype=torch.float64)
        features = features - self._shift
        self.n += len(features)
        self._sum += features.sum(dim=0)
        self._outer += features.T @ features

    def include(self, other: RunningStatistics) -> None:
        """Add the images of another instance, whose sums use another shift."""
        if self.n == 0:
            self.__dict__.update(other.__dict__)
        elif other.n:
            shift = other._shift - self._shift
            crossed = torch.outer(other._sum, shift)
            self._outer += other._outer + crossed + crossed.T + other.n * torch.outer(shift, shift)
            self._sum += other._sum + other.n * shift
            self.n += other.n

    def finish(self) -> Statistics:
        """Raises InputError for fewer than two images."""
        if self.n < 2:
            raise InputError(f"{self.n} images are too few for a score, at least 2 are needed")
        mean = self._sum / self.n
        if not self._outer.isfinite().all():
            raise InputError("the feature extractor gave values that are not finite; it does not suit these images")
        sigma = (self._outer - self.n * torch.outer(mean, mean)) / (self.n - 1)
        return Statistics((mean + self._shift).numpy(), sigma.numpy(), self.n)


def sums_of(features: Iterable[Tensor]) -> RunningStatistics:
    running = RunningStatistics()
    for batch in features:
        running.add(batch)
    return running


def statistics_of(features: Iterable[Tensor]) -> Statistics | None:
    """The statistics of all features on process 0; None on the others. features: the share of this process."""
    parts = gather(sums_of(features))
    if parts is None:
        return None
    for part in parts[1:]:
        parts[0].include(part)
    return parts[0].finish()


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). Heusel et al. 2017, Eq. 6.

    The trace of the root is the sum of the roots of the eigenvalues of R S_b R, with R the symmetric root
    of S_a: two symmetric eigenproblems instead of the root of a non-symmetric matrix.
    """
    if a.mu.shape != b.mu.shape:
        raise InputError(f"features of {len(a.mu)} and {len(b.mu)} dimensions: made by different extractors")
    values, vectors = scipy.linalg.eigh(a.sigma)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    values = scipy.linalg.eigvalsh(root @ b.sigma @ root)
    trace_of_root = np.sqrt(values.clip(min=0)).sum()
    distance = np.sum((a.mu - b.mu) ** 2) + np.trace(a.sigma) + np.trace(b.sigma) - 2 * trace_of_root
    return max(0.0, float(distance))  # rounding can take equal statistics below 0


def save_statistics(path: Path, statistics: Statistics, left_out: Mapping[str, str] | None = None) -> None:
    """left_out: the reasons by name of broken images that the statistics do not include; see `load_left_out`."""
    arrays: dict[str, Any] = {"mu": statistics.mu, "sigma": statistics.sigma, "n": np.asarray(statistics.n or 0)}
    if left_out is not None:
        arrays["left_out"] = np.asarray(json.dumps(dict(left_out)))
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def load_left_out(path: Path) -> dict[str, str]:
    """The reasons by name of broken images. Raises InputError if the file has none."""
    try:
        left_out: dict[str, str] = json.loads(str(read_arrays(path, ["left_out"])["left_out"]))
        if not all(isinstance(why, str) for why in left_out.values()):
            raise ValueError("a reason is not a text")
    except (KeyError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: it does not list the images that were left out ({error!s:.120})") from None
    return left_out


def load_statistics(path: Path) -> Statistics:
    """An .npz with mu (D,) and sigma (D, D), ours or a published one; other arrays in it are not read.

    Raises InputError for other files, and if sigma is not a covariance: not symmetric, or with eigenvalues further
    below 0 than rounding to float32 explains.
    """
    arrays = read_arrays(path, ("mu", "sigma", "n"))
    try:
        if any(arrays[name].dtype.kind not in "fiu" for name in ("mu", "sigma")):
            raise ValueError("they are not real numbers")
        mu, sigma = np.asarray(arrays["mu"], np.float64), np.asarray(arrays["sigma"], np.float64)
        n = int(arrays["n"]) or None if "n" in arrays else None
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{path}: no usable mu and sigma ({error!s:.120})") from None
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise InputError(f"{path}: mu {mu.shape} and sigma {sigma.shape} do not fit, wanted (D,), (D, D)")
    if not (len(mu) and np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise InputError(f"{path}: mu and sigma are empty or not finite")
    if np.abs(sigma - sigma.T).max() > ROUNDING * np.abs(sigma).max():
        raise InputError(f"{path}: sigma is not symmetric, so it is not a covariance")
    values = scipy.linalg.eigvalsh(sigma)
    if values[0] < -ROUNDING * np.abs(values).max():
        raise InputError(
            f"{path}: sigma has the eigenvalue {values[0]:.3g}, but no eigenvalue of a covariance is below 0"
        )
    return Statistics(mu, sigma, n)
