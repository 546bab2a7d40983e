"""The training loop.

Learning rate, data order, timesteps, noise and flips are functions of the seed and the step, so a run
that goes on from a checkpoint is the run that was never interrupted.
"""

from __future__ import annotations

import argparse
import logging
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.config import Config, carried_settings
from common.distributed import is_main, on_main, part_of, total, world_size
from common.errors import InputError, WriteError, writing
from common.files import remove_leftovers
from common.images import save_grid, to_uint8
from common.seeds import nth_seed
from data.dataset import ImageDataset, training_batches
from diffusion import NoiseSchedule
from diffusion.ddpm import training_target
from diffusion.sampling import Denoiser, SeededNoise, random_classes, sample
from diffusion.solvers import Solver, spaced_timesteps
from models.autoencoder import image_maker
from training.checkpoint import CheckpointFolder, write_checkpoint
from training.ema import Ema
from training.interruption import REASONS, Reason, StopRequests
from training.logs import MetricsLog
from training.parallel import ReadLate, gradients_shared, in_pieces, like, spread, whole
from training.settings import decisive, incidental

log = logging.getLogger(__name__)

# Called with (model, x_t, t, y, target), the model being the network, perhaps wrapped. Returns what to log, means
# over the images, of which "loss" is minimised.
Objective = Callable[[nn.Module, Tensor, Tensor, Tensor | None, Tensor], dict[str, Tensor]]


class Batch(NamedTuple):
    """Of a batch the rows that this process works on."""

    x_t: Tensor  # (B, C, H, W)
    t: Tensor  # (B,) int64
    y: Tensor | None  # (B,) int64
    target: Tensor  # (B, C, H, W)


