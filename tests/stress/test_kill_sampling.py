"""kill_sampling.py, in a short form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_sampling_survives_kills():
    script = Path(__file__).with_name("kill_sampling.py")
    done = subprocess.run([sys.executable, script, "--kills", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith("2 of 2\n"), done.stdout + done.stderr
