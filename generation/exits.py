"""What an early-exit model does while it samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.files import replacing
from models.early_exit import EarlyExitUViT


class ExitRecorder:
    """A denoiser that leaves early, and remembers where."""

    def __init__(self, model: EarlyExitUViT, threshold: float):
        self.model, self.threshold = model, threshold
        self._steps: list[tuple[Tensor, Tensor]] = []  # of the batch under way: exit layers, uncertainties
        self._exit_layers: list[np.ndarray] = []  # a batch each: (S, B)
        self._sums: np.ndarray | float = 0.0  # (S, L)
        self._counts: np.ndarray | float = 0.0  # (S, L)

    def __call__(self, x_t: Tensor, t: int, y: Tensor | None) -> Tensor:
        output, exit_layer, uncertainty = self.model.trace_early_exit(x_t, t, y, threshold=self.threshold)
        self._steps.append((exit_layer, uncertainty))
        return output

    def end_batch(self) -> None:
        """Take the batch's steps off the device."""
        exit_layer, uncertainty = (torch.stack(part).cpu() for part in zip(*self._steps, strict=True))
        self._steps.clear()
        self._exit_layers.append(exit_layer.numpy().astype(np.int16))
        self._sums += uncertainty.nansum(dim=-1).double().numpy()
        self._counts += (~uncertainty.isnan()).sum(dim=-1).numpy()

    def save(self, path: Path, timesteps: Sequence[int]) -> dict[str, np.ndarray]:
        """Write and return, for S timesteps, N images and L layers:

        timesteps (S,); exit_layer (S, N); uncertainty (S, L), the mean over the images that reached the
        layer, nan where none did; threshold ().
        """
        with np.errstate(invalid="ignore"):
            mean = self._sums / self._counts
        exits = {
            "timesteps": np.asarray(timesteps),
            "exit_layer": np.concatenate(self._exit_layers, axis=1),
            "uncertainty": mean.astype(np.float32),
            "threshold": np.asarray(self.threshold),
        }
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **exits)
        return exits
