"""The settings of the training scripts. No torch in here."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common.cli import Parser
from common.config import BACKBONES, TRAINABLE
from common.distributed import world_size
from common.errors import InputError
from common.options import MOST_BATCH, MOST_SEED, MachineSettings
from common.settings import CONDITIONS, Checked, flat, option, section
from data import CROPS, DATASETS

MOST_STEPS = 10**9
HOW = (CONDITIONS,)
of_description = partial(option, decides=(), why="the network's description has it")
of_start = partial(option, decides=(), why="it belongs to one start; the run may continue without it")
of_place = partial(option, decides=(), why="it is only the place of the checkpoint")
of_saving = partial(option, least=1, most=MOST_STEPS, decides=HOW, why="saving changes no weight")
of_previews = partial(option, decides=HOW, why="previews change no weight")


@dataclass(frozen=True, kw_only=True)
class DataSettings(Checked):
    """Data."""

    dataset: str = option(help="training images", choices=tuple(DATASETS))
    data_path: Path | None = option(
        None,
        "path of the dataset (default: datasets/)",
        exists="path",
        decides=HOW,
        why="the same images may be in another place",
    )
    crop: str | None = of_description(
        None, "crop that makes images square (default: the crop of the dataset)", choices=CROPS
    )
    random_flip: bool | None = option(None, "mirror half of the images at random (default: depends on the dataset)")
    label_dropout: float | None = option(
        None,
        'probability of training with "no class" instead of the label, for guidance; needs a network with that class '
        "(default: --class_dropout_prob of a dit, else 0)",
        least=0,
        most=1,
    )
    download: bool = of_start(False, "download the dataset first, if it is missing")
    num_workers: int | None = option(
        None,
        "number of processes that load images for each training process (default: 0 for images in memory, else one per "
        "core)",
        least=0,
        most=1024,
        decides=HOW,
        why="the order of the data follows from the seed",
    )


@dataclass(frozen=True, kw_only=True)
class OptimisationSettings(Checked):
    """Optimisation."""

    lr: float = option(2e-4, "learning rate after the warm-up", least=0, most=1000, above=True)
    lr_schedule: str = option("cosine", "form of the learning rate after the warm-up", choices=("cosine", "constant"))
    num_warmup_steps: int = option(
        1500, "steps in which the learning rate rises linearly from 0", least=0, most=MOST_STEPS
    )
    weight_decay: float = option(0.03, "weight decay of AdamW", least=0, most=1000)
    beta1: float = option(0.99, "beta1 of AdamW", least=0, most=0.999999)
    beta2: float = option(0.999, "beta2 of AdamW", least=0, most=0.999999)
    max_grad_norm: float = option(1.0, "norm to which gradients are clipped", least=0, most=1e12, above=True)
    ema_decay: float = option(0.9999, "decay of the averaged weights; 0 turns averaging off", least=0, most=0.999999999)
    use_amp: bool = option(False, "train in mixed precision")
    amp_dtype: str = option("bfloat16", "precision of --use_amp", choices=("bfloat16", "float16"))
    compile: bool = option(
        False,
        "compile the network first (torch.compile), which takes about a minute",
        decides=HOW,
        why="compilation changes only the rounding",
    )
    grad_checkpointing: bool = option(
        False,
        "compute activations again in the backward pass, which saves memory and takes about a third more time",
        decides=HOW,
        why="the gradients are the same",
    )


@dataclass(frozen=True, kw_only=True)
class LogSettings(Checked):
    """Logs and checkpoints."""

    log_every_n_steps: int = option(
        2500,
        "steps between log entries, each with a preview",
        least=1,
        most=MOST_STEPS,
        decides=HOW,
        why="logging changes no weight",
    )
    save_every_n_steps: int = of_saving(25_000, "steps between replacements of the last checkpoint")
    save_new_every_n_steps: int = of_saving(100_000, "steps between checkpoints that are kept")
    keep_last: int | None = of_saving(None, "number of checkpoints that are kept (default: all)", most=10**6)
    n_samples: int = of_previews(16, "number of images in a preview", least=1, most=1024)
    preview_steps: int = of_previews(
        20, "number of DDIM steps of a preview; 0 turns previews off", least=0, most=100_000
    )
    preview_threshold: float | None = of_previews(
        None, "exit threshold in the previews of an early-exit model (default: 0.1)", least=0, most=1
    )
    sample_seed: int = of_previews(0, "seed of the previews", least=0, most=MOST_SEED)
    autoencoder_checkpoint_path: Path | None = of_previews(
        None, "autoencoder for the previews of a network of latents", exists="path"
    )


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(Checked):
    """Learning from a full network (--model uvit or dit)."""

    init_from: Path | None = of_start(
        None,
        "start from the weights of this deeper or shallower U-ViT: its embeddings, head and middle block, and evenly "
        "spaced others of its blocks; blocks that a shallower one lacks begin as the identity",
        exists="file",
    )
    distill_from: Path | None = option(
        None, "also learn the predictions of this network", exists="file", decides=HOW, why="recorded by its SHA-256"
    )
    distill_weight: float | None = option(
        None,
        "weight of the squared error to --distill_from; the error to the target has weight 1 (default: 1)",
        least=0,
        most=1e6,
        above=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distill_weight is not None and not self.distill_from:
            raise InputError("--distill_weight needs --distill_from")
        if self.distill_from and self.distill_weight is None:
            object.__setattr__(self, "distill_weight", 1.0)


@dataclass(frozen=True, kw_only=True)
class ExitSettings(Checked):
    """Early exit (--model deediff_uvit)."""

    load_backbone: Path | None = of_start(None, "weights of the trained full backbone", exists="file")
    freeze_backbone: bool = option(False, "train only probes and exit heads")
    use_unweighted_loss: bool = option(False, "add the unweighted squared errors of the exits to the loss")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Checked):
    """Settings of train.py and main.py."""

    model: str | None = of_description(help="kind of network", choices=TRAINABLE)
    n_steps: int = option(
        help="number of optimiser steps",
        least=1,
        most=MOST_STEPS,
        decides=(),
        why="recorded separately, because a run may be extended",
    )
    batch_size: int = option(128, "number of images per optimiser step, over all processes", least=1, most=MOST_BATCH)
    grad_accum_steps: int = option(
        1, "number of parts of a batch, which are computed one after the other to save memory", least=1, most=MOST_BATCH
    )
    seed: int = option(
        0, "seed of the weights, the order of the data, the noise and the timesteps", least=0, most=MOST_SEED
    )
    log_path: Path = of_place(Path("logs"), "folder that contains the runs")
    exp_name: str | None = of_place(None, "name of the run's folder (default: <dataset>_<model>_<blocks>)")
    resume: bool = of_start(False, "continue from the newest checkpoint in the run's folder")
    load_checkpoint_path: Path | None = of_start(
        None,
        "start from the weights, optimiser state and step of this checkpoint; a file of weights starts at step 0",
        exists="file",
    )
    max_hours: float | None = of_start(
        None, "save and stop after this many hours, for queues with a time limit", least=0, most=1e6, above=True
    )
    max_bad_steps: int = option(
        10,
        "stop after this many steps in a row without a finite loss and gradient; such steps change no weight",
        least=1,
        most=10**6,
        decides=HOW,
        why="a run that ends earlier is the same run up to there",
    )
    fsdp: bool = option(
        False,
        "under torchrun, shard parameters, optimiser state and averaged weights over the processes",
        decides=HOW,
        why="sharding changes only the rounding",
    )
    config_path: Path | None = of_description(None, "YAML file that describes the network", exists="file")
    sample_height: int | None = of_description(
        None, "height of the images, which must be that of the network", least=1, most=4096
    )
    sample_width: int | None = of_description(
        None, "width of the images, which must be that of the network", least=1, most=4096
    )
    described: Mapping[str, Any] = of_description({}, flag=False)  # the network's own flags, nested
    command: tuple[str, ...] = of_start((), flag=False)  # the command line, word by word
    data: DataSettings = section("data")
    optimisation: OptimisationSettings = section("optimisation", OptimisationSettings())
    logs: LogSettings = section("logs and checkpoints", LogSettings())
    teacher: TeacherSettings = section("learning from a full network (--model uvit or dit)", TeacherSettings())
    exits: ExitSettings = section("early exit (--model deediff_uvit)", ExitSettings())
    machine: MachineSettings = section("machine", MachineSettings())

    def __post_init__(self) -> None:
        super().__post_init__()
        parts, processes = self.grad_accum_steps, world_size()
        if self.batch_size % parts:
            raise InputError(f"--batch_size {self.batch_size} is no multiple of --grad_accum_steps {parts}")
        if self.batch_size < processes * parts:
            raise InputError(
                f"--batch_size {self.batch_size}: {processes} processes in {parts} parts each need at least "
                f"{processes * parts}"
            )
        if self.fsdp and processes == 1:
            raise InputError("--fsdp needs several processes; start the script with torchrun --nproc_per_node=N")
        if self.resume and self.load_checkpoint_path:
            raise InputError("--resume and --load_checkpoint_path both choose the start; give one of them")
        if self.teacher.init_from and (self.resume or self.load_checkpoint_path):
            raise InputError(
                "--init_from starts a new run, --resume and --load_checkpoint_path continue one; give one of them"
            )
        if self.exp_name is not None and (Path(self.exp_name).name != self.exp_name or self.exp_name == ".."):
            raise InputError(f"--exp_name {self.exp_name}: wanted the name of a folder, not a path")
        self._check_model()

    def _check_model(self) -> None:
        """Raises InputError for flags of another kind of network."""
        if self.model != "deediff_uvit":
            given = flat(self.exits) | {"preview_threshold": self.logs.preview_threshold}
            for name, value in given.items():
                if value not in (None, False):
                    raise InputError(f"--{name} belongs to --model deediff_uvit")
        if self.teacher.init_from and self.model not in (None, "uvit"):
            raise InputError("--init_from belongs to --model uvit")
        if self.model == "deediff_uvit":
            if self.teacher.distill_from:
                raise InputError("--distill_from belongs to --model uvit or dit")
            if self.exits.freeze_backbone and not self.exits.load_backbone:
                raise InputError(
                    "--freeze_backbone needs --load_backbone: a backbone with fresh weights would learn nothing"
                )


@dataclass(frozen=True, kw_only=True)
class BackboneSettings(TrainingSettings):
    """Settings of train.py."""

    model: str | None = of_description(
        None,
        "kind of network; main.py trains early-exit models (default: that of --config_path, else uvit)",
        choices=BACKBONES,
    )


def typed_words(parser: Parser, argv: Sequence[str] | None) -> tuple[str, ...]:
    """The words of the command, which are printed for --resume."""
    return tuple(sys.argv) if argv is None else (parser.prog, *argv)
