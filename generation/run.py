"""One sampling run: all samples of a folder, batch by batch, and the report beside them."""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from common.config import Config
from common.devices import DTYPES, Stopwatch, check_compiler, pick_device, pick_precision
from common.errors import InputError
from common.files import writable_folder, write_json
from common.images import enlarge, save_grid, save_png, to_uint8
from common.seeds import nth_seed
from diffusion import NoiseSchedule
from diffusion.sampling import Denoiser, SeededNoise, SwitchingDenoiser, guided, random_classes, sample
from diffusion.solvers import make_solver, spaced_timesteps
from models.autoencoder import image_maker

SAMPLE_NAME = re.compile(r"\d{6,}\.png")
# What this project writes into report/; anything else there is the user's.
REPORT_NAMES = {
    *("grid_image.png", "frames.png", "frames", "statistics.json", "metrics.json", "exits.npz", "exit_layer.png"),
}
GRID_SAMPLES = 100  # shown in report/grid_image.png
FRAME_SAMPLES = 8  # shown in report/frames.png


def pick_working_device(args: argparse.Namespace) -> torch.device:
    """The device of a run; settles --precision, and raises InputError for options that the device has no use for."""
    device = pick_device(args.device)
    args.precision = pick_precision(args.precision, device)
    if getattr(args, "offload", False) and device.type != "cuda":
        raise InputError(f"--offload is for CUDA: on {device.type} the networks are in the host's memory anyway")
    if args.compile:
        check_compiler(device)
    return device


