"""Networks in folders of diffusers: a model, or a pipeline with its scheduler and autoencoder.

    config.json                          of a model; or
    model_index.json                     of a pipeline, whose network is in unet/ or transformer/
    scheduler/scheduler_config.json      noise schedule, meaning of the output
    vae/                                 the autoencoder of a pipeline of latents

Weights are read only from safetensors; nothing is downloaded, and no code in a folder is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from common.config import PUBLIC_SCALE_FACTOR, DiffusersConfig
from common.errors import InputError
from common.files import check_regular, read_json
from common.settings import shown
from models.backbone import Backbone
from models.weights import check_numbers

M = TypeVar("M", bound=nn.Module)
# From the content of scheduler_config.json, and a name of the file for messages, to the keys of a description: this
# needs the mathematics of noise schedules, so `diffusion.schedulers.process_of` does it.
ProcessOf = Callable[[Mapping[str, Any], str], dict[str, Any]]

# The classes of diffusers' networks, by the names that folders give them. DiT was saved as the second at first.
NETWORKS = {
    "UNet2DModel": "UNet2DModel",
    "DiTTransformer2DModel": "DiTTransformer2DModel",
    "Transformer2DModel": "DiTTransformer2DModel",
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class DiffusersBackbone(Backbone):
    """A network of diffusers as a backbone for samplers: UNet2DModel or DiTTransformer2DModel.

    It drops a learned variance. It supports neither caches of its middle nor early exit.
    """

    config: DiffusersConfig
    has_middle = False
    time_dtype = torch.float32  # the network computes sinusoids of the time tokens

    def __init__(self, network: nn.Module, config: DiffusersConfig):
        super().__init__()
        self.network, self.config = network, config

    def time_tokens(self, timesteps: Tensor) -> Tensor:
        """The time input itself: timesteps (B,) -> (B, 1)."""
        return (self.time_scale * (timesteps.float() + self.time_shift))[:, None]

    def denoise(self, x: Tensor, time: Tensor, y: Tensor | None = None) -> Tensor:
        config = self.config
        if x.shape[1:] != config.image_shape:
            raise InputError(f"images of shape {tuple(x.shape[1:])}, the network takes {config.image_shape}")
        if (y is not None) != (config.num_labels > 0):
            raise InputError(f"classes y {'missing' if y is None else 'given'}, num_classes={config.num_classes}")
        x = x.to(next(self.network.parameters()).dtype)
        output = self.network(x, time[:, 0].expand(len(x)), class_labels=y, return_dict=False)[0]
        return output[:, : config.in_channels]

    def middle(self, outer: int) -> range:
        raise InputError(f"--reuse_every: a {self.config.network} of diffusers does not support it; leave it out")


@dataclass(frozen=True)
class Folder:
    """The content of a folder."""

    network: Path  # folder of the network
    name: str  # its class in diffusers
    about: Mapping[str, Any]  # its config.json
    description: dict[str, Any]  # in this project's words, see common.config; without the process
    scheduler: tuple[Mapping[str, Any], str] | None  # the arguments of a ProcessOf, if the folder describes its process


def read_folder(path: Path) -> Folder:
    """Describe the network in a folder. Raises InputError for an unsupported one."""
    network, name = _find_network(path)
    about = _mapping(network / "config.json")
    description: dict[str, Any] = {"model": "diffusers", "model_params": _params(about, name, network / "config.json")}
    places = (path / "scheduler" / "scheduler_config.json", path / "scheduler_config.json")
    scheduler = next(((_mapping(place), str(place)) for place in places if place.is_file()), None)
    if (path / "vae").is_dir():
        scale = _mapping(path / "vae" / "config.json").get("scaling_factor", PUBLIC_SCALE_FACTOR)
        description["autoencoder"] = {"checkpoint_path": str(path / "vae"), "scale_factor": scale}
    return Folder(network, name, about, description, scheduler)


def load_backbone(folder: Folder, config: DiffusersConfig) -> DiffusersBackbone:
    """The network of a folder, on the CPU. Raises InputError for weights that are missing, not finite or pickles."""
    import diffusers  # slow to import

    return DiffusersBackbone(pretrained(getattr(diffusers, folder.name), folder.network, f"a {folder.name}"), config)


def pretrained(cls: type[M], path: Path, what: str) -> M:
    """A model of diffusers from a folder of its config.json and safetensors.

    cls: its class in diffusers. what: its name in messages. Raises InputError for a folder that holds no such model,
    pickles alone, or weights that do not fit or are not finite.
    """
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: not {what} in the format of diffusers: config.json is missing")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        pickles = [part.name for part in sorted(path.iterdir()) if part.suffix in PICKLES]
        found = f"has only pickles ({pickles[0]})" if pickles else "has no weights"
        raise InputError(f"{path}: {found}; wanted .safetensors, the default of save_pretrained")
    for part in weights:
        check_regular(part)
    of_diffusers: Any = cls  # with the methods of its mixins
    try:
        with torch.device("meta"):  # shapes without memory: a folder may claim a network of any size
            numbers = sum(
                tensor.numel() for tensor in of_diffusers.from_config(_mapping(path / "config.json")).parameters()
            )
        if numbers > sum(part.stat().st_size for part in weights):
            raise ValueError(f"config.json describes {numbers:,} numbers, more than the weights' files have bytes")
        with _without_bars():
            network, report = of_diffusers.from_pretrained(
                path, local_files_only=True, use_safetensors=True, output_loading_info=True, low_cpu_mem_usage=False
            )
    except (MemoryError, InputError):
        raise
    except Exception as error:  # unknown settings make diffusers raise any error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: not readable as {what} ({reason:.160})") from None
    if wrong := [*report["missing_keys"], *report["unexpected_keys"], *map(str, report["mismatched_keys"])]:
        raise InputError(f"{path}: {len(wrong)} weights missing or too many ({', '.join(sorted(wrong)[:3])}, ...)")
    check_numbers(network.state_dict(), path)
    return network


@contextmanager
def _without_bars() -> Iterator[None]:
    """A context in which diffusers shows no bars of its own, which know neither --quiet nor the kind of stderr."""
    from diffusers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _find_network(path: Path) -> tuple[Path, str]:
    """The folder of the network, and its class in diffusers."""
    if (index := path / "model_index.json").is_file():
        parts = {
            str(part): of[1]
            for part, of in _mapping(index).items()
            if isinstance(of, list) and len(of) == 2 and of[0] == "diffusers" and isinstance(of[1], str)
        }
        known = [part for part, name in parts.items() if name in NETWORKS and Path(part).name == part != ".."]
        if len(known) != 1:
            raise InputError(f"{index}: names {_names(parts.values())}; wanted one {_wanted()}")
        return path / known[0], NETWORKS[parts[known[0]]]
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: is a folder without a network: config.json and model_index.json are missing")
    name = _mapping(path / "config.json").get("_class_name")
    if not isinstance(name, str) or name not in NETWORKS:
        raise InputError(f"{path / 'config.json'}: describes {shown(name)}; wanted a {_wanted()}")
    return path, NETWORKS[name]


def _params(about: Mapping[str, Any], name: str, where: Path) -> dict[str, Any]:
    """The fields of DiffusersConfig, from the network's config.json. Raises InputError for unsupported ones."""
    side, channels = about.get("sample_size"), about.get("in_channels", 4 if name != "UNet2DModel" else 3)
    if isinstance(side, list) and len(side) == 2 and side[0] == side[1]:
        side = side[0]
    made = about.get("out_channels") or channels
    refused = {
        "sample_size": type(side) is not int,
        "in_channels": type(channels) is not int,
        "out_channels": made not in (channels, 2 * channels) if type(channels) is int else False,
        "time_embedding_type": about.get("time_embedding_type", "positional") != "positional",
        "class_embed_type": about.get("class_embed_type") is not None,
        "block_out_channels": not isinstance(about.get("block_out_channels", []), list),
        "norm_type": about.get("norm_type", "ada_norm_zero") != "ada_norm_zero",
    }
    if wrong := [key for key, is_refused in refused.items() if is_refused]:
        raise InputError(f"{where}: a {name} with {wrong[0]} {shown(about.get(wrong[0]))} is not supported")
    params = {"network": name, "sample_size": side, "in_channels": channels}
    if name == "UNet2DModel":
        return params | {
            "num_blocks": len(about.get("block_out_channels", (0,) * 4)),
            "num_classes": about.get("num_class_embeds") or -1,
        }
    return params | {
        "num_blocks": about.get("num_layers", 28),
        "num_classes": about.get("num_embeds_ada_norm", 1000),
        "has_no_class": True,
    }


def _mapping(path: Path) -> Mapping[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: wanted a mapping")
    return content


def _names(values: Any) -> str:
    return ", ".join(f"{name:.60}" for name in list(values)[:6]) or "no network of diffusers"


def _wanted() -> str:
    return " or ".join(dict.fromkeys(NETWORKS.values()))
