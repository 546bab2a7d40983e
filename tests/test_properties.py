"""Broken input of every kind, made by machine: a script ends in one line and status 2, or it works.

The suite tries a few dozen of each kind. HYPOTHESIS_PROFILE=thousands tries 3,000 (600 where each is slow), others
each time.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import compare
import eesampler
import fid
import pack
import sampler
from common.errors import command
from common.settings import Field, flat
from data.files import SUFFIXES
from tests.conftest import TINY
from tests.parsers import Command, commands

CLASSIFIER = Path(__file__).parents[1] / "experiments" / "digits_classifier.pt"
QUICK = ["--solver", "ddim", "--steps", "1", "--n_samples", "1", "--device", "cpu", "--quiet"]
SOME = settings(max_examples=settings().max_examples // 5)  # where an example runs several scripts
pytestmark = pytest.mark.usefixtures("modest_memory")


def outcome(main: Callable[[list[str]], None], argv: Sequence[object]) -> int:
    """Runs a script. Returns its status, 0 or 2, once it is sure that 2 came with one line and no traceback."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of casts and of numbers that overflow
        try:
            main([str(arg) for arg in argv])
        except SystemExit as ended:
            assert ended.code == 2, said.getvalue()
            assert said.getvalue().count("\n") == 1 and len(said.getvalue()) < 20_000, said.getvalue()
            return 2
    return 0


def sampled(folder: Path, status: int) -> None:
    """A run that worked left its sample and its report, one that did not left nothing."""
    made = sorted(path.name for path in folder.glob("*")) if folder.exists() else []
    assert made == ([] if status else ["000000.png", "report"])
    assert status or (folder / "report" / "statistics.json").exists()


@pytest.fixture
def emptied(tmp_path):
    """Called at the start of an example: the test's folder, without what the example before left in it."""

    def empty() -> Path:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        return tmp_path

    return empty


# How things break

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from(
        [0, 1, -1, 2**31, 2**63, 10**400, 1e308, -1e308, 1e-320, math.inf, math.nan, "", "1e-4", "\0", "é"]
    ),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


