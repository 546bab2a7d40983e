"""The interface of backbones, for samplers and training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.config import DiffusersConfig, DiTConfig, UViTConfig


class Backbone(nn.Module):
    """Predicts the output named by `parametrization` from a noisy image, its timestep and its class."""

    config: UViTConfig | DiTConfig | DiffusersConfig
    has_middle = True  # whether it supports `middle` and `denoise_around`
    time_dtype: torch.dtype | None = None  # dtype of the time tokens in a sampler; None: that of the weights

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False  # trade time for memory while training
        self.time_scale, self.time_shift = 1.0, 0.0  # of the time input, see DiffusionConfig

    def forward(self, x: Tensor, timesteps: Tensor | float, y: Tensor | None = None) -> Tensor:
        """x: (B, C, H, W). timesteps: (B,), or one for all, int or float. y: (B,) classes. Returns (B, C, H, W)."""
        return self.denoise(x, self.time_tokens(per_image(timesteps, x)), y)

    def time_tokens(self, timesteps: Tensor) -> Tensor:
        """The input that encodes the noise level: timesteps (B,) -> (B, D)."""
        raise NotImplementedError

    def denoise(self, x: Tensor, time: Tensor, y: Tensor | None = None) -> Tensor:
        """`forward` with precomputed `time_tokens`, (B, D), or (1, D) for all."""
        raise NotImplementedError

    def middle(self, outer: int) -> range:
        """The layers without the first and the last `outer`; empty if there are no more.

        Raises InputError for a network that does not run around its middle.
        """
        raise NotImplementedError

    def denoise_around(
        self, x: Tensor, time: Tensor, y: Tensor | None, outer: int, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`denoise`, in which the residual of the middle, see `middle`, may be that of another call.

        residual: (B, N, D), what the middle's blocks add to the tokens that enter the first of them; None to run them.
        Returns the output (B, C, H, W) and the residual.
        """
        raise NotImplementedError


def per_image(timesteps: Tensor | float, x: Tensor) -> Tensor:
    """(B,) timesteps from one number, or as they are."""
    return timesteps if isinstance(timesteps, Tensor) else torch.full((len(x),), timesteps, device=x.device)
