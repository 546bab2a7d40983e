"""Initialise a U-ViT with the weights of a deeper or a shallower one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.config import contradictions
from common.errors import InputError
from common.settings import plain
from models.backbone import Backbone
from models.uvit import Block, UViT

BLOCKS = ("in_blocks.", "out_blocks.")


def warm_start(uvit: Backbone, source: Backbone, path: Path) -> None:
    """Copy the embeddings, the middle block, the head and as many other blocks of `source` to `uvit` as both have.

    Let the deeper network have n in-blocks and the other k. The copies are in its in-blocks 0, n / k, 2 n / k, ...,
    rounded down, each with the out-block at the end of its long skip. So the first in-block and the last out-block are
    always copied. If uvit is the deeper one, its other blocks begin as the identity (Chen et al. 2016, Net2Net), so it
    begins as the same function as the source.

    path: the file of the source, for messages. Raises InputError unless the two are U-ViTs that differ only in depth.
    """
    if not (isinstance(uvit, UViT) and isinstance(source, UViT)):
        raise InputError(f"--init_from {path}: both networks must be of model uvit")
    if different := contradictions(_all_but_depth(source), _all_but_depth(uvit)):
        raise InputError(
            f"--init_from {path} differs from the new network in {', '.join(different)}; only the depth may differ"
        )
    rest = {name: value for name, value in source.state_dict().items() if not name.startswith(BLOCKS)}
    missing, unexpected = uvit.load_state_dict(rest, strict=False)
    assert not unexpected and all(name.startswith(BLOCKS) for name in missing), (missing, unexpected)
    ours, theirs = len(uvit.in_blocks), len(source.in_blocks)
    copies = min(ours, theirs)
    origin = {k * ours // copies: k * theirs // copies for k in range(copies)}
    for i in range(ours):
        pair = uvit.in_blocks[i], uvit.out_blocks[-1 - i]
        if i in origin:
            pair[0].load_state_dict(source.in_blocks[origin[i]].state_dict())
            pair[1].load_state_dict(source.out_blocks[-1 - origin[i]].state_dict())
        else:
            for block in pair:
                _make_identity(block)


def _make_identity(block: nn.Module) -> None:
    """By zeros in the last layers alone, so that all its weights get gradients after the first step."""
    assert isinstance(block, Block), "a U-ViT has blocks"
    for layer in (block.attn.proj, block.mlp.fc2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    if block.skip_linear is not None:
        nn.init.zeros_(block.skip_linear.bias)
        with torch.no_grad():
            block.skip_linear.weight.copy_(torch.eye(*block.skip_linear.weight.shape))  # the skip's half is zeros


def _all_but_depth(uvit: UViT) -> dict[str, Any]:
    times = {"time_scale": uvit.time_scale, "time_shift": uvit.time_shift}
    config: dict[str, Any] = plain(uvit.config)
    return config | times | {"depth": None}
