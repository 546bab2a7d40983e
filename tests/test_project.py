"""The project as a whole: importing has no effects, and the commit hooks work."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("train.py", "main.py", "sampler.py", "eesampler.py", "fid.py", "compare.py", "calibrate.py", "benchmark.py")


REFUSALS = {
    "--dataset folder": "--img_size",
    "--dataset folder --img_size 0": "--img_size",
    "--dataset celeba --img_size 64 --crop halve": "crop of celeba=halve",
    "--dataset celeba --img_size 64 --download": "cannot be downloaded",
}


@pytest.mark.parametrize(
    "script, argv, status, said",
    [(script, "--help", 0, f"usage: {script}") for script in SCRIPTS]
    + [("data/pack.py", "--help", 0, "usage: pack.py")]
    + [("data/pack.py", argv, 2, said) for argv, said in REFUSALS.items()],
)
def test_help_and_refusals_need_no_torch(script, argv, status, said):
    code = f"""
import runpy, sys
sys.argv = ["{script}", *{argv.split()}]
sys.path.insert(0, ".")
try:
    runpy.run_path("{script}", run_name="__main__")
except SystemExit as ended:
    heavy = sorted({{"torch", "scipy", "matplotlib", "numpy", "PIL"}} & sys.modules.keys())
    sys.exit(f"imported {{heavy}}" if heavy else ended.code)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert said in (done.stderr if status else done.stdout)


def test_importing_prints_nothing_and_touches_no_randomness():
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in ROOT.glob("[a-z]*/*.py")]
    modules = [m.removesuffix(".__init__") for m in modules if m.split(".")[0] not in ("tests", "scripts", "venv")]
    code = f"""
import importlib, torch
before = torch.get_rng_state()
for name in {sorted(modules)}:
    importlib.import_module(name)
assert torch.equal(before, torch.get_rng_state())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.skipif(shutil.which("git") is None, reason="git is needed to run the hooks")
def test_pre_commit_hooks(tmp_path):
    """The hooks install and pass on the project, and mend a badly formatted file."""

    def call(*command):
        return subprocess.run(command, cwd=tmp_path / "repo", capture_output=True, text=True, check=False)

    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if not listed:
        pytest.skip("not a git checkout, so it cannot be told what belongs to the project")
    for name in listed.splitlines():
        (tmp_path / "repo" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "repo" / name)
    call("git", "init", "-q")
    call("git", "add", "-A")
    first = call(sys.executable, "-m", "pre_commit", "run", "--all-files")
    if "Could not find a version" in first.stdout + first.stderr or "ConnectionError" in first.stdout:
        pytest.skip("the hooks install from PyPI, which cannot be reached")
    assert first.returncode == 0, first.stdout + first.stderr
    (tmp_path / "repo" / "bad.py").write_text("import sys\nimport os\nprint( os,sys )\n")
    call("git", "add", "-A")
    assert call(sys.executable, "-m", "pre_commit", "run", "--all-files").returncode == 1
    assert (tmp_path / "repo" / "bad.py").read_text() == "import os\nimport sys\n\nprint(os, sys)\n"
