"""Denoisers for sampling: networks in one precision, with precomputed time tokens and optional compilation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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


def refreshing(stages: Iterable[Sequence[int]], interval: int) -> set[int]:
    """The timesteps at which a network computes its middle: in each stage the first and every interval-th after it.

    stages: the timesteps of each stage.
    """
    return {t for timesteps in stages for t in timesteps[::interval]}


class MiddleCache:
    """Caches the sum that the middle blocks of a backbone add to its tokens, to reuse it at later timesteps.

    The features deep in a network change little from one step to the next: DeepCache (Ma et al., CVPR 2024,
    arXiv 2312.00858) keeps those of a U-Net and runs its outermost levels with their skips; Delta-DiT (Chen et al.
    2024, arXiv 2406.01125) keeps, of transformer blocks, the difference of what leaves and what enters, as here.

    outer: blocks at each end that always run, fewer than half of all. refresh: the timesteps at which the middle is
    computed, see `refreshing`. They must include the first timestep of a batch, so earlier calls for other batches have
    no influence.
    """

    def __init__(self, outer: int, refresh: Collection[int]):
        self.outer, self.refresh = outer, refresh
        self.residual: Tensor | None = None  # (B, E + P, D)

    def reuses(self, t: int) -> bool:
        """Whether the network reuses the residual at t."""
        return t not in self.refresh

    def at(self, t: int, batch_size: int) -> Tensor | None:
        """The residual (B, E + P, D) to reuse at t; None if the middle must be computed."""
        fits = self.residual is not None and len(self.residual) == batch_size
        return self.residual if fits and self.reuses(t) else None


class BackboneDenoiser:
    """A backbone as a denoiser. Its output is fp32 for any working precision.

    timesteps: all t of later calls, each with the network's own timestep. device: that of the images; the weights may
    be elsewhere until the calls, see `models.offload`. compiled: use torch.compile, with CUDA graphs on CUDA; batches
    of another size than the first run without it, since a smaller last batch is not worth a second compilation. cache:
    None to run all blocks at every timestep.
    """

    def __init__(
        self,
        backbone: Backbone,
        timesteps: Mapping[int, float],
        dtype: torch.dtype,
        device: torch.device,
        *,
        compiled: bool = False,
        cache: MiddleCache | None = None,
    ):
        self.backbone, self.cache = backbone, cache
        self.time_tokens = to_working_precision(backbone, backbone, timesteps, dtype, device)
        self.eager: Callable[..., Any] = backbone.denoise_around if cache else backbone.denoise
        self.compiled: Callable[..., Any] | None = None
        if compiled:
            mode = "reduce-overhead" if device.type == "cuda" else "default"
            self.compiled = torch.compile(self.eager, dynamic=False, mode=mode)
        self.batch_size: int | None = None

    def __call__(self, x_t: Tensor, t: int, y: Tensor | None) -> Tensor:
        """x_t: (B, C, H, W). y: (B,) classes, or None. Returns the model output (B, C, H, W), fp32."""
        self.batch_size = self.batch_size or len(x_t)
        denoise = self.eager
        if self.compiled is not None and len(x_t) == self.batch_size:
            torch.compiler.cudagraph_mark_step_begin()  # allows CUDA graphs to overwrite the previous output
            denoise = self.compiled
        if self.cache is None:
            return denoise(x_t, self.time_tokens[t], y).float()
        kept = self.cache.at(t, len(x_t))
        output, residual = denoise(x_t, self.time_tokens[t], y, self.cache.outer, kept)
        if kept is None:
            self.cache.residual = residual.clone()  # a CUDA graph overwrites its output memory
        return output.float()


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
