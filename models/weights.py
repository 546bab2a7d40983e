"""Read weights from files of this and other projects."""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.config import Config
from common.errors import InputError
from common.files import check_regular, encodable, read_json
from common.settings import check_types, differences, plain
from models.dit import DiT, without_variance
from models.early_exit import EarlyExitUViT, MlpProbes
from models.pickles import check_pickles, check_sums, is_zip

log = logging.getLogger(__name__)

FORMAT = "duodiff-1"  # format of this project's checkpoints and exported folders
IN_FOLDER = "model.safetensors"  # the weights of an exported folder, next to its config.json
# Keys of every description by this project; descriptions by other projects are ignored.
DESCRIPTION = {"model", "model_params", "parametrization", "diffusion_params"}
# Prefixes of training wrappers (DataParallel, torch.compile).
WRAPPERS = re.compile(r"(?:(?:^|(?<=\.))(?:module|_orig_mod)\.)+")
AVERAGED = re.compile(r"(?<![a-z])ema(?![a-z])", re.IGNORECASE)  # entries of a file with averaged weights
MAPPED_AT_ONCE = 2**24  # bytes of a safetensors file
MOST_NESTED, MOST_NAMES, LONGEST_NAME = 4, 200_000, 500  # of entries in entries of a file, and of their names


class Weights(NamedTuple):
    """The weights in a file."""

    state_dict: dict[str, Tensor]  # ENTRY.NAME for a tensor in an entry of the file
    settings: dict[str, Any] | None  # the description in the file (see common.config), if any
    kind: str  # "ema" or "raw"; "unknown" if the file does not record it
    step: int | None  # optimiser steps of the training
    entries: Sequence[str] = ()  # the entries of a file with nested state dicts
    entry: str = ""  # the chosen one, see `fitting`


def load_weights(model: nn.Module, path: str | os.PathLike[str], weights: str = "ema") -> None:
    """Load a file into a UViT, DiT or EarlyExitUViT.

    Reads .safetensors and .pth: this project's checkpoints, plain state dicts such as the public ones, the original
    DuoDiff authors' checkpoints, names with prefixes of wrappers, files with several state dicts of which one fits, and
    the folders of export.py.
    Only tensors and plain values are unpickled. A DiT without a learned variance accepts weights with one.

    weights: "ema" (if the file has them) or "raw".
    Raises InputError for a file that is missing, damaged, not finite or does not fit the model; the model is then
    unchanged.
    """
    path = Path(path)
    model.load_state_dict(check_fit(model, read_weights(path, weights), path, weights).state_dict)


