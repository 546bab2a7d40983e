"""Networks whose weights are in memory only while they run."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import InputError

Read = Callable[[], Mapping[str, Tensor]]  # gives the weights of a network, by the names of its state dict
ALIGNMENT = 64  # bytes; torch's own allocations have it


class StoredWeights:
    """Reads the weights of a network from its file or folder again, in fp32.

    read: gives the weights, possibly mapped. Calling this raises InputError if the file has changed since it was made.
    """

    def __init__(self, path: Path, read: Read):
        self.path, self.read = path, read
        self.versions = _versions(path)

    def __call__(self) -> dict[str, Tensor]:
        if _versions(self.path) != self.versions:
            raise InputError(
                f"{self.path} was changed or removed, but --offload needs it during the run; restore it and start again"
            )
        return {name: _as_allocated(weight.float()) for name, weight in self.read().items()}


def _versions(path: Path) -> dict[Path, tuple[int, ...]]:
    """Values that change when a file, or a folder of weights, changes; no content is read."""
    patterns = ("*.safetensors", "config.json")
    files = [file for pattern in patterns for file in path.rglob(pattern)] if path.is_dir() else [path]
    found: dict[Path, tuple[int, ...]] = {}
    for file in files:
        try:
            about = file.stat()
        except OSError:
            continue
        found[file] = (about.st_ino, about.st_size, about.st_mtime_ns)
    return found


def _as_allocated(weight: Tensor) -> Tensor:
    """The tensor, or a copy if it does not lie in memory as torch would allocate it: products may round otherwise."""
    if weight.is_contiguous() and weight.data_ptr() % ALIGNMENT == 0:
        return weight
    return weight.clone(memory_format=torch.contiguous_format)


def on_host(network: nn.Module, stored: Read | None) -> AbstractContextManager[None]:
    """A context in which an empty network has its weights in fp32 on the CPU. stored: None if it is not empty."""
    return nullcontext() if stored is None else _resident(network, stored, torch.float32, torch.device("cpu"))


def session_of(
    network: nn.Module, stored: Read | None, dtype: torch.dtype, device: torch.device
) -> Callable[[], AbstractContextManager[None]]:
    """Makes the contexts in which an empty network has its weights on the device, in dtype; after them it is empty.

    stored: None if the network is not empty. On CUDA they come from pinned host memory, which is several times as fast
    as a file; elsewhere from the file each time.
    """
    if stored is None:
        return nullcontext
    if device.type == "cuda":
        weights = {name: weight.to(dtype).pin_memory() for name, weight in stored().items()}
        return partial(_resident, network, lambda: weights, dtype, device)
    return partial(_resident, network, stored, dtype, device)


@contextmanager
def _resident(network: nn.Module, read: Read, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    with torch.inference_mode(False):  # sampling is in inference mode, whose tensors cannot be used outside of it
        _fill(network, {name: w.to(device, dtype, non_blocking=w.is_pinned()) for name, w in read().items()})
    try:
        yield
    finally:
        empty(network)
        _give_back()


def empty(network: nn.Module) -> None:
    """Remove the weights of a network, but keep their shapes. Its other buffers stay."""
    with torch.inference_mode(False):
        _fill(network, {name: weight.to("meta") for name, weight in network.state_dict().items()})


def _give_back() -> None:
    """Return freed memory to the system. glibc keeps memory below a block in use, up to a whole network."""
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _fill(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Make these tensors, not copies of them, the weights of a network."""
    network.load_state_dict(weights, assign=True)
