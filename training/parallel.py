"""A network on several processes: as copies (DistributedDataParallel), or as pieces of one (FSDP).

A piece is a DTensor. Checkpoints hold whole tensors, whoever writes and reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.distributed import is_main, world_size
from models.dit import DiTBlock
from models.uvit import Block

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def spread(network: nn.Module, device: torch.device, fsdp: bool) -> nn.Module:
    """Put the network on the device. Returns what to call in training; in single-process runs the network itself.

    fsdp: its parameters become pieces, in place, a block at a time, so that no GPU ever holds all of it.
    """
    if fsdp:
        _shard(network, device)
        return network
    network.to(device)
    if world_size() == 1:
        return network
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=device_ids, gradient_as_bucket_view=True)


def _shard(network: nn.Module, device: torch.device) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world_size(),))
    for module in network.modules():
        if isinstance(module, Block | DiTBlock):
            fully_shard(module, mesh=mesh)
    # The rest is freed after each forward as well: previews put averaged weights in, and none must stay.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    if hasattr(network, "early_exit"):  # previews call it in the place of forward
        register_fsdp_forward_method(network, "early_exit")


@contextmanager
def gradients_shared(model: nn.Module, now: bool) -> Iterator[None]:
    """A forward and backward pass after which gradients are averaged over the processes, or (now=False) kept here."""
    if isinstance(model, DistributedDataParallel) and not now:
        with model.no_sync():
            yield
        return
    if (set_sync := getattr(model, "set_requires_gradient_sync", None)) is not None:  # FSDP's
        set_sync(now)
    yield


def in_pieces(tensor: Any) -> TypeGuard[DTensor]:
    """Whether it is a DTensor. Told by a method of theirs: their module takes a second to import."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """The piece that lies here; a tensor that is in no pieces, itself."""
    return tensor.to_local() if in_pieces(tensor) else tensor


def whole(content: Any) -> Any:
    """Nested dicts and lists with every tensor whole: for process 0, on its CPU if it was in pieces.

    All processes must call it; the others get None in the place of tensors that were in pieces.
    """
    if isinstance(content, dict):
        return {key: whole(value) for key, value in content.items()}
    if isinstance(content, list):
        return [whole(value) for value in content]
    if not in_pieces(content):
        return content
    gathered = content.full_tensor()
    return gathered.cpu() if is_main() else None


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, in pieces if `model` is."""
    if not in_pieces(model) or tensor.shape != model.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements)


Reading = tuple[int, Tensor, torch.cuda.Event | None]  # the step, its values, and what says that they are there


class ReadLate:
    """Numbers from the device, read without making it wait for the host: on CUDA one step late, elsewhere at once."""

    def __init__(self, size: int):
        self._now: Reading = (0, torch.zeros(size), None)
        self._before: Reading = self._now

    def put(self, step: int, values: Tensor) -> None:
        """values: float (size,), of this step."""
        self._before, event = self._now, None
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._now = step, values, event

    def get(self) -> tuple[int, list[float]]:
        """The step they are of, and the values."""
        step, values, event = self._now if self._now[2] is None else self._before
        if event is not None:
            event.synchronize()
        return step, values.tolist()
