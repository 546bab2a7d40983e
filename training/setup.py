"""Prepare a training run from its settings, and check everything before the first step."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common.config import BACKBONES, AutoencoderConfig, Config, build_config, carried_settings, contradictions
from common.devices import check_compiler
from common.distributed import main_first, on_main, part_of
from common.errors import InputError
from common.files import sha256_of, writable_folder
from common.settings import differences, merge, plain
from data import DATASETS, crop_of, open_dataset
from data.dataset import ImageDataset
from diffusion.sampling import Denoiser
from models.backbone import Backbone
from models.early_exit import EarlyExitUViT
from models.loading import (
    build_network,
    check_range,
    described_by,
    load_described,
    load_network,
    load_relative,
    stated_settings,
    task_differences,
)
from models.uvit import UViT
from models.warm_start import warm_start
from models.weights import FORMAT, read_pth
from training.batches import BatchMaker
from training.checkpoint import CheckpointFolder, check_state, read_checkpoint
from training.loop import Training
from training.losses import Model, Objective, backbone_objective, distillation_objective, early_exit_objective
from training.previews import preview_maker
from training.settings import TrainingSettings
from training.step import MISFITS, Learner

log = logging.getLogger(__name__)


def prepare(settings: TrainingSettings, device: torch.device) -> Training:
    """A training run that is ready to start, or to continue from a checkpoint. Raises InputError."""
    if settings.optimisation.compile:
        check_compiler(device)
    task = early_exit_task if settings.model == "deediff_uvit" else backbone_task
    config, network, objective, preview = task(settings, device)
    config, dataset = open_data(settings, config)
    settings = with_label_dropout(with_num_workers(settings, dataset), config)
    assert settings.data.label_dropout is not None

    name = settings.exp_name or f"{settings.data.dataset}_{config.model}_{config.model_params.num_blocks}"
    checkpoints = CheckpointFolder(settings.log_path / name, f"{settings.data.dataset}_{config.model}")
    start = on_main(functools.partial(find_start, settings, checkpoints))
    content = {} if start is None else read_start(start, settings.resume)
    on_main(functools.partial(make_folder, checkpoints))
    if start is not None and content.get("format") != FORMAT:
        load_described(network, config, start, described_by(settings.config_path))

    backbone_of(network).grad_checkpointing = settings.optimisation.grad_checkpointing
    learner = Learner(
        network,
        objective,
        settings.optimisation,
        device,
        batch_size=settings.batch_size,
        parts=settings.grad_accum_steps,
        max_bad_steps=settings.max_bad_steps,
        fsdp=settings.fsdp,
    )
    flips, teacher = settings.data.random_flip, settings.teacher.distill_from
    run = Training(
        settings=settings,
        config=config,
        learner=learner,
        dataset=dataset,
        make_batch=BatchMaker(
            config,
            dataset,
            seed=settings.seed,
            batch_size=settings.batch_size,
            part=part_of(settings.batch_size),
            device=device,
            random_flip=dataset.random_flip if flips is None else flips,
            label_dropout=settings.data.label_dropout,
        ),
        checkpoints=checkpoints,
        preview=preview_maker(settings.logs, config, learner, preview, checkpoints.folder, settings.fsdp),
        identity=on_main(dataset.identity),
        teacher_sha256=on_main(functools.partial(sha256_of, teacher)) if teacher else None,
    )
    if start is not None and content.get("format") == FORMAT:
        go_on(run, start, content)
    warm_up = settings.optimisation.num_warmup_steps
    if settings.n_steps < warm_up and learner.step < settings.n_steps:
        log.warning(
            "--num_warmup_steps %d is more than --n_steps %d: the learning rate never reaches --lr %g",
            *(warm_up, settings.n_steps, settings.optimisation.lr),
        )
    return run


Task = tuple[Config, Backbone | EarlyExitUViT, Objective, Denoiser]  # the denoiser is for previews


def backbone_task(settings: TrainingSettings, device: torch.device) -> Task:
    """A backbone with fresh weights, or initialised from a deeper one."""
    given = stated(settings)
    model = given.setdefault("model", settings.model or "uvit")
    if settings.model not in (None, model):
        raise InputError(f"--model {settings.model} contradicts model {model} of {settings.config_path}; leave one out")
    if model not in BACKBONES:
        raise InputError(f"{settings.config_path} describes a {model}; train.py trains {' or '.join(BACKBONES)}")
    config = config_of(given, settings)
    torch.manual_seed(settings.seed)
    network = build_network(config)
    assert isinstance(network, Backbone)
    teacher = settings.teacher
    if teacher.init_from:
        warm_start(network, load_relative(teacher.init_from, config).module, teacher.init_from)
    objective: Objective = backbone_objective
    if teacher.distill_from:
        assert teacher.distill_weight is not None, "TeacherSettings sets it"
        model = load_teacher(teacher.distill_from, config, device, compiled=settings.optimisation.compile)
        objective = distillation_objective(model, teacher.distill_weight)
    return config, network, objective, network


def early_exit_task(settings: TrainingSettings, device: torch.device) -> Task:
    """Probes and exit heads on a backbone, which is frozen or also trained."""
    given, exits = stated(settings), settings.exits
    own_type = {"model": "deediff_uvit", "classifier_type": given.pop("classifier_type", None)}
    if exits.load_backbone:
        # Heads may train on another dataset than the backbone, with its own crop, and at other timesteps.
        own = {name: given.pop(name) for name in ("dataset", "crop", "t_min", "t_max") if name in given}
        backbone = load_network(exits.load_backbone, given, UViT, described=described_by(settings.config_path))
        same_data = backbone.config.dataset in (None, settings.data.dataset)
        given = merge(plain(backbone.config), ({} if same_data else {"crop": None}) | own)
    config = config_of(given | own_type, settings)
    torch.manual_seed(settings.seed)
    network = build_network(config)
    assert isinstance(network, EarlyExitUViT)
    if exits.load_backbone:
        network.uvit.load_state_dict(backbone.module.state_dict())
    if exits.freeze_backbone:
        check_range(backbone, config.trained_timesteps, "give --t_min and --t_max, or leave out --freeze_backbone")
    network.uvit.requires_grad_(not exits.freeze_backbone)
    threshold = 0.1 if settings.logs.preview_threshold is None else settings.logs.preview_threshold

    def preview(x_t: torch.Tensor, t: int, y: torch.Tensor | None) -> torch.Tensor:
        return network.early_exit(x_t, t, y, threshold=threshold).output

    return config, network, early_exit_objective(exits.freeze_backbone, exits.use_unweighted_loss), preview


def config_of(given: Mapping[str, Any], settings: TrainingSettings) -> Config:
    """The description of a network. Raises InputError if neither a file nor the flags give its least settings."""
    params = given.get("model_params") or {}
    size = "input_size" if given["model"] == "dit" else "img_size"
    described = bool(params) if given["model"] == "dit" else params.keys() >= {size, "patch_size"}  # a DiT has defaults
    if settings.config_path is None and not described:
        raise InputError(f"the network has no description; give --config_path, or --{size} and --patch_size")
    return build_config(given, described_by(settings.config_path))


def backbone_of(network: Backbone | EarlyExitUViT) -> Backbone:
    return network.uvit if isinstance(network, EarlyExitUViT) else network


def load_teacher(path: Path, config: Config, device: torch.device, *, compiled: bool) -> Model:
    """The network of --distill_from, frozen and not sharded.

    config: that of the trained network. Raises InputError unless both have the same task at the same timesteps.
    """
    teacher = load_relative(path, config, device)
    if different := task_differences(config, teacher.config):
        raise InputError(f"--distill_from {path} cannot be the teacher: it differs in {', '.join(different)}")
    check_range(teacher, config.trained_timesteps, "it cannot teach these timesteps; give --t_min and --t_max")
    return torch.compile(teacher.module, dynamic=False) if compiled else teacher.module


def stated(settings: TrainingSettings) -> dict[str, Any]:
    """The description of the network from the flags and the YAML file."""
    given: dict[str, Any] = {"dataset": settings.data.dataset}
    if settings.data.crop:
        given["crop"] = settings.data.crop
    if path := settings.logs.autoencoder_checkpoint_path:
        given["autoencoder"] = {"checkpoint_path": str(path)}
    return stated_settings(settings.config_path, {**settings.described, **given})


def open_data(settings: TrainingSettings, config: Config) -> tuple[Config, ImageDataset]:
    """The training images, and the config with their crop, number of classes and scale of latents."""
    name = settings.data.dataset
    config = replace(config, crop=crop_of(name, config.crop))
    channels, side, _ = config.model_params.image_shape
    for flag in ("sample_height", "sample_width"):
        if getattr(settings, flag) not in (None, side):
            raise InputError(f"--{flag} {getattr(settings, flag)}: the network makes {side} x {side} images")
    with main_first():
        dataset = open_dataset(
            name,
            settings.data.data_path,
            img_size=side,
            in_chans=channels,
            num_classes=config.model_params.num_classes,
            crop=config.crop,
            download=settings.data.download,
        )
    given = stated(settings)
    config = match_latents(count_real_classes(config, dataset, given), dataset, given)
    if settings.data.label_dropout and config.no_class is None:
        raise InputError(
            f'--label_dropout {settings.data.label_dropout:g}: the network has no "no class"; '
            f"num_classes must be one more than the classes of {name}"
        )
    if settings.batch_size > len(dataset):
        raise InputError(f"--batch_size {settings.batch_size} is more than the {len(dataset)} images of {name}")
    return config, dataset


def with_label_dropout(settings: TrainingSettings, config: Config) -> TrainingSettings:
    """The settings with a rate of label dropout: the flag's, else the class_dropout_prob of a DiT, else 0."""
    if settings.data.label_dropout is not None:
        return settings
    made_for = 0.0 if config.no_class is None else getattr(config.model_params, "class_dropout_prob", 0.0)
    return replace(settings, data=replace(settings.data, label_dropout=made_for))


