"""Devices, precisions and stopwatches."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from common.errors import InputError


def pick_device(name: str) -> torch.device:
    """The device of this name; `auto` is CUDA, else MPS, else the CPU. Raises InputError for a missing device.

    On CUDA, fp32 products may round their factors to TF32 from here on.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    kind, _, index = name.partition(":")
    if kind not in available or (index and not index.isdecimal()):
        raise InputError(f"--device {name}: choose auto, cpu, cuda, cuda:N or mps")
    if not available[kind]:
        raise InputError(f"--device {name}: this machine or this torch has no {kind}; use --device auto")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if index and (len(index) > 9 or int(index) >= count):
        raise InputError(f"--device {name}: this machine has {count} such devices, numbered from 0")
    if kind == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """The name of the hardware: "AMD EPYC 7B13", "mps", "NVIDIA H100 80GB HBM3"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name() if device.type == "cpu" else device.type


@functools.cache
def cpu_name() -> str:
    """The model of the CPU, or its architecture if the model is unknown."""
    with suppress(OSError, subprocess.SubprocessError):
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout
        else:
            said = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
            said = next((line for line in said.splitlines() if line.startswith("model name")), "").partition(":")[2]
        if name := " ".join(said.split()):
            return name
    return platform.processor() or platform.machine() or "cpu"


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_precision(name: str | None, device: torch.device) -> str:
    """A key of DTYPES; for None bf16 if the device has instructions for it, else fp32.

    Raises InputError for fp16 on a CPU without fp16 instructions. bf16 works everywhere, but may be slow.
    """
    if name is None:
        return "bf16" if in_hardware("bf16", device) else "fp32"
    if name == "fp16" and device.type == "cpu" and not in_hardware("fp16", device):
        raise InputError("--precision fp16: this CPU cannot compute in fp16; use bf16 or fp32")
    return name


def in_hardware(precision: str, device: torch.device) -> bool:
    """Whether the device has instructions for products in this precision, not only an emulation."""
    if precision == "fp32":
        return True
    if device.type == "cuda":
        return (
            precision == "fp16" or torch.cuda.get_device_capability(device) >= (8, 0) or torch.version.hip is not None
        )
    if device.type == "mps":
        return precision == "fp16"  # torch does not report which chips have bf16
    if platform.machine() in ("aarch64", "arm64"):
        # Also False if torch was built without the library for these instructions.
        return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported")())
    # The names of these functions differ between torch releases; a missing function counts as no.
    names = {"bf16": ("_is_avx512_bf16_supported", "_is_amx_tile_supported"), "fp16": ("_is_amx_fp16_supported",)}
    return any(getattr(torch.cpu, name, lambda: False)() for name in names[precision])


def check_compiler(device: torch.device) -> None:
    """Raises InputError if torch.compile lacks a compiler."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise InputError("--compile: torch.compile needs triton on CUDA; install it, or leave --compile out")
    compilers = (os.environ.get("CXX", "g++"), "g++", "clang++", "cl")
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise InputError(
            "--compile: torch.compile needs a C++ compiler, such as g++; install one, or leave --compile out"
        )


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> int | None:
    """The peak memory in bytes: of tensors on a GPU, else of the process; None if the system does not report it.

    Both are since the start of the process. The parts of files that are mapped into the process count.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # Linux, where getrusage also counts the memory of the parent before exec
    if status.exists() and (found := re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def in_units(size: int) -> str:
    """A size in bytes as text: "350 MiB", "1.25 GiB"."""
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"


class Stopwatch:
    """Seconds of finished work on a device: `with stopwatch: ...` takes a lap."""

    def __init__(self, device: torch.device):
        self.device = device
        self.laps: list[float] = []

    @property
    def seconds(self) -> float:
        return sum(self.laps)

    def __enter__(self) -> Stopwatch:
        synchronize(self.device)
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exc_info: object) -> None:
        synchronize(self.device)
        self.laps.append(time.perf_counter() - self._start)
