"""Options, of every script: what they refuse they refuse while they are parsed, in one line."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pytest

from common.settings import fields_of, option, parser_of
from tests.parsers import Command, commands

COMMANDS = commands()
PER_COMMAND = pytest.mark.parametrize("command", COMMANDS, ids=str)
TOO_LARGE = [str(2**63), "9" * 400, "9" * 5000, "-" + "9" * 5000, "1e400", "inf", "-inf", "nan"]
REFUSED = r" is no (whole )?number| is out of range, wanted (-?[0-9]|more than [0-9])"
MAY_BE_MINUS_1 = {"num_classes", "t_switch", "logsnr_switch", "time_shift"}


def refusal(command: Command, argv: Sequence[str]) -> str:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        command.script.parse_settings([*command.words, *argv])
    assert ended.value.code == 2
    assert said.getvalue().count("\n") == 1 and len(said.getvalue()) < 400, said.getvalue()
    return said.getvalue()


def outcome(action: argparse.Action, text: str) -> object:
    """What the type of an option makes of a text; None if it refuses it."""
    try:
        return action.type(text) if action.type else text
    except (argparse.ArgumentTypeError, ValueError):
        return None


def is_number(action: argparse.Action) -> bool:
    return any(isinstance(outcome(action, text), int | float) for text in ("1", "0.5", "64"))


def test_all_scripts_are_found():
    names = {str(command) for command in COMMANDS}
    assert names >= {"train", "main", "sampler", "eesampler", "fid", "compare", "calibrate"}
    assert names >= {"benchmark sample", "benchmark early-exit", "benchmark train", "training.export"}
    assert {name.rpartition(".")[2] for name in names} >= {"pack", "results", "train_classifier"}
    assert sum(is_number(action) for command in COMMANDS for action in command.options) > 150


@PER_COMMAND
def test_numbers_are_bounded(command):
    for action in filter(is_number, command.options):
        for text in [*TOO_LARGE, *(["-1"] if action.dest not in MAY_BE_MINUS_1 else [])]:
            said = refusal(command, [f"{action.option_strings[0]}={text}"])
            assert f"argument {action.option_strings[0]}: " in said and re.search(REFUSED, said)


@PER_COMMAND
def test_a_value_is_never_empty(command, tmp_path):
    """Paths, names, numbers and choices; of a variable that is not set, for one."""
    for action in command.options:
        for argv in ([f"{action.option_strings[0]}="], [action.option_strings[0], ""]):
            assert action.option_strings[0] in refusal(command, argv)
    (tmp_path / "file").write_text("x")
    before = []
    for action in (a for a in command.parser._actions if not a.option_strings and a.nargs != argparse.PARSER):
        refusal(command, [*before, "", *["x"] * (len(before) == 1)])
        before.append(action.choices[0] if action.choices else str(tmp_path / "file"))


def test_empty_paths_say_what_to_look_for(tmp_path):
    told = [
        refusal(command, [f"{action.option_strings[0]}="])
        for command in COMMANDS
        for action in command.options
        if outcome(action, str(tmp_path / "new")) == tmp_path / "new"
    ]
    assert len(told) > 10
    assert all("an empty path; is a variable in the command not set?" in said for said in told)


def test_a_label_without_a_folder(fails):
    import compare

    for text in ("full=", "=", "full", ""):
        fails(compare.main, [text], "wanted LABEL=FOLDER")


@dataclass
class Numbers:
    count: int = option(3, least=3, most=12)
    share: float = option(0.5, least=0, most=1)
    rate: float = option(0.5, least=0, most=1, above=True)
    place: int | Literal["auto"] = option("auto", least=-1, most=9)


@pytest.mark.parametrize(
    "name, taken, refused",
    [
        ("count", ["3", "12", "+7", " 4 "], ["2", "13", "4.0", "1e1", "four", "0x4", ""]),
        ("share", ["0", "1", "1e-300", "-0"], ["-1e-9", "1.000001", "one", "1,5", ""]),
        ("rate", ["1e-300", "1"], ["0", "-0", "2"]),
        ("place", ["auto", "-1", "9"], ["Auto", "10", ""]),
    ],
)
def test_types_of_numbers(name, taken, refused):
    kind = parser_of(next(f for f in fields_of(Numbers) if f.name == name))
    assert [kind(text) for text in taken] == [text if text == "auto" else float(text) for text in taken]
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match=REFUSED):
            kind(text)


# Ways of saying "default" and of leaving out half of a sentence that a reader stops at.
CLUMSY = r"if not said|default: (None|True|False)|\(default [^(]|^see |; ?-?\d: |: none\b|[.;]$|which see"


@PER_COMMAND
def test_help_texts_are_plain(command):
    """Each option is explained by a phrase of its own, which ends in its default, if it has one, in parentheses."""
    for action in command.parser._actions:
        said, name = action.help, "/".join(action.option_strings) or action.dest
        if said == argparse.SUPPRESS:
            continue  # an older name
        assert said and len(said.split()) > 1, f"{name}: {said!r}"
        assert not re.search(CLUMSY, said), f"{name}: {said!r}"
        phrase = re.fullmatch(r"(.*?)( \(default: .+\))?", said, re.DOTALL)[1]
        assert "default" not in phrase, f"{name}: the default does not stand at the end of {said!r}"
        assert phrase[0].islower() or phrase.startswith(("DDIM", "TorchScript", "YAML", "MLP")), f"{name}: {said!r}"
    assert "default: None" not in command.parser.format_help()


def test_a_default_is_told_as_it_would_be_typed():
    told = {}
    for command in COMMANDS:
        for action in command.parser._actions:
            match = re.search(r"\(default: (.+)\)$", action.help or "")
            told[str(command), action.dest] = match[1] if match else None
    assert told["sampler", "seed"] == "0"
    assert told["benchmark sample", "full"] == "configs/uvit_celeba.yaml"
    assert told["benchmark sample", "t_switch"] == "300 500 699"
    assert told["train", "conv"] == "on" and told["train", "qkv_bias"] == "off"
    assert told["train", "use_amp"] is None
