"""From options to a trainer: everything that can be wrong is found here, before the first step."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.cli import architecture, task_settings
from common.config import (
    AutoencoderConfig,
    Config,
    build_config,
    carried_settings,
    check_types,
    completed,
    contradictions,
    merge,
    settings_of,
)
from common.devices import check_compiler
from common.distributed import main_first, on_main
from common.errors import InputError
from common.files import sha256_of, writable_folder
from data import DATASETS, crop_of, open_dataset
from data.dataset import ImageDataset
from diffusion.sampling import Denoiser
from models.early_exit import EarlyExitUViT, ExitOutputs
from models.loading import (
    build_network,
    check_range,
    load_described,
    load_network,
    load_relative,
    stated_settings,
    task_differences,
)
from models.warm_start import warm_start
from models.weights import FORMAT, read_pth
from training.checkpoint import CheckpointFolder, check_weights, read_checkpoint
from training.loop import Objective, Trainer
from training.losses import early_exit_losses, total_early_exit_loss
from training.settings import LATER, data_differences, differences

log = logging.getLogger(__name__)


def backbone_trainer(args: argparse.Namespace, device: torch.device) -> Trainer:
    """Train a U-ViT from fresh weights, or from those of a deeper one."""
    if args.compile:
        check_compiler(device)
    config = build_config(stated(args) | {"model": "uvit"}, described(args))
    torch.manual_seed(args.seed)
    uvit = build_network(config)
    if args.init_from:
        warm_start(uvit, load_relative(args.init_from, config).module, args.init_from)
    config, dataset = open_data(args, config)
    objective = backbone_objective
    if args.distill_from:
        objective = functools.partial(distillation_objective, load_teacher(args, config, device), args.distill_weight)
    return _trainer(args, config, dataset, uvit, objective, preview=uvit, device=device)


def early_exit_trainer(args: argparse.Namespace, device: torch.device) -> Trainer:
    """Train probes and exit heads on a backbone, which is frozen or trained along."""
    if args.compile:
        check_compiler(device)
    settings = stated(args)
    classifier_type = args.classifier_type or settings.pop("classifier_type", None)
    settings.pop("classifier_type", None)
    if args.load_backbone:
        # Heads may learn from other data than the backbone did, with a crop of its own, and at other timesteps.
        own = ("dataset", "crop", "t_min", "t_max")
        here = settings | dict.fromkeys(own)
        backbone = load_network(args.load_backbone, here, model="uvit", described=described(args))
        same_data = backbone.config.dataset in (None, args.dataset)
        inherited = settings_of(backbone.config) | ({} if same_data else {"crop": None})
        settings = merge(inherited, {name: settings.get(name) for name in own})
    config = build_config(settings | {"model": "deediff_uvit", "classifier_type": classifier_type}, described(args))
    torch.manual_seed(args.seed)
    network = build_network(config)
    if args.load_backbone:
        network.uvit.load_state_dict(backbone.module.state_dict())
    if args.freeze_backbone:
        check_range(backbone, config.trained_timesteps, "give --t_min and --t_max, or train it along")
    network.uvit.requires_grad_(not args.freeze_backbone)

    threshold = 0.1 if args.preview_threshold is None else args.preview_threshold

    def preview(x_t: torch.Tensor, t: int, y: torch.Tensor | None) -> torch.Tensor:
        return network.early_exit(x_t, t, y, threshold=threshold).output

    objective = functools.partial(early_exit_objective, args.freeze_backbone, args.use_unweighted_loss)
    config, dataset = open_data(args, config)
    return _trainer(args, config, dataset, network, objective, preview, device)


def backbone_objective(uvit: nn.Module, x_t: Tensor, t: Tensor, y: Tensor | None, target: Tensor) -> dict[str, Tensor]:
    """Mean squared error. DDPM (Ho et al. 2020), Eq. 14."""
    return {"loss": F.mse_loss(uvit(x_t, t, y).float(), target)}


def distillation_objective(
    teacher: nn.Module, weight: float, uvit: nn.Module, x_t: Tensor, t: Tensor, y: Tensor | None, target: Tensor
) -> dict[str, Tensor]:
    """Mean squared error against the target, and `weight` times that against what the teacher predicts."""
    predicted = uvit(x_t, t, y).float()
    with torch.no_grad():
        taught = teacher(x_t, t, y).float()
    losses = {"target_loss": F.mse_loss(predicted, target), "teacher_loss": F.mse_loss(predicted, taught)}
    return {"loss": losses["target_loss"] + weight * losses["teacher_loss"], **losses}


def load_teacher(args: argparse.Namespace, config: Config, device: torch.device) -> nn.Module:
    """The network of --distill_from, frozen, all of it on this process. Adds `distill_from_sha256` to args.

    config: of the network that learns. Raises InputError unless the two do the same task at the same timesteps.
    """
    teacher = load_relative(args.distill_from, config, device)
    if different := task_differences(config, teacher.config):
        raise InputError(f"--distill_from {teacher.path} is no teacher here: it differs in {', '.join(different)}")
    check_range(teacher, config.trained_timesteps, "it can teach nothing there; give --t_min and --t_max")
    args.distill_from_sha256 = on_main(functools.partial(sha256_of, args.distill_from))
    return torch.compile(teacher.module, dynamic=False) if args.compile else teacher.module


def early_exit_objective(
    freeze_backbone: bool,
    use_unweighted_loss: bool,
    network: nn.Module,
    x_t: Tensor,
    t: Tensor,
    y: Tensor | None,
    target: Tensor,
) -> dict[str, Tensor]:
    exits = ExitOutputs(*(part.float() for part in network(x_t, t, y)))
    losses = early_exit_losses(exits, target)
    return {"loss": total_early_exit_loss(losses, freeze_backbone, use_unweighted_loss), **losses}


def stated(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags and the YAML file say of the network."""
    given = {
        **architecture(args),
        **task_settings(args),
        "dataset": args.dataset,
        "crop": args.crop,
        "t_min": args.t_min,
        "t_max": args.t_max,
    }
    if args.autoencoder_checkpoint_path:
        given["autoencoder"] = {"checkpoint_path": str(args.autoencoder_checkpoint_path)}
    return stated_settings(args.config_path, given)


