"""Train a network on several processes, with copies (DistributedDataParallel) or shards (FSDP).

Shards are DTensors. Checkpoints always contain whole tensors.
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
    """Put the network on the device. Returns the module to call in training; in single-process runs the network.

    fsdp: shard the parameters in place, one block at a time, so that no GPU ever holds the whole network.
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
    # Reshard the rest after each forward too, because previews replace the weights by the averaged ones.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    if hasattr(network, "early_exit"):  # previews call it instead of forward
        register_fsdp_forward_method(network, "early_exit")


@contextmanager
def gradients_shared(model: nn.Module, now: bool) -> Iterator[None]:
    """A context for a forward and backward pass. now: average the gradients over the processes at its end."""
    if isinstance(model, DistributedDataParallel) and not now:
        with model.no_sync():
            yield
        return
    if (set_sync := getattr(model, "set_requires_gradient_sync", None)) is not None:  # FSDP's
        set_sync(now)
    yield


def in_pieces(tensor: Any) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor. It looks for a method, because importing the class takes a second."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """The shard of this process; other tensors are returned unchanged."""
    return tensor.to_local() if in_pieces(tensor) else tensor


def whole(content: Any) -> Any:
    """Nested dicts and lists with whole tensors instead of shards, on the CPU of process 0.

    All processes must call it; the others get None instead of sharded tensors.
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
    """Shard a whole tensor like `model`, a tensor of the same shape; unchanged if `model` is not sharded."""
    if not in_pieces(model) or tensor.shape != model.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements)


Reading = tuple[int, Tensor, torch.cuda.Event | None]  # the step, its values, and the event of their arrival


class ReadLate:
    """Reads numbers without making the device wait for the host: on CUDA one step late, elsewhere at once."""

    def __init__(self, size: int):
        self._now: Reading = (0, torch.zeros(size), None)
        self._before: Reading = self._now

    def put(self, step: int, values: Tensor) -> None:
        """values: float (size,), the numbers of this step."""
        self._before, event = self._now, None
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._now = step, values, event

    def get(self) -> tuple[int, list[float]]:
        """The newest step that can be read, and its values."""
        step, values, event = self._now if self._now[2] is None else self._before
        if event is not None:
            event.synchronize()
        return step, values.tolist()
