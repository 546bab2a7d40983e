"""Measure the predictions of each network along paths of noisy images, and the time of a call."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError
from common.progress import Progress
from common.seeds import nth_seed
from common.timing import in_turns, ratio
from data.dataset import ImageDataset, say_left_out
from diffusion.paths import DataPath, Path, SampledPath
from diffusion.sampling import Denoiser, SeededNoise, random_classes
from diffusion.solvers import Solver

ROUNDS = 5  # of timing


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


class At(NamedTuple):
    """A batch of paths at a timestep."""

    step: int  # position of t among the timesteps
    t: int
    x_t: Tensor  # (B, C, H, W)
    y: Tensor | None  # (B,) classes
    rows: list[int]  # positions of the images among the indices
    output: Tensor  # of the full network at x_t
    noise: Tensor | None  # what was added to a real image to make x_t, if there is one


class Walk:
    """Paths through the timesteps of a sampler, batch by batch.

    full: the full network. dataset, indices: the real images at the end of the paths; without a dataset they are the
    paths on which the full network samples (`diffusion.paths`), as many as there are indices, of classes drawn among
    `classes`. conditional: pass classes to the networks: the labels of the images. purpose: named by the progress bar.
    The noise depends on the seed, the purpose, the position of the image in the indices and the position of the
    timestep. Broken images are left out with a warning.
    """

    def __init__(
        self,
        full: Denoiser,
        solver: Solver,
        timesteps: Sequence[int],
        dataset: ImageDataset | None,
        indices: Sequence[int],
        *,
        conditional: bool,
        batch_size: int,
        seed: int,
        device: torch.device,
        image_shape: tuple[int, int, int] | None = None,
        classes: Sequence[int] = (),
        purpose: str = "calibration",
        quiet: bool = False,
    ):
        self.full, self.solver, self.timesteps = full, solver, timesteps
        self.dataset, self.indices, self.conditional, self.classes = dataset, indices, conditional, classes
        self.batch_size, self.seed, self.device, self.quiet = batch_size, seed, device, quiet
        self.image_shape, self.purpose = image_shape, purpose
        self.broken: dict[int, str] = {}

    @property
    def whole(self) -> list[int]:
        """Positions of the images that are not broken, after the walk."""
        return [row for row, index in enumerate(self.indices) if index not in self.broken]

    def __iter__(self) -> Iterator[At]:
        """Raises InputError if fewer than two images are readable."""
        starts = range(0, len(self.indices), self.batch_size)
        total = len(starts) * len(self.timesteps)
        with Progress(self.purpose, total, "steps", images=None, quiet=self.quiet) as bar:
            for start in starts:
                yield from self._batch(range(start, min(start + self.batch_size, len(self.indices))), bar)
        if self.dataset is not None:
            say_left_out({self.dataset.name_of(index): why for index, why in self.broken.items()}, "calibration")
        if (count := len(self.whole)) < 2:
            raise InputError(f"{count} of the {len(self.indices)} images can be read, at least 2 are needed")

    def _batch(self, places: Sequence[int], bar: Progress) -> Iterator[At]:
        path, rows, draw_noise = self._path(places)
        if not rows:
            bar.update(len(self.timesteps))
            return
        y = self._classes(rows)
        self.solver.begin(self.timesteps)
        x_t = path.start(self.timesteps[0], draw_noise)
        for step, (t, s) in enumerate(zip(self.timesteps, [*self.timesteps[1:], None], strict=True)):
            output = self.full(x_t, t, y)
            yield At(step, t, x_t, y, rows, output, path.noise_in(x_t, t))
            if s is not None:
                x_t = path.onward(output, x_t, t, s, draw_noise)
            bar.update()

    def _path(self, places: Sequence[int]) -> tuple[Path, list[int], Callable[[], Tensor]]:
        if self.dataset is None:
            noise = SeededNoise([nth_seed(self.seed, self.purpose, i) for i in places], self.device)
            shape = self.image_shape
            assert shape is not None, "sampled paths without a shape"
            return SampledPath(self.solver), list(places), lambda: noise(*shape)
        chosen = [self.indices[i] for i in places]
        images, met = self.dataset.whole_and_broken(chosen)
        self.broken |= met
        good = [n for n, index in enumerate(chosen) if index not in met]
        rows = [places[n] for n in good]
        noise = SeededNoise([nth_seed(self.seed, self.purpose, i) for i in rows], self.device)
        x0 = self.dataset.to_x0(images[good].to(self.device), None, noise) if good else images[:0]
        return DataPath(self.solver, x0), rows, lambda: noise(*x0.shape[1:])

    def _classes(self, rows: Sequence[int]) -> Tensor | None:
        if not self.conditional:
            return None
        if self.dataset is None:
            return random_classes(self.classes, self.seed, rows).to(self.device)
        labels = self.dataset.labels
        return torch.tensor([0 if labels is None else int(labels[self.indices[i]]) for i in rows], device=self.device)


@torch.inference_mode()
def measure_predictions(
    denoisers: Sequence[Denoiser],
    known: Sequence[Collection[int]],
    solver: Solver,
    timesteps: Sequence[int],
    dataset: ImageDataset,
    indices: Sequence[int],
    **walking: Any,
) -> Predictions:
    """Predict the noise along the same paths with every network, at each timestep.

    known: the allowed timesteps of each network. solver: converts model outputs to eps. walking: see `Walk`.
    Raises InputError where a prediction is not finite.
    """
    shape = (len(denoisers), len(timesteps), len(indices))
    error, distance = np.full(shape, np.nan), np.full(shape, np.nan)
    walk, dimensions = Walk(denoisers[-1], solver, timesteps, dataset, indices, **walking), 0
    for at in walk:
        assert at.noise is not None, "paths from a dataset"
        dimensions = at.x_t[0].numel()
        of_last = solver.eps(at.output, at.x_t, at.t)
        for k, (denoiser, able) in enumerate(zip(denoisers, known, strict=True)):
            last = k == len(denoisers) - 1
            assert at.t in able or not last, f"the last network may not be asked about t = {at.t}"
            if at.t in able:
                eps = of_last if last else solver.eps(denoiser(at.x_t, at.t, at.y), at.x_t, at.t)
                error[k, at.step, at.rows] = mean_square(eps - at.noise)
                distance[k, at.step, at.rows] = mean_square(eps - of_last)
                check_finite(error[k, at.step, at.rows], f"network {k + 1}", at.t)
    whole = walk.whole
    return Predictions(error[..., whole], distance[..., whole], dimensions)


def check_finite(values: np.ndarray, name: str, t: int) -> None:
    """Raises InputError, which names the predictor and t, for squares that are not finite."""
    if not np.isfinite(values).all():
        raise InputError(f"{name} predicts noise that is not finite at t = {t}; try --precision fp32")


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
    """The seconds of a call of each denoiser at its timestep, see `seconds_of`; the last denoiser is the standard.

    classes: the number of classes of the networks; 0 for unconditional ones.
    """
    x = torch.randn(batch_size, *image_shape, device=device)
    y = torch.arange(batch_size, device=device) % classes if classes else None
    calls = enumerate(zip(denoisers, timesteps, strict=True))
    tasks = {str(k): partial(denoiser, x, t, y) for k, (denoiser, t) in calls}
    return list(seconds_of(tasks, str(len(denoisers) - 1), device).values())


def seconds_of(tasks: Mapping[str, Callable[[], object]], standard: str, device: torch.device) -> dict[str, float]:
    """The seconds of each task, measured alternately: the median of the standard one's, times the median ratio to it
    within each round."""
    measured = in_turns(tasks, ROUNDS, device, quiet=True)
    median = statistics.median(measured[standard])
    return {name: median * ratio(of_one, measured[standard]) for name, of_one in measured.items()}