def described(args: argparse.Namespace) -> str:
    return str(args.config_path or "the flags (see also --config_path)")


def open_data(args: argparse.Namespace, config: Config) -> tuple[Config, ImageDataset]:
    """The images to learn from, and the config with what they settle: crop, real classes, scale of latents."""
    config = dataclasses.replace(config, crop=crop_of(args.dataset, config.crop))
    params = config.model_params
    for name in ("sample_height", "sample_width"):
        if getattr(args, name) not in (None, params.img_size):
            raise InputError(
                f"--{name} {getattr(args, name)}: the network makes {params.img_size} x {params.img_size} images"
            )
    with main_first():
        dataset = open_dataset(
            args.dataset,
            args.data_path,
            img_size=params.img_size,
            in_chans=params.in_chans,
            num_classes=params.num_classes,
            crop=config.crop,
            download=args.download,
        )
    config = match_latents(count_real_classes(config, dataset), dataset)
    if args.label_dropout and config.no_class is None:
        raise InputError(
            f'--label_dropout {args.label_dropout:g}: the network has no class that stands for "no class"; '
            f"num_classes must be one more than the classes of {args.dataset}"
        )
    if args.num_workers is None:
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.num_workers = max(1, min(8, cores)) if dataset.needs_decoding else 0
    if args.batch_size > len(dataset):
        raise InputError(f"--batch_size {args.batch_size} is more than the {len(dataset)} images of {args.dataset}")
    return config, dataset


