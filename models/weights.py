"""Reading weights from files, whoever wrote them."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.config import Config, check_types
from common.errors import InputError
from models.dit import DiT, without_variance
from models.early_exit import EarlyExitUViT, MlpProbes
from models.pickles import check_pickles, check_sums

FORMAT = "duodiff-1"  # of this project's checkpoints
# Training wrappers (DataParallel, torch.compile) put their own names before those of the network.
WRAPPERS = re.compile(r"(?:(?:^|(?<=\.))(?:module|_orig_mod)\.)+")


class Weights(NamedTuple):
    """A network's weights as a file holds them."""

    state_dict: dict[str, Tensor]
    settings: dict[str, Any] | None  # the description the file carries (see common.config), if any
    kind: str  # "ema" or "raw"; "unknown" for a file that does not say
    step: int | None  # optimiser steps behind them


def load_weights(model: nn.Module, path: str | Path, weights: str = "ema") -> None:
    """Load a file into a UViT, DiT or EarlyExitUViT.

    Reads .safetensors and .pth: this project's checkpoints, plain state dicts such as the public ones, the
    original DuoDiff authors' checkpoints, and names prefixed by wrappers. Only tensors and plain values are
    unpickled. A DiT that makes no variance takes the weights of one that learned to.

    weights: "ema" (where the file has them) or "raw", of this project's checkpoints.
    Raises InputError for a file that is missing, damaged or does not fit the model; the model is then
    unchanged.
    """
    fill(model, read_weights(path, weights).state_dict, path)


def read_weights(path: str | Path, weights: str = "ema") -> Weights:
    """Read what `load_weights` loads, on the CPU."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = read_pth(path)
    if content.get("format") == FORMAT:
        state_dict, kind = content["model"], "raw"
        if weights == "ema" and content.get("ema") is not None:
            state_dict, kind = state_dict | content["ema"], "ema"
        return Weights(state_dict, check_types(Config, content["config"], str(path)), kind, content["step"])
    state_dict = content.get("model_state_dict", content)
    if not isinstance(state_dict, Mapping) or not _all_tensors(state_dict):
        raise InputError(f"{path}: holds no state dict of tensors")
    return Weights(dict(state_dict), None, "unknown", None)


def read_pth(path: Path) -> dict[str, Any]:
    """The mapping a torch file holds; nothing but tensors and plain values is unpickled."""
    try:
        check_pickles(path)
        check_sums(path)
        content = _load_pth(path)
        for tensor in _tensors_in(content):
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise ValueError(f"a tensor of {tuple(tensor.shape)} claims more numbers than it holds")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except MemoryError:
        raise
    except Exception as error:  # the unpickler meets any bytes there are, and fails in any way there is
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path}: not readable as a checkpoint; cut short, or not one? ({reason:.120})") from None
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path}: holds no state dict but a {type(content).__name__}")
    content = dict(content)
    if content.get("format") == FORMAT and not _whole(content):
        raise InputError(f"{path}: a checkpoint of this project, but parts of it are missing")
    return content


def _whole(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint of this project has what everyone reads of it."""
    model, ema, config, step = (content.get(key) for key in ("model", "ema", "config", "step"))
    averaged = ema is None or (isinstance(ema, dict) and _all_tensors(ema))
    return (
        isinstance(model, dict) and _all_tensors(model) and averaged and isinstance(config, dict) and type(step) is int
    )


def _load_pth(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch, about bytes that are no pickle at all
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if "argparse.Namespace" not in str(error):
                raise
        # The original authors' checkpoints carry their options; a Namespace holds values and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            state_dict = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no mapping
        settings = json.loads(about["config"]) if "config" in about else None
        if settings is not None and not isinstance(settings, dict):
            raise ValueError("its config is no mapping")
        step = int(about["step"]) if "step" in about else None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, RecursionError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: not readable as safetensors; cut short? ({error!s:.120})") from None
    settings = None if settings is None else check_types(Config, settings, str(path))
    return Weights(state_dict, settings, about.get("weights", "unknown"), step)


def fill(model: nn.Module, state_dict: Mapping[str, Tensor], source: str | Path) -> None:
    """Put a state dict under any of the known namings into the model, all of it or nothing.

    source: named in the InputError that says what does not fit.
    """
    model.load_state_dict(check_fit(model, state_dict, source))


def check_fit(model: nn.Module, state_dict: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """The state dict under the names of the model; raises InputError where it does not fit. See `fill`."""
    given = {WRAPPERS.sub("", key): value for key, value in state_dict.items()}
    if isinstance(model, EarlyExitUViT):
        given = _from_original_names(given, model)
    if isinstance(model, DiT):
        given = without_variance(given, model.config)
    wanted = model.state_dict()
    missing, unexpected = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    shapes = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise InputError(f"{source}: weights do not fit the network: {'; '.join(problems)}")
    return given


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


def _tensors_in(content: Any) -> Iterator[Tensor]:
    """All tensors in nested containers, each container once: they may hold themselves, or one another many times."""
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
