"""Which of a run's settings its result depends on, and what differs between two runs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from common.config import Config, UViTConfig, contradictions
from common.distributed import world_size

# Options that decide what a step computes, beside the network's and the data's own descriptions.
DECISIVE = (
    "dataset",
    "batch_size",
    "grad_accum_steps",
    "seed",
    "lr",
    "lr_schedule",
    "num_warmup_steps",
    "weight_decay",
    "beta1",
    "beta2",
    "max_grad_norm",
    "ema_decay",
    "use_amp",
    "amp_dtype",
    "label_dropout",
    "freeze_backbone",
    "use_unweighted_loss",
    "distill_weight",
    "distill_from_sha256",
)
# Of these the ones that checkpoints of before do not have, with what they stood for.
LATER = {"distill_weight": None, "distill_from_sha256": None}
# What the network's description or the checkpoint's place says already, and what is of one start alone.
ELSEWHERE = (
    {*DECISIVE, *UViTConfig.__dataclass_fields__, *Config.__dataclass_fields__}
    | {"num_timesteps", "config_path", "random_flip", "sample_height", "sample_width"}
    | {
        "log_path",
        "exp_name",
        "resume",
        "load_checkpoint_path",
        "init_from",
        "download",
        "quiet",
        "max_hours",
        "deadline",
        "command",
    }
)


def decisive(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in DECISIVE if hasattr(args, name)}


def incidental(args: argparse.Namespace) -> dict[str, Any]:
    """Every other option, as plain values: how a run is done, and not what comes of it.

    --n_steps is one of them where the learning rate does not depend on it; a run may change it in any case.
    """
    elsewhere = ELSEWHERE | ({"n_steps"} if args.lr_schedule == "cosine" else set())
    chosen = {name: value for name, value in vars(args).items() if name not in elsewhere}
    plain = {
        name: value if isinstance(value, bool | int | float | None) else str(value) for name, value in chosen.items()
    }
    return plain | {"processes": world_size()}


def differences(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """["lr (0.1 and 0.2)", ...]: every key that both have with different values, None being one."""
    return sorted(contradictions(recorded, present, none_counts=True))


def data_differences(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Of what `ImageDataset.identity` said. Files that were copied have other times, but the same contents."""
    hashes = {"files_sha256", "contents_sha256"}
    common = hashes & recorded.keys() & present.keys()
    found = differences(*({k: v for k, v in about.items() if k not in hashes} for about in (recorded, present)))
    if common and not any(recorded[name] == present[name] for name in common):
        found.append("the files of the dataset")
    return found