def _trainer(
    args: argparse.Namespace,
    config: Config,
    dataset: ImageDataset,
    network: nn.Module,
    objective: Objective,
    preview: Denoiser,
    device: torch.device,
) -> Trainer:
    name = args.exp_name or f"{args.dataset}_{config.model}_{config.model_params.num_blocks}"
    checkpoints = CheckpointFolder(args.log_path / name, f"{args.dataset}_{config.model}")
    start = on_main(functools.partial(find_start, args, checkpoints))
    content = None if start is None else read_start(start, args.resume)
    on_main(functools.partial(make_folder, checkpoints))

    if content is not None and content.get("format") != FORMAT:
        load_described(network, config, start, described(args))
    (network.uvit if isinstance(network, EarlyExitUViT) else network).grad_checkpointing = args.grad_checkpointing
    trainer = Trainer(args, config, network, objective, preview, dataset, checkpoints, device)
    if content is not None and content.get("format") == FORMAT:
        go_on(trainer, start, content)
    return trainer


def count_real_classes(config: Config, dataset: ImageDataset) -> Config:
    """A network may have more classes than the dataset: what it learns of is written into its description."""
    num_classes = config.model_params.num_classes
    if num_classes <= 0 or config.real_classes is not None:
        return config
    real = DATASETS[config.dataset].num_classes or (num_classes if dataset.labels is None else max(dataset.labels) + 1)
    return dataclasses.replace(config, real_classes=min(int(real), num_classes))


def match_latents(config: Config, dataset: ImageDataset) -> Config:
    """Latents know the factor they are scaled by; the network's description must have the same."""
    scale_factor = getattr(dataset, "scale_factor", None)
    if scale_factor is None:
        if config.autoencoder is not None:
            raise InputError(f"{config.dataset} gives pixels, but the network is described with an autoencoder")
        return config
    stated = config.autoencoder or AutoencoderConfig()
    if stated.scale_factor not in (None, scale_factor):
        raise InputError(f"the latents were packed with scale_factor {scale_factor}, not {stated.scale_factor}")
    return dataclasses.replace(config, autoencoder=dataclasses.replace(stated, scale_factor=scale_factor))


def find_start(args: argparse.Namespace, checkpoints: CheckpointFolder) -> Path | None:
    """The checkpoint or weights to go on from; None for a new run. Never in another run's folder."""
    checkpoints.claim()
    if args.resume:
        newest = checkpoints.newest_whole()
        checkpoints.tidy(newest, args.keep_last)
        return newest
    there, start = checkpoints.newest_first(), args.load_checkpoint_path
    if there and not (start and start.samefile(there[0])):
        raise InputError(
            f"{checkpoints.folder} holds a run already; go on with --resume, or choose another --exp_name or --log_path"
        )
    return start


def make_folder(checkpoints: CheckpointFolder) -> None:
    writable_folder(checkpoints.folder)
    checkpoints.claim()


def read_start(path: Path, resume: bool) -> Mapping[str, Any]:
    """What the file to go on from holds; empty for one that can only be bare weights."""
    if resume:
        return read_checkpoint(path)
    content = {} if path.suffix == ".safetensors" else read_pth(path)
    if content.get("format") == FORMAT:
        check_weights(content, path)
    return content


def go_on(trainer: Trainer, path: Path, content: Mapping[str, Any]) -> None:
    """Give the trainer the state of a checkpoint; raises InputError where other settings would change the result."""
    # A new run may be of other timesteps than what it starts from.
    described = settings_of(trainer.config) | {"t_min": None, "t_max": None}
    recorded = completed(check_types(Config, content["config"], str(path)))
    obstacles, others = contradictions(recorded, described), []
    if same_run := trainer.args.resume or path.parent.samefile(trainer.checkpoints.folder):
        obstacles = [
            *differences(recorded, completed(carried_settings(trainer.config))),
            *differences(LATER | content["options"], trainer.options()),
            *data_differences(content.get("data", {}), trainer.data),
        ]
        others = differences(content.get("incidental", {}), trainer.incidental())
    if obstacles := list(dict.fromkeys(obstacles)):
        also = f" (also other, but no obstacle: {', '.join(others)})" if others else ""
        raise InputError(f"{path} was made with other settings: {', '.join(obstacles)}; go on with the same{also}")
    if others:
        log.warning("%s was made with other settings, which leave the result as it is: %s", path, ", ".join(others))
    trainer.restore(path, content)
    if not same_run:
        trainer.begin_sums()  # means over steps of two losses would be of neither
