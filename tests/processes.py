"""The project's scripts as processes of their own, which tests kill, interrupt and let talk to each other.

They are forked from one process that has imported torch already: a start takes a tenth of a second, not five.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

if "forkserver" not in multiprocessing.get_all_start_methods():
    pytest.skip("processes are forked here, which Windows cannot", allow_module_level=True)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["training.setup", "torch.utils.tensorboard", "torch._dynamo", "torch.distributed.fsdp"])
# Killed processes leave semaphores (of tqdm) behind, which are cleared away at the end, with a warning.
os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
PATIENCE = 300  # seconds; machines that run tests are sometimes busy


def start(script: str, argv: Sequence[object], output: Path, processes: int = 1) -> list:
    """Start main(argv) of a script, on several processes as torchrun would. What they say is added to `output`."""
    environments = [{"OMP_NUM_THREADS": "1"}]
    if processes > 1:
        world = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        environments = [environments[0] | world | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    words = [str(word) for word in argv]
    started = [CONTEXT.Process(target=_run, args=(script, words, e, output)) for e in environments]
    for process in started:
        process.start()
    return started


def finish(processes: Sequence) -> list[int]:
    """Wait for their ends; the exit statuses, -N for one that signal N ended."""
    for process in processes:
        process.join(PATIENCE)
    if hanging := [process for process in processes if process.exitcode is None]:
        for process in hanging:
            process.kill()
        raise AssertionError(f"{len(hanging)} processes were still running after {PATIENCE} s")
    return [process.exitcode for process in processes]


def run(script: str, argv: Sequence[object], output: Path, processes: int = 1) -> list[int]:
    return finish(start(script, argv, output, processes))


def wait_for(condition: Callable[[], object], what: str) -> None:
    for _ in range(50 * PATIENCE):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(f"waited in vain for {what}")


def children(pid: int) -> list[int]:
    """Process ids, on Linux."""
    return [int(child) for tasks in Path(f"/proc/{pid}/task").glob("*/children") for child in tasks.read_text().split()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(script: str, argv: list[str], environment: dict[str, object], output: Path) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    torch.set_num_threads(1)
    importlib.import_module(script).main(argv)
