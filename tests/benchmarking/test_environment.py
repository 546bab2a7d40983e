"""benchmark.py --environment: what a report of a fault says about the machine."""

from __future__ import annotations

import platform
import sys

import numpy as np
import pytest
import torch

import benchmark
from benchmarking import environment as module
from common import __version__


def test_environment(capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--environment"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    told = {name: about.strip() for name, _, about in (line.partition(":") for line in said.splitlines())}
    assert told["DuoDiff"] == __version__ and told["Python"].startswith(platform.python_version())
    packages = told["packages"].split(", ")
    assert f"torch {torch.__version__}" in packages and f"numpy {np.__version__}" in packages
    assert f"{torch.get_num_threads()} threads" in told["CPU"] and "fp32" in told["CPU"]
    assert any(name.startswith("GPU") for name in told) and told["--compile"]


def test_a_missing_package_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "REQUIREMENTS", tmp_path / "requirements.txt")
    module.REQUIREMENTS.write_text("# comment\ntorch>=2\nno-such-package>=1\n")
    assert f"torch {torch.__version__}, no-such-package missing" in module.environment()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="as Linux tells it")
def test_the_cpu_is_named():
    with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
        assert module.cpu_name() in " ".join(file.read().split()) or module.cpu_name() == platform.machine()
