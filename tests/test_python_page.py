"""The Python of docs/python.md and of the notebook, run in their order, with fewer steps and images."""

from __future__ import annotations

import importlib
import json
import os
import re
from pathlib import Path

import pytest
import torch

from common.images import save_grid
from data import open_dataset
from models import UViT, load_weights
from models.loading import load_network
from tests.conftest import TINY

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
NOTEBOOK = json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]

# The networks have 1000 timesteps.
STAND_INS = {"num_timesteps, 50)": "num_timesteps, 4)", "range(16)": "range(2)", "arange(16)": "arange(2)"}
STAND_INS |= {"timesteps[10]": "timesteps[1]", "nats[10]": "nats[1]", "[40]": "[3]"}


@pytest.mark.parametrize("blocks", [BLOCKS, CELLS], ids=["page", "notebook"])
def test_the_blocks_run(blocks, tmp_path, monkeypatch, capsys):
    (tmp_path / "pretrained").symlink_to(DOCS.parent / "pretrained")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        for said, tiny in STAND_INS.items():
            block = block.replace(said, tiny)
        exec(block, names)
    assert (tmp_path / "duodiff.png").stat().st_size > 500
    said = capsys.readouterr().out
    assert "from DuoDiff's images" in said and "nats" in said
    assert names["images"].shape == (2, 1, 28, 28)
    assert not torch.equal(names["sharper"], names["images"])


def test_the_notebook_has_no_outputs_and_says_what_the_page_says():
    assert all(not cell.get("outputs") for cell in NOTEBOOK["cells"])
    assert [cell.rstrip() for cell in CELLS[: len(BLOCKS)]] == [block.rstrip() for block in BLOCKS]


def test_paths_may_be_text(full, tmp_path):
    """And any other object that names a file, as for `open`."""

    class Named(os.PathLike):
        def __fspath__(self):
            return str(full)

    other = UViT(**TINY, depth=5)
    wanted = load_network(full, {}, UViT).module.state_dict()
    for path in (str(full), Named()):
        network = load_network(path, {}, UViT)
        assert network.path == full
        load_weights(other, path)
        for name, values in wanted.items():
            assert torch.equal(network.module.state_dict()[name], values) and torch.equal(
                other.state_dict()[name], values
            )
    save_grid(str(tmp_path / "grid.png"), torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    images = open_dataset("folder", str(tmp_path), img_size=8, in_chans=1)
    assert len(images) == 1


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