def with_num_workers(settings: TrainingSettings, dataset: ImageDataset) -> TrainingSettings:
    if settings.data.num_workers is not None:
        return settings
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    num_workers = max(1, min(8, cores)) if dataset.needs_decoding else 0
    return replace(settings, data=replace(settings.data, num_workers=num_workers))


def count_real_classes(config: Config, dataset: ImageDataset, given: Mapping[str, Any]) -> Config:
    """The config with the number of classes of the dataset, which may be less than that of the network."""
    num_classes = config.model_params.num_classes
    if num_classes <= 0 or given.get("real_classes") is not None:
        return config
    assert config.dataset is not None, "the flags name the dataset"
    real = DATASETS[config.dataset].num_classes or (num_classes if dataset.labels is None else max(dataset.labels) + 1)
    return replace(config, real_classes=min(int(real), num_classes))


def match_latents(config: Config, dataset: ImageDataset, given: Mapping[str, Any]) -> Config:
    """The config with the scale factor of packed latents. Raises InputError if the description has another."""
    scale_factor = getattr(dataset, "scale_factor", None)
    if scale_factor is None:
        if config.autoencoder is not None:
            raise InputError(f"{config.dataset} gives pixels, but the network is described with an autoencoder")
        return config
    wanted = (given.get("autoencoder") or {}).get("scale_factor")
    if wanted not in (None, scale_factor):
        raise InputError(f"the latents were packed with scale_factor {scale_factor}, not {wanted}")
    return replace(config, autoencoder=replace(config.autoencoder or AutoencoderConfig(), scale_factor=scale_factor))