def read_weights(path: str | os.PathLike[str], weights: str = "ema") -> Weights:
    """Read the weights in a file onto the CPU. `check_fit` then chooses the entry of the file that fits.

    The tensors of a .pth file are mapped: a checkpoint's other parts, such as the state of its optimizer, take no
    memory. A caller that keeps the tensors after the file may change must copy them.
    """
    path = Path(path)
    if path.is_dir():
        return _read_exported(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = read_pth(path, mapped=True)
    if content.get("format") == FORMAT:
        state_dict, kind = content["model"], "raw"
        if weights == "ema" and content.get("ema") is not None:
            state_dict, kind = state_dict | content["ema"], "ema"
        return Weights(state_dict, check_types(Config, content["config"], str(path)), kind, content["step"])
    entries = sorted(content) if any(isinstance(value, Mapping) for value in content.values()) else []
    if not (state_dict := _tensors_by_name(content, path)):
        raise InputError(f"{path}: contains no state dict of tensors, only {_shortened(sorted(content))}")
    return Weights(state_dict, None, "unknown", None, entries)


def is_exported(folder: Path) -> bool:
    """Whether it is a folder that export.py wrote."""
    path = folder / "config.json"
    content = read_json(path) if path.is_file() else None
    return isinstance(content, dict) and content.get("format") == FORMAT


def _read_exported(folder: Path) -> Weights:
    """A folder that export.py wrote. The file of weights also contains the description, as a check."""
    if not is_exported(folder):
        raise InputError(f"{folder}: is a folder that is not from export.py; wanted a file of weights")
    read = _read_safetensors(folder / IN_FOLDER)
    carried = read_json(folder / "config.json").get("config")
    described = check_types(Config, carried if isinstance(carried, dict) else {}, f"{folder / 'config.json'}: config")
    if different := differences(plain(read.settings), plain(described)):
        raise InputError(
            f"{folder}: config.json and {IN_FOLDER} belong to different networks: they differ in {', '.join(different)}"
        )
    return read


def _tensors_by_name(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors of nested mappings under dotted names. Raises InputError for more names than a network can have."""
    found: dict[str, Tensor] = {}
    waiting: list[tuple[str, Mapping[Any, Any], int]] = [("", content, 0)]
    met = 0  # all visited names: a mapping may contain another many times
    while waiting:
        prefix, mapping, depth = waiting.pop()
        if (met := met + len(mapping)) > MOST_NAMES:
            raise InputError(f"{path}: more than {MOST_NAMES:,} names, too many for any supported network")
        for key, value in mapping.items():
            name = f"{prefix}{key}" if isinstance(key, str) else None  # optimizers count their tensors
            if isinstance(value, Tensor) and name is not None:
                if name in found or len(name) > LONGEST_NAME:
                    raise InputError(f"{path}: two of its tensors, or one with a too long name, are called {name:.80}")
                found[name] = value
            elif isinstance(value, Mapping) and name is not None and depth < MOST_NESTED:
                waiting.append((f"{name:.{LONGEST_NAME}}.", value, depth + 1))
    return found


def _shortened(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(name[:80] for name in names[:most]) + (", ..." if len(names) > most else "")


def read_pth(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """The mapping in a torch file. Only tensors and plain values are unpickled.

    mapped: map the file into memory, if its format allows, instead of reading all of it.
    """
    try:
        check_pickles(path)
        check_sums(path)
        content = _load_pth(path, mapped and is_zip(path))
        for tensor in tensors_in(content):
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise ValueError(f"a tensor of {tuple(tensor.shape)} claims more numbers than it holds")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (MemoryError, InputError):
        raise
    except Exception as error:  # damaged bytes make the unpickler raise any error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{path}: not readable as a checkpoint; cut short, or another format? ({reason:.120})"
        ) from None
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path}: contains no state dict but a {type(content).__name__}")
    content = dict(content)
    if content.get("format") == FORMAT and not _whole(content):
        raise InputError(f"{path}: a checkpoint of this project, but parts of it are missing")
    return content


def _whole(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint of this project has all entries that its readers need."""
    model, ema, config, step = (content.get(key) for key in ("model", "ema", "config", "step"))
    averaged = ema is None or (isinstance(ema, dict) and _all_tensors(ema))
    return (
        isinstance(model, dict) and _all_tensors(model) and averaged and isinstance(config, dict) and type(step) is int
    )


def _load_pth(path: Path, mapped: bool) -> Any:
    with warnings.catch_warnings(), encodable(path) as file:
        warnings.simplefilter("ignore", UserWarning)  # torch warns about bytes that are not a pickle
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            if "argparse.Namespace" not in str(error):
                raise
        # The original authors' checkpoints include their options as a Namespace, which runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


def _read_safetensors(path: Path) -> Weights:
    check_regular(path)
    try:
        with encodable(path) as plain_path, safe_open(plain_path, framework="pt") as file:
            about = file.metadata() or {}
            names = list(file.keys())
        state_dict = _read_tensors(path, names)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: not readable as safetensors; cut short? ({error!s:.120})") from None
    try:
        settings = json.loads(about["config"])
    except (KeyError, ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict) or not settings.keys() >= DESCRIPTION:
        return Weights(state_dict, None, "unknown", None)  # metadata of another project
    kind, step = about.get("weights"), about.get("step", "")
    return Weights(
        state_dict,
        check_types(Config, settings, str(path)),
        kind if kind in ("ema", "raw") else "unknown",
        int(step) if re.fullmatch(r"\d{1,18}", step) else None,
    )


def _read_tensors(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Copies of the tensors. What was read of a file stays in memory until it closes, so it is opened several times."""
    found: dict[str, Tensor] = {}
    remaining = iter(names)
    while len(found) < len(names):
        with encodable(path) as plain_path, safe_open(plain_path, framework="pt") as file:
            size = 0
            while size < MAPPED_AT_ONCE and (name := next(remaining, None)) is not None:
                found[name] = file.get_tensor(name).clone()
                size += found[name].nbytes
    return found


def check_fit(model: nn.Module, read: Weights, source: str | Path, weights: str = "ema") -> Weights:
    """`fitting`, which logs the entry too. Raises InputError unless all numbers are floating-point and finite."""
    fits = fitting(model, read, source, weights)
    check_numbers(_candidates(read.state_dict)[fits.entry], source, fits.entry)
    if fits.entry:
        log.warning("%s: using the entry %s, which fits the network", source, fits.entry)
    return fits


def fitting(model: nn.Module, read: Weights, source: str | Path, weights: str = "ema") -> Weights:
    """The weights in `read` that fit the model, with the names of the model.

    The file may contain them directly or in an entry. weights: if several entries fit, "ema" prefers averaged weights
    and "raw" the others. source: the file, for messages. Raises InputError unless exactly one entry fits.
    """
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    candidates = _candidates(read.state_dict)
    fits: dict[str, dict[str, Tensor]] = {}
    for entry, state_dict in candidates.items():
        inside_another = any(entry.startswith(f"{other}." if other else "") for other in fits)
        if not inside_another and _fits(renamed := _renamed(model, state_dict), wanted):
            fits[entry] = renamed
    if not fits:
        raise InputError(f"{source}: weights do not fit the network: {_nearest_misfit(model, read, candidates)}")

    averaged = [entry for entry in fits if AVERAGED.search(entry)]
    others = [entry for entry in fits if entry not in averaged]
    chosen = averaged or others if weights == "ema" else others or averaged
    if len(chosen) > 1:
        raise InputError(
            f"{source}: several of its entries fit the network ({_shortened(sorted(chosen))}); save the one you mean "
            "as a file of its own"
        )
    entry, kind = chosen[0], read.kind
    if kind == "unknown" and averaged:
        kind = "ema" if entry in averaged else "raw"
    if weights == "raw" and kind == "ema":
        raise InputError(f"{source} has only averaged weights; leave out --weights raw")
    return read._replace(state_dict=fits[entry], kind=kind, entry=entry)


def check_numbers(state_dict: Mapping[str, Tensor], source: str | Path, entry: str = "") -> None:
    """Raises InputError, which names the tensor, unless all tensors are floating-point and finite."""
    for name, tensor in state_dict.items():
        name = f"{entry}.{name}" if entry else name
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputError(f"{source}: {name} contains numbers of {kind}, wanted floating-point numbers")
        if not tensor.float().isfinite().all():  # in fp32, where larger numbers of fp64 are infinite
            raise InputError(
                f"{source}: {name} contains numbers that are not finite; take weights from before the training diverged"
            )


def _candidates(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Candidates for a network: all tensors, under "", and the tensors under each prefix, shortest prefix first."""
    found: dict[str, dict[str, Tensor]] = {"": dict(state_dict)}
    for name, tensor in state_dict.items():
        parts = name.split(".", MOST_NESTED)
        for n in range(1, len(parts)):
            found.setdefault(".".join(parts[:n]), {})[".".join(parts[n:])] = tensor
    return dict(sorted(found.items(), key=lambda item: (item[0] != "", item[0].count("."))))


def _renamed(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with wrapper prefixes and known foreign names replaced by the names of the model."""
    given = {WRAPPERS.sub("", key): value for key, value in state_dict.items()}
    if len(given) < len(state_dict):  # a network beside a wrapped one, which are two entries
        given = dict(state_dict)
    if isinstance(model, DiT):
        return without_variance(given, model.config)
    return _from_original_names(given, model) if isinstance(model, EarlyExitUViT) else given


def _fits(given: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> bool:
    return given.keys() == wanted.keys() and all(given[key].shape == shape for key, shape in wanted.items())


def _misfits(given: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> dict[str, list[str]]:
    """The names that do not fit, by kind of fault."""
    shapes = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(shape)}"
        for key, shape in wanted.items()
        if key in given and given[key].shape != shape
    ]
    missing, unexpected = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    found = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    return {what: names for what, names in found.items() if names}


def _nearest_misfit(model: nn.Module, read: Weights, candidates: Mapping[str, Mapping[str, Tensor]]) -> str:
    """A message about the candidate with the fewest faults, and the entries of the file."""
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    misfits = {
        entry: _misfits(_renamed(model, state_dict), wanted)
        for entry, state_dict in candidates.items()
        if not entry or 2 * len(state_dict) >= len(wanted)
    }
    entry = min(misfits, key=lambda entry: sum(map(len, misfits[entry].values())))
    problems = [f"{len(names)} {what} ({_shortened(names, 3)})" for what, names in misfits[entry].items()]
    return (
        "; ".join(problems)
        + (f" in its entry {entry}" if entry else "")
        + (f"; its entries are {_shortened(read.entries)}" if read.entries else "")
    )


def _from_original_names(given: Mapping[str, Tensor], model: EarlyExitUViT) -> dict[str, Tensor]:
    """Rename the original authors' exit heads and gather their probes into this project's tables."""
    if not any(key.startswith("matrix.") for key in given):
        return dict(given)
    middle = model.num_layers // 2
    renamed: dict[str, Tensor] = {}
    probes: dict[str, Tensor] = {}
    for key, value in given.items():
        if key.startswith("matrix."):
            probes[key.removeprefix("matrix.")] = value
        elif match := re.fullmatch(r"(in|out)_blocks_heads\.(\d+)\.(.+)", key):
            layer = int(match[2]) + (middle + 1 if match[1] == "out" else 0)
            renamed[f"exit_heads.{layer}.{match[3]}"] = value
        elif key.startswith("mid_block_head."):
            renamed[key.replace("mid_block_head", f"exit_heads.{middle}")] = value
        else:
            renamed[key] = value
    if not isinstance(model.probes, MlpProbes):
        return renamed | {f"probes.{key}": value for key, value in probes.items()}

    num_layers, num_timesteps = model.probes.bias.shape
    if len(probes) != 2 * num_layers * num_timesteps:
        return renamed | {f"matrix.{key}": value for key, value in probes.items()}
    for name, rank in (("weight", 3), ("bias", 2)):
        keys = [
            ", ".join([str(layer)] * (num_layers > 1) + [str(t)] * (num_timesteps > 1)) + f".classifier.0.{name}"
            for layer in range(num_layers)
            for t in range(num_timesteps)
        ]
        rows = [probes.pop(key).reshape(-1) for key in keys if key in probes]
        if len(rows) == len(keys):
            table = torch.stack(rows)
            renamed[f"probes.{name}"] = table.reshape((num_layers, num_timesteps, -1)[:rank])
    return renamed | {f"matrix.{key}": value for key, value in probes.items()}


def tensors_in(content: Any) -> Iterator[Tensor]:
    """All tensors in nested containers. Each container is visited once, because containers may contain themselves."""
    seen, waiting = set(), [content]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            waiting.extend(item.values() if isinstance(item, Mapping) else item)


def _all_tensors(mapping: Mapping[str, Any]) -> bool:
    return bool(mapping) and all(isinstance(value, Tensor) for value in mapping.values())
