"""Several processes that do one job, as torchrun starts them; without it there is one, which is all of them.

torchrun tells each process its place in RANK, WORLD_SIZE and LOCAL_RANK. No torch at import, so that reading
options stays quick.
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
LONGEST_WAIT = timedelta(days=1)  # of a process for another, which may be at its last batch for hours


def rank() -> int:
    """The number of this process, 0..world_size() - 1. Process 0 logs, saves and reports."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes share the job, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of a sequence: every world_size()-th item. The parts make up the whole."""
    return items[rank() :: world_size()]


def part_of(total: int) -> slice:
    """This process's part of `total` rows: neighbours, as many as the others have, or one more."""
    return slice(total * rank() // world_size(), total * (rank() + 1) // world_size())


@contextmanager
def joined_processes(device_name: str) -> Iterator[torch.device]:
    """Within the block the processes can talk to each other. Yields the device of this one.

    Warnings are process 0's to give: the others would repeat them.

    device_name: as in `pick_device`; on CUDA each process takes the GPU of its LOCAL_RANK.
    Raises InputError where there are fewer GPUs than processes on this machine, or one GPU is named for several.
    """
    from common.devices import pick_device

    device = pick_device(device_name)
    if world_size() == 1:
        yield device
        return

    import torch
    from torch import distributed

    if device.type == "mps":
        raise InputError("--device mps serves one process; start the script without torchrun, or give --device cpu")
    if device.type == "cuda":
        if device.index is not None:
            raise InputError(f"--device {device_name} names one GPU for {world_size()} processes; give --device cuda")
        local_rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local_rank >= count:
            raise InputError(
                f"process {local_rank} of this machine has no GPU: there are {count}; lower --nproc_per_node"
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
    """Wait until every process has come here."""
    if world_size() > 1:
        from torch import distributed

        distributed.barrier()


def gather(item: T) -> list[T] | None:
    """What every process gave, by rank, on process 0; None on the others. For plain values and CPU arrays."""
    if world_size() == 1:
        return [item]
    from torch import distributed

    gathered: list[Any] | None = [None] * world_size() if is_main() else None
    distributed.gather_object(item, gathered)
    return gathered


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum of what every process gives, on all of them; `values` are changed."""
    if world_size() > 1:
        from torch import distributed

        distributed.all_reduce(values)
    return values


def on_main(work: Callable[[], T]) -> T:
    """What `work` gives on process 0, on every process; it runs there alone. For plain values.

    An InputError that process 0 meets ends the others as well, in silence: it says what there is to say.
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
    """Process 0 goes through the block before the others: it may download what they then find."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()
