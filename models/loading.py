"""Load networks from files, with the descriptions in checkpoints, YAML files and flags, which must agree."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from common.config import Config, build_config, contradictions, read_yaml
from common.errors import InputError
from common.settings import merge, plain
from models.early_exit import EarlyExitUViT
from models.uvit import UViT
from models.weights import Weights, check_fit, read_weights

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module, covariant=True)
KINDS: dict[str, type[nn.Module]] = {"uvit": UViT, "deediff_uvit": EarlyExitUViT}
SCRIPTS = {"uvit": "sampler.py", "deediff_uvit": "eesampler.py"}


@dataclass(frozen=True)
class Network(Generic[M]):
    """A network ready to run, with its description and provenance."""

    module: M  # in eval mode
    config: Config
    weights: str  # "ema", "raw", or "unknown" if the file does not record it
    step: int | None  # optimiser steps of its training, if known
    path: Path

    def describe(self) -> dict[str, Any]:
        """The provenance as plain values."""
        about: dict[str, Any] = {"checkpoint": str(self.path), "weights": self.weights, "step": self.step}
        return about | plain(self.config)


def name_of(kind: type[nn.Module]) -> str:
    """The name of a class of networks in descriptions; "uvit" for any."""
    return next((name for name, of in KINDS.items() if of is kind), "uvit")


def build_network(config: Config) -> UViT | EarlyExitUViT:
    """A network with fresh weights."""
    uvit = UViT(**plain(config.model_params))
    uvit.time_scale, uvit.time_shift = config.diffusion_params.time_scale, config.diffusion_params.time_shift
    if config.classifier_type is None:
        return uvit
    return EarlyExitUViT(uvit, config.classifier_type, config.diffusion_params.num_timesteps)


def stated_settings(config_path: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The user's description of a network: the YAML file, overridden by the command line."""
    return merge(read_yaml(config_path) if config_path else {}, given)


def described_by(config_path: Path | None) -> str:
    """The source of the stated settings, for messages."""
    return str(config_path or "the flags (see also --config_path)")


def load_network(
    path: Path,
    stated: Mapping[str, Any],
    kind: type[M],
    *,
    described: str = "the flags",
    weights: str = "ema",
    device: torch.device | str = "cpu",
) -> Network[M]:
    """Build and load the network of a checkpoint, or of bare weights with settings.

    stated: settings from `stated_settings`; needed for bare weights only. described: the source of these settings.
    kind: the required class; nn.Module for any (bare weights are then those of a UViT). Raises InputError if the file
    does not fit or contradicts the stated settings.
    """
    read = read_weights(path, weights)
    if read.settings is None:
        if (stated.get("model_params") or {}).get("img_size") is None:
            raise InputError(
                f"{path} does not say what network it belongs to; give its --config_path, or its --img_size, "
                "--patch_size and whatever else differs from the defaults"
            )
        config = build_config(merge({"model": name_of(kind)}, stated), described)
    else:
        if different := contradictions(read.settings, stated):
            raise InputError(
                f"{path} differs from --config_path or the flags in {', '.join(different)}; "
                "it carries its own settings, so those can be left out"
            )
        config = build_config(merge(stated, read.settings), str(path))
    return _loaded(path, read, config, kind, described, weights, device)


def load_together(
    files: Sequence[tuple[Path, Path | None]],
    given: Mapping[str, Any],
    *,
    weights: str = "ema",
    device: torch.device | str = "cpu",
) -> list[Network[UViT]]:
    """Load U-ViTs that run on one image, stage by stage.

    files: weights, and a YAML file for weights without a description. given: the description on the command line; its
    architecture applies only to the first network. Raises InputError unless every network fits the last.
    """
    of_all = {key: value for key, value in given.items() if key != "model_params"}
    networks = [
        load_network(
            path,
            stated_settings(config_path, given if n == 0 else of_all),
            UViT,
            described=described_by(config_path),
            weights=weights,
            device=device,
        )
        for n, (path, config_path) in enumerate(files)
    ]
    for network in networks[:-1]:
        check_pair(network, networks[-1])
    return networks


