"""The training loop.

Learning rate, data order, timesteps, noise and flips are functions of the seed and the step, so a run that continues
from a checkpoint equals a run that was never interrupted.
"""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from common.config import Config, carried_settings
from common.distributed import is_main, on_main, part_of, world_size
from common.errors import InputError, WriteError, writing
from common.files import remove_leftovers
from common.progress import Progress
from common.settings import CONDITIONS, record
from data.dataset import ImageDataset, training_batches
from training.batches import BatchMaker
from training.checkpoint import CheckpointFolder, write_checkpoint
from training.interruption import REASONS, Reason, StopRequests
from training.logs import MetricsLog
from training.parallel import ReadLate
from training.settings import TrainingSettings
from training.step import Learner, learning_rate, train_step

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """A run that is ready to start or to continue."""

    settings: TrainingSettings
    config: Config
    learner: Learner
    dataset: ImageDataset
    make_batch: BatchMaker
    checkpoints: CheckpointFolder
    preview: Callable[[int], None] | None  # makes the preview of a step; all processes call it
    identity: Mapping[str, Any]  # see `ImageDataset.identity`
    teacher_sha256: str | None = None  # of --distill_from

    def options(self) -> dict[str, Any]:
        """The settings, except network and data, that decide the result; --resume requires the same ones."""
        images = {"images": len(self.dataset), "random_flip": self.make_batch.random_flip}
        return record(self.settings) | images | {"distill_from_sha256": self.teacher_sha256}

    def conditions(self) -> dict[str, Any]:
        """The settings that --resume may change.

        They include --n_steps if the learning rate does not depend on it; --n_steps may change in any case.
        """
        here = {"processes": world_size(), "device": self.learner.device.type}
        constant = self.settings.optimisation.lr_schedule == "constant"
        return record(self.settings, CONDITIONS) | here | ({"n_steps": self.settings.n_steps} if constant else {})


@contextmanager
def ending_in_order(run: Training) -> Iterator[StopRequests]:
    """A context for `train`: after a signal or --max_hours the current step is finished, and a line explains how to
    continue.

    Raises SystemExit with the status of the reason, and InputError if a file cannot be written, because training
    without checkpoints would be lost.
    """
    hours = run.settings.max_hours
    try:
        with StopRequests(None if hours is None else time.monotonic() + 3600 * hours) as stop:
            yield stop
    except WriteError as error:
        raise InputError(f"step {run.learner.step}: {error}; {what_is_kept(run, error.remedy)}") from None
    if stop.reason is None:
        return
    if is_main():
        advice = how_to_go_on(run.settings)
        print(f"{stop.reason.name}: stopped after step {run.learner.step}; {advice}", file=sys.stderr)
    if stop.reason.status:
        raise SystemExit(stop.reason.status)


