"""Measure the time that early exit saves: exits forced to each layer, and spread over all layers in one batch."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarking.settings import ExitBenchmark
from common.devices import DTYPES, peak_memory
from common.timing import in_turns, ratio
from diffusion.sampling import random_classes
from models.early_exit import EarlyExitUViT
from models.inference import EarlyExitTracer
from models.loading import Network

T = 500  # the timestep of all calls; with forced exits the time does not depend on it


class ForcedProbes(nn.Module):
    """The probes with a bias that sets the exit layer of each image, at the real cost of the probes.

    exit_at: (B,), the exit layer of each image. The timesteps must be 0..B-1, as the numbers of the images.
    """

    def __init__(self, probes: nn.Module, exit_at: Tensor):
        super().__init__()
        self.probes, self.exit_at = probes, exit_at

    def forward(self, tokens: Tensor, layer: int, timesteps: Tensor) -> Tensor:
        leaves = layer >= self.exit_at[timesteps]
        uncertainty: Tensor = self.probes(tokens, layer, T) + torch.where(leaves, -1e6, 1e6)
        return uncertainty


@torch.inference_mode()
def measure_early_exit(
    settings: ExitBenchmark, network: Network[EarlyExitUViT], precision: str, device: torch.device
) -> dict[str, Any]:
    """Times with forced exits, and the ideal times: the sums over the parts that ran, each measured alone."""
    model = network.module
    depth, size = model.num_layers, settings.batch_size
    x = torch.randn(size, *model.uvit.config.image_shape, device=device)
    classes = network.config.classes
    y = random_classes(classes, 0, range(size)).to(device) if classes else None
    tracer = EarlyExitTracer(model, {T: T}, DTYPES[precision], device, threshold=0.0, compiled=settings.compile)
    time = tracer.time_tokens[T]

    probes, images = model.probes, torch.arange(size, device=device)

    def leave(exit_at: Tensor, min_group: int = 1) -> None:
        model.probes = ForcedProbes(probes, exit_at)
        try:
            trace = model.trace_early_exit(x, images, y, threshold=0.0, min_group=min_group, time=time)
        finally:
            model.probes = probes
        assert torch.equal(trace.exit_layer, exit_at), "images left elsewhere"

    tasks: dict[str, Callable[[], object]] = {"full network": partial(model.uvit.denoise, x, time, y)}
    tasks |= part_tasks(model, x, time, y)
    layers = torch.arange(depth + 1, device=device)
    tasks |= {f"exit at {k}": partial(leave, k.expand(size)) for k in layers}
    spread = layers.repeat(-(-size // len(layers)))[:size]  # as many images at each depth as the batch allows
    tasks |= {f"spread, min_group {n}": partial(leave, spread, n) for n in settings.min_group}
    seconds = in_turns(tasks, settings.rounds, device, settings.machine.quiet)

    def ideal(exit_at: Tensor) -> list[float]:
        """The ideal time: the time of each part multiplied by its share of the images. exit_at: (B,)."""
        at = exit_at.float()
        spent = [("embed", 1.0), ("decode", float((at == depth).float().mean()))]
        for k in range(depth):
            spent += [(f"probe {k}", float((at >= k).float().mean())), (f"head {k}", float((at == k).float().mean()))]
            spent += [(f"block {k}", float((at > k).float().mean()))]
        rounds = zip(*([share * s for s in seconds[name]] for name, share in spent), strict=True)
        return [sum(parts) for parts in rounds]

    def row(name: str, exit_at: Tensor) -> dict[str, Any]:
        measured, best = seconds[name], ideal(exit_at)
        return {
            "mean_exit_layer": float(exit_at.float().mean()),
            "seconds_per_image": statistics.median(measured) / size,
            "seconds_per_image_ideal": statistics.median(best) / size,
            "ideal_over_measured": ratio(best, measured),
        }

    return {
        "precision": precision,
        "compiled": settings.compile,
        "batch_size": size,
        "classifier_type": model.classifier_type,
        "depth": depth,
        "seconds_per_image_full_network": statistics.median(seconds["full network"]) / size,
        "full_over_never_exiting": ratio(seconds["full network"], seconds[f"exit at {depth}"]),
        "exits": [{"exit_layer": int(k)} | row(f"exit at {k}", k.expand(size)) for k in layers],
        "spread": [{"min_group": n} | row(f"spread, min_group {n}", spread) for n in settings.min_group],
        "peak_memory_bytes": peak_memory(device),
    }


def part_tasks(model: EarlyExitUViT, x: Tensor, time: Tensor, y: Tensor | None) -> dict[str, Callable[[], object]]:
    """A task for each part of the model alone, on the whole batch."""
    uvit = model.uvit
    tokens = uvit.embed(x, time, y)
    tasks: dict[str, Callable[[], object]] = {
        "embed": partial(uvit.embed, x, time, y),
        "decode": partial(uvit.decode, tokens),
    }
    for k, (block, head) in enumerate(zip(uvit.blocks, model.exit_heads, strict=True)):
        inputs = [tokens] if block.skip_linear is None else [tokens, tokens]
        tasks |= {f"probe {k}": partial(model.probes, tokens, k, T), f"head {k}": partial(head, tokens)}
        tasks[f"block {k}"] = partial(block, *inputs)
    return tasks
