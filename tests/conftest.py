"""What several tests share: tiny networks, and checkpoints trained for a few steps."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

import main as main_script
import train as train_script

TINY = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "num_heads": 4}
TINY_FLAGS = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]
TRAINING_FLAGS = [
    *("--dataset", "digits", "--batch_size", "8", "--num_timesteps", "20", "--num_warmup_steps", "2"),
    *("--log_every_n_steps", "4", "--preview_steps", "0", "--device", "cpu"),
]
CLEAR_REFS = Path("/proc/self/clear_refs")

# nohup and the jobs of a script start pytest with these ignored, and so every process of the tests.
for number, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, number) and signal.getsignal(getattr(signal, number)) is signal.SIG_IGN:
        signal.signal(getattr(signal, number), handler)

# HYPOTHESIS_PROFILE=thousands python -m pytest tests/test_properties.py
_ANY = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
_BRIEF = (Phase.explicit, Phase.generate)  # simplifying what fails takes minutes; "thousands" does it
settings.register_profile("quick", max_examples=25, derandomize=True, phases=_BRIEF, **_ANY)
settings.register_profile("thousands", max_examples=3000, **_ANY)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """What a test printed may name files outside UTF-8, which one process of pytest cannot send to another."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def _plain_randomness():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A log folder with trained runs.

    full (5 blocks), shallow (1), ee (on the full one); classes (10), no_class (and one for none), ee_no_class.
    """
    logs = tmp_path_factory.mktemp("logs")
    flags = [*TINY_FLAGS, *TRAINING_FLAGS, "--n_steps", "4", "--log_path", str(logs)]
    train_script.main([*flags, "--depth", "5", "--exp_name", "full"])
    train_script.main([*flags, "--depth", "3", "--exp_name", "classes", "--num_classes", "10"])
    no_class = [*flags, "--depth", "3", "--num_classes", "11"]
    train_script.main([*no_class, "--exp_name", "no_class", "--label_dropout", "0.2"])
    main_script.main([*flags, "--model", "uvit", "--depth", "1", "--exp_name", "shallow"])
    heads = ["--model", "deediff_uvit", "--freeze_backbone", "--classifier_type", "mlp_probe_per_layer"]
    for backbone, depth, classes, name in (("full", "5", "-1", "ee"), ("no_class", "3", "11", "ee_no_class")):
        argv = [*flags, *heads, "--depth", depth, "--num_classes", classes, "--exp_name", name]
        main_script.main([*argv, "--load_backbone", str(logs / backbone / "digits_uvit_last.pth")])
    return logs


@pytest.fixture(scope="session")
def full(runs) -> Path:
    return runs / "full" / "digits_uvit_last.pth"


@pytest.fixture(scope="session")
def shallow(runs) -> Path:
    return runs / "shallow" / "digits_uvit_last.pth"


@pytest.fixture(scope="session")
def early_exit(runs) -> Path:
    return runs / "ee" / "digits_deediff_uvit_last.pth"


@pytest.fixture
def fails(capsys):
    """Call a script's main and expect one line on stderr, exit status 2, and words in that line."""

    def check(main, argv, *words: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in argv])
        said = capsys.readouterr().err
        assert ended.value.code == 2, said
        assert said.count("\n") == 1 and said.endswith("\n"), said
        assert "Traceback" not in said
        for word in words:
            assert word in said, said
        return said

    return check


@pytest.fixture
def run_quietly(capsys):
    def call(main, argv) -> str:
        main([str(arg) for arg in argv])
        return capsys.readouterr().out

    return call


@pytest.fixture
def modest_memory():
    """At its highest the test's use of memory is less than 2 GB above what it was before."""
    if not CLEAR_REFS.exists():  # Linux alone tells
        yield
        return
    CLEAR_REFS.write_text("5")  # forget the highest use so far
    before = _kilobytes("VmRSS")
    yield
    assert _kilobytes("VmHWM") - before < 2 * 2**20


def _kilobytes(name: str) -> int:
    return int(re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.fixture
def quickly_compiled(monkeypatch):
    """Traced and differentiated as ever, but without the minutes of C++; models/test_inference.py has those."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch.compiler.reset()


@pytest.fixture
def torchrun():
    """Run a script in several processes that talk over gloo."""

    def call(script, argv, processes: int) -> subprocess.CompletedProcess:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        return subprocess.run(
            [str(arg) for arg in (*launcher, script, *argv)],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    return call


def perturbed(network: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random: no zero initialisation hides a term."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
    return network
