"""The training loop.

Learning rate, data order, timesteps, noise and flips are functions of the seed and the step, so a run
that goes on from a checkpoint is the run that was never interrupted.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.config import Config, carried_settings
from common.errors import InputError
from common.images import save_grid, to_uint8
from common.seeds import nth_seed
from data.dataset import ImageDataset, training_batches
from diffusion import NoiseSchedule
from diffusion.ddpm import training_target
from diffusion.sampling import Denoiser, SeededNoise, random_classes, sample
from diffusion.solvers import Solver, spaced_timesteps
from models.autoencoder import image_maker
from training.checkpoints import CheckpointFolder, write_checkpoint
from training.ema import Ema
from training.logs import MetricsLog

log = logging.getLogger(__name__)

# Called with (x_t, t, y, target); returns what to log, of which "loss" is minimised.
Objective = Callable[[Tensor, Tensor, Tensor | None, Tensor], dict[str, Tensor]]


class Batch(NamedTuple):
    x_t: Tensor  # (B, C, H, W)
    t: Tensor  # (B,) int64
    y: Tensor | None  # (B,) int64
    target: Tensor  # (B, C, H, W)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Of the update that follows `step` finished ones: linear warm-up, then constant or half a cosine to 0."""
    if step < args.num_warmup_steps:
        return args.lr * (step + 1) / args.num_warmup_steps
    if args.lr_schedule == "constant":
        return args.lr
    progress = (step - args.num_warmup_steps) / max(1, args.n_steps - args.num_warmup_steps)
    return args.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Trainer:
    """Trains those parameters of a network that want gradients.

    args: what training.options parsed. preview: the denoiser that previews are made with.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        config: Config,
        network: nn.Module,
        objective: Objective,
        preview: Denoiser,
        dataset: ImageDataset,
        checkpoints: CheckpointFolder,
        device: torch.device,
    ):
        self.args, self.config, self.network = args, config, network
        self.objective, self.preview, self.dataset = objective, preview, dataset
        self.checkpoints, self.device = checkpoints, device
        self.step = 0
        self.schedule = NoiseSchedule(**config.diffusion_params.schedule)
        self.to_images = preview_decoder(config, device) if args.preview_steps else None
        self.preview_timesteps = spaced_timesteps(
            self.schedule.num_timesteps, max(1, min(args.preview_steps, self.schedule.num_timesteps))
        )
        self.trained = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=args.lr,
            betas=(args.beta1, args.beta2),
            weight_decay=args.weight_decay,
            fused=device.type in ("cuda", "cpu"),
        )
        self.ema = Ema(network, args.ema_decay) if args.ema_decay else None
        self.amp_dtype = getattr(torch, args.amp_dtype)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.use_amp and args.amp_dtype == "float16")
        self.random_flip = dataset.random_flip if args.random_flip is None else args.random_flip
        self.sums: dict[str, Tensor] = {}  # of what is logged, since the last log
        self.summed_steps = 0

    def train(self) -> None:
        args = self.args
        metrics = MetricsLog(self.checkpoints.folder, self.step)
        batches = training_batches(
            self.dataset, args.batch_size, args.seed, self.step, args.num_workers, self.device.type == "cuda"
        )
        self.network.train()
        trained = sum(p.numel() for p in self.trained) / 1e6
        print(f"{trained:.2f} M parameters learn from {len(self.dataset):,} images -> {self.checkpoints.folder}")
        bar = tqdm(total=args.n_steps, initial=self.step, unit="step", disable=True if args.quiet else None)
        since, since_step = time.perf_counter(), self.step
        while self.step < args.n_steps:
            self.update(self.make_batch(*next(batches)))
            bar.update()
            finished = self.step == args.n_steps
            if finished or self.step % args.log_every_n_steps == 0:
                scalars = self._means()  # waits for the device
                if self.step % args.log_every_n_steps == 0:  # the end alone is no such step: see what goes on from it
                    self.sums, self.summed_steps = {}, 0
                steps_per_second = (self.step - since_step) / (time.perf_counter() - since)
                metrics.write(self.step, scalars | {"steps_per_second": steps_per_second})
                tqdm.write(f"step {self.step}: loss {scalars['loss']:.4f}, {steps_per_second:.2f} steps/s")
            if self.step % args.save_new_every_n_steps == 0:
                self._save(self.checkpoints.at_step(self.step))
            if finished or self.step % args.save_every_n_steps == 0 or self.step % args.save_new_every_n_steps == 0:
                self._save(self.checkpoints.last)
            if finished or self.step % args.log_every_n_steps == 0:
                self._save_preview()  # after the checkpoint: whatever happens to it, the training is not lost
                since, since_step = time.perf_counter(), self.step
        bar.close()
        metrics.close()

    def make_batch(self, images: Tensor, labels: Tensor) -> Batch:
        """Noise the images of the step to come."""
        generator = torch.Generator(self.device)
        generator.manual_seed(nth_seed(self.args.seed, "training steps", self.step))
        mirrored = None
        if self.random_flip:
            mirrored = torch.rand(len(images), generator=generator, device=self.device) < 0.5
        x0 = self.dataset.to_x0(images.to(self.device, non_blocking=True), mirrored, generator)
        t = torch.randint(self.schedule.num_timesteps, (len(x0),), generator=generator, device=self.device)
        eps = torch.randn(x0.shape, generator=generator, device=self.device)
        x_t = self.schedule.q_sample(x0, t, eps)
        y = labels.to(self.device, non_blocking=True) if self.config.classes else None
        if self.args.label_dropout:
            dropped = torch.rand(len(x0), generator=generator, device=self.device) < self.args.label_dropout
            y = torch.where(dropped, self.config.no_class, y)
        target = training_target(self.schedule, x0, x_t, t, eps, self.config.parametrization)
        return Batch(x_t, t, y, target)

    def update(self, batch: Batch) -> None:
        """One optimiser step."""
        args, parts = self.args, self.args.grad_accum_steps
        lr = learning_rate(self.step, args)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for k in range(parts):
            part = Batch(*(None if tensor is None else tensor.chunk(parts)[k] for tensor in batch))
            with torch.autocast(self.device.type, self.amp_dtype, enabled=args.use_amp):
                losses = self.objective(*part)
            self.scaler.scale(losses["loss"] / parts).backward()
            for name, loss in losses.items():
                self._add(name, loss.detach() / parts)
        self.scaler.unscale_(self.optimizer)
        self._add("grad_norm", nn.utils.clip_grad_norm_(self.trained, args.max_grad_norm))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.summed_steps += 1
        if self.ema is not None:
            self.ema.update(self.step)

    def _add(self, name: str, value: Tensor) -> None:
        """Sum up on the device: reading a number back would make the device wait for the host."""
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _means(self) -> dict[str, float]:
        """Means since the last log, and the learning rate of the last update."""
        means = {name: float(total) / self.summed_steps for name, total in self.sums.items()}
        if not math.isfinite(means["loss"]):
            raise InputError(
                f"step {self.step}: the loss is {means['loss']}; the training diverged. Go on from an earlier "
                f"checkpoint in {self.checkpoints.folder} with a lower --lr or without fp16"
            )
        return means | {"lr": learning_rate(self.step - 1, self.args)}

    def _save_preview(self) -> None:
        args = self.args
        if self.to_images is None:
            return
        noise = SeededNoise([nth_seed(args.sample_seed, "samples", i) for i in range(args.n_samples)], self.device)
        y = None
        if self.config.classes:
            y = random_classes(self.config.classes, args.sample_seed, range(args.n_samples)).to(self.device)
        solver = Solver("ddim", self.schedule, self.config.parametrization)
        self.network.eval()
        shape = self.config.model_params.image_shape
        with nullcontext() if self.ema is None else self.ema.in_place():
            images = sample(self.preview, solver, self.preview_timesteps, noise, shape, y)
        self.network.train()
        folder = self.checkpoints.folder / "previews"
        folder.mkdir(exist_ok=True)
        save_grid(folder / f"step-{self.step}.png", to_uint8(self.to_images(images)), args.n_samples)

    def _save(self, path: Path) -> None:
        write_checkpoint(
            path,
            {
                "step": self.step,
                "n_steps": self.args.n_steps,
                "config": carried_settings(self.config),
                "options": self.options(),
                "model": self.network.state_dict(),
                "ema": self.ema.averages if self.ema else None,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "sums": self.sums,
                "summed_steps": self.summed_steps,
            },
        )

    def options(self) -> dict[str, Any]:
        """What decides what a step computes, beside the network; a run goes on only under the same."""
        chosen = {name: getattr(self.args, name) for name in DECISIVE if hasattr(self.args, name)}
        return chosen | {"images": len(self.dataset), "random_flip": self.random_flip}

    def restore(self, path: Path, content: dict[str, Any]) -> None:
        """Take up the state of a checkpoint; raises InputError where it does not fit this run."""
        if (content["ema"] is None) != (self.ema is None):
            raise InputError(f"{path} was made {'without' if self.ema else 'with'} --ema_decay; give the same")
        try:
            self.network.load_state_dict(content["model"])
            if self.ema is not None:
                self.ema.load(content["ema"])
            fused = self.optimizer.defaults["fused"]
            self.optimizer.load_state_dict(content["optimizer"])
            for group in self.optimizer.param_groups:  # the state is the checkpoint's, the options are this run's
                betas = (self.args.beta1, self.args.beta2)
                group.update(betas=betas, weight_decay=self.args.weight_decay, fused=fused)
            self.scaler.load_state_dict(content["scaler"])
            self.step = content["step"]
            self.sums = {name: total.to(self.device) for name, total in content["sums"].items()}
            self.summed_steps = content["summed_steps"]
        except (KeyError, ValueError, RuntimeError) as error:  # a backbone that was frozen and now is not, for one
            raise InputError(f"{path}: its training state does not fit this run ({error!s:.120})") from None
        if self.args.lr_schedule == "cosine" and content["n_steps"] != self.args.n_steps:
            log.warning("the learning rate now falls to 0 at step %d, not %d", self.args.n_steps, content["n_steps"])
        if self.step >= self.args.n_steps:
            raise InputError(
                f"{path} is at step {self.step} already; --n_steps {self.args.n_steps} leaves nothing to do"
            )


def preview_decoder(config: Config, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """See `image_maker`; None, with a note, where there is no autoencoder to decode latents with."""
    path = config.autoencoder and config.autoencoder.checkpoint_path
    if config.autoencoder and not (path and Path(path).exists()):
        log.warning("no previews: they need the autoencoder, %s", path or "--autoencoder_checkpoint_path")
        return None
    return image_maker(config, device)


# Options that decide what a step computes.
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
)