@st.composite
def altered(draw: st.DrawFn, tree: Any) -> Any:
    """Nested values of which one has another value, is missing or has a key too many."""
    if not isinstance(tree, dict | list) or not tree or draw(st.integers(0, 9)) == 0:
        return draw(ODD)
    place = draw(st.sampled_from(sorted(tree, key=str) if isinstance(tree, dict) else range(len(tree))))
    copy = tree.copy()
    deed = draw(st.sampled_from(["alter", "alter", "alter", "remove", "add"]))
    if deed == "alter":
        copy[place] = draw(altered(tree[place]))
    elif deed == "remove":
        del copy[place]
    elif isinstance(tree, dict):
        copy[draw(st.text(max_size=8))] = draw(ODD)
    else:
        copy.append(draw(ODD))
    return copy


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of which some are changed, missing or too many."""
    at = draw(st.integers(0, len(content)))
    some = draw(st.binary(min_size=1, max_size=8))
    return draw(
        st.sampled_from(
            [
                content[:at],
                content[at:],
                content[:at] + some + content[at:],
                content[:at] + some + content[at + len(some) :],
                content[:at] + some + content[at + len(some) :],
                content[:at] + content[at + len(some) :],
                content + some,
                some,
                b"",
            ]
        )
    )


# Networks' descriptions


@pytest.fixture(scope="module")
def bare(full, tmp_path_factory):
    """Weights without a description, and the description they need."""
    folder = tmp_path_factory.mktemp("bare")
    content = torch.load(full, weights_only=True)
    torch.save(content["model"], folder / "bare.pth")
    return folder / "bare.pth", {
        "model": "uvit",
        "model_params": TINY | {"depth": 5, "mlp_ratio": 4, "qkv_bias": False, "num_classes": -1},
        "diffusion_params": {"num_timesteps": 20, "beta_start": 1e-4, "beta_end": 0.02, "time_scale": 1.0},
        "parametrization": "predict_noise",
    }


@given(data=st.data())
@pytest.mark.slow
def test_yaml(data, bare, emptied):
    tmp_path = emptied()
    weights, settings = bare
    path = tmp_path / "odd.yaml"
    if data.draw(st.booleans()):
        path.write_text(yaml.safe_dump(data.draw(altered(settings)), allow_unicode=data.draw(st.booleans())), "utf-8")
    else:
        path.write_bytes(data.draw(damaged(yaml.safe_dump(settings).encode())))
    argv = ["--checkpoint_path", weights, "--config_path", path, "--output_folder", tmp_path / "s", *QUICK]
    sampled(tmp_path / "s", outcome(sampler.main, argv))


@given(data=st.data())
def test_yaml_that_ships(data, full, emptied):
    """Beside a checkpoint that describes itself: what contradicts it is refused before anything is made."""
    tmp_path = emptied()
    source = data.draw(st.sampled_from(sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))))
    (tmp_path / "odd.yaml").write_bytes(data.draw(damaged(source.read_bytes())))
    argv = ["--checkpoint_path", full, "--config_path", tmp_path / "odd.yaml", "--output_folder", tmp_path / "s"]
    sampled(tmp_path / "s", outcome(sampler.main, [*argv, *QUICK]))


# Checkpoints


@pytest.fixture(scope="module")
def checkpoints(full, early_exit, bare, tmp_path_factory):
    """Name -> a whole file of each kind that is read, its script and what else the script needs."""
    folder = tmp_path_factory.mktemp("checkpoints")
    weights, settings = bare
    (folder / "net.yaml").write_text(yaml.safe_dump(settings))
    described = ["--config_path", folder / "net.yaml"]
    content, state_dict = torch.load(full, weights_only=True), torch.load(weights, weights_only=True)
    torch.save(state_dict, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    original = {"model_state_dict": state_dict, "num_steps": 3, "args": argparse.Namespace(lr=1e-4, name="x")}
    torch.save(original, folder / "original.pth")
    save_file(state_dict, folder / "plain.safetensors")
    about = {"config": json.dumps(content["config"]), "weights": "ema", "step": "4"}
    save_file(state_dict, folder / "described.safetensors", about)
    return {
        "checkpoint": (full, sampler.main, []),
        "early exit": (early_exit, eesampler.main, ["--threshold", 0.5]),
        "state dict": (weights, sampler.main, described),
        "legacy": (folder / "legacy.pth", sampler.main, described),
        "original": (folder / "original.pth", sampler.main, described),
        "plain safetensors": (folder / "plain.safetensors", sampler.main, described),
        "described safetensors": (folder / "described.safetensors", sampler.main, []),
    }


KINDS = ("checkpoint", "early exit", "state dict", "legacy", "original", "plain safetensors", "described safetensors")


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_damaged_checkpoints(kind, data, checkpoints, emptied):
    tmp_path = emptied()
    whole, main, more = checkpoints[kind]
    content = whole.read_bytes()
    # Most bytes are weights, which may be anything: damage the beginning or the end, where the structure is.
    edge = data.draw(st.sampled_from([len(content), 600, 3000]))
    if data.draw(st.booleans()):
        content = data.draw(damaged(content[:edge])) + content[edge:]
    else:
        content = content[:-edge] + data.draw(damaged(content[-edge:]))
    path = tmp_path / f"odd{whole.suffix}"
    path.write_bytes(content)
    argv = ["--checkpoint_path", path, *more, "--output_folder", tmp_path / "s", *QUICK]
    sampled(tmp_path / "s", outcome(main, argv))


TENSORS = st.one_of(
    st.sampled_from([torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64]).map(
        lambda dtype: torch.zeros(32).to(dtype)
    ),
    st.lists(st.integers(0, 3), max_size=4).map(torch.zeros),
    st.sampled_from([math.nan, math.inf]).map(lambda value: torch.full((32,), value)),
)


@pytest.mark.parametrize("kind", ["checkpoint", "early exit", "original"])
@SOME
@given(data=st.data())
@pytest.mark.slow
def test_altered_checkpoints(kind, data, checkpoints, emptied):
    """Files that torch reads, with other things in them than they should have."""
    tmp_path = emptied()
    whole, main, more = checkpoints[kind]
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(whole, weights_only=True)
    if data.draw(st.booleans()):
        content = data.draw(altered(content))
    else:
        part = content[
            data.draw(st.sampled_from([key for key in ("model", "ema", "model_state_dict") if key in content]))
        ]
        part[data.draw(st.sampled_from(sorted(part)))] = data.draw(TENSORS)
    torch.save(content, tmp_path / "odd.pth")
    argv = ["--checkpoint_path", tmp_path / "odd.pth", *more, "--output_folder", tmp_path / "s", *QUICK]
    sampled(tmp_path / "s", outcome(main, argv))


# Folders of images, and what lies beside them


@pytest.fixture(scope="module")
def pictures():
    """Suffix -> a whole image of 8 x 8 pixels in this format."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    files = {}
    for suffix in sorted(SUFFIXES):
        file = io.BytesIO()
        (image.convert("L") if suffix == ".pgm" else image).save(file, Image.registered_extensions()[suffix])
        files[suffix] = file.getvalue()
    return files


