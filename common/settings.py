"""Settings as frozen dataclasses: each field is a flag, a YAML key and an entry in the record of a run.

Each field has its help text, its range and its influence on the result (see `option`). The command line, the checks of
YAML files and checkpoints, the record of a run and the comparison of two runs all use these fields. No torch in here,
so that --help stays quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from common.errors import InputError

T = TypeVar("T")
RESULT, CONDITIONS = "result", "conditions"  # decides the images, weights or scores; or how they are made
EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d{1,2}")
KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
PROJECT = Path(__file__).resolve().parents[1]
MOST_DIGITS = 300  # Python refuses to read numbers with thousands of digits


@dataclass(frozen=True)
class About:
    """The metadata of a field."""

    help: str
    least: float | None = None
    most: float | None = None
    above: bool = False  # least itself is out of range
    choices: tuple[str, ...] | None = None
    exists: Literal["file", "folder", "path"] | None = None  # kind of file that must exist
    decides: tuple[str, ...] = (RESULT,)
    why: str = ""  # the reason why the result does not depend on it
    flag: bool = True  # False: set by the script, not by the command line
    group: str = ""  # of --help
    parse: Callable[[str], Any] | None = None  # makes a value of no plain type from text
    positional: bool = False
    metavar: str | None = None
    aliases: tuple[str, ...] = ()  # other names of the flag, which --help leaves out
    kinds: Mapping[str, type] | None = None  # classes of a section, by the value of the field `chosen_by`
    chosen_by: str = ""


def option(
    default: Any = MISSING, help: str = "", *, decides: Sequence[str] = (RESULT,), why: str = "", **about: Any
) -> Any:
    """A field of settings.

    default: a field without one is required; each instance gets a copy of a dict. help: the text of --help, which adds
    the default. least, most: the range of the value, or of the items of a tuple; both are included, but `least` is not
    if `above` is set. choices: the allowed strings. exists: "file", "folder" or "path", the kind of file that must
    exist. decides: RESULT, CONDITIONS (such as the time, the place of the data, the logs), both or neither. why: the
    reason if the result does not depend on the field. flag: False for a field without a flag. group, metavar: see
    --help. parse: makes a value from the text on the command line, for types that are not plain. positional: a
    positional argument instead of a flag. aliases: other names of the flag, such as "--old", which are not in --help;
    not for required fields.
    """
    if RESULT not in decides and not why:
        raise TypeError(f"a field without influence on the result must say why ({help!r})")
    metadata = {"about": About(help, decides=tuple(decides), why=why, **about)}
    if isinstance(default, list):
        raise TypeError("defaults are shared: give a tuple or None")
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(title: str, default: Any = MISSING, *, kinds: Mapping[str, type] | None = None, chosen_by: str = "") -> Any:
    """A field with nested settings.

    title: the title of their group in --help. kinds, chosen_by: for a field of several classes, the class for each
    value of the field `chosen_by` of the same settings. The classes may share fields of the same name and type.
    """
    return dataclasses.field(default=default, metadata={"about": About(title, kinds=kinds, chosen_by=chosen_by)})


@dataclass(frozen=True)
class Field:
    """A field and its analysed type."""

    name: str
    kinds: tuple[Any, ...]  # the possible types without None; those of the items for a tuple
    many: bool  # it is a tuple
    optional: bool  # None is a value: "not applicable"
    default: Any
    about: About

    @property
    def nested(self) -> type[Any] | None:
        """The dataclass of the value, or of the items of a tuple; the first of several."""
        return next(iter(self._dataclasses), None)

    @property
    def sections(self) -> tuple[type[Any], ...]:
        """The dataclasses of nested settings, if the field is a section."""
        return () if self.many else self._dataclasses

    @property
    def _dataclasses(self) -> tuple[type[Any], ...]:
        return tuple(kind for kind in self.kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind))

    def of(self, beside: Mapping[Any, Any], cls: type, where: str) -> Field:
        """The field with its one class, if it may have several.

        beside: the given values of the fields of `cls`. Raises InputError if they choose no class.
        """
        if self.about.kinds is None:
            return self
        name = self.about.chosen_by
        value = beside.get(name, next(f.default for f in fields_of(cls) if f.name == name))
        chosen = self.about.kinds.get(value) if isinstance(value, str) else None
        if chosen is None:
            raise InputError(f"{where}: {name}={shown(value)}: choose one of {', '.join(self.about.kinds)}")
        return dataclasses.replace(self, kinds=(chosen,))


def leaves(cls: type, decides: str) -> Iterator[Field]:
    """The fields of a dataclass of settings, and of its sections, on which the result, or the time, depends."""
    for f in fields_of(cls):
        for nested in f.sections:
            yield from leaves(nested, decides)
        if not f.sections and decides in f.about.decides:
            yield f


def fields_of(cls: type) -> tuple[Field, ...]:
    """The fields of a settings dataclass; fields without `option` have no help and no range."""
    return _fields_of(cls)


@functools.cache
def _fields_of(cls: type) -> tuple[Field, ...]:
    hints, found = get_type_hints(cls), []
    for f in dataclasses.fields(cls):
        kinds = _options_of(hints[f.name])
        optional, kinds = type(None) in kinds, tuple(kind for kind in kinds if kind is not type(None))
        if many := len(kinds) == 1 and get_origin(kinds[0]) in (tuple, list):
            kinds = _options_of(get_args(kinds[0])[0])
        default = f.default if f.default_factory is MISSING else f.default_factory()
        found.append(Field(f.name, kinds, many, optional, default, f.metadata.get("about", About(""))))
    return tuple(found)


def _options_of(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


# Values: of the right type and in their range


class Checked:
    """A dataclass that raises InputError for a value of the wrong type or out of range."""

    def __post_init__(self) -> None:
        for f in fields_of(type(self)):
            check(f, getattr(self, f.name), f.name)


def check(f: Field, value: Any, where: str) -> None:
    """Raises InputError, which begins with `where`, for a value outside the choices or the range of the field."""
    if value is None and f.optional:
        return
    for item in value if f.many else (value,):
        if f.about.choices and item not in f.about.choices:
            raise InputError(f"{where}={shown(item)}: choose one of {', '.join(f.about.choices)}")
        if type(item) in (int, float) and not _in_range(f.about, item):
            raise InputError(f"{where}={shown(item)} is out of range, wanted {range_of(f.about)}")


def _in_range(about: About, value: float) -> bool:
    least = -math.inf if about.least is None else about.least
    most = math.inf if about.most is None else about.most
    return math.isfinite(value) and least <= value <= most and not (about.above and value == least)


def range_of(about: About) -> str:
    """The range as text: "1..4096", "more than 0 and at most 64"."""
    if about.above:
        return f"more than {about.least:g} and at most {about.most:g}"
    if isinstance(about.least, int) and isinstance(about.most, int):
        return f"{about.least}..{about.most}"
    return f"{about.least:g}..{about.most:g}"


def shown(value: object) -> str:
    """A value as short text for a message."""
    if value is None:
        return "none"
    if isinstance(value, int) and value.bit_length() > 256:
        return "a huge number"
    if isinstance(value, str | Path):
        return f"{str(value)!r:.80}"
    if isinstance(value, int | float):
        return f"{value!r:.80}"
    return "a mapping" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def in_words(value: object) -> str:
    """A setting's value for a message, without the marks of Python's lists, mappings and texts; not long."""

    def bare(item: object) -> str:
        return item[:80] if isinstance(item, str) else shown(item)

    if isinstance(value, Mapping):
        value = [f"{key} {bare(item)}" for key, item in itertools.islice(value.items(), 8)]
    text = ", ".join(map(bare, value[:8])) if isinstance(value, list | tuple) else bare(value)
    return text[:80] or "empty"


# From nested plain values: YAML files, checkpoints, JSON


def check_types(cls: type, given: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """`given`, with every key known to the dataclass `cls` and every value of its type, all the way down.

    where: the file, for messages. Raises InputError.
    """
    known = {f.name: f.of(given, cls, where) for f in fields_of(cls)}
    if unknown := sorted(shown(key).strip("'") for key in given if key not in known):
        raise InputError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return {key: _typed(known[key], value, f"{where}: {key}") for key, value in given.items()}


def _typed(f: Field, value: Any, where: str) -> Any:
    if value is None and f.optional:
        return None
    if not f.many:
        return _typed_item(f, value, where)
    if isinstance(value, list | tuple):
        return tuple(_typed_item(f, item, f"{where} {n}") for n, item in enumerate(value, 1))
    raise InputError(f"{where} is {shown(value)}, wanted a list")


def _typed_item(f: Field, value: Any, where: str) -> Any:
    if f.nested and isinstance(value, Mapping):
        _check_own(f, f.nested, value, where)
        return check_types(f.nested, value, where)
    if value == "":
        raise InputError(f"{where} is empty; leave it out, or give a value")
    for kind in f.kinds:
        if get_origin(kind) is Literal and value in get_args(kind):
            return value
        if kind is Path and isinstance(value, str | Path):
            return Path(value)
        if kind is float and type(value) in (int, float) and abs(value) < 1e300:
            return float(value)
        if type(value) is (get_origin(kind) or kind) and not (kind is int and abs(value) >= 2**63):
            return value
        if kind is float and isinstance(value, str) and EXPONENT.fullmatch(value):
            return float(value)  # YAML reads 1.0e-4 as a number, but 1e-4 as text
    names = " or ".join(KINDS.get(get_origin(kind) or kind, "a mapping") for kind in f.kinds)
    raise InputError(f"{where} is {shown(value)}, wanted {names}")


def _check_own(f: Field, kind: type, value: Mapping[Any, Any], where: str) -> None:
    """Raises InputError for a key that another class of the section has, and this one has not."""
    own, kinds = {nested.name for nested in fields_of(kind)}, f.about.kinds or {}
    for name, other in kinds.items():
        if strange := [nested.name for nested in fields_of(other) if nested.name in value and nested.name not in own]:
            here = [name for name, of in kinds.items() if of is kind]
            raise InputError(
                f"{where}: {', '.join(strange)} belongs to {f.about.chosen_by} {name}, not {' or '.join(here)}"
            )


def build(cls: type[T], given: Mapping[str, Any], where: str) -> T:
    """An instance of the dataclass `cls`, and of those in it, from nested plain values.

    where: the file to name in messages. Raises InputError.
    """
    given = check_types(cls, given, where)
    values: dict[str, Any] = {}
    for f in fields_of(cls):
        if f.name in given:
            values[f.name] = _built(f.of(given, cls, where), given[f.name], f"{where}: {f.name}")
    if missing := [f.name for f in fields_of(cls) if f.default is MISSING and f.name not in values]:
        raise InputError(f"{where}: {', '.join(missing)} not given")
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _built(f: Field, value: Any, where: str) -> Any:
    if f.nested is None or value is None:
        return value
    if f.many:
        return tuple(build(f.nested, item, f"{where} {n}") for n, item in enumerate(value, 1))
    return build(f.nested, value, where)


# From the command line


def add_options(
    parser: argparse._ActionsContainer, cls: type, *, partial: bool = False, apart_from: Collection[str] = ()
) -> None:
    """A flag for each field; nested settings are a group of --help.

    The parser returns only the flags on the command line, see `from_flags`. partial: another source may set the fields
    too, so no flag is required, and each bool also has a flag for False. apart_from: fields that already have a flag,
    of another class of the section.
    """
    groups: dict[str, argparse._ActionsContainer] = {"": parser}

    def group(title: str) -> argparse._ActionsContainer:
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        return groups[title]

    for f in fields_of(cls):
        if not f.about.flag or f.name in apart_from:
            continue
        there: dict[str, Field] = {}
        for nested in f.sections:
            fields = {field.name: field for field in fields_of(nested) if field.about.flag}
            if fields.keys() - there.keys():
                add_options(group(_title(f, nested, there)), nested, partial=partial, apart_from=there)
            there |= fields
        if not f.sections:
            flag, argument = f.name if f.about.positional else f"--{f.name}", _argument(f, partial)
            group(f.about.group).add_argument(flag, **argument)
            for alias in f.about.aliases:
                group(f.about.group).add_argument(alias, **argument | {"dest": f.name, "help": argparse.SUPPRESS})


def _title(f: Field, cls: type, there: Mapping[str, Field]) -> str:
    """The title of a section in --help. there: flags of other classes of the section that also apply to this one."""
    if not there:
        return f.about.help or f.name
    names = [name for name, of in (f.about.kinds or {}).items() if of is cls]
    shared = [field for field in fields_of(cls) if field.name in there]
    defaults = ", ".join(f"--{field.name}{_default_of(field)}" for field in shared)
    return f"{f.about.chosen_by} {' or '.join(names)}, which also takes {defaults}"


def _argument(f: Field, partial: bool) -> dict[str, Any]:
    plain_flag = f.kinds == (bool,) and f.default is False and not partial
    text = f.about.help + ("" if plain_flag else _default_of(f))
    about: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
    if f.about.metavar:
        about["metavar"] = f.about.metavar
    if f.kinds == (bool,):
        return about | {"action": "store_true" if plain_flag else argparse.BooleanOptionalAction}
    if f.default is MISSING and not partial and not f.about.positional:
        about["required"] = True
    if f.many and (f.about.positional or not f.about.parse):
        about["nargs"] = "+"
    elif f.about.positional and f.default is not MISSING:
        about |= {"nargs": "?", "default": f.default}  # argparse would use SUPPRESS as the value
    if f.about.choices:
        return about | {"choices": f.about.choices}
    return about | {"type": f.about.parse or parser_of(f)}


def _default_of(f: Field) -> str:
    """The end of a help text; empty for a field without a default, or with its own text for None."""
    if f.default is MISSING or f.default is None or f.default == ():
        return ""
    if isinstance(f.default, bool):
        return f" (default: {'on' if f.default else 'off'})"
    values = f.default if f.many else (f.default,)
    return f" (default: {' '.join(map(_path_or_value, values))})"


def _path_or_value(value: object) -> str:
    """The value as text; paths in the project are relative to it."""
    if isinstance(value, Path) and value.is_relative_to(PROJECT):
        return value.relative_to(PROJECT).as_posix()
    return str(value)


def parser_of(f: Field) -> Callable[[str], Any]:
    """An argparse type: one value of the field from text, in its range."""

    def parse(text: str) -> Any:
        value = _from_text(f, text)
        if f.about.exists:
            _check_exists(value, f.about.exists)
        if type(value) in (int, float) and not _in_range(f.about, value):
            raise argparse.ArgumentTypeError(f"{shown(value)} is out of range, wanted {range_of(f.about)}")
        return value

    return parse


def _from_text(f: Field, text: str) -> Any:
    kinds = f.kinds
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if text in words:
        return text
    if Path in kinds:
        if not text:
            raise argparse.ArgumentTypeError("an empty path; is a variable in the command not set?")
        return Path(text)
    if str in kinds:
        if not text:
            raise argparse.ArgumentTypeError("an empty text; is a variable in the command not set?")
        return text
    kind, name = (int, "whole number") if int in kinds else (float, "number")
    try:
        if len(text) > MOST_DIGITS:
            raise ValueError
        return kind(text)
    except ValueError:
        also = f" or {', '.join(words)}" if words else ""
        raise argparse.ArgumentTypeError(f"{shown(text)} is no {name}{also}") from None


def _check_exists(path: Path, exists: str) -> None:
    there = {"file": path.is_file, "folder": path.is_dir, "path": path.exists}[exists]
    if not there():
        fault = {"file": "is a folder" if path.is_dir() else "no such file", "folder": "no such folder"}
        raise argparse.ArgumentTypeError(f"{path}: {fault.get(exists, 'no such file or folder')}")


def from_flags(cls: type[T], given: Mapping[str, Any], **more: Any) -> T:
    """Settings from the flags on the command line (`vars` of the parser's result).

    more: fields without a flag. Raises InputError.
    """
    values = dict(more)
    for f in fields_of(cls):
        if f.sections:
            values[f.name] = from_flags(f.sections[0], given)
        elif f.name in given:
            values[f.name] = tuple(given[f.name]) if f.many else given[f.name]
    return cls(**values)


def given_of(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The flags on the command line that belong to a dataclass, nested as in a YAML file."""
    found: dict[str, Any] = {}
    for f in fields_of(cls):
        if f.sections and f.about.flag:
            nested = {name: value for cls in f.sections for name, value in given_of(cls, given).items()}
            found |= {f.name: nested} if nested else {}
        elif f.about.flag and f.name in given:
            found[f.name] = given[f.name]
    return found


# Records and their differences


def record(settings: Any, decides: str = RESULT) -> dict[str, Any]:
    """The fields that decide the result, or the conditions, as plain values in one flat mapping."""
    found: dict[str, Any] = {}
    for f in fields_of(type(settings)):
        value = getattr(settings, f.name)
        if f.sections and value is not None:
            found |= record(value, decides)
        elif decides in f.about.decides and not f.sections:
            found[f.name] = plain(value)
    return found


def plain(value: Any) -> Any:
    """The value as JSON types: paths become text, tuples lists, and settings mappings."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(item) for item in value]
    return value.as_posix() if isinstance(value, Path) else value


def flat(settings: Any) -> dict[str, Any]:
    """All fields, also those of nested settings, as plain values in one flat mapping."""
    found: dict[str, Any] = {}
    for f in fields_of(type(settings)):
        value = getattr(settings, f.name)
        found |= flat(value) if f.sections and value is not None else {f.name: plain(value)}
    return found


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested plain values; `upper` overrides `lower`."""
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        merged[key] = merge(below or {}, value) if isinstance(value, Mapping) else value
    return merged


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """The differences of two nested plain values: ["seed (0 and 1)", "networks.0.model_params.depth (3 and 5)"].

    A missing key counts as None.
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        pairs = [(f"{name}.{key}".lstrip("."), one.get(key), other.get(key)) for key in {**one, **other}]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(f"{name}.{i}", *pair) for i, pair in enumerate(zip(one, other, strict=True))]
    else:
        return [] if one == other else [f"{name} ({in_words(one):.40} and {in_words(other):.40})"]
    return [difference for key, a, b in pairs for difference in differences(a, b, key)]
