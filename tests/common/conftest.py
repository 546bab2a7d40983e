"""A script of a few lines, which tests start, stop and cut off."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(tmp_path) -> Callable[..., list[str]]:
    """Writes main() of a script; returns the words that start it."""

    def write(*lines: str) -> list[str]:
        path = tmp_path / "script.py"
        head = ["import os, sys, time", "from pathlib import Path", "from common.errors import command", "@command"]
        body = ["def main(argv=None):", *(f"    {line}" for line in lines), "if __name__ == '__main__':", "    main()"]
        path.write_text("\n".join([*head, *body]))
        return [sys.executable, str(path)]

    return write


@pytest.fixture
def start(tmp_path) -> Callable[..., subprocess.Popen]:
    """Start a command in tmp_path, its outputs read as text."""

    def call(words: list[str] | str, **more: object) -> subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | more.pop("env", {})
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        shell = isinstance(words, str)
        executable = "/bin/bash" if shell else None
        return subprocess.Popen(
            words, cwd=tmp_path, env=environment, shell=shell, executable=executable, **pipes | more
        )

    return call