@pytest.fixture(scope="module")
def mean_colour(tmp_path_factory):
    """A feature extractor for images in colour."""
    path = tmp_path_factory.mktemp("extractor") / "mean.pt"
    torch.jit.trace(lambda x: x.float().mean(dim=(2, 3)), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).save(str(path))
    return path


@given(data=st.data())
def test_images(data, pictures, mean_colour, emptied):
    """In a folder of samples and in a dataset."""
    tmp_path = emptied()
    folder = tmp_path / "images"
    folder.mkdir(exist_ok=True)
    suffix, other = data.draw(st.sampled_from(sorted(pictures))), data.draw(st.sampled_from(sorted(pictures)))
    (folder / f"0{other}").write_bytes(pictures[other])
    (folder / f"1{suffix}").write_bytes(data.draw(damaged(pictures[suffix])))
    flags = ["--feature_extractor", mean_colour, "--device", "cpu", "--quiet"]
    status = outcome(fid.main, ["--samples_path", folder, "--reference", folder, *flags])
    assert (folder / "report" / "metrics.json").exists() == (status == 0)
    argv = ["--dataset", "folder", "--data_path", folder, "--img_size", 8, "--output", tmp_path / "packed"]
    status = outcome(pack.main, [*argv, "--num_workers", 0, "--quiet"])
    assert (tmp_path / "packed" / "manifest.json").exists() == (status == 0)


@pytest.fixture(scope="module")
def finished(full, tmp_path_factory):
    """A scored folder of samples."""
    folder = tmp_path_factory.mktemp("finished") / "s"
    argv = ["--checkpoint_path", full, "--output_folder", folder, *QUICK, "--n_samples", 3, "--batch_size", 2]
    assert outcome(sampler.main, argv) == 0
    assert outcome(fid.main, ["--samples_path", folder, "--reference", folder, *SCORE]) == 0
    return folder


SCORE = ["--feature_extractor", CLASSIFIER, "--device", "cpu", "--quiet"]
REPORTS = ("statistics.json", "metrics.json", "run.json", "batches/000000-000001.npz")


@pytest.mark.parametrize("name", REPORTS)
@SOME
@given(data=st.data())
def test_reports(name, data, full, finished, emptied):
    """What a run left is read by those who go on with it, score it and compare it."""
    tmp_path = emptied()
    folder = tmp_path / "s"
    shutil.copytree(finished, folder)
    path = folder / "report" / name
    if path.suffix == ".json" and data.draw(st.booleans()):
        path.write_text(json.dumps(data.draw(altered(json.loads(path.read_text())))))
    else:
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    with mock.patch("evaluation.picture.draw"):  # slow, and of numbers that have been read
        outcome(compare.main, [f"a={folder}", f"b={finished}", "--output", tmp_path / "x.png"])
    outcome(fid.main, ["--samples_path", folder, "--reference", finished, *SCORE])
    argv = ["--checkpoint_path", full, "--output_folder", folder, *QUICK, "--n_samples", 3, "--batch_size", 2]
    outcome(sampler.main, argv)
    for n in range(3):  # the samples are those of the run, whatever its report said
        assert (folder / f"{n:06d}.png").read_bytes() == (finished / f"{n:06d}.png").read_bytes()


@given(data=st.data())
def test_statistics(data, finished, emptied):
    tmp_path = emptied()
    path = tmp_path / "odd.npz"
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3), n=np.asarray(7))
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    outcome(fid.main, ["--samples_path", finished, "--reference", path, *SCORE])


# Datasets


@given(data=st.data())
def test_packed_datasets(data, pictures, emptied):
    """A finished one, and one that was begun."""
    tmp_path = emptied()
    images, packed = tmp_path / "images", tmp_path / "packed"
    images.mkdir()
    (images / "0.png").write_bytes(pictures[".png"])
    argv = ["--dataset", "folder", "--data_path", images, "--img_size", 8, "--num_workers", 0, "--quiet"]
    assert outcome(pack.main, [*argv, "--output", packed]) == 0
    manifest = json.loads((packed / "manifest.json").read_text())
    path = data.draw(st.sampled_from(sorted(packed.iterdir())))
    if path.suffix == ".json" and data.draw(st.booleans()):
        path.write_text(json.dumps(data.draw(altered(manifest))))
    else:
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    Image.new("RGB", (8, 8)).save(tmp_path / "000000.png")
    score = [
        "--samples_path",
        tmp_path,
        "--dataset",
        "folder",
        "--data_path",
        packed,
        "--cache_dir",
        tmp_path / "cache",
    ]
    outcome(fid.main, [*score, *SCORE])
    outcome(pack.main, [*argv, "--output", packed])
    begun = tmp_path / "begun.partial"
    packed.rename(begun)
    (begun / "manifest.json").unlink(missing_ok=True)
    plan = json.dumps(data.draw(altered({"source": manifest["source"], "chunk_images": 64})))
    (begun / "plan.json").write_text(plan)
    (begun / "journal.jsonl").write_bytes(data.draw(damaged(b'{"number": 0, "crc32": 1, "broken": {}}\n')))
    status = outcome(pack.main, [*argv, "--output", tmp_path / "begun"])
    assert (tmp_path / "begun").exists() == (status == 0)


