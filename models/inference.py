"""Backbones as samplers run them: in one precision, compiled if asked, told of t by tokens made beforehand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.backbone import Backbone
from models.early_exit import EarlyExitUViT, ExitTrace


def to_working_precision(
    network: nn.Module, backbone: Backbone, timesteps: Mapping[int, float], dtype: torch.dtype, device: torch.device
) -> dict[int, Tensor]:
    """Put a network's weights into dtype. Returns its time tokens, by the sampler's t, {t: (1, D)} on the device.

    backbone: in the network, or the network itself. timesteps: its own for each of the sampler's, see
    `diffusion.matching.own_timesteps`. Time tokens are made first, in fp32: half precision cannot tell 997 from 998.
    """
    with torch.no_grad():
        own = torch.tensor(list(timesteps.values()), device=next(backbone.parameters()).device)
        tokens = backbone.time_tokens(own).to(device, backbone.time_dtype or dtype)
    network.to(dtype)
    return dict(zip(timesteps, tokens.split(1), strict=True))


def refreshing(stages: Iterable[Sequence[int]], interval: int) -> set[int]:
    """The timesteps at which a network computes its middle: the first of each of its stages, every interval-th after.

    stages: the timesteps of each.
    """
    return {t for timesteps in stages for t in timesteps[::interval]}


class MiddleCache:
    """What the middle blocks of a backbone add to its tokens, kept from some timesteps for those that follow.

    The features deep in a network change little from one step to the next: DeepCache (Ma et al., CVPR 2024,
    arXiv 2312.00858) keeps those of a U-Net and runs its outermost levels with their skips; Delta-DiT (Chen et al.
    2024, arXiv 2406.01125) keeps, of transformer blocks, the difference of what leaves and what enters, as here.

    outer: blocks at each end that always run; fewer than half of all. refresh: the timesteps at which
    the middle is computed, see `refreshing`. It does not matter how often or for which batch the network was called
    before: the first of the timesteps of a batch must be among them.
    """

    def __init__(self, outer: int, refresh: Collection[int]):
        self.outer, self.refresh = outer, refresh
        self.residual: Tensor | None = None  # (B, E + P, D)

    def reuses(self, t: int) -> bool:
        return t not in self.refresh

    def at(self, t: int, batch_size: int) -> Tensor | None:
        """The residual to use at t; None where it is to be computed, or there is none for such a batch."""
        fits = self.residual is not None and len(self.residual) == batch_size
        return self.residual if fits and self.reuses(t) else None


class BackboneDenoiser:
    """A backbone as a denoiser. What comes and goes is fp32, whatever the network works in.

    timesteps: those it will be called at, and the network's own for each of them. device: where the images are; the
    network may come there later, see `Offloader`. compiled: through torch.compile, on CUDA with its graphs; batches of
    another size than the first run as they are, since a last batch is not worth a second compilation. cache: None to
    run all blocks at every timestep.
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
        # Gives a residual too, or not.
        self.eager: Callable[..., Any] = backbone.denoise_around if cache else backbone.denoise
        self.compiled: Callable[..., Any] | None = None
        if compiled:
            mode = "reduce-overhead" if device.type == "cuda" else "default"
            self.compiled = torch.compile(self.eager, dynamic=False, mode=mode)
        self.batch_size: int | None = None

    def __call__(self, x_t: Tensor, t: int, y: Tensor | None) -> Tensor:
        self.batch_size = self.batch_size or len(x_t)
        denoise = self.eager
        if self.compiled is not None and len(x_t) == self.batch_size:
            torch.compiler.cudagraph_mark_step_begin()  # the output before this one may be overwritten
            denoise = self.compiled
        if self.cache is None:
            return denoise(x_t, self.time_tokens[t], y).float()
        kept = self.cache.at(t, len(x_t))
        output, residual = denoise(x_t, self.time_tokens[t], y, self.cache.outer, kept)
        if kept is None:
            self.cache.residual = residual.clone()  # out of the memory that a CUDA graph writes to again
        return output.float()


class EarlyExitTracer:
    """An early-exit model as `trace_early_exit` runs it at one threshold: (x_t, t, y) -> ExitTrace, in fp32.

    The arguments are those of `BackboneDenoiser` and of `trace_early_exit`. compiled: block by block, since the
    batch shrinks from one to the next.
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
        return self.model.trace_early_exit(
            x_t, self.probed[t], y, threshold=self.threshold, min_group=self.min_group, time=self.time_tokens[t]
        )


class Offloader:
    """Keeps of several networks only the one that works on the device; the weights of all stay in host memory.

    The host's copy is pinned and never changes, so that a network costs one copy to the device and none back.
    """

    def __init__(self, networks: Sequence[nn.Module], device: torch.device):
        self.device = device
        self.host = [
            {p: pinned(p.data, device) for p in [*network.parameters(), *network.buffers()]} for network in networks
        ]
        for weights in self.host:
            _point_to(weights)

    @contextmanager
    def resident(self, k: int) -> Iterator[None]:
        """Within the block network number k is on the device."""
        with torch.inference_mode(False):  # the weights outlive the sampling of a batch
            here = {parameter: host.to(self.device, non_blocking=True) for parameter, host in self.host[k].items()}
        _point_to(here)
        try:
            yield
        finally:
            _point_to(self.host[k])


@torch.inference_mode(False)
def _point_to(weights: Mapping[Tensor, Tensor]) -> None:
    for parameter, value in weights.items():
        parameter.data = value


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    tensor = tensor.cpu()
    return tensor.pin_memory() if device.type == "cuda" else tensor
