"""Floating-point operations of a network, counted by torch on shapes alone (a multiply-add is two)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.backbone import Backbone
from models.early_exit import EarlyExitUViT

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def backbone_flops(backbone: Backbone, outer: int | None = None) -> int:
    """FLOPs for one image of the whole network, or, with outer, without its middle (see `Backbone.denoise_around`)."""
    backbone = _shapes_only(backbone)
    x, timesteps, y = _inputs(backbone)
    if outer is None:
        return _count(lambda: backbone(x, timesteps, y))
    _, residual = backbone.denoise_around(x, backbone.time_tokens(timesteps), y, outer)
    return _count(lambda: backbone.denoise_around(x, backbone.time_tokens(timesteps), y, outer, residual))


@torch.no_grad()
def exit_flops(model: EarlyExitUViT, layer: int) -> int:
    """FLOPs for one image that leaves at a layer which was chosen before, 0..L: no probe runs."""
    model = _shapes_only(model)
    x, timesteps, y = _inputs(model.uvit)
    return _count(lambda: model.leave_at(layer, x, model.uvit.time_tokens(timesteps), y))


@torch.no_grad()
def early_exit_flops(model: EarlyExitUViT) -> list[int]:
    """FLOPs for one image that exits at layer 0, 1, ..., L (L: no exit), with probes and heads."""
    model = _shapes_only(model)
    x, timesteps, y = _inputs(model.uvit)
    skips: list[Tensor] = []
    costs = []
    tokens = model.uvit.embed(x, model.uvit.time_tokens(timesteps), y)
    so_far = _count(lambda: model.uvit.embed(x, model.uvit.time_tokens(timesteps), y))
    for layer, head in enumerate(model.exit_heads):
        so_far += _count(lambda: model.probes(tokens, layer, timesteps))  # noqa: B023, called at once
        costs.append(so_far + _count(lambda: head(tokens)))  # noqa: B023
        so_far += _count(lambda: model.uvit.run_block(layer, tokens, skips.copy()))  # noqa: B023
        tokens = model.uvit.run_block(layer, tokens, skips)
    return [*costs, so_far + _count(lambda: model.uvit.decode(tokens))]


def early_exit_training_flops(model: EarlyExitUViT, freeze_backbone: bool) -> int:
    """FLOPs for one image of a training step: forward, and twice that for the backward pass of the trained parts."""
    everything = _shapes_only(model)
    inputs = _inputs(everything.uvit)
    with torch.no_grad():
        backbone, whole = _count(lambda: everything.uvit(*inputs)), _count(lambda: everything(*inputs))
    return backbone + 3 * (whole - backbone) if freeze_backbone else 3 * whole


def _shapes_only(module: M) -> M:
    without_numbers: dict[int, Any] = {
        id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in module.parameters()
    }
    return copy.deepcopy(module, without_numbers).to("meta").float()


def _inputs(backbone: Backbone) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.empty(1, *backbone.config.image_shape, device="meta")
    y = torch.zeros(1, dtype=torch.long, device="meta") if backbone.config.num_labels else None
    return x, torch.zeros(1, device="meta"), y


def _count(run: Callable[[], object]) -> int:
    # Some releases of the counter have no formula for the fused attention of the CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()
