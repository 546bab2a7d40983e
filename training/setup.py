"""From options to a trainer: everything that can be wrong is found here, before the first step."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from common.cli import model_settings
from common.config import AutoencoderConfig, Config, build_config, contradictions, settings_of
from common.devices import check_compiler, pick_device
from common.errors import InputError
from common.files import writable_folder
from data import DATASETS, crop_of, open_dataset
from data.dataset import ImageDataset
from diffusion.sampling import Denoiser
from models.early_exit import EarlyExitUViT, ExitOutputs
from models.loading import build_network, load_network, stated_settings
from models.weights import FORMAT, fill, read_pth, read_weights
from training.checkpoints import CheckpointFolder
from training.loop import Objective, Trainer
from training.losses import early_exit_losses, total_early_exit_loss


def backbone_trainer(args: argparse.Namespace) -> Trainer:
    """Train a U-ViT from fresh weights."""
    config = build_config(stated(args) | {"model": "uvit"}, described(args))
    torch.manual_seed(args.seed)
    uvit = build_network(config)
    return _trainer(args, config, uvit, backbone_objective(compiled(uvit, args)), preview=uvit)


def early_exit_trainer(args: argparse.Namespace) -> Trainer:
    """Train probes and exit heads on a backbone, which is frozen or trained along."""
    settings = stated(args)
    classifier_type = args.classifier_type or settings.pop("classifier_type", None)
    settings.pop("classifier_type", None)
    if args.load_backbone:
        # Heads may learn from other data than the backbone did, with a crop of its own.
        backbone = load_network(args.load_backbone, settings | {"dataset": None, "crop": None}, model="uvit")
        same_data = backbone.config.dataset in (None, args.dataset)
        crop = settings.get("crop") or (backbone.config.crop if same_data else None)
        settings = settings_of(backbone.config) | {"dataset": args.dataset, "crop": crop}
    config = build_config(settings | {"model": "deediff_uvit", "classifier_type": classifier_type}, described(args))
    torch.manual_seed(args.seed)
    network = build_network(config)
    if args.load_backbone:
        network.uvit.load_state_dict(backbone.module.state_dict())
    network.uvit.requires_grad_(not args.freeze_backbone)

    threshold = 0.1 if args.preview_threshold is None else args.preview_threshold

    def preview(x_t: torch.Tensor, t: int, y: torch.Tensor | None) -> torch.Tensor:
        return network.early_exit(x_t, t, y, threshold=threshold).output

    objective = early_exit_objective(compiled(network, args), args.freeze_backbone, args.use_unweighted_loss)
    return _trainer(args, config, network, objective, preview)


def compiled(network: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The network as training calls it. Previews call it as it is: they have another batch size."""
    if not args.compile:
        return network
    check_compiler(pick_device(args.device))
    return torch.compile(network, dynamic=False)


def backbone_objective(uvit: nn.Module) -> Objective:
    """Mean squared error. DDPM (Ho et al. 2020), Eq. 14."""

    def objective(x_t, t, y, target):
        return {"loss": F.mse_loss(uvit(x_t, t, y).float(), target)}

    return objective


def early_exit_objective(network: nn.Module, freeze_backbone: bool, use_unweighted_loss: bool) -> Objective:
    def objective(x_t, t, y, target):
        exits = ExitOutputs(*(part.float() for part in network(x_t, t, y)))
        losses = early_exit_losses(exits, target)
        return {"loss": total_early_exit_loss(losses, freeze_backbone, use_unweighted_loss), **losses}

    return objective


def stated(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags and the YAML file say of the network."""
    given = model_settings(args) | {
        "diffusion_params": {"num_timesteps": args.num_timesteps},
        "dataset": args.dataset,
        "crop": args.crop,
    }
    if args.autoencoder_checkpoint_path:
        given["autoencoder"] = {"checkpoint_path": str(args.autoencoder_checkpoint_path)}
    return stated_settings(args.config_path, given)


def described(args: argparse.Namespace) -> str:
    return str(args.config_path or "the flags (see also --config_path)")


def _trainer(
    args: argparse.Namespace, config: Config, network: nn.Module, objective: Objective, preview: Denoiser
) -> Trainer:
    device = pick_device(args.device)
    config = dataclasses.replace(config, crop=crop_of(args.dataset, config.crop))
    params = config.model_params
    for name in ("sample_height", "sample_width"):
        if getattr(args, name) not in (None, params.img_size):
            raise InputError(
                f"--{name} {getattr(args, name)}: the network makes {params.img_size} x {params.img_size} images"
            )
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
        args.num_workers = min(8, os.cpu_count() or 1) if dataset.needs_decoding else 0
    if args.batch_size > len(dataset):
        raise InputError(f"--batch_size {args.batch_size} is more than the {len(dataset)} images of {args.dataset}")

    name = args.exp_name or f"{args.dataset}_{config.model}_{params.num_blocks}"
    checkpoints = CheckpointFolder(args.log_path / name, f"{args.dataset}_{config.model}")
    going_on = find_start(args, checkpoints)
    writable_folder(checkpoints.folder)

    (network.uvit if isinstance(network, EarlyExitUViT) else network).grad_checkpointing = args.grad_checkpointing
    trainer = Trainer(args, config, network.to(device), objective, preview, dataset, checkpoints, device)
    if going_on is not None:
        go_on(trainer, *going_on)
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


def find_start(args: argparse.Namespace, checkpoints: CheckpointFolder) -> tuple[Path, Mapping[str, Any]] | None:
    """The checkpoint or weights to go on from; None for a new run. Never in another run's folder."""
    there = checkpoints.newest_first()
    if args.resume:
        return checkpoints.load_newest()
    start = None
    if path := args.load_checkpoint_path:
        start = path, {} if path.suffix == ".safetensors" else read_pth(path)
        if there and path.samefile(there[0]):
            return start
    if there:
        raise InputError(
            f"{checkpoints.folder} holds a run already; go on with --resume, or choose another --exp_name or --log_path"
        )
    return start


def go_on(trainer: Trainer, path: Path, content: Mapping[str, Any]) -> None:
    """Give the trainer the state of a checkpoint, or the weights of any other file."""
    if content.get("format") != FORMAT:
        fill(trainer.network, read_weights(path).state_dict, path)
        if trainer.ema is not None:
            trainer.ema.load(dict(trainer.network.named_parameters()))
        return
    different = contradictions(content["config"], settings_of(trainer.config))
    if trainer.args.resume or path.parent.samefile(trainer.checkpoints.folder):
        different += contradictions(content["options"], trainer.options())
    if different:
        raise InputError(f"{path} was made with other settings: {', '.join(different)}; go on with the same")
    trainer.restore(path, content)
