"""Settings: flags, ranges, records, and what differs between two."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import sampler
from common.cli import Parser
from common.errors import InputError
from common.settings import (
    CONDITIONS,
    RESULT,
    Checked,
    add_options,
    build,
    differences,
    fields_of,
    flat,
    given_of,
    merge,
    option,
    plain,
    record,
    section,
)
from data import CROPS, DATASETS
from generation.settings import EarlyExitSettings, SamplerSettings
from training.settings import TrainingSettings

FILE, OTHER_FILE = Path(__file__), Path(pytest.__file__)


@dataclass(frozen=True, kw_only=True)
class Inner(Checked):
    width: int = option(3, "width", least=1, most=9)
    names: tuple[str, ...] = option((), "names", decides=(), why="names change nothing")


@dataclass(frozen=True, kw_only=True)
class Outer(Checked):
    rate: float = option(help="rate", least=0, most=1, above=True)
    path: Path | None = option(None, "path", exists="file", decides=(CONDITIONS,), why="it is a place")
    fast: bool = option(False, "fast", decides=(RESULT, CONDITIONS))
    inner: Inner = section("inner", Inner())


def parsed(*argv: object) -> Outer:
    return Parser(prog="test").settings(Outer, [str(arg) for arg in argv], network=False)


def test_flags_become_nested_settings():
    assert parsed("--rate", "0.5") == Outer(rate=0.5)
    given = parsed("--rate", "1e-1", "--width", 7, "--names", "a", "b", "--fast", "--path", FILE)
    assert given == Outer(rate=0.1, path=FILE, fast=True, inner=Inner(width=7, names=("a", "b")))


def test_no_two_settings_share_a_default_that_can_be_changed():
    @dataclass(frozen=True, kw_only=True)
    class Described(Checked):
        given: Mapping[str, Any] = option({"depth": 3}, flag=False)

    one, other = Described(), Described()
    one.given["depth"] = 5
    assert other.given == Described().given == {"depth": 3}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--rate", "0"], ["--rate", "more than 0 and at most 1"]),
        (["--rate", "nan"], ["--rate", "out of range"]),
        (["--rate", "9" * 5000], ["--rate", "no number"]),
        (["--rate", "0.5", "--width", 2**63], ["--width", "1..9"]),
        (["--rate", "0.5", "--width", "1.5"], ["--width", "no whole number"]),
        (["--rate", "0.5", "--width", "9" * 400], ["--width", "no whole number"]),
        (["--rate", "0.5", "--path", ""], ["--path", "empty path"]),
        (["--rate", "0.5", "--path", "/no/such"], ["--path", "no such file"]),
        (["--rate", "0.5", "--path", FILE.parent], ["--path", "is a folder"]),
        (["--rate", "0.5", "--names", ""], ["--names", "empty text"]),
        ([], ["--rate"]),
    ],
)
def test_wrong_flags_end_in_one_line(argv, words, fails):
    fails(lambda argv: parsed(*argv), argv, *words)


@dataclass(frozen=True, kw_only=True)
class Renamed(Checked):
    size: int = option(3, "the size", aliases=("--magnitude", "--extent"), least=1, most=9)
    loud: bool = option(False, "loud", aliases=("--noisy",))


def test_an_alias_is_the_flag_itself(capsys, fails):
    """But for --help, which shows one name, and for a message about it, which names the one that was typed."""

    def parse(argv):
        return Parser(prog="test").settings(Renamed, argv, network=False)

    for name in ("--size", "--magnitude", "--extent"):
        assert parse([name, "7"]) == Renamed(size=7)
        fails(parse, [name, "10"], f"argument {name}: 10 is out of range, wanted 1..9")
    assert parse(["--size", "7", "--extent", "8"]).size == 8, "the last one counts, as of a flag given twice"
    assert parse(["--noisy"]) == parse(["--loud"]) == Renamed(loud=True)
    assert parse([]) == Renamed()
    with pytest.raises(SystemExit):
        parse(["--help"])
    said = capsys.readouterr().out
    assert said.count("--size") == 2, "in the usage, and where it is explained"
    assert not any(name in said for name in ("--magnitude", "--extent", "--noisy"))


def test_stages_were_once_called_a_schedule():
    argv = ["--output_folder", "out"]
    by_either = [sampler.parse_settings([flag, str(FILE), *argv]) for flag in ("--stages", "--schedule")]
    assert by_either[0] == by_either[1] and by_either[0].stages == FILE


def test_help_groups_and_defaults(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "inner: --width WIDTH width (default: 3)" in said
    assert "default: None" not in said and "default: False" not in said


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rate": 0.5, "widht": 1}, ["f.yaml: unknown key widht"]),
        ({"rate": "fast"}, ["f.yaml: rate is 'fast'", "a number"]),
        ({"rate": True}, ["f.yaml: rate is True"]),
        ({"rate": 2.0}, ["f.yaml: rate=2.0", "more than 0 and at most 1"]),
        ({"rate": 0.5, "inner": {"width": 10}}, ["f.yaml: ", "width=10", "1..9"]),
        ({"rate": 0.5, "inner": {"names": "ab"}}, ["f.yaml: inner: names", "a list"]),
        ({"rate": 0.5, "inner": None}, ["f.yaml: inner is none", "a mapping"]),
        ({"rate": 0.5, "path": ""}, ["f.yaml: path is empty"]),
        ({"rate": 0.5, "inner": {"names": ["a", ""]}}, ["f.yaml: inner: names 2 is empty"]),
        ({}, ["f.yaml: rate not given"]),
    ],
)
def test_plain_values_are_checked(given, words):
    with pytest.raises(InputError) as raised:
        build(Outer, given, "f.yaml")
    assert all(word in str(raised.value) for word in words), raised.value


def test_plain_values_there_and_back():
    settings = Outer(rate=0.25, path=FILE, inner=Inner(width=2, names=("x",)))
    assert build(Outer, plain(settings), "here") == settings
    assert build(Outer, {"rate": "1e-3"}, "YAML reads 1e-3 as text").rate == 0.001


def test_records():
    settings = Outer(rate=0.5, path=FILE)
    assert record(settings) == {"rate": 0.5, "fast": False, "width": 3}
    assert record(settings, CONDITIONS) == {"path": FILE.as_posix(), "fast": False}
    assert flat(settings) == {"rate": 0.5, "path": FILE.as_posix(), "fast": False, "width": 3, "names": []}


def test_a_field_without_influence_says_why():
    with pytest.raises(TypeError, match="must say why"):
        option(1, "silent", decides=())


def test_differences_and_merging():
    one, other = {"a": 1, "b": {"c": [1, {"d": 2}]}}, {"a": 1, "b": {"c": [1, {"d": 3}]}, "e": 5}
    assert differences(one, one) == []
    assert differences(one, other) == ["b.c.1.d (2 and 3)", "e (none and 5)"]
    assert merge(one, {"b": {"f": 0}}) == {"a": 1, "b": {"c": [1, {"d": 2}], "f": 0}}


# Another value for each field of the settings of runs, where no general rule finds one.
SPECIAL = {
    "class_id": (3,),
    "dataset": next(iter(DATASETS)),
    "crop": CROPS[0],
    "described": {"model_params": {"depth": 3}},
    "device": "mps",
    "command": ("train.py",),
    "n_samples": 7,
    "steps": 7,
    "model": "deediff_uvit",
}


def changed(f, value):
    """Another value of the field."""
    if f.name in SPECIAL and SPECIAL[f.name] != value:
        return SPECIAL[f.name]
    if f.about.choices:
        return next(choice for choice in f.about.choices if choice != value)
    for kind in f.kinds:
        if kind is bool:
            return not value
        if kind in (int, float):
            least, most = f.about.least, f.about.most
            middle = kind(min(most, least + 2)) if value != min(most, least + 2) else kind(least + 1)
            return (middle,) if f.many else middle
        if kind is Path:
            return OTHER_FILE
        if kind is str:
            return "other"
    raise AssertionError(f"no other value for {f.name}")


def leaves(cls, path=()):
    """Every field that is no section, with the sections that lead to it."""
    for f in fields_of(cls):
        if f.sections:
            yield from leaves(f.sections[0], (*path, f.name))
        else:
            yield path, f


def replaced(settings, path, name, value):
    """The settings with one field changed, without the checks of combinations."""
    copied = object.__new__(type(settings))
    for f in dataclasses.fields(settings):
        object.__setattr__(copied, f.name, getattr(settings, f.name))
    inner = replaced(getattr(settings, path[0]), path[1:], name, value) if path else value
    object.__setattr__(copied, path[0] if path else name, inner)
    return copied


RUNS = {
    SamplerSettings: {"checkpoint_path": FILE, "output_folder": Path("out")},
    EarlyExitSettings: {"checkpoint_path": FILE, "output_folder": Path("out"), "threshold": 0.1},
}


@pytest.mark.parametrize(
    ("cls", "path", "f"),
    [(cls, *leaf) for cls in (SamplerSettings, EarlyExitSettings, TrainingSettings) for leaf in leaves(cls)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_no_option_is_forgotten_in_the_record(cls, path, f):
    """A setting that is changed changes the record of the run, or says why the result does not depend on it."""
    if cls is TrainingSettings:
        settings = build(cls, {"model": "uvit", "n_steps": 5, "data": {"dataset": "digits"}}, "test")
    else:
        settings = cls(**RUNS[cls])
    at = settings
    for part in path:
        at = getattr(at, part)
    other = replaced(settings, path, f.name, changed(f, getattr(at, f.name)))
    assert other != settings
    if record(other) == record(settings):
        assert len(f.about.why) > 10, f"--{f.name} is not recorded, and does not say why"
    else:
        assert RESULT in f.about.decides


@dataclass(frozen=True, kw_only=True)
class Round(Checked):
    size: int = option(1, "size", least=1, most=9)
    radius: int = option(2, "radius", least=1, most=9)


@dataclass(frozen=True, kw_only=True)
class Square(Checked):
    size: int = option(5, "size", least=1, most=9)
    side: int = option(help="side", least=1, most=9)


@dataclass(frozen=True, kw_only=True)
class Shaped(Checked):
    shape: str = option("round", choices=("round", "square"), flag=False)
    params: Round | Square = section("measures", kinds={"round": Round, "square": Square}, chosen_by="shape")


def test_a_section_whose_class_another_field_chooses(capsys):
    assert build(Shaped, {"params": {}}, "f").params == Round()
    square = build(Shaped, {"shape": "square", "params": {"side": 3}}, "f")
    assert square.params == Square(side=3) and build(Shaped, plain(square), "f") == square
    for given, words in [
        ({"params": {"side": 3}}, "f: params: side belongs to shape square, not round"),
        ({"shape": "square", "params": {}}, "f: params: side not given"),
        ({"shape": "flat", "params": {}}, "f: shape='flat': choose one of round, square"),
        ({"shape": ["square"], "params": {}}, "f: shape=a list: choose one of"),
        ({"shape": "square", "params": {"side": 3, "width": 1}}, "f: params: unknown key width; known are side, size"),
    ]:
        with pytest.raises(InputError) as raised:
            build(Shaped, given, "f")
        assert words in str(raised.value)


def test_flags_of_such_a_section_are_those_of_all_its_classes(capsys):
    parser = Parser(prog="test")
    add_options(parser, Shaped, partial=True)
    given = vars(parser.parse_args(["--size", "3", "--side", "4"]))
    assert given_of(Shaped, given) == {"params": {"size": 3, "side": 4}}
    said = " ".join(parser.format_help().split())
    assert said.count("--size SIZE") == 2, "in the usage, and once below"
    assert "shape square, which also takes --size (default: 5): --side SIDE" in said
