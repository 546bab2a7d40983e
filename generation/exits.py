"""What an early-exit model does while it samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from common.files import replacing
from models.early_exit import ExitTrace


class ExitRecorder:
    """A denoiser that leaves early, and remembers where.

    trace: (x_t, t, y) -> ExitTrace. passes: 2 under guidance, where the images come twice in a batch, with their
    class and without.
    """

    def __init__(self, trace: Callable[[Tensor, int, Tensor | None], ExitTrace], threshold: float, passes: int = 1):
        self.trace, self.threshold, self.passes = trace, threshold, passes
        self._steps: list[tuple[Tensor, Tensor]] = []  # of the batch under way: exit layers, uncertainties
        self._exit_layers: list[np.ndarray] = []  # a batch each: (passes, S, B)
        self._sums: np.ndarray | float = 0.0  # (S, L)
        self._counts: np.ndarray | float = 0.0  # (S, L)

    def __call__(self, x_t: Tensor, t: int, y: Tensor | None) -> Tensor:
        output, exit_layer, uncertainty = self.trace(x_t, t, y)
        self._steps.append((exit_layer, uncertainty))
        return output

    def end_batch(self) -> None:
        """Take the batch's steps off the device."""
        exit_layer, uncertainty = (torch.stack(part).cpu() for part in zip(*self._steps, strict=True))
        self._steps.clear()
        passes = rearrange(exit_layer.numpy().astype(np.int16), "s (p b) -> p s b", p=self.passes)
        self._exit_layers.append(passes)
        self._sums += uncertainty.nansum(dim=-1).double().numpy()
        self._counts += (~uncertainty.isnan()).sum(dim=-1).numpy()

    def save(self, path: Path, timesteps: Sequence[int]) -> dict[str, np.ndarray]:
        """Write and return, for S timesteps, N images and L layers:

        timesteps (S,); exit_layer (S, N), and under guidance exit_layer_uncond (S, N); uncertainty (S, L),
        the mean over the images that reached the layer, nan where none did; threshold ().
        """
        layers = np.concatenate(self._exit_layers, axis=2)
        with np.errstate(invalid="ignore"):
            mean = self._sums / self._counts
        exits = {
            "timesteps": np.asarray(timesteps),
            **dict(zip(("exit_layer", "exit_layer_uncond"), layers, strict=False)),
            "uncertainty": mean.astype(np.float32),
            "threshold": np.asarray(self.threshold),
        }
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **exits)
        return exits
