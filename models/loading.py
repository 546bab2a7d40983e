"""Load networks from files, with the descriptions in checkpoints, YAML files and flags, which must agree."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from common.config import Config, DiffusersConfig, build_config, contradictions, read_yaml
from common.errors import InputError
from common.settings import check_types, in_words, merge, plain
from models.backbone import Backbone
from models.diffusers_folder import DiffusersBackbone, ProcessOf, load_backbone, read_folder
from models.dit import DiT
from models.early_exit import EarlyExitUViT
from models.offload import StoredWeights, empty
from models.uvit import UViT
from models.weights import Weights, check_fit, fitting, is_exported, read_weights

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module, covariant=True)
KINDS: dict[str, type[nn.Module]] = {
    "uvit": UViT,
    "dit": DiT,
    "deediff_uvit": EarlyExitUViT,
    "diffusers": DiffusersBackbone,
}
SAMPLERS = {Backbone: "sampler.py", EarlyExitUViT: "eesampler.py"}


@dataclass(frozen=True)
class Network(Generic[M]):
    """A network ready to run, with its description and provenance."""

    module: M  # in eval mode
    config: Config
    weights: str  # "ema", "raw", or "unknown" if the file does not record it
    step: int | None  # optimiser steps of its training, if known
    path: Path
    stored: StoredWeights | None = None  # reads the weights of a module that was left empty

    def describe(self) -> dict[str, Any]:
        """The provenance as plain values."""
        about: dict[str, Any] = {"checkpoint": str(self.path), "weights": self.weights, "step": self.step}
        return about | plain(self.config)


def name_of(kind: type[nn.Module]) -> str:
    """The name of a class of networks in descriptions; "uvit" for any."""
    return next((name for name, of in KINDS.items() if of is kind), "uvit")


def build_network(config: Config) -> UViT | DiT | EarlyExitUViT:
    """A network with fresh weights. Raises InputError for one that exists only in its folder."""
    if isinstance(config.model_params, DiffusersConfig):
        raise InputError("model diffusers: such a network is a folder with its weights; give --checkpoint_path DIR")
    backbone = (DiT if config.model == "dit" else UViT)(**plain(config.model_params))
    backbone.time_scale, backbone.time_shift = config.diffusion_params.time_line
    if config.classifier_type is None:
        return backbone
    assert isinstance(backbone, UViT), "Config allows probes on a U-ViT alone"
    return EarlyExitUViT(backbone, config.classifier_type, config.diffusion_params.num_timesteps)


def stated_settings(config_path: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The user's description of a network: the YAML file, overridden by the command line."""
    return merge(read_yaml(config_path) if config_path else {}, given)


def described_by(config_path: Path | None) -> str:
    """The source of the stated settings, for messages."""
    return str(config_path or "the flags (see also --config_path)")


def load_network(
    path: str | os.PathLike[str],
    stated: Mapping[str, Any],
    kind: type[M],
    *,
    described: str = "the flags",
    weights: str = "ema",
    device: torch.device | str = "cpu",
    process_of: ProcessOf | None = None,
    offload: bool = False,
) -> Network[M]:
    """Build and load the network of a checkpoint, or of bare weights with settings.

    stated: settings from `stated_settings`; needed for bare weights only. described: the source of these settings.
    kind: the required class: Backbone for any that sampler.py runs, nn.Module for any at all (bare weights are then
    those of a UViT, unless `stated` names another model). process_of: `diffusion.schedulers.process_of`, where the
    network may be in a folder of diffusers. offload: check the weights, but leave the module empty, see
    `Network.stored`. Raises InputError if the file does not fit or contradicts the stated settings.
    """
    path = Path(path)
    if path.is_dir() and not is_exported(path):
        return _load_folder(path, stated, kind, described, device, process_of, offload)
    read = read_weights(path, weights)
    if read.settings is None:
        stated = merge({"model": name_of(kind)}, stated)
        if not stated.get("model_params") or (stated["model"] != "dit" and not stated["model_params"].get("img_size")):
            raise InputError(
                f"{path} has no description of its network; give --config_path, or --img_size, --patch_size and "
                "all other options that differ from their defaults"
            )
        config = build_config(stated, described)
    else:
        config = _agreed(path, read.settings, stated, described)
    return _loaded(path, read, config, kind, described, weights, device, offload)