def load_relative(path: Path, config: Config, device: torch.device | str = "cpu") -> Network[UViT]:
    """Load a U-ViT from which another network learns, with averaged weights if the file has them.

    config: the description of the other network. Weights without a description get the same one, except for the depth,
    which is the number of blocks in the file.
    """
    read = read_weights(path)
    settings = read.settings
    if settings is None:
        half = len({match[1] for name in read.state_dict if (match := re.search(r"\bin_blocks\.(\d+)\.", name))})
        settings = merge(plain(config), {"model_params": {"depth": 2 * half + 1}})
    config = build_config(settings, str(path))
    return _loaded(path, read, config, UViT, "the network that learns from it", "ema", device)


def load_described(network: nn.Module, config: Config, path: Path, described: str) -> None:
    """Load a file into a network. described: the source of config. Raises InputError as `load_weights` does."""
    read = read_weights(path)
    network.load_state_dict(check_fit(network, read, path).state_dict)
    _note_description(path, read, config, described)


def _note_description(path: Path, read: Weights, config: Config, described: str) -> None:
    """Warn which time input and schedule bare weights get, because a wrong one raises no error."""
    if read.settings is None:
        log.warning("%s carries no description; taken from %s: %s", path, described, config.conventions)


def _loaded(
    path: Path,
    read: Weights,
    config: Config,
    kind: type[M],
    described: str,
    weights: str,
    device: torch.device | str,
) -> Network[M]:
    if not issubclass(KINDS[config.model], kind):
        found, wanted = config.model, name_of(kind)
        raise InputError(f"{path} is a {found}, wanted a {wanted}; {SCRIPTS[found]} samples from it")
    with torch.device("meta"):  # shapes only: the description may claim a network larger than memory
        shapes = build_network(config)
    read = check_fit(shapes, read, path, weights)
    network = build_network(config)
    assert isinstance(network, kind)
    network.load_state_dict(read.state_dict)
    _note_description(path, read, config, described)
    network.requires_grad_(False).eval().to(device)
    return Network(network, config, read.kind, read.step, path)


def check_pair(early: Network[UViT], late: Network[UViT]) -> None:
    """Raises InputError unless the two networks can run on one image, stage by stage."""
    if different := task_differences(early.config, late.config):
        raise InputError(f"{early.path} and {late.path} cannot run on one image: they differ in {', '.join(different)}")


def task_differences(one: Config, other: Config) -> list[str]:
    """["num_classes (10 and -1)", ...]: the reasons why the outputs of two networks have different meanings."""
    return [
        f"{name} ({a} and {b})"
        for name, a, b in (
            ("image shape", one.model_params.image_shape, other.model_params.image_shape),
            ("num_classes", one.model_params.num_classes, other.model_params.num_classes),
            ("scale of latents", _scale(one), _scale(other)),
            ("crop", one.crop or other.crop, other.crop or one.crop),
            ("parametrization", one.parametrization, other.parametrization),
            ("noise schedule", one.diffusion_params.schedule, other.diffusion_params.schedule),
            ("real_classes", len(one.classes), len(other.classes)),
        )
        if a != b
    ]


def _scale(config: Config) -> float | None:
    return None if config.autoencoder is None else config.autoencoder.scale_factor


def check_range(network: Network[nn.Module], timesteps: Sequence[int], advice: str) -> None:
    """Raises InputError, which ends with the advice, unless the network was trained on all these timesteps."""
    trained = network.config.trained_timesteps
    if outside := [t for t in timesteps if t not in trained]:
        shown = ", ".join(map(str, outside[:3])) + (", ..." if len(outside) > 3 else "")
        raise InputError(
            f"{network.path} was trained on t = {trained[0]}..{trained[-1]} alone, and would run at t = {shown}; "
            f"{advice}"
        )