class SamplingRun:
    """Checks everything that can be checked at once, then makes the samples.

    args: what generation.options parsed. config: of the network, or of the first of several.
    """

    def __init__(self, args: argparse.Namespace, config: Config, device: torch.device):
        self.args, self.config, self.device = args, config, device
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
        check_output_folder(self.folder, args.overwrite)

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

    def guide(self, denoiser: Denoiser, scale: float, option: str = "--guidance_scale") -> Denoiser:
        """The denoiser under classifier-free guidance, or as it is for a scale of 0."""
        if scale == 0:
            return denoiser
        if self.config.no_class is None:
            params = self.config.model_params
            raise InputError(
                f'{option} {scale:g}: the network has no class that stands for "no class" '
                f"(num_classes={params.num_classes}, {len(self.config.classes)} of them real); leave it out"
            )
        return guided(denoiser, scale, self.config.no_class)

    @torch.inference_mode()
    def warm_up(self, denoiser: Denoiser) -> None:
        """Run each network once, so that what only first calls cost is not in the timing."""
        size = min(self.args.batch_size, self.args.n_samples)
        x = torch.zeros(size, *self.config.model_params.image_shape, device=self.device)
        which = denoiser.index if isinstance(denoiser, SwitchingDenoiser) else lambda t: 0
        for t in {which(t): t for t in self.timesteps}.values():
            for _ in range(3 if self.args.compile else 1):  # CUDA graphs are recorded on the second call
                denoiser(x, t, self._classes(range(size)))

    def run(self, denoiser: Denoiser, after_batch: Callable[[], None] | None = None) -> dict[str, Any]:
        """Make and save all samples. Returns the timing part of statistics.json.

        after_batch: called when a batch has been made.
        """
        args = self.args
        clear_samples(self.folder)
        # Known before the first image is: a run that was stopped is not taken for a whole one.
        write_json(self.folder / "report" / "statistics.json", {"n_samples": args.n_samples})
        frames = dict.fromkeys(sorted(args.timesteps_save, reverse=True))
        first_images, first_frames = [], {t: [] for t in frames}
        sampling, decoding, saving = (Stopwatch(self.device) for _ in range(3))

        total = -(-args.n_samples // args.batch_size) * len(self.timesteps)
        with tqdm(total=total, unit="step", disable=True if args.quiet else None) as bar:

            def on_step(t: int, x_t: Tensor) -> None:
                bar.update()
                if t in frames:
                    frames[t] = to_uint8(self.to_images(x_t))

            for start in range(0, args.n_samples, args.batch_size):
                indices = range(start, min(start + args.batch_size, args.n_samples))
                with sampling:
                    x0 = self._sample(denoiser, indices, on_step)
                with decoding:
                    images = to_uint8(self.to_images(x0))
                if after_batch is not None:
                    after_batch()
                with saving:
                    self._save(images, indices, self.folder)
                    for t, x_t in frames.items():
                        self._save(x_t, indices, self.folder / "report" / "frames" / f"t{t:04d}")
                if start < GRID_SAMPLES:
                    first_images.append(images.cpu())
                if start < FRAME_SAMPLES:
                    for t, x_t in frames.items():
                        first_frames[t].append(x_t.cpu())

        report = self.folder / "report"
        save_grid(report / "grid_image.png", torch.cat(first_images), GRID_SAMPLES)
        if frames:
            save_frames(report / "frames.png", [torch.cat(f) for f in first_frames.values()], torch.cat(first_images))
        sizes = [min(args.batch_size, args.n_samples - start) for start in range(0, args.n_samples, args.batch_size)]
        return {
            "n_samples": args.n_samples,
            "seconds": sampling.seconds,
            # The median batch: what else the machine did for a moment is not the network's time.
            "seconds_per_image": statistics.median(lap / n for lap, n in zip(sampling.laps, sizes, strict=True)),
            "images_per_second": args.n_samples / sampling.seconds,
            "seconds_decoding": decoding.seconds,
            "seconds_saving": saving.seconds,
        }

    def _sample(self, denoiser: Denoiser, indices: Sequence[int], on_step: Callable[[int, Tensor], None]) -> Tensor:
        noise = SeededNoise([nth_seed(self.args.seed, "samples", i) for i in indices], self.device)
        shape = self.config.model_params.image_shape
        return sample(denoiser, self.solver, self.timesteps, noise, shape, self._classes(indices), on_step)

    @staticmethod
    def _save(images: Tensor, indices: Sequence[int], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for index, image in zip(indices, images.cpu(), strict=True):
            save_png(folder / f"{index:06d}.png", image)

    def summary(self, timing: dict[str, Any]) -> str:
        return (
            f"{timing['n_samples']} images in {timing['seconds']:.1f} s "
            f"({timing['images_per_second']:.2f} images/s on {self.device}) -> {self.folder}"
        )

    def write_statistics(self, timing: dict[str, Any], backbones: list[dict[str, Any]], flops: float) -> None:
        """Write report/statistics.json.

        backbones: what ran, and how often. flops: of the networks, per image.
        """
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items()}
        content = timing | {
            "network_flops_per_image": flops,
            "backbones": backbones,
            "timesteps": len(self.timesteps),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "settings": settings,
        }
        write_json(self.folder / "report" / "statistics.json", content)


def check_output_folder(folder: Path, overwrite: bool) -> None:
    """Raises InputError unless samples can be written there and nothing of the user's is lost."""
    writable_folder(folder)
    files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    samples = [path for path in files if SAMPLE_NAME.fullmatch(path.name)]
    others = [path for path in files if path not in samples and path.name != "report"]
    if others:
        raise InputError(f"{folder} holds {others[0].name}, which is no sample; choose a folder of its own")
    if samples and not overwrite:
        raise InputError(
            f"{folder} holds {len(samples)} samples already; choose another --output_folder or give --overwrite"
        )
    report = folder / "report"
    report.mkdir(exist_ok=True)
    if foreign := sorted(path.name for path in report.iterdir() if path.name not in REPORT_NAMES):
        raise InputError(f"{report} holds {foreign[0]}, which is of no sampling run; choose a folder of its own")


def clear_samples(folder: Path) -> None:
    """Remove an earlier run, all of it, so that no sample of one run is taken for one of another."""
    for path in folder.iterdir():
        if SAMPLE_NAME.fullmatch(path.name):
            path.unlink()
    shutil.rmtree(folder / "report")
    (folder / "report").mkdir()


def save_frames(path: Path, frames: list[Tensor], images: Tensor) -> None:
    """A row a sample, a column a timestep, the finished image last."""
    columns = [enlarge(column[:FRAME_SAMPLES], least_side=64) for column in [*frames, images]]
    tiles = F.pad(torch.stack(columns, dim=1), (1, 1, 1, 1), value=255)
    save_png(path, rearrange(tiles, "n k c h w -> c (n h) (k w)"))