def find_start(settings: TrainingSettings, checkpoints: CheckpointFolder) -> Path | None:
    """The checkpoint or weights to start from; None for a new run. Raises InputError for the folder of another run."""
    checkpoints.claim()
    if settings.resume:
        newest = checkpoints.newest_whole()
        checkpoints.tidy(newest, settings.logs.keep_last)
        return newest
    there, start = checkpoints.newest_first(), settings.load_checkpoint_path
    if there and not (start and start.samefile(there[0])):
        raise InputError(
            f"{checkpoints.folder} already contains a run; continue with --resume, or choose another --exp_name or "
            "--log_path"
        )
    return start


def make_folder(checkpoints: CheckpointFolder) -> None:
    writable_folder(checkpoints.folder)
    checkpoints.claim()


def read_start(path: Path, resume: bool) -> Mapping[str, Any]:
    """The content of the start file; empty for a format that only contains weights."""
    if resume:
        return read_checkpoint(path)
    content = {} if path.suffix == ".safetensors" else read_pth(path)
    if content.get("format") == FORMAT:
        check_state(content, path)
    return content


def go_on(run: Training, path: Path, content: Mapping[str, Any]) -> None:
    """Continue from a checkpoint. Raises InputError if changed settings would change the result."""
    config, others = carried_settings(run.config), []
    # A new run may train on other timesteps than the run of the checkpoint.
    obstacles = contradictions(content["config"], config | {"t_min": None, "t_max": None})
    if same_run := run.settings.resume or path.parent.samefile(run.checkpoints.folder):
        obstacles = [
            *differences(content["config"], config),
            *differences(content["options"], run.options()),
            *data_differences(content["data"], run.identity),
        ]
        others = differences(content["conditions"], run.conditions())
    if obstacles:
        also = f" (also different, but allowed: {', '.join(others)})" if others else ""
        raise InputError(
            f"{path} was made with other settings: {', '.join(obstacles)}; continue with the same settings{also}"
        )
    if others:
        log.warning("%s was made with other settings, which do not change the result: %s", path, ", ".join(others))
    restore(run, path, content)
    if not same_run:
        run.learner.counters.begin_sums()  # do not average over the losses of two runs


def data_differences(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """The differences of two `ImageDataset.identity`. Copied files have other times, but the same contents."""
    hashes = {"files_sha256", "contents_sha256"}
    ours, theirs = ({k: v for k, v in about.items() if k not in hashes} for about in (recorded, present))
    found = differences(ours, theirs)
    common = hashes & recorded.keys() & present.keys()
    if common and not any(recorded[name] == present[name] for name in common):
        found.append("the files of the dataset")
    return found


def restore(run: Training, path: Path, content: Mapping[str, Any]) -> None:
    """Load the state of a checkpoint. Raises InputError if it does not fit this run."""
    learner, settings = run.learner, run.settings
    if (content["ema"] is None) != (learner.ema is None):
        raise InputError(
            f"{path} was made {'without' if learner.ema else 'with'} --ema_decay; continue in the same way"
        )
    try:
        learner.load_state_dict(content)
    # For instance if the backbone was frozen before, or the checkpoint is forged.
    except MISFITS as error:
        raise InputError(f"{path}: its training state does not fit this run ({error!s:.120})") from None
    done = learner.step == settings.n_steps
    if settings.optimisation.lr_schedule == "cosine" and content["n_steps"] != settings.n_steps and not done:
        log.warning("the learning rate now falls to 0 at step %d, not %d", settings.n_steps, content["n_steps"])
    if learner.step > settings.n_steps or (done and not settings.resume):  # a queue may repeat a command
        raise InputError(
            f"{path} is at step {learner.step} already, so --n_steps {settings.n_steps} needs no more steps"
        )