def _agreed(path: Path, carried: Mapping[str, Any], stated: Mapping[str, Any], described: str) -> Config:
    """The description in a file, merged with the stated one. Raises InputError if they differ."""
    check_types(Config, {**stated, "model": carried["model"]}, described)
    if different := contradictions(carried, stated):
        raise InputError(
            f"{path} differs from --config_path or the flags in {', '.join(different)}; "
            "the file has its own settings, so leave these out"
        )
    return build_config(merge(stated, carried), str(path))


def _load_folder(
    path: Path,
    stated: Mapping[str, Any],
    kind: type[M],
    described: str,
    device: torch.device | str,
    process_of: ProcessOf | None,
    offload: bool,
) -> Network[M]:
    """`load_network` for a folder of diffusers; a model without a scheduler takes its process from `stated`."""
    folder = read_folder(path)
    _check_kind(path, "diffusers", kind)
    assert process_of is not None, "a folder of diffusers, and no translation of its scheduler"
    own = dict(folder.description)
    if folder.scheduler is not None:
        own |= process_of(*folder.scheduler)
    if (stated.get("autoencoder") or {}).get("checkpoint_path"):
        own.get("autoencoder", {}).pop("checkpoint_path", None)
    config = _agreed(path, own, stated, described)
    params = config.model_params
    assert isinstance(params, DiffusersConfig)
    network = load_backbone(folder, params)
    assert isinstance(network, kind)
    network.time_scale, network.time_shift = config.diffusion_params.time_line
    if "diffusion_params" not in own:
        log.warning("%s has no scheduler; using that of %s: %s", path, described, config.conventions)
    network.requires_grad_(False).eval().to(device)
    if not offload:
        return Network(network, config, "unknown", None, path)
    empty(network)
    stored = StoredWeights(folder.network, lambda: load_backbone(folder, params).state_dict())
    return Network(network, config, "unknown", None, path, stored)


Runnable = Backbone | EarlyExitUViT  # the networks of sampler.py; it ignores the probes of the second


def load_together(
    files: Sequence[tuple[Path, Path | None]],
    given: Mapping[str, Any],
    *,
    with_exits: Collection[int] | None = (),
    weights: str = "ema",
    device: torch.device | str = "cpu",
    process_of: ProcessOf,
    offload: bool = False,
) -> list[Network[Runnable]]:
    """Load networks that run on one image, stage by stage.

    files: weights, and a YAML file for weights without a description. given: the description on the command line; its
    architecture applies only to the first network. with_exits: the numbers of the early-exit models, all others must
    be backbones; None: according to the files. process_of, offload: see `load_network`. Raises InputError unless every
    network fits the last.
    """
    of_all = {key: value for key, value in given.items() if key != "model_params"}
    networks: list[Network[Runnable]] = [
        load_network(
            path,
            stated_settings(config_path, given if n == 0 else of_all),
            _kind_of(n, with_exits),
            described=described_by(config_path),
            weights=weights,
            device=device,
            process_of=process_of,
            offload=offload,
        )
        for n, (path, config_path) in enumerate(files)
    ]
    for network in networks[:-1]:
        check_pair(network, networks[-1])
    return networks


def _kind_of(n: int, with_exits: Collection[int] | None) -> type[Any]:
    if with_exits is None:
        return nn.Module
    return EarlyExitUViT if n in with_exits else Backbone


def load_relative(path: Path, config: Config, device: torch.device | str = "cpu") -> Network[Backbone]:
    """Load a backbone from which another network learns, with averaged weights if the file has them.

    config: the description of the other network. Weights without a description get the same one, except for the depth,
    which is the number of blocks in the file.
    """
    read = read_weights(path)
    settings = read.settings
    if settings is None:
        found = [re.search(r"\b(?:in_)?blocks\.(\d+)\.", name) for name in read.state_dict]
        count = len({match[1] for match in found if match})
        depth = count if config.model == "dit" else 2 * count + 1
        settings = merge(plain(config), {"model_params": {"depth": max(1, depth)}})
    config = build_config(settings, str(path))
    return _loaded(path, read, config, Backbone, "the network that learns from it", "ema", device)


def load_described(network: nn.Module, config: Config, path: Path, described: str) -> None:
    """Load a file into a network. described: the source of config. Raises InputError as `load_weights` does."""
    read = read_weights(path)
    network.load_state_dict(check_fit(network, read, path).state_dict)
    _note_description(path, read, config, described)


def _note_description(path: Path, read: Weights, config: Config, described: str) -> None:
    """Warn which time input and schedule bare weights get, because a wrong one raises no error."""
    if read.settings is None:
        log.warning("%s has no description; using that of %s: %s", path, described, config.conventions)


