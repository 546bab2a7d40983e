"""Measure the predictions of each network on noised real images, and the time of a call."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError
from common.progress import Progress
from common.seeds import nth_seed
from common.timing import in_turns, ratio
from data.dataset import ImageDataset, say_left_out
from diffusion.sampling import Denoiser, SeededNoise
from diffusion.solvers import Solver


class Predictions(NamedTuple):
    """K networks, S timesteps, N images: mean squares over the D numbers of an image, float64.

    NaN at timesteps on which a network was not trained. Broken images are not among the N.
    """

    error: np.ndarray  # (K, S, N) of the predicted eps minus the added noise
    distance: np.ndarray  # (K, S, N) of the predicted eps minus that of the last network
    dimensions: int  # D


def choose_images(dataset: ImageDataset, n: int, seed: int) -> list[int]:
    """The indices of n random images, rising. Raises InputError if there are fewer."""
    if n > len(dataset):
        raise InputError(f"--n_images {n}: the dataset has {len(dataset)} images")
    return sorted(np.random.default_rng(seed).choice(len(dataset), n, replace=False).tolist())


@torch.inference_mode()
def measure_predictions(
    denoisers: Sequence[Denoiser],
    known: Sequence[Collection[int]],
    solver: Solver,
    timesteps: Sequence[int],
    dataset: ImageDataset,
    indices: Sequence[int],
    *,
    conditional: bool,
    batch_size: int,
    seed: int,
    device: torch.device,
    quiet: bool = False,
) -> Predictions:
    """Predict the noise of the same noisy images with every network, at each timestep.

    known: the allowed timesteps of each network. solver: converts model outputs to eps. conditional: pass the labels of
    the images to the networks. The noise depends on the seed, the position of the image in the indices and the position
    of the timestep. Broken images are skipped with a warning. Raises InputError if fewer than two images are readable.
    """
    shape = (len(denoisers), len(timesteps), len(indices))
    error, distance = np.full(shape, np.nan), np.full(shape, np.nan)
    broken: dict[int, str] = {}
    starts = range(0, len(indices), batch_size)
    with Progress("calibration", len(starts) * len(timesteps), "steps", images=None, quiet=quiet) as bar:
        for start in starts:
            chosen = indices[start : start + batch_size]
            images, met = dataset.whole_and_broken(chosen)
            broken |= met
            whole = [row for row, index in enumerate(chosen) if index not in met]
            rows = [start + row for row in whole]
            if not rows:
                bar.update(len(timesteps))
                continue
            noise = SeededNoise([nth_seed(seed, "calibration", i) for i in rows], device)
            x0 = dataset.to_x0(images[whole].to(device), None, noise)
            labels = [0 if dataset.labels is None else int(dataset.labels[indices[i]]) for i in rows]
            y = torch.tensor(labels, device=device) if conditional else None
            for s, t in enumerate(timesteps):
                eps = noise(*x0.shape[1:])
                x_t = solver.schedule.q_sample(x0, t, eps)
                predicted = [
                    solver.eps(denoiser(x_t, t, y), x_t, t) if t in able else None
                    for denoiser, able in zip(denoisers, known, strict=True)
                ]
                of_last = predicted[-1]
                for k, of_network in enumerate(predicted):
                    if of_network is not None:
                        error[k, s, rows] = mean_square(of_network - eps)
                        if not np.isfinite(error[k, s, rows]).all():
                            raise InputError(
                                f"network {k + 1} predicts noise that is not finite at t = {t}; try --precision fp32"
                            )
                        assert of_last is not None, f"the last network may not be asked about t = {t}"
                        distance[k, s, rows] = mean_square(of_network - of_last)
                bar.update()
    say_left_out({dataset.name_of(index): why for index, why in broken.items()}, "calibration")
    whole = [row for row, index in enumerate(indices) if index not in broken]
    if len(whole) < 2:
        raise InputError(f"{len(whole)} of the {len(indices)} images can be read, at least 2 are needed")
    return Predictions(error[..., whole], distance[..., whole], x0[0].numel())


def mean_square(difference: Tensor) -> np.ndarray:
    """The mean square of each image: (B, C, H, W) -> (B,) float64."""
    return difference.square().mean(dim=(1, 2, 3)).cpu().double().numpy()  # MPS has no float64


@torch.inference_mode()
def seconds_per_call(
    denoisers: Sequence[Denoiser],
    timesteps: Sequence[int],
    image_shape: tuple[int, int, int],
    classes: int,
    batch_size: int,
    device: torch.device,
) -> list[float]:
    """The seconds of a call of each denoiser at its timestep, measured alternately.

    Computed as the median of the last denoiser, times the median ratio to it within each round.

    classes: the number of classes of the networks; 0 for unconditional ones.
    """
    x = torch.randn(batch_size, *image_shape, device=device)
    y = torch.arange(batch_size, device=device) % classes if classes else None
    calls = enumerate(zip(denoisers, timesteps, strict=True))
    tasks = {str(k): partial(denoiser, x, t, y) for k, (denoiser, t) in calls}
    measured = list(in_turns(tasks, 5, device, quiet=True).values())
    return [statistics.median(measured[-1]) * ratio(of_one, measured[-1]) for of_one in measured]
