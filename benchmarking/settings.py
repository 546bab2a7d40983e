"""The settings of benchmark.py. No torch in here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import PRECISIONS
from common.options import MOST_BATCH, MachineSettings
from common.settings import Checked, option, section
from common.solvers import SOLVERS

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NETWORK = "checkpoint of the {} network, or its YAML file for random weights"


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings(Checked):
    """Settings of all three benchmarks."""

    rounds: int = option(3, "number of rounds; each round measures everything once", least=1, most=10_000)
    precision: tuple[str, ...] = option((), "precisions to measure (default: that of sampler.py)", choices=PRECISIONS)
    compile: bool = option(False, "compile the networks first (torch.compile)")
    output_folder: Path = option(Path("out/benchmark"), "folder for the JSON files and the picture")
    config_path: Path | None = option(
        None, "YAML file that describes the network of a checkpoint without a description", exists="file"
    )
    described: Mapping[str, Any] = option({}, flag=False)  # the network's own flags, nested
    machine: MachineSettings = section("machine", MachineSettings())


@dataclass(frozen=True, kw_only=True)
class SamplingBenchmark(BenchmarkSettings):
    """network calls, whole sampling runs, and DuoDiff at several switches"""

    full: Path = option(CONFIGS / "uvit_celeba.yaml", NETWORK.format("full"), exists="file")
    shallow: Path = option(CONFIGS / "uvit_celeba_3.yaml", NETWORK.format("shallow"), exists="file")
    batch_size: int = option(8, "samples per batch", least=1, most=MOST_BATCH)
    solver: tuple[str, ...] = option(("ddpm", "dpmsolver++"), "solvers to measure", choices=tuple(SOLVERS))
    steps: int = option(20, "network calls per image", least=1, most=100_000)
    t_switch: tuple[int, ...] = option((300, 500, 699), "switches to measure", least=-1, most=99_999)


@dataclass(frozen=True, kw_only=True)
class ExitBenchmark(BenchmarkSettings):
    """exits forced to every layer, and spread over the layers"""

    model: Path = option(CONFIGS / "deediff_celeba.yaml", NETWORK.format("early-exit"), exists="file")
    batch_size: int = option(64, "images per call", least=1, most=MOST_BATCH)
    min_group: tuple[int, ...] = option(
        (1, 8),
        "values of --min_group of eesampler.py to measure, for exits spread over the layers",
        least=1,
        most=MOST_BATCH,
    )


@dataclass(frozen=True, kw_only=True)
class TrainingBenchmark(BenchmarkSettings):
    """optimiser steps"""

    model: Path = option(CONFIGS / "uvit_celeba.yaml", NETWORK.format("benchmarked"), exists="file")
    batch_size: int = option(16, "images per step", least=1, most=MOST_BATCH)
    freeze_backbone: bool = option(False, "freeze the backbone of an early-exit model")
