"""The weights of a checkpoint for samplers: python export.py IN OUT.safetensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.cli import Parser
from common.errors import InputError, command
from common.files import replacing
from common.settings import Checked, option


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Checked):
    """Settings of export.py."""

    source: Path = option(help="checkpoint to read", exists="file", positional=True, metavar="IN")
    target: Path = option(help="file to write or replace", positional=True, metavar="OUT.safetensors")
    weights: str = option("ema", "averaged (ema), or of the last step (raw)", choices=("ema", "raw"))


def parse_settings(argv: Sequence[str] | None) -> ExportSettings:
    description = "Write the weights of a checkpoint, and the description of the network, as safetensors."
    return Parser(prog="export.py", description=description).settings(ExportSettings, argv, network=False)


@command
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(argv)
    print(f"{export(settings.source, settings.target, settings.weights)} -> {settings.target}")


def export(source: Path, target: Path, weights: str) -> str:
    """Write the weights of a checkpoint, and the description, as safetensors. Returns a text about the weights."""
    from safetensors.torch import save_file

    from models.weights import check_numbers, read_weights

    if target.suffix != ".safetensors":
        raise InputError(f"{target}: wanted a name that ends in .safetensors")
    if not target.parent.is_dir():
        raise InputError(f"{target.parent}: no such folder")
    if target.exists() and target.samefile(source):
        raise InputError(f"{target} is the file to read from; give another name to write to")
    read = read_weights(source, weights)
    if read.settings is None:
        raise InputError(f"{source} carries no description of its network; only checkpoints of this project do")
    if read.kind != weights:
        raise InputError(f"{source} holds {read.kind} weights alone; give --weights {read.kind}")
    check_numbers(read.state_dict, source)
    about = {"format": "pt", "config": json.dumps(read.settings), "weights": read.kind, "step": str(read.step)}
    with replacing(target) as temporary:
        save_file({name: value.contiguous() for name, value in read.state_dict.items()}, temporary, about)
    return f"{read.kind} weights of step {read.step}"
