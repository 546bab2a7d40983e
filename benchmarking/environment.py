"""The facts about the machine and its libraries that a bug report needs."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from common import __version__
from common.devices import check_compiler, cpu_name, in_hardware
from common.errors import InputError

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"


def environment() -> str:
    """One line for each of: versions, system, CPU, each accelerator, torch.compile."""
    return "\n".join(f"{name + ':':<11} {about}" for name, about in _entries())


def _entries() -> Iterator[tuple[str, str]]:
    yield "DuoDiff", __version__
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "system", f"{platform.platform()}, {platform.machine()}"
    yield "packages", ", ".join(f"{name} {_version(name)}" for name in _packages())
    threads = f"{torch.get_num_threads()} threads"
    limits = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ]
    cores = f"{os.cpu_count()} cores"
    instructions = f"{torch.backends.cpu.get_cpu_capability()}, {_precisions('cpu')}"
    yield "CPU", ", ".join([cpu_name(), cores, threads, *limits, instructions])
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        toolkit = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        memory = f"{about.total_memory / 2**30:.0f} GiB"
        yield f"GPU {number}", ", ".join([about.name, memory, toolkit, _precisions(f"cuda:{number}")])
    if torch.backends.mps.is_available():
        yield "GPU", f"mps, {_precisions('mps')}"
    elif not torch.cuda.is_available():
        yield "GPU", "none that this torch can use"
    try:
        check_compiler(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        yield "--compile", "has its compiler"
    except InputError as error:
        yield "--compile", str(error)


def _packages() -> list[str]:
    return re.findall(r"^[a-z-]+", REQUIREMENTS.read_text(encoding="utf-8"), re.MULTILINE)


def _version(package: str) -> str:
    if package == "torch":
        return str(torch.__version__)  # also names the build
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _precisions(device: str) -> str:
    """The precisions for which the device has instructions."""
    return " ".join(name for name in ("fp32", "bf16", "fp16") if in_hardware(name, torch.device(device)))
