"""One sampling run: all samples of a folder, batch by batch, and the report beside them."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from common.config import Config
from common.devices import DTYPES, Stopwatch, check_compiler, pick_precision
from common.distributed import barrier, is_main, on_main, share, world_size
from common.errors import InputError, WriteError
from common.files import write_json
from common.images import enlarge, read_png, save_grid, save_png, to_uint8
from common.seeds import nth_seed
from common.signals import status_of
from diffusion import NoiseSchedule
from diffusion.sampling import Denoiser, FiniteWatch, SeededNoise, SwitchingDenoiser, guided, random_classes, sample
from diffusion.solvers import make_solver, spaced_timesteps
from generation.record import Batch, RunRecord, conditions_of, deciding_settings, samples_in
from models.autoencoder import image_maker
from models.loading import Network

GRID_SAMPLES = 100  # shown in report/grid_image.png
FRAME_SAMPLES = 8  # shown in report/frames.png


def settle_speed(args: argparse.Namespace, device: torch.device) -> None:
    """Settle --precision. Raises InputError for options of speed that the device has no use for."""
    args.precision = pick_precision(args.precision, device)
    if getattr(args, "offload", False) and device.type != "cuda":
        raise InputError(f"--offload is for CUDA: on {device.type} the networks are in the host's memory anyway")
    if args.compile:
        check_compiler(device)


def guide(config: Config, denoiser: Denoiser, scale: float, option: str = "--guidance_scale") -> Denoiser:
    """The denoiser under classifier-free guidance, or as it is for a scale of 0.

    option: named in the InputError for a network that has no class for none.
    """
    if scale == 0:
        return denoiser
    if config.no_class is None:
        raise InputError(
            f'{option} {scale:g}: the network has no class that stands for "no class" '
            f"(num_classes={config.model_params.num_classes}, {len(config.classes)} of them real); leave it out"
        )
    return guided(denoiser, scale, config.no_class)


class SamplingRun:
    """Checks everything that can be checked at once, then makes the samples that are not there yet.

    Several processes share the work, batch by batch. args: what generation.options parsed. networks: those that
    will run. config: of the first of them.
    """

    def __init__(self, args: argparse.Namespace, networks: Sequence[Network], config: Config, device: torch.device):
        self.args, self.networks, self.config, self.device = args, networks, config, device
        self.dtype = DTYPES[args.precision]
        self.to_images = image_maker(config, device)
        if args.clip_x0 and config.autoencoder:
            raise InputError("--clip_x0 is for pixels; latents reach beyond [-1, 1]")
        self.schedule = NoiseSchedule(**config.diffusion_params.schedule)
        self.timesteps = spaced_timesteps(self.schedule.num_timesteps, args.steps)
        self.solver = make_solver(args.solver, self.schedule, config.parametrization, args.eta, args.clip_x0)
        if unmet := sorted(set(args.timesteps_save) - set(self.timesteps)):
            raise InputError(f"--timesteps_save {unmet[0]}: this run visits no such t; it has {len(self.timesteps)}")
        self.class_ids = self._class_ids()
        self.folder: Path = args.output_folder
        on_main(lambda: len(samples_in(self.folder)))  # a folder of something else is refused before long work
        self.conditions = conditions_of(args, device)

    @cached_property
    def record(self) -> RunRecord:
        """What decides the images must be settled, and all processes must ask together."""

        def settings() -> dict[str, Any]:
            return deciding_settings(self.args, self.networks, self.device) | {"steps": len(self.timesteps)}

        return RunRecord(self.folder, on_main(settings))

    @cached_property
    def to_do(self) -> list[range]:
        """The batches to make. The folder is opened when this is first asked for: what is refused leaves nothing in it.

        All processes must ask together.
        """
        record = self.record
        return on_main(lambda: record.open(self.args.n_samples, self.args.batch_size, self.args.overwrite))

    def _class_ids(self) -> list[int] | None:
        """The classes that were asked for; None for random ones, or if the network has none."""
        classes, asked = self.config.classes, self.args.class_id
        if asked == ["random"]:
            return None
        if not classes:
            raise InputError(f"--class_id {asked[0]}: the network is unconditional; leave it out")
        if wrong := [class_id for class_id in asked if class_id not in classes]:
            raise InputError(f"--class_id {wrong[0]}: the network knows classes 0..{classes[-1]}")
        return asked

    def _classes(self, indices: Sequence[int]) -> Tensor | None:
        """The class of each sample, (B,)."""
        if not self.config.classes:
            return None
        if self.class_ids is None:
            classes = random_classes(self.config.classes, self.args.seed, indices)
        else:
            classes = torch.tensor([self.class_ids[i % len(self.class_ids)] for i in indices])
        return classes.to(self.device)

    @torch.inference_mode()
    def warm_up(self, denoiser: Denoiser) -> None:
        """Run each network once, so that what only first calls cost is not in the timing."""
        if not (mine := share(self.to_do)):
            return
        size = len(mine[0])
        x = torch.zeros(size, *self.config.model_params.image_shape, device=self.device)
        turns = [self.timesteps]
        if isinstance(denoiser, SwitchingDenoiser):
            turns = denoiser.timesteps_of_each(self.timesteps)
        kinds_of_call = min(2, getattr(self.args, "cache_interval", 1))  # the second one reuses what the first computed
        for t in (t for own in turns for t in own[:kinds_of_call]):
            for _ in range(3 if self.args.compile else 1):  # CUDA graphs are recorded on the second call
                denoiser(x, t, self._classes(range(size)))

    def run(
        self,
        denoiser: Denoiser,
        of_batch: Callable[[], dict[str, np.ndarray]] | None = None,
        on_begin: Callable[[], None] | None = None,
    ) -> list[Batch]:
        """Make and save the samples that are missing, this process's share of them.

        of_batch: called when a batch has been made; what it returns is kept with the batch. on_begin: called on
        process 0 before the first image, when report/ holds nothing of other runs. Returns all batches of the run,
        those of other processes and of earlier attempts among them, on process 0; none on the others.
        """

        def begin() -> None:
            self.record.begin(self.args.n_samples, self.to_do)
            if on_begin is not None:
                on_begin()

        on_main(begin)
        mine = share(self.to_do)
        total = len(mine) * len(self.timesteps)
        with going_on_later(), tqdm(total=total, unit="step", disable=True if self.args.quiet else None) as bar:
            try:
                for indices in mine:
                    self.record.add(self._make(denoiser, indices, bar, of_batch or dict))
            except InputError:
                if world_size() == 1:  # others may be in the midst of a batch
                    self.record.forget()
                raise
            barrier()
        if not is_main():
            return []
        batches = self.record.finished()
        assert sum(len(batch.indices) for batch in batches) == self.args.n_samples, "batches are missing"
        return batches

    def _make(
        self, denoiser: Denoiser, indices: range, bar: tqdm, of_batch: Callable[[], dict[str, np.ndarray]]
    ) -> Batch:
        """Make and save a batch. Raises InputError, and saves none of it, where it is not all finite."""
        batch = f"samples {indices[0]}..{indices[-1]}"
        frames: dict[int, Tensor] = {}

        def on_step(t: int, x_t: Tensor) -> None:
            bar.update()
            if t in self.record.frames:
                frames[t] = to_uint8(self.to_images(x_t))

        sampling, decoding, saving = (Stopwatch(self.device) for _ in range(3))
        with sampling:
            watch = FiniteWatch()
            try:
                x0 = self._sample(denoiser, indices, on_step, watch)
                watch.settle()
            except InputError as error:
                raise InputError(f"{batch}: {error}") from None
        with decoding:
            images = self.to_images(x0)
            if not images.isfinite().all():
                raise InputError(
                    f"{batch}: what the autoencoder decodes after t = {self.timesteps[-1]} is not finite; is it the "
                    "one of these latents?"
                )
            images = to_uint8(images)
        with saving:
            checksums = [self._save(images, self.record.paths(indices))]
            checksums += [self._save(frames[t], self.record.paths(indices, t)) for t in self.record.frames]
        seconds = np.array([sampling.seconds, decoding.seconds, saving.seconds])
        return Batch(indices, np.array(checksums, np.uint32), seconds, self.conditions, of_batch())

    def _sample(
        self,
        denoiser: Denoiser,
        indices: Sequence[int],
        on_step: Callable[[int, Tensor], None],
        watch: FiniteWatch,
    ) -> Tensor:
        noise = SeededNoise([nth_seed(self.args.seed, "samples", i) for i in indices], self.device)
        shape = self.config.model_params.image_shape
        return sample(denoiser, self.solver, self.timesteps, noise, shape, self._classes(indices), on_step, watch)

    @staticmethod
    def _save(images: Tensor, paths: Sequence[Path]) -> list[int]:
        """Returns the CRC-32 of each file."""
        return [save_png(path, image) for path, image in zip(paths, images.cpu(), strict=True)]

    def timing(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """The timing part of statistics.json: of the images that were made under the conditions of the last one."""
        made_now = [batch for batch in batches if batch.conditions == self.conditions]
        conditions = self.conditions if made_now else batches[-1].conditions
        timed = [batch for batch in batches if batch.conditions == conditions]
        sampling, decoding, saving = (float(seconds) for seconds in sum(batch.seconds for batch in timed))
        images_timed = sum(len(batch.indices) for batch in timed)
        return {
            "n_samples": self.args.n_samples,
            "images_timed": images_timed,
            **conditions,
            "seconds": sampling,  # of all processes together
            # The median batch: what else the machine did for a moment is not the network's time.
            "seconds_per_image": statistics.median(float(b.seconds[0]) / len(b.indices) for b in timed),
            "images_per_second": images_timed / sampling * conditions["processes"],
            "seconds_decoding": decoding,
            "seconds_saving": saving,
        }

    def save_pictures(self) -> None:
        """The first samples as a grid, and the noisy images on the way to them."""
        indices = range(min(GRID_SAMPLES, self.args.n_samples))
        report, images = self.folder / "report", torch.stack([read_png(path) for path in self.record.paths(indices)])
        save_grid(report / "grid_image.png", images, GRID_SAMPLES)
        if self.record.frames:
            few = indices[:FRAME_SAMPLES]
            frames = [torch.stack([read_png(p) for p in self.record.paths(few, t)]) for t in self.record.frames]
            save_frames(report / "frames.png", frames, images)

    def report(self, batches: Sequence[Batch], backbones: list[dict[str, Any]], flops: float) -> str:
        """Write report/statistics.json and the pictures. Returns a line that says what was made.

        batches: what `run` returned. backbones: what ran, and how often. flops: of the networks, per image.
        """
        self.save_pictures()
        timing = self.timing(batches)
        content = timing | {
            "network_flops_per_image": flops,
            "backbones": backbones,
            "timesteps": len(self.timesteps),
            "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items()},
        }
        write_json(self.folder / "report" / "statistics.json", content)
        kept = self.args.n_samples - sum(map(len, self.to_do))
        return (
            f"{self.args.n_samples} images{f', {kept} of them there already' if kept else ''} "
            f"({timing['images_per_second']:.2f} images/s on {timing['device']}) -> {self.folder}"
        )


@contextmanager
def going_on_later() -> Iterator[None]:
    """What ends the work in the block, a signal or a full disk, ends it in a line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if is_main():
            print(f"{Path(sys.argv[0]).name}: stopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(status_of(interrupt)) from None
    except WriteError as error:
        raise InputError(
            f"{error}; the samples before it are whole: {error.remedy}, then the same command goes on from here"
        ) from None


def save_frames(path: Path, frames: list[Tensor], images: Tensor) -> None:
    """A row a sample, a column a timestep, the finished image last."""
    columns = [enlarge(column[:FRAME_SAMPLES], least_side=64) for column in [*frames, images]]
    tiles = F.pad(torch.stack(columns, dim=1), (1, 1, 1, 1), value=255)
    save_png(path, rearrange(tiles, "n k c h w -> c (n h) (k w)"))