def _loaded(
    path: Path,
    read: Weights,
    config: Config,
    kind: type[M],
    described: str,
    weights: str,
    device: torch.device | str,
    offload: bool = False,
) -> Network[M]:
    _check_kind(path, config.model, kind)
    with torch.device("meta"):  # shapes only: the description may claim a network larger than memory
        shapes = build_network(config)
    read = check_fit(shapes, read, path, weights)
    network = shapes if offload else build_network(config)
    assert isinstance(network, kind)
    _note_description(path, read, config, described)
    network.requires_grad_(False).eval()
    if offload:
        stored = StoredWeights(path, lambda: fitting(shapes, read_weights(path, weights), path, weights).state_dict)
        return Network(network, config, read.kind, read.step, path, stored)
    network.load_state_dict(read.state_dict)
    return Network(network.to(device), config, read.kind, read.step, path)


def _check_kind(path: Path, model: str, kind: type[nn.Module]) -> None:
    """Raises InputError unless the network has the required class."""
    if not issubclass(KINDS[model], kind):
        wanted = [name for name, of in KINDS.items() if issubclass(of, kind)]
        raise InputError(f"{path} is a {model}, wanted a {' or '.join(wanted)}; {sampler_of(model)} samples from it")


def sampler_of(model: str) -> str:
    """The script that samples from a kind of network, one of `common.config.MODELS`."""
    return next(script for of, script in SAMPLERS.items() if issubclass(KINDS[model], of))


def check_pair(early: Network[nn.Module], late: Network[nn.Module]) -> None:
    """Raises InputError unless the two networks can run on one image, stage by stage.

    They may differ in noise schedule and parametrization, see `diffusion.matching`, unless one predicts x_{t-1}: this
    output is valid only for the steps of its own schedule.
    """
    if different := image_differences(early.config, late.config):
        raise InputError(f"{early.path} and {late.path} cannot run on one image: they differ in {', '.join(different)}")


def image_differences(one: Config, other: Config) -> list[str]:
    """["num_classes (10 and -1)", ...]: why two networks cannot work on one image."""
    labels, other_labels = one.model_params.num_labels, other.model_params.num_labels
    previous = "predict_previous" in (one.parametrization, other.parametrization)
    return _differing(
        ("image shape", one.model_params.image_shape, other.model_params.image_shape),
        ("num_classes", labels or -1, other_labels or -1),  # with "no class", which a DiT's own number leaves out
        ("scale of latents", _scale(one), _scale(other)),
        ("crop", one.crop or other.crop, other.crop or one.crop),
        ("real_classes", len(one.classes), len(other.classes)),
        *(_outputs(one, other) if previous else ()),
    )


def task_differences(one: Config, other: Config) -> list[str]:
    """["num_classes (10 and -1)", ...]: the reasons why the outputs of two networks have different meanings."""
    directions = one.diffusion_params.toward_data, other.diffusion_params.toward_data
    return image_differences(one, other) + _differing(*_outputs(one, other), ("toward_data", *directions))


def _outputs(one: Config, other: Config) -> list[tuple[str, Any, Any]]:
    return [
        ("parametrization", one.parametrization, other.parametrization),
        ("noise schedule", one.diffusion_params.schedule, other.diffusion_params.schedule),
    ]


def _differing(*pairs: tuple[str, Any, Any]) -> list[str]:
    return [f"{name} ({in_words(a)} and {in_words(b)})" for name, a, b in pairs if a != b]


def _scale(config: Config) -> float | None:
    return None if config.autoencoder is None else config.autoencoder.scale_factor


def knows(network: Network[nn.Module], t: float) -> bool:
    """Whether the network was trained on its own timestep t; a t between two integers counts as the one above."""
    trained = network.config.trained_timesteps
    return trained[0] - 1 < t <= trained[-1]


def check_range(network: Network[nn.Module], timesteps: Sequence[float], advice: str) -> None:
    """Raises InputError, which ends in the advice, unless the network was trained on all these timesteps.

    timesteps: the network's own, see `knows`.
    """
    trained = network.config.trained_timesteps
    if outside := [t for t in timesteps if not knows(network, t)]:
        shown = ", ".join(f"{t:g}" for t in outside[:3]) + (", ..." if len(outside) > 3 else "")
        raise InputError(
            f"{network.path} was trained only on t = {trained[0]}..{trained[-1]}, but would run at t = {shown}; "
            f"{advice}"
        )
