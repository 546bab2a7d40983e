"""Denoisers for sampling: networks in one precision, with precomputed time tokens and optional compilation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.backbone import Backbone
from models.early_exit import EarlyExitUViT, ExitTrace


def to_working_precision(
    network: nn.Module, backbone: Backbone, timesteps: Mapping[int, float], dtype: torch.dtype, device: torch.device
) -> dict[int, Tensor]:
    """Convert the weights of a network to dtype. Returns its time tokens on the device, {t: (1, D)}, t of the sampler.

    backbone: the backbone in the network. timesteps: the network's own timestep for each of the sampler's, see
    `diffusion.matching.own_timesteps`. The tokens are computed first, in fp32: 997 and 998 are equal in half precision.
    """
    with torch.no_grad():
        own = torch.tensor(list(timesteps.values()), device=next(backbone.parameters()).device)
        tokens = backbone.time_tokens(own).to(device, backbone.time_dtype or dtype)
    network.to(dtype)
    return dict(zip(timesteps, tokens.split(1), strict=True))


Around = Callable[[Tensor, int, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]


class BackboneDenoiser:
    """A network as a denoiser. Its output is fp32 for any working precision.

    network: a backbone, or an early-exit model, of which it is the backbone. timesteps: all t of later calls, each with
    the network's own timestep. device: that of the images; the weights may be elsewhere until the calls, see
    `models.offload`. compiled: use torch.compile, with CUDA graphs on CUDA; batches of another size than the first run
    without it, since a smaller last batch is not worth a second compilation.
    """

    def __init__(
        self,
        network: Backbone | EarlyExitUViT,
        timesteps: Mapping[int, float],
        dtype: torch.dtype,
        device: torch.device,
        *,
        compiled: bool = False,
    ):
        self.network = network
        self.backbone = network.uvit if isinstance(network, EarlyExitUViT) else network
        self.time_tokens = to_working_precision(network, self.backbone, timesteps, dtype, device)
        self.compiled, self.graphs = compiled, compiled and device.type == "cuda"
        self.batch_size: int | None = None
        self._denoise = self._prepared(self.backbone.denoise)

    def __call__(self, x_t: Tensor, t: int, y: Tensor | None) -> Tensor:
        """x_t: (B, C, H, W). y: (B,) classes, or None. Returns the model output (B, C, H, W), fp32."""
        return self._as_output(self._denoise(x_t, self.time_tokens[t], y))

    def leaving_at(self, layer: int) -> Callable[[Tensor, int, Tensor | None], Tensor]:
        """The denoiser of which every image leaves at one layer, 0..L. For an early-exit model."""
        assert isinstance(self.network, EarlyExitUViT), "a network without exits"
        denoise = self._prepared(partial(self.network.leave_at, layer))
        return lambda x_t, t, y: self._as_output(denoise(x_t, self.time_tokens[t], y))

    def around(self, outer: int) -> Around:
        """The denoiser around a given middle: (x_t, t, y, residual) -> model output, residual.

        See `Backbone.denoise_around`: the residual (B, N, D) is None if the middle is to run.
        """
        denoise = self._prepared(self.backbone.denoise_around)

        def run(x_t: Tensor, t: int, y: Tensor | None, residual: Tensor | None) -> tuple[Tensor, Tensor]:
            output, added = denoise(x_t, self.time_tokens[t], y, outer, residual)
            return self._as_output(output), added.clone() if self.graphs else added

        return run

    def _prepared(self, denoise: Callable[..., Any]) -> Callable[..., Any]:
        """The function, compiled for batches of the first size if `compiled` is set."""
        if not self.compiled:
            return denoise
        compiled = torch.compile(denoise, dynamic=False, mode="reduce-overhead" if self.graphs else "default")

        def run(x_t: Tensor, *others: Any) -> Any:
            self.batch_size = self.batch_size or len(x_t)
            if len(x_t) != self.batch_size:
                return denoise(x_t, *others)
            torch.compiler.cudagraph_mark_step_begin()  # allows CUDA graphs to overwrite the previous output
            return compiled(x_t, *others)

        return run

    def _as_output(self, output: Tensor) -> Tensor:
        """fp32, in memory that no later call overwrites."""
        return output.clone() if self.graphs and output.dtype == torch.float32 else output.float()


class EarlyExitTracer:
    """Calls `trace_early_exit` of an early-exit model at one threshold: (x_t, t, y) -> ExitTrace, in fp32.

    The arguments are those of `BackboneDenoiser` and of `trace_early_exit`. compiled: each block is compiled alone,
    because the batch shrinks between blocks.
    """

    def __init__(
        self,
        model: EarlyExitUViT,
        timesteps: Mapping[int, float],
        dtype: torch.dtype,
        device: torch.device,
        *,
        threshold: float,
        min_group: int = 1,
        compiled: bool = False,
    ):
        self.model, self.threshold, self.min_group = model, threshold, min_group
        self.probed = {t: max(0, round(own)) for t, own in timesteps.items()}  # probes are tables over integers
        self.time_tokens = to_working_precision(model, model.uvit, timesteps, dtype, device)
        if compiled:
            for block in model.uvit.blocks:
                block.compile(dynamic=True)

    def __call__(self, x_t: Tensor, t: int, y: Tensor | None) -> ExitTrace:
        """x_t: (B, C, H, W). y: (B,) classes, or None."""
        return self.model.trace_early_exit(
            x_t, self.probed[t], y, threshold=self.threshold, min_group=self.min_group, time=self.time_tokens[t]
        )