def train(run: Training, stop: StopRequests) -> None:
    """Train to the last step, or until `stop` has a reason to stop earlier."""
    settings, learner, logs = run.settings, run.learner, run.settings.logs
    if finished := learner.step == settings.n_steps:  # a queue repeated the command
        if is_main():
            print(f"finished already: {run.checkpoints.last} is at step {learner.step} of {settings.n_steps}")
        return
    metrics = begin(run) if is_main() else None
    batches = training_batches(
        run.dataset,
        settings.batch_size,
        settings.seed,
        learner.step,
        settings.data.num_workers or 0,
        pin_memory=learner.device.type == "cuda",
        part=part_of(settings.batch_size),
    )
    learner.network.train()
    status = ReadLate(1 + len(REASONS))
    silent = settings.machine.quiet or not is_main()
    bar = Progress(
        "training", settings.n_steps, "steps", images=settings.batch_size, initial=learner.step, quiet=silent
    )
    since, since_step = time.perf_counter(), learner.step
    while not finished and stop.reason is None:
        lr = learning_rate(learner.step, settings.n_steps, settings.optimisation)
        asked = train_step(learner, run.make_batch(learner.step, *next(batches)), lr, torch.tensor(stop.asked()))
        step, finished = learner.step, learner.step >= settings.n_steps
        bar.update()
        status.put(step, torch.cat([learner.counters.bad_in_row[None], asked]))
        reason = reason_to_stop(run, *status.get())
        stop.reason = None if finished else reason
        logs_now, stays = step % logs.log_every_n_steps == 0, step % logs.save_new_every_n_steps == 0
        if metrics and (finished or logs_now):
            scalars = learner.counters.means() | {"lr": lr}  # waits for the device
            steps_per_second = (step - since_step) / (time.perf_counter() - since)
            with writing(metrics.path):
                metrics.write(step, scalars | {"steps_per_second": steps_per_second})
            tqdm.write(f"step {step}: loss {scalars['loss']:.4f}, {steps_per_second:.2f} steps/s")
        if logs_now:  # not at the last step alone, so that a continued run logs whole sums
            learner.counters.begin_sums()
        if finished or reason or stays or step % logs.save_every_n_steps == 0:
            save(run, stays)
        if not reason and (finished or logs_now):
            if run.preview:
                run.preview(step)  # after the checkpoint, so that a failing preview loses no training
            since, since_step = time.perf_counter(), step
    bar.close()
    if metrics:
        metrics.close()


def begin(run: Training) -> MetricsLog:
    """Clean the folder, print the task and open the log. For process 0."""
    folder, learner = run.checkpoints.folder, run.learner
    for place in (folder, folder / "previews"):
        remove_leftovers(place)
    trained = sum(p.numel() for p in learner.trained) / 1e6
    print(f"{trained:.2f} M parameters learn from {len(run.dataset):,} images -> {folder}")
    with writing(folder / "metrics.jsonl"):
        return MetricsLog(folder, learner.step)


def save(run: Training, stays: bool) -> None:
    """Replace the last checkpoint. stays: first write a kept one too. All processes must call it."""
    content = {
        **run.learner.state_dict(),
        "n_steps": run.settings.n_steps,
        "config": carried_settings(run.config),
        "options": run.options(),
        "data": run.identity,
        "conditions": run.conditions(),
    }

    def write() -> None:
        if stays:
            write_checkpoint(run.checkpoints.at_step(run.learner.step), content)
            run.checkpoints.thin_out(run.settings.logs.keep_last)
        write_checkpoint(run.checkpoints.last, content)

    on_main(write)


def reason_to_stop(run: Training, step: int, status: list[float]) -> Reason | None:
    """The reason to stop now, if any. Raises InputError after too many bad steps in a row.

    status: after `step`, the bad steps in a row, and for each of REASONS the number of processes that should stop.
    """
    bad_in_row, *asked = status
    if bad_in_row >= run.settings.max_bad_steps:
        newest = next(iter(run.checkpoints.newest_first()), None) if is_main() else None
        last = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint"
        raise InputError(
            f"step {step}: the loss or the gradient was not finite {bad_in_row:.0f} times in a row, so training "
            f"stops; {last}. Try a lower --lr, or --use_amp without fp16"
        )
    return next((reason for reason, count in zip(REASONS, asked, strict=True) if count), None)


def what_is_kept(run: Training, remedy: str) -> str:
    """The newest checkpoint after a failed write, and how to continue, as text for a message."""
    kept = run.checkpoints.newest_first()
    if not kept:
        return f"there is no checkpoint yet: {remedy}, then give the same command again"
    return f"the newest checkpoint is {kept[0]}: {remedy}, then {how_to_go_on(run.settings)}"


def how_to_go_on(settings: TrainingSettings) -> str:
    """The command that continues the run, as text for a message."""
    words = [word for word in settings.command if word != "--resume"]
    for i, word in enumerate(words):
        if word.startswith(("--load_checkpoint_path", "--init_from")):
            del words[i : i + (1 if "=" in word else 2)]
            break
    start = "python" if world_size() == 1 else "torchrun ..."
    return f"continue with: {start} {shlex.join([*words, '--resume'])}"