class Draws:
    """Random numbers for some rows of a batch. Drawn for all of them, so that they depend on the step alone."""

    def __init__(self, seed: int, batch_size: int, part: slice, device: torch.device):
        self.batch_size, self.part, self.device = batch_size, part, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def uniform(self) -> Tensor:
        return torch.rand(self.batch_size, generator=self.generator, device=self.device)[self.part]

    def below(self, limit: int) -> Tensor:
        return torch.randint(limit, (self.batch_size,), generator=self.generator, device=self.device)[self.part]

    def normal(self, *shape: int) -> Tensor:
        """(rows, *shape)."""
        return torch.randn((self.batch_size, *shape), generator=self.generator, device=self.device)[self.part]


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Of the update that follows `step` finished ones: linear warm-up, then constant or half a cosine to 0."""
    if step < args.num_warmup_steps:
        return args.lr * (step + 1) / args.num_warmup_steps
    if args.lr_schedule == "constant":
        return args.lr
    progress = (step - args.num_warmup_steps) / max(1, args.n_steps - args.num_warmup_steps)
    return args.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Trainer:
    """Trains those parameters of a network that want gradients; with other processes, where there are any.

    args: what training.options parsed. network: on the CPU. preview: the denoiser that previews are made with.
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
        self.part = part_of(args.batch_size)
        self.schedule = NoiseSchedule(**config.diffusion_params.schedule)
        self.preview_timesteps = spaced_timesteps(
            self.schedule.num_timesteps, max(1, min(args.preview_steps, self.schedule.num_timesteps))
        )
        self.to_images = preview_decoder(config, self.preview_timesteps, device) if args.preview_steps else None
        self.model = spread(network, device, args.fsdp)
        # Previews call the network as it is: their batch is another.
        self.forward = torch.compile(self.model, dynamic=False) if args.compile else self.model
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
        # Kept on the device: reading a number back would make the device wait for the host.
        self.begin_sums()
        self.skipped_steps = torch.zeros((), device=device)  # since step 0
        self.bad_in_row = torch.zeros((), device=device)
        self.status = ReadLate(1 + len(REASONS))
        self.stop = StopRequests(args.deadline)
        self.saved: Path | None = None  # the newest checkpoint

    def train(self) -> None:
        """To the last step, or until something asks to stop: then raises SystemExit with the status that says so.

        Raises InputError where a file cannot be written: training that could not be saved is not worth its time.
        """
        args = self.args
        if self.step == args.n_steps:
            if is_main():
                print(f"finished already: {self.saved} is at step {self.step} of {args.n_steps}")
            return
        if args.num_warmup_steps > args.n_steps:
            log.warning(
                "--num_warmup_steps %d is more than --n_steps %d: the learning rate never reaches --lr %g",
                *(args.num_warmup_steps, args.n_steps, args.lr),
            )
        try:
            with self.stop:
                reason = self._run()
        except WriteError as error:
            raise InputError(f"step {self.step}: {error}; {self._what_is_kept(error.remedy)}") from None
        if reason is None:
            return
        if is_main():
            print(f"{reason.name}: stopped after step {self.step}; {self._how_to_go_on()}", file=sys.stderr)
        if reason.status:
            raise SystemExit(reason.status)

    def _run(self) -> Reason | None:
        args = self.args
        metrics = None
        if is_main():
            for folder in (self.checkpoints.folder, self.checkpoints.folder / "previews"):
                remove_leftovers(folder)
            with writing(self.checkpoints.folder / "metrics.jsonl"):
                metrics = MetricsLog(self.checkpoints.folder, self.step)
            trained = sum(p.numel() for p in self.trained) / 1e6
            print(f"{trained:.2f} M parameters learn from {len(self.dataset):,} images -> {self.checkpoints.folder}")
        batches = training_batches(
            self.dataset,
            args.batch_size,
            args.seed,
            self.step,
            args.num_workers,
            pin_memory=self.device.type == "cuda",
            part=self.part,
        )
        self.network.train()
        silent = True if args.quiet or not is_main() else None
        bar = tqdm(total=args.n_steps, initial=self.step, unit="step", disable=silent)
        since, since_step = time.perf_counter(), self.step
        reason = None
        while self.step < args.n_steps and reason is None:
            self.update(self.make_batch(*next(batches)))
            bar.update()
            reason = self._reason_to_stop()
            finished = self.step == args.n_steps
            if metrics and (finished or self.step % args.log_every_n_steps == 0):
                scalars = self._means()  # waits for the device
                steps_per_second = (self.step - since_step) / (time.perf_counter() - since)
                with writing(metrics.path):
                    metrics.write(self.step, scalars | {"steps_per_second": steps_per_second})
                tqdm.write(f"step {self.step}: loss {scalars['loss']:.4f}, {steps_per_second:.2f} steps/s")
            if self.step % args.log_every_n_steps == 0:  # the end alone is no such step: see what goes on from it
                self.begin_sums()
            stays = self.step % args.save_new_every_n_steps == 0
            if finished or reason or stays or self.step % args.save_every_n_steps == 0:
                self._save(stays)
            if not reason and (finished or self.step % args.log_every_n_steps == 0):
                self._save_preview()  # after the checkpoint: whatever happens to it, the training is not lost
                since, since_step = time.perf_counter(), self.step
        bar.close()
        if metrics:
            metrics.close()
        return None if self.step == args.n_steps else reason

    def make_batch(self, images: Tensor, labels: Tensor) -> Batch:
        """Noise the images of the step to come."""
        seed = nth_seed(self.args.seed, "training steps", self.step)
        draws = Draws(seed, self.args.batch_size, self.part, self.device)
        mirrored = draws.uniform() < 0.5 if self.random_flip else None
        x0 = self.dataset.to_x0(images.to(self.device, non_blocking=True), mirrored, draws.normal)
        trained = self.config.trained_timesteps
        t = trained[0] + draws.below(len(trained))
        eps = draws.normal(*x0.shape[1:])
        x_t = self.schedule.q_sample(x0, t, eps)
        y = labels.to(self.device, non_blocking=True) if self.config.classes else None
        if self.args.label_dropout:
            y = torch.where(draws.uniform() < self.args.label_dropout, self.config.no_class, y)
        target = training_target(self.schedule, x0, x_t, t, eps, self.config.parametrization)
        return Batch(x_t, t, y, target)

    def update(self, batch: Batch) -> None:
        """One optimiser step; one that changes nothing, if the loss or the gradient is not finite."""
        lr = learning_rate(self.step, self.args)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses, asked = self._backward(batch)
        scale = self.scaler.scale(torch.ones((), device=self.device))
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self.trained, self.args.max_grad_norm)
        grad_norm = grad_norm.full_tensor() if in_pieces(grad_norm) else grad_norm

        finite = losses["loss"].isfinite() & grad_norm.isfinite()
        # After too many bad steps none is taken any more: a host that reads late finds the weights of the last good.
        taken = finite & (self.bad_in_row < self.args.max_bad_steps)
        if self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = (~taken).float()  # read by the kernel, as GradScaler would have it
            self.optimizer.step()
        elif taken:
            self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.step, taken)

        # fp16 begins with a scale that overflows and lowers it: only at 1 an overflow is the training's fault.
        searching = losses["loss"].isfinite() & (scale > 1)
        self.bad_in_row = torch.where(taken, 0, self.bad_in_row + ~searching)
        self.skipped_steps = self.skipped_steps + ~taken
        self.summed_steps = self.summed_steps + taken
        for name, value in (losses | {"grad_norm": grad_norm}).items():
            value = torch.where(taken, value, 0)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.status.put(self.step, torch.cat([self.bad_in_row[None], asked]))

    def _backward(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of the batch's mean loss. Returns the losses, and how many processes ask to stop (see REASONS).

        Rows weigh the same wherever they are: parts of a batch need not be of one size.
        """
        args = self.args
        losses: dict[str, Tensor] = {}
        for k in range(args.grad_accum_steps):
            rows = Batch(
                *(None if tensor is None else tensor.tensor_split(args.grad_accum_steps)[k] for tensor in batch)
            )
            parts = args.batch_size / len(rows.t)  # so many of this size make a batch
            with gradients_shared(self.model, now=k == args.grad_accum_steps - 1):
                with torch.autocast(self.device.type, self.amp_dtype, enabled=args.use_amp):
                    found = self.objective(self.forward, *rows)
                # Gradients are averaged over the processes, and wanted is their sum.
                self.scaler.scale(found["loss"] / (parts / world_size())).backward()
            for name, loss in found.items():
                loss = loss.detach() / parts
                losses[name] = losses[name] + loss if name in losses else loss
        asked = torch.tensor(self.stop.asked()).to(self.device, non_blocking=True)
        summed = total(torch.cat([torch.stack(list(losses.values())), asked]))
        return dict(zip(losses, summed, strict=False)), summed[len(losses) :]

    def _reason_to_stop(self) -> Reason | None:
        """Why all processes stop now, if they do. Raises InputError after too many bad steps in a row."""
        step, (bad_in_row, *asked) = self.status.get()
        if bad_in_row >= self.args.max_bad_steps:
            last = f"the last good checkpoint is {self.saved}" if self.saved else "there is no checkpoint"
            raise InputError(
                f"step {step}: the loss or the gradient was not finite {bad_in_row:.0f} times in a row, so training "
                f"stops; {last}. Try a lower --lr, or --use_amp without fp16"
            )
        return next((reason for reason, count in zip(REASONS, asked, strict=True) if count), None)

    def _how_to_go_on(self) -> str:
        """The command, after the launcher's own words if there is one."""
        words = [word for word in self.args.command if word != "--resume"]
        for i, word in enumerate(words):
            if word.startswith(("--load_checkpoint_path", "--init_from")):
                del words[i : i + (1 if "=" in word else 2)]
                break
        start = "python" if world_size() == 1 else "torchrun ..."
        return f"go on with: {start} {shlex.join([*words, '--resume'])}"

    def _what_is_kept(self, remedy: str) -> str:
        """Of a training that ends on a file that could not be written, and how to go on; process 0 says it."""
        kept = self.checkpoints.newest_first()
        if not kept:
            return f"there is no checkpoint yet: {remedy}, then give the same command again"
        return f"the newest checkpoint is {kept[0]}: {remedy}, then {self._how_to_go_on()}"

    def begin_sums(self) -> None:
        """Of what is logged, since the last log, over the steps that were taken."""
        self.sums: dict[str, Tensor] = {}
        self.summed_steps = torch.zeros((), device=self.device)

    def _means(self) -> dict[str, float]:
        """Means since the last log, and the learning rate of the last update."""
        steps = float(self.summed_steps)
        means = {name: float(value) / steps if steps else math.nan for name, value in self.sums.items()}
        return means | {"skipped_steps": int(self.skipped_steps), "lr": learning_rate(self.step - 1, self.args)}

    def _save_preview(self) -> None:
        args = self.args
        if self.to_images is None or not (is_main() or args.fsdp):  # in pieces the network takes all processes
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
        if not is_main():
            return
        folder = self.checkpoints.folder / "previews"
        folder.mkdir(exist_ok=True)
        save_grid(folder / f"step-{self.step}.png", to_uint8(self.to_images(images)), args.n_samples)

    def _save(self, stays: bool) -> None:
        """Replace the last checkpoint; before that, if asked, write one that stays. All processes take part."""
        content = {
            "step": self.step,
            "n_steps": self.args.n_steps,
            "config": carried_settings(self.config),
            "options": self.options(),
            "data": self.data,
            "incidental": self.incidental(),
            "model": whole(self.network.state_dict()),
            "ema": whole(self.ema.averages) if self.ema else None,
            "optimizer": whole(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "sums": self.sums,
            "summed_steps": int(self.summed_steps),
            "skipped_steps": int(self.skipped_steps),
            "bad_in_row": int(self.bad_in_row),
        }
        on_main(lambda: self._write(content, stays))
        self.saved = self.checkpoints.last

    def _write(self, content: dict[str, Any], stays: bool) -> None:
        if stays:
            write_checkpoint(self.checkpoints.at_step(self.step), content)
            self.checkpoints.thin_out(self.args.keep_last)
        write_checkpoint(self.checkpoints.last, content)

    @cached_property
    def data(self) -> dict[str, Any]:
        """What tells the images from others. All processes must ask for it together."""
        return on_main(self.dataset.identity)

    def options(self) -> dict[str, Any]:
        """What decides what a step computes, beside the network and the data; a run goes on only under the same."""
        return decisive(self.args) | {"images": len(self.dataset), "random_flip": self.random_flip}

    def incidental(self) -> dict[str, Any]:
        """The options that a run may change on the way."""
        return incidental(self.args) | {"device": self.device.type}

    def restore(self, path: Path, content: Mapping[str, Any]) -> None:
        """Take up the state of a checkpoint; raises InputError where it does not fit this run."""
        if (content["ema"] is None) != (self.ema is None):
            raise InputError(f"{path} was made {'without' if self.ema else 'with'} --ema_decay; give the same")
        try:
            here = self.network.state_dict()
            self.network.load_state_dict({name: like(value, here[name]) for name, value in content["model"].items()})
            if self.ema is not None:
                self.ema.load(content["ema"])
            fused = self.optimizer.defaults["fused"]
            self.optimizer.load_state_dict(self._in_pieces(content["optimizer"]))
            for group in self.optimizer.param_groups:  # the state is the checkpoint's, the options are this run's
                betas = (self.args.beta1, self.args.beta2)
                group.update(betas=betas, weight_decay=self.args.weight_decay, fused=fused)
            self.scaler.load_state_dict(content["scaler"])
            self.step = content["step"]
            self.sums = {name: value.to(self.device) for name, value in content["sums"].items()}
            self.summed_steps.fill_(content["summed_steps"])
            self.skipped_steps.fill_(content.get("skipped_steps", 0))
            self.bad_in_row.fill_(content.get("bad_in_row", 0))
            self.saved = path
        # A backbone that was frozen and now is not, for one; or a file that was made to look like a checkpoint.
        except (LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: its training state does not fit this run ({error!s:.120})") from None
        done = self.step == self.args.n_steps
        if self.step > self.args.n_steps or (done and not self.args.resume):  # queues may give a command once more
            raise InputError(
                f"{path} is at step {self.step} already; --n_steps {self.args.n_steps} leaves nothing to do"
            )
        if self.args.lr_schedule == "cosine" and content["n_steps"] != self.args.n_steps and not done:
            log.warning("the learning rate now falls to 0 at step %d, not %d", self.args.n_steps, content["n_steps"])

    def _in_pieces(self, optimizer: Mapping[str, Any]) -> dict[str, Any]:
        """The state of an optimizer, each tensor in pieces if its parameter is."""
        state = {
            i: {name: like(value, self.trained[i]) for name, value in values.items()}
            for i, values in optimizer["state"].items()
        }
        return {**optimizer, "state": state}


def preview_decoder(
    config: Config, timesteps: Sequence[int], device: torch.device
) -> Callable[[Tensor], Tensor] | None:
    """See `image_maker`. None, with a note, where the network cannot make previews.

    It may know but some of the timesteps that lead to an image, or make latents that nothing is there to decode.
    """
    trained = config.trained_timesteps
    if not all(t in trained for t in timesteps):
        log.warning("no previews: the network learns t = %d..%d, an image takes them all", trained[0], trained[-1])
        return None
    path = config.autoencoder and config.autoencoder.checkpoint_path
    if config.autoencoder and not (path and Path(path).exists()):
        log.warning("no previews: they need the autoencoder, %s", path or "--autoencoder_checkpoint_path")
        return None
    return image_maker(config, device)
