"""Several processes that share one job under torchrun; without torchrun there is one process.

torchrun sets RANK, WORLD_SIZE and LOCAL_RANK in each process. No torch at import, so that reading options stays quick.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from common.errors import InputError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
LONGEST_WAIT = timedelta(days=1)  # a process may wait hours for the last batch of another


def rank() -> int:
    """The number of this process, 0..world_size() - 1. Process 0 logs, saves and reports."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of processes of the job, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """The part of a sequence for this process: every world_size()-th item."""
    return items[rank() :: world_size()]


def shared_images(total: int, batch_size: int) -> int:
    """How many of `total` images this process has in its `share` of the batches."""
    return sum(min(batch_size, total - start) for start in share(range(0, total, batch_size)))


def part_of(total: int) -> slice:
    """The part of `total` rows for this process: consecutive rows; parts differ by at most one row."""
    return slice(total * rank() // world_size(), total * (rank() + 1) // world_size())


@contextmanager
def joined_processes(device_name: str) -> Iterator[torch.device]:
    """A context in which the processes can communicate. Yields the device of this process.

    Only process 0 logs warnings, because the others would repeat them.

    device_name: as in `pick_device`; on CUDA each process uses the GPU of its LOCAL_RANK. Raises InputError if this
    machine has fewer GPUs than processes, or device_name is one GPU for several processes.
    """
    from common.devices import pick_device

    device = pick_device(device_name)
    if world_size() == 1:
        yield device
        return

    import torch
    from torch import distributed

    if device.type == "mps":
        raise InputError(
            "--device mps supports only one process; start the script without torchrun, or give --device cpu"
        )
    if device.type == "cuda":
        if device.index is not None:
            raise InputError(f"--device {device_name} names one GPU for {world_size()} processes; give --device cuda")
        local_rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local_rank >= count:
            raise InputError(
                f"process {local_rank} of this machine has no GPU: the machine has {count}; lower --nproc_per_node"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    logging.disable(logging.NOTSET if is_main() else logging.WARNING)
    try:
        yield device
    finally:
        logging.disable(logging.NOTSET)
        distributed.destroy_process_group()


def barrier() -> None:
    """Wait until every process calls this."""
    if world_size() > 1:
        from torch import distributed

        distributed.barrier()


def gather(item: T) -> list[T] | None:
    """The items of all processes, by rank, on process 0; None on the others. For plain values and CPU arrays."""
    if world_size() == 1:
        return [item]
    from torch import distributed

    gathered: list[Any] | None = [None] * world_size() if is_main() else None
    distributed.gather_object(item, gathered)
    return gathered


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over all processes, on all of them, in place. values: of any shape, the same everywhere."""
    if world_size() > 1:
        from torch import distributed

        distributed.all_reduce(values)
    return values


def on_main(work: Callable[[], T]) -> T:
    """Run `work` on process 0 and return its result on every process. For plain values.

    After an InputError on process 0 the other processes end too, without a message.
    """
    if world_size() == 1:
        return work()
    from torch import distributed

    outcome: list[Any] = [None, False]
    failure = None
    if is_main():
        try:
            outcome[0] = work()
        except InputError as error:
            failure, outcome[1] = error, True
    distributed.broadcast_object_list(outcome)
    if outcome[1]:
        raise failure or SystemExit(2)
    result: T = outcome[0]
    return result


@contextmanager
def main_first() -> Iterator[None]:
    """A context that process 0 runs before the others, so that it can download files for them."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()
