"""The worked examples of CONTRIBUTING.md, done as they say in a copy of the project."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
QUICK = {
    "train.py": "--n_steps 3 --num_timesteps 1000 --preview_steps 0 --num_workers 0",
    "sampler.py": "--steps 3 --n_samples 2",
}


def project(place: Path) -> None:
    """The project's code, as far as the examples use it."""
    for path in ROOT.iterdir():
        if path.suffix == ".py" or (path / "__init__.py").exists() or path.name in ("scripts", "configs"):
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, place / path.name)


def done(place: Path) -> list[str]:
    """Write the files and the entries of the examples; returns their commands, in their order."""
    commands = []
    for kind, block in BLOCKS:
        if kind == "bash":
            commands += [line for line in block.replace("\\\n", " ").splitlines() if line.startswith("python ")]
            continue
        title, _, content = block.partition("\n")
        name, _, below = title.removeprefix("# ").partition(": ")
        path = place / name
        if below:  # an entry of a table
            before = path.read_text("utf-8")
            assert before.count(f"\n{below}\n") == 1, f"{name} has no {below}"
            path.write_text(before.replace(f"\n{below}\n", f"\n{below}\n{content}"), encoding="utf-8")
        else:
            assert not path.exists(), f"{name} is there already"
            path.write_text(content, encoding="utf-8")
            if path.parent == place:
                commands.append(f"python {name}")
    return commands


@pytest.mark.slow
def test_the_examples_do_what_they_say(tmp_path):
    project(tmp_path)
    commands = [shlex.split(command)[1:] for command in done(tmp_path)]
    assert [command[0] for command in commands] == ["train.py", "sampler.py", "every_other.py"]
    runs = [[*command, *QUICK.get(command[0], "").split()] for command in commands]
    code = f"""
import runpy, sys
sys.path.insert(0, ".")
for words in {runs}:
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert len(list((tmp_path / "out" / "stripes").glob("*.png"))) == 2
    assert Image.open(tmp_path / "every_other.png").getbbox()


def test_the_places_of_a_network_are_there():
    for name, words in re.findall(r"^\| `([\w/.]+)` \| (.*) \|$", TEXT, re.MULTILINE):
        content = (ROOT / name).read_text("utf-8")
        for word in re.findall(r"`(\w+)`", words):
            assert word in content, f"{name} has no {word}"
