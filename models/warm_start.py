"""Initialise a U-ViT with the weights of a deeper one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.config import contradictions
from common.errors import InputError
from common.settings import plain
from models.backbone import Backbone
from models.uvit import UViT

BLOCKS = ("in_blocks.", "out_blocks.")


def warm_start(uvit: Backbone, source: Backbone, path: Path) -> None:
    """Copy the embeddings, the middle block, the head and evenly spaced other blocks of `source` to `uvit`.

    Let the source have n in-blocks and uvit k. The copied in-blocks are those at 0, n / k, 2 n / k, ..., rounded down,
    each with the out-block at the end of its long skip. So the first in-block and the last out-block are always copied,
    and for k = n all blocks.

    path: the file of the source, for messages. Raises InputError unless the two are U-ViTs that differ only in depth,
    and the source is at least as deep.
    """
    if not (isinstance(uvit, UViT) and isinstance(source, UViT)):
        raise InputError(f"--init_from {path}: a network begins with the weights of another if both are of model uvit")
    if different := contradictions(_all_but_depth(source), _all_but_depth(uvit)):
        raise InputError(f"--init_from {path} fits no network that differs in {', '.join(different)}; depth alone may")
    wanted, there = len(uvit.in_blocks), len(source.in_blocks)
    if wanted > there:
        raise InputError(
            f"--init_from {path} has {2 * there + 1} blocks, and the network to train {2 * wanted + 1}; "
            f"give a --depth of at most {2 * there + 1}"
        )
    rest = {name: value for name, value in source.state_dict().items() if not name.startswith(BLOCKS)}
    missing, unexpected = uvit.load_state_dict(rest, strict=False)
    assert not unexpected and all(name.startswith(BLOCKS) for name in missing), (missing, unexpected)
    for ours, theirs in enumerate(k * there // wanted for k in range(wanted)):
        uvit.in_blocks[ours].load_state_dict(source.in_blocks[theirs].state_dict())
        uvit.out_blocks[-1 - ours].load_state_dict(source.out_blocks[-1 - theirs].state_dict())


def _all_but_depth(uvit: UViT) -> dict[str, Any]:
    times = {"time_scale": uvit.time_scale, "time_shift": uvit.time_shift}
    config: dict[str, Any] = plain(uvit.config)
    return config | times | {"depth": None}
