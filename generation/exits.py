"""Record and save the exit layers of an early-exit model during sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor

from common import plots
from common.files import replacing
from models.early_exit import ExitTrace


class ExitRecorder:
    """A denoiser with early exit that records the exit layers.

    trace: (x_t, t, y) -> ExitTrace. passes: 2 with guidance, where a batch contains each image twice, with and without
    its class; else 1.
    """

    def __init__(self, trace: Callable[[Tensor, int, Tensor | None], ExitTrace], passes: int = 1):
        self.trace, self.passes = trace, passes
        self._steps: list[tuple[Tensor, Tensor]] = []  # exit layers, uncertainties of the current batch

    def __call__(self, x_t: Tensor, t: int, y: Tensor | None) -> Tensor:
        """x_t: (B, C, H, W). y: (B,) classes, or None. Returns the model output (B, C, H, W)."""
        output, exit_layer, uncertainty = self.trace(x_t, t, y)
        self._steps.append((exit_layer, uncertainty))
        return output

    def end_batch(self) -> dict[str, np.ndarray]:
        """Return the recorded steps of the batch and start a new one. For S timesteps, L layers and B images:

        exit_layer (passes, S, B); uncertainty_sum and uncertainty_count (S, L), over the images at the layer.
        """
        exit_layer, uncertainty = (torch.stack(part).cpu() for part in zip(*self._steps, strict=True))
        self._steps.clear()
        return {
            "exit_layer": rearrange(exit_layer.numpy().astype(np.int16), "s (p b) -> p s b", p=self.passes),
            "uncertainty_sum": uncertainty.nansum(dim=-1).double().numpy(),
            "uncertainty_count": (~uncertainty.isnan()).sum(dim=-1).numpy(),
        }


def save_exits(
    report: Path, timesteps: Sequence[int], batches: Sequence[dict[str, np.ndarray]], threshold: float, depth: int
) -> dict[str, np.ndarray]:
    """Write exits.npz and exit_layer.png. Returns, for S timesteps, N images and L layers:

    timesteps (S,); exit_layer (S, N), and with guidance exit_layer_uncond (S, N); uncertainty (S, L), the mean over the
    images that reached the layer, NaN if there were none; threshold ().

    batches: the results of `ExitRecorder.end_batch`, in the order of their images.
    """
    layers = np.concatenate([batch["exit_layer"] for batch in batches], axis=2)
    sums, counts = (reduce(np.add, (batch[f"uncertainty_{name}"] for batch in batches)) for name in ("sum", "count"))
    with np.errstate(invalid="ignore"):
        mean = sums / counts
    exits = {
        "timesteps": np.asarray(timesteps),
        **dict(zip(("exit_layer", "exit_layer_uncond"), layers, strict=False)),
        "uncertainty": mean.astype(np.float32),
        "threshold": np.asarray(threshold),
    }
    with replacing(report / "exits.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **exits)
    draw_exit_layers(report / "exit_layer.png", exits["timesteps"], exits["exit_layer"], depth, threshold)
    return exits


def draw_exit_layers(path: Path, timesteps: np.ndarray, exit_layer: np.ndarray, depth: int, threshold: float) -> None:
    """Plot the exit layer at each t: the mean, and the middle 90 % of the images.

    timesteps: (S,). exit_layer: (S, N) in 0..depth.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    low, high = np.percentile(exit_layer, [5, 95], axis=1)
    axes.fill_between(timesteps, low, high, color=plots.BLUE, alpha=0.25, linewidth=0, label="90 % of the images")
    axes.plot(timesteps, exit_layer.mean(axis=1), color=plots.BLUE, clip_on=False, label="mean")
    axes.axhline(depth, color=plots.GREY, linestyle=":", clip_on=False, label=f"whole network ({depth} blocks)")
    axes.set(
        xlim=(timesteps.max(), timesteps.min()) if len(timesteps) > 1 else None,
        ylim=(0, depth),
        xlabel="timestep t (noise on the left, image on the right)",
        ylabel="exit layer (blocks run)",
        title=f"Early exit at threshold {threshold:g}: {exit_layer.mean():.2f} of {depth} blocks on average",
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3)
    plots.save(figure, path)
