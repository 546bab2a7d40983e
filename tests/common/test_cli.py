"""Options, of every script: what they refuse they refuse while they are parsed, in one line."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from collections.abc import Sequence

import pytest

from common.cli import any_path, real, whole, word_or
from tests.parsers import Command, commands

COMMANDS = commands()
PER_COMMAND = pytest.mark.parametrize("command", COMMANDS, ids=str)
TOO_LARGE = [str(2**63), "9" * 400, "9" * 5000, "-" + "9" * 5000, "1e400", "inf", "-inf", "nan"]
REFUSED = r" is no (whole )?number (in|from|above) -?[0-9]"
MAY_BE_MINUS_1 = {"num_classes", "t_switch"}


def refusal(command: Command, argv: Sequence[str]) -> str:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        command.script.parse_args([*command.words, *argv])
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
    assert names >= {"train", "main", "sampler", "eesampler", "fid", "compare", "calibrate", "pack"}
    assert names >= {"benchmark sample", "benchmark early-exit", "benchmark train", "training.checkpoint"}
    assert names >= {"experiments.results", "experiments.train_classifier"}
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


def test_empty_paths_say_what_to_look_for():
    for command in COMMANDS:
        for action in command.options:
            if action.type is any_path:
                assert "is empty; was a variable meant that is not set?" in refusal(
                    command, [action.option_strings[0], ""]
                )


def test_a_label_without_a_folder(fails):
    import compare

    for text in ("full=", "=", "full", ""):
        fails(compare.main, [text], "wanted LABEL=FOLDER")


@pytest.mark.parametrize(
    "kind, taken, refused",
    [
        (whole(3, 12), ["3", "12", "+7", " 4 "], ["2", "13", "4.0", "1e1", "four", "0x4", ""]),
        (real(0, 1), ["0", "1", "1e-300", "-0"], ["-1e-9", "1.000001", "one", "1,5", ""]),
        (real(0, 1, above=True), ["1e-300", "1"], ["0", "-0", "2"]),
        (word_or("auto", whole(-1, 9)), ["auto", "-1", "9"], ["Auto", "10", ""]),
    ],
)
def test_types_of_numbers(kind, taken, refused):
    assert [kind(text) for text in taken] == [text if text == "auto" else float(text) for text in taken]
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match=REFUSED):
            kind(text)
