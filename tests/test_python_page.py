"""The Python of docs/python.md and of the notebook, run in their order, on tiny networks in place of the demo's."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
NOTEBOOK = json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]

# The tiny networks have 20 timesteps.
TINY = {"num_timesteps, 50)": "num_timesteps, 20)", "[501, 0]": "[11, 0]", "[40]": "[15]"}


@pytest.mark.parametrize("blocks", [BLOCKS, CELLS], ids=["page", "notebook"])
def test_the_blocks_run(blocks, runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "demo").symlink_to(runs)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        for said, tiny in TINY.items():
            block = block.replace(said, tiny)
        exec(block, names)
    assert (tmp_path / "duodiff.png").stat().st_size > 500
    said = capsys.readouterr().out
    assert "from DuoDiff's images" in said and "nats" in said
    assert names["images"].shape == (16, 1, 8, 8)


def test_the_notebook_has_no_outputs_and_says_what_the_page_says():
    assert all(not cell.get("outputs") for cell in NOTEBOOK["cells"])
    assert [cell.rstrip() for cell in CELLS[: len(BLOCKS)]] == [block.rstrip() for block in BLOCKS]


def test_every_name_of_the_table_is_there():
    rows = re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)
    found = 0
    for row in rows:
        module = ""
        for name in re.findall("`([^`]+)`", row):
            parent, _, attribute = name.rpartition(".")
            module = parent or module  # a bare name is beside the one before it
            assert hasattr(importlib.import_module(module), attribute), name
            found += 1
    assert found >= 20