# Flags


COMMANDS = commands()
FLAGS = [
    (which, action)
    for which in COMMANDS
    for action in which.parser._actions
    if action.option_strings and action.option_strings[0] not in ("-h", "--help")
]


def field_of(action: argparse.Action) -> Field | None:
    """The field behind a flag, where its type knows it."""
    return inspect.getclosurevars(action.type).nonlocals.get("f") if inspect.isfunction(action.type) else None


RANGED = [(s, a) for s, a in FLAGS if (f := field_of(a)) and f.about.least is not None]
NUMBERS = st.one_of(
    st.integers().map(str),
    st.floats().map(repr),
    st.text(max_size=12),
    st.from_regex(r"[+-]?[0-9_]{0,5}(\.[0-9]{0,3})?([eE][+-]?[0-9]{1,4})?", fullmatch=True),
    st.sampled_from(
        ["", " ", "nan", "-inf", "1e400", "0x10", "٣", "1_0", "9" * 5000, "--", "-", "\udcff", "1 2", "None"]
    ),
)


def value_for(action: argparse.Action, there: Path) -> list[str]:
    """What makes an option that must be given acceptable."""
    if action.choices:
        return [str(next(iter(action.choices)))]
    if (f := field_of(action)) and f.about.exists:
        return [str(there if f.about.exists == "file" else there.parent)]
    return ["1"]


def parsed(which: Command, argv: list[str]) -> dict[str, Any] | None:
    """What a script's options came to; None if they were refused, in one line."""
    found: list[Any] = []
    status = outcome(command(lambda argv: found.append(which.script.parse_settings(argv))), [*which.words, *argv])
    if status:
        return None
    settings = found[0][1] if which.words else found[0]  # with the sub-command before them
    return flat(settings) | flattened(getattr(settings, "described", None) or {})


def flattened(described: dict[str, Any]) -> dict[str, Any]:
    """A network's own flags, without the sections they are in."""
    flags: dict[str, Any] = {}
    for name, value in described.items():
        flags |= flattened(value) if isinstance(value, dict) else {name: value}
    return flags


def required(which: Command, but: argparse.Action, there: Path) -> list[str]:
    argv = []
    for action in which.parser._actions:
        needed = action.required or action.dest in ("checkpoint_path", "reference")
        if needed and action is not but and action.dest != but.dest:
            argv += action.option_strings[:1] + value_for(action, there)
    return argv


@pytest.fixture(scope="module")
def a_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("there") / "file"
    path.write_text("x")
    return path


def test_flags_with_a_range_are_found():
    """By what their types remember: were that to change, the test below would try nothing."""
    found = {which.script.__name__.rpartition(".")[2] for which, _ in RANGED}
    assert len(RANGED) > 150 and found >= {"train", "main", "sampler", "eesampler", "fid", "pack", "benchmark"}


@given(data=st.data())
def test_flags_with_a_range(data, a_file):
    which, action = data.draw(st.sampled_from(RANGED))
    about = field_of(action).about
    least, most = about.least, about.most
    near = [str(bound + step) for bound in (least, most) for step in (-1, 0, 1, 0.5, -1e-9)]
    text = data.draw(st.one_of(NUMBERS, st.sampled_from(near)))
    settings = parsed(which, [*required(which, action, a_file), f"{action.option_strings[0]}={text}"])
    if settings is not None:
        value = settings[action.dest]
        assert all(least <= number <= most for number in (value if isinstance(value, list) else [value]))


@given(data=st.data())
def test_all_flags(data, a_file):
    which, action = data.draw(st.sampled_from(FLAGS))
    text = data.draw(st.one_of(NUMBERS, st.text(max_size=300), st.just(str(a_file)), st.just("x" * 5000)))
    parsed(which, [*required(which, action, a_file), f"{action.option_strings[0]}={text}".replace("\0", "")])
