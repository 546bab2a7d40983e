"""`python -m data.pack` is `python pack.py`."""

from __future__ import annotations

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "pack.py"), run_name="__main__")
