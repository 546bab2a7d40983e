"""The folder of a sampling run, with the records that allow a stopped run to continue.

    000000.png ...                  the samples
    report/run.json                 the settings that decide the images, written before the first of them
    report/batches/FIRST-LAST.npz   a finished batch, written after its images

A batch is kept if its file exists and the checksums in it match the images. All other images are made in whole batches:
with the same --batch_size the images are bit for bit those of a run without a stop.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common.config import carried_settings
from common.devices import Stopwatch, device_name
from common.distributed import barrier, is_main, on_main, share, world_size
from common.errors import InputError, WriteError
from common.files import (
    lock,
    read_arrays,
    read_json,
    remove_leftovers,
    replacing,
    sha256_of,
    writable_folder,
    write_json,
)
from common.images import save_png, to_uint8
from common.progress import Progress
from common.settings import CONDITIONS, differences, record
from common.signals import status_of
from diffusion.sampling import NotFinite
from generation.settings import RunSettings
from generation.stages import Plan
from models.loading import Network

ADVICE = "choose another --output_folder or give --overwrite"
SAMPLE_NAME = re.compile(r"\d{6,}\.png")
BATCH_NAME = re.compile(r"(\d{6,})-(\d{6,})\.npz")
# The files that this project writes into report/; all others belong to the user.
REPORT_NAMES = {
    *("grid_image.png", "frames.png", "frames", "statistics.json", "metrics.json", "exits.npz", "exit_layer.png"),
    *("run.json", "batches", "calibration.yaml", "calibration.json", "calibration.png"),
}


class Batch(NamedTuple):
    """The content of the file of a finished batch."""

    indices: range  # of its samples
    checksums: np.ndarray  # (1 + K, B) uint32: CRC-32 of the samples and of the frames at K timesteps
    seconds: np.ndarray  # (3,): sampling, decoding, saving
    conditions: dict[str, Any]  # see `conditions_of`
    arrays: dict[str, np.ndarray]  # further arrays, such as exit layers


def fingerprint(
    settings: RunSettings, networks: Sequence[Network[nn.Module]], plan: Plan, device: torch.device
) -> dict[str, Any]:
    """All settings that decide the images, as plain values: the content of run.json. All processes must call it."""

    def settled() -> dict[str, Any]:
        autoencoders = [n.config.autoencoder for n in networks if n.config.autoencoder]
        paths = [Path(a.checkpoint_path) for a in autoencoders if a.checkpoint_path]
        return record(settings) | {
            "stages": plan.described(networks[0].config.diffusion_params.num_timesteps),
            "device": device.type,  # CPU and GPU generators draw different noise
            "autoencoder_sha256": sha256_of(paths[0]) if paths else None,
            "networks": [
                {"sha256": sha256_of(network.path), "weights": network.weights, **carried_settings(network.config)}
                for network in networks
            ],
        }

    return on_main(settled)


def conditions_of(settings: RunSettings, device: torch.device) -> dict[str, Any]:
    """The settings that decide the time of an image but not its content."""
    return {
        **record(settings, CONDITIONS),
        "device": device_name(device),
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def samples_in(folder: Path) -> list[Path]:
    """The samples in a folder, if it exists. Raises InputError if it contains files that no sampling run wrote."""
    files = _listed(folder)
    samples = [path for path in files if SAMPLE_NAME.fullmatch(path.name)]
    if others := [path for path in files if path not in set(samples) and path.name != "report"]:
        raise InputError(f"{folder} holds {others[0].name}, which is not a sample; choose an empty folder")
    report = folder / "report"
    if foreign := sorted(path.name for path in _listed(report) if path.name not in REPORT_NAMES):
        raise InputError(f"{report} holds {foreign[0]}, which is not from a sampling run; choose another folder")
    return samples


def _listed(folder: Path) -> list[Path]:
    """The entries of a folder without hidden files; none if the folder does not exist."""
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except FileNotFoundError:
        return []
    except OSError as error:  # a file, or no permission; an InputError ends the other processes too
        raise InputError(f"{folder}: cannot be listed ({error.strerror})") from None


def recorded_fingerprint(folder: Path) -> Any:
    """The fingerprint of the samples in a folder: its run.json. Raises InputError if there is none."""
    path = folder / "report" / "run.json"
    if not path.exists():
        raise InputError(
            f"{folder} holds {len(samples_in(folder))} samples already, but no report/run.json with their settings; "
            f"{ADVICE}"
        )
    return read_json(path)


def recorded_stages(folder: Path) -> list[Any] | None:
    """The description of the stages of the samples in a folder, see `Plan.described`; None if there are no samples."""
    if not samples_in(folder):
        return None
    recorded = recorded_fingerprint(folder)
    stages = recorded.get("stages") if isinstance(recorded, dict) else None
    if not isinstance(stages, list) or not stages:
        raise InputError(f"{folder} holds samples of a run whose stages are not recorded; {ADVICE}")
    return stages


class SampleFolder:
    """The existing samples, the missing samples, and their files.

    fingerprint: see the function `fingerprint`. conditions: see `conditions_of`.
    """

    def __init__(self, settings: RunSettings, fingerprint: Mapping[str, Any], conditions: Mapping[str, Any]):
        self.folder, self.n_samples, self.quiet = settings.output_folder, settings.n_samples, settings.machine.quiet
        self.report, self.batches = self.folder / "report", self.folder / "report" / "batches"
        self.frames: Sequence[int] = settings.timesteps_save
        self.num_timesteps = 1  # number of steps of the run, see `making`
        self.fingerprint, self.conditions = json.loads(json.dumps(fingerprint)), dict(conditions)
        self.goes_on = False  # whether the run continues with existing samples
        self.kept: list[Batch] = []
        self.to_do: list[range] = []  # batches of all processes

    def open(self, batch_size: int, overwrite: bool) -> None:
        """Find the missing batches and lock the folder; no sample is changed yet. All processes must call it together.

        Raises InputError if the folder cannot be written, if another process samples into it, or if it contains other
        files, samples of a run with other settings, or samples of a longer run.
        """
        self.to_do = on_main(lambda: self._open(batch_size, overwrite))

    def _open(self, batch_size: int, overwrite: bool) -> list[range]:
        writable_folder(self.folder)
        samples = samples_in(self.folder)
        self.report.mkdir(exist_ok=True)
        self._lock = lock(self.report / ".lock", f"{self.folder}: another process is sampling into it")
        if samples and not overwrite:
            self._refuse_another(samples)
            self.goes_on, self.kept = True, self._whole_batches()
        ends = [0, *(batch.indices.stop for batch in self.kept)]
        starts = [*(batch.indices.start for batch in self.kept), self.n_samples]
        return [
            range(first, min(first + batch_size, start))
            for end, start in zip(ends, starts, strict=True)
            for first in range(end, start, batch_size)
        ]

    def _refuse_another(self, samples: Sequence[Path]) -> None:
        holds = f"{self.folder} holds {len(samples)} samples"
        if different := differences(recorded_fingerprint(self.folder), self.fingerprint):
            raise InputError(f"{holds} of another run, which differs in {', '.join(different)}; {ADVICE}")
        if max(int(path.stem) for path in samples) >= self.n_samples:
            raise InputError(f"{holds}, more than --n_samples {self.n_samples}; {ADVICE}")

    def _whole_batches(self) -> list[Batch]:
        """The complete batches, without overlaps."""
        kept: list[Batch] = []
        for batch in self.finished():
            follows = (kept[-1].indices.stop if kept else 0) <= batch.indices.start
            fits = follows and batch.indices.stop <= self.n_samples
            there = self._checksums(batch.indices) if fits else None
            if there is not None and np.array_equal(batch.checksums, there):
                kept.append(batch)
        # The last batch of a shorter run may be smaller: make it again in full size, as a single longer run would.
        last = kept[-1] if kept else None
        if last and last.indices.stop < self.n_samples and len(last.indices) < last.conditions["batch_size"]:
            kept.pop()
        return kept

    def _checksums(self, indices: range) -> np.ndarray | None:
        """The checksums of the present files, (1 + K, B); None if a file is missing."""
        paths = [self.paths(indices, frame) for frame in (None, *self.frames)]
        try:
            return np.array([[zlib.crc32(path.read_bytes()) for path in row] for row in paths], np.uint32)
        except OSError:
            return None

    def paths(self, indices: Sequence[int], frame: int | None = None) -> list[Path]:
        """The paths of samples, or of their noisy images at a timestep."""
        folder = self.folder if frame is None else self.report / "frames" / f"t{frame:04d}"
        return [folder / f"{index:06d}.png" for index in indices]

    @property
    def mine(self) -> Sequence[range]:
        """The batches that this process makes."""
        return share(self.to_do)

    @contextmanager
    def making(self, num_timesteps: int, save_choice: Callable[[Path], None] | None = None) -> Iterator[Progress]:
        """A context in which the missing batches are made. Yields a progress bar that counts images, of which
        each step does a part.

        save_choice: writes the measurement behind the stages to report/calibration.yaml and beside it.
        """

        def begin() -> None:
            self._begin()  # removes the files of other runs from report/
            if save_choice is not None:
                save_choice(self.report / "calibration.yaml")

        on_main(begin)
        self.num_timesteps, total = num_timesteps, sum(map(len, self.mine))
        with going_on_later(), Progress("sampling", total, quiet=self.quiet) as bar:
            try:
                yield bar
            except InputError:
                if world_size() == 1:  # other processes may still be writing a batch
                    self._forget()
                raise
            barrier()

    def _begin(self) -> None:
        """Remove all files except those of the kept batches, and record the run."""
        frames = [self.paths([0], t)[0].parent for t in self.frames]
        if not self.goes_on:
            for path in self.report.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != ".lock":
                    path.unlink()
        for folder in (self.folder, self.report, *frames, self.batches):
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
        kept = {index for batch in self.kept for index in batch.indices}
        for folder in (self.folder, *frames):
            for path in folder.iterdir():
                if SAMPLE_NAME.fullmatch(path.name) and int(path.stem) not in kept:
                    path.unlink()
        ranges = {batch.indices for batch in self.kept}
        for path in self.batches.iterdir():
            if _indices_of(path) not in ranges:
                path.unlink()
        write_json(self.report / "run.json", self.fingerprint)
        if self.to_do:
            # Written before the first image, so that a stopped run does not look complete.
            (self.report / "metrics.json").unlink(missing_ok=True)
            write_json(self.report / "statistics.json", {"n_samples": self.n_samples})

    def _forget(self) -> None:
        """Remove the files of `_begin` if no sample was made: a refused run leaves at most a calibration."""
        if any(self.batches.iterdir()) or samples_in(self.folder):
            return
        self._lock.__exit__(None, None, None)  # Windows does not remove an open file
        for name in ("run.json", "statistics.json", ".lock"):
            (self.report / name).unlink(missing_ok=True)
        for name in ("batches", "frames"):
            shutil.rmtree(self.report / name, ignore_errors=True)
        with suppress(OSError):  # not empty
            self.report.rmdir()

    def finished(self) -> list[Batch]:
        """The batches with readable files, sorted by their first sample."""
        found = [(indices, path) for path in self.batches.glob("*.npz") if (indices := _indices_of(path))]
        batches = []
        for indices, path in sorted(found, key=lambda pair: pair[0].start):
            try:
                content = read_arrays(path)
                conditions = json.loads(str(content.pop("conditions")))
                batches.append(Batch(indices, content.pop("checksums"), content.pop("seconds"), conditions, content))
            except (InputError, KeyError, ValueError):
                continue  # damaged by a power cut; made again
        return batches


class BatchUnderWay:
    """One batch of samples: its timing, its frames, and saving it."""

    def __init__(
        self,
        folder: SampleFolder,
        indices: range,
        decode: Callable[[Tensor], Tensor],
        device: torch.device,
        bar: Progress,
    ):
        self.folder, self.indices, self.decode, self.bar = folder, indices, decode, bar
        self.watches = [Stopwatch(device) for _ in range(3)]  # sampling, decoding, saving
        self.frames: dict[int, Tensor] = {}

    @property
    def name(self) -> str:
        return f"samples {self.indices[0]}..{self.indices[-1]}"

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """A context that times the sampling loop. Raises InputError, which names the batch, for values not finite."""
        try:
            with self.watches[0]:
                yield
        except NotFinite as error:
            raise InputError(f"{self.name}: {error}") from None

    def on_step(self, t: int, x_t: Tensor) -> None:
        """Update the progress bar, and keep the frame if t is in --timesteps_save. x_t: (B, C, H, W)."""
        self.bar.update(len(self.indices) / self.folder.num_timesteps)
        if t in self.folder.frames:
            self.frames[t] = to_uint8(self.decode(x_t))

    def save(self, x0: Tensor, arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Decode and write the images, and then the file of the batch.

        x0: (B, C, H, W). arrays: further arrays for the file, see `Batch`. Raises InputError, before any file is
        written, if decoded images are not finite.
        """
        (_, decoding, saving), folder, indices = self.watches, self.folder, self.indices
        with decoding:
            decoded = self.decode(x0)
            if not decoded.isfinite().all():
                raise InputError(
                    f"{self.name}: the autoencoder's images are not finite; does it belong to these latents?"
                )
            images = to_uint8(decoded)
        with saving:
            rows = [(images, folder.paths(indices))]
            rows += [(self.frames[t], folder.paths(indices, t)) for t in folder.frames]
            checksums = [
                [save_png(path, image) for path, image in zip(paths, pixels.cpu(), strict=True)]
                for pixels, paths in rows
            ]
        content: dict[str, Any] = {
            "checksums": np.array(checksums, np.uint32),
            "seconds": np.array([watch.seconds for watch in self.watches]),
            "conditions": json.dumps(folder.conditions),
            **(arrays or {}),
        }
        path = folder.batches / f"{indices.start:06d}-{indices.stop - 1:06d}.npz"
        with replacing(path, durable=False) as temporary:
            np.savez_compressed(temporary, **content)


def _indices_of(path: Path) -> range | None:
    match = BATCH_NAME.fullmatch(path.name)
    return range(int(match[1]), int(match[2]) + 1) if match else None


@contextmanager
def going_on_later() -> Iterator[None]:
    """A context in which a signal or a full disk ends the script with a line that explains how to continue."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if is_main():
            print(f"{Path(sys.argv[0]).name}: stopped; give the same command again to continue", file=sys.stderr)
        raise SystemExit(status_of(interrupt)) from None
    except WriteError as error:
        raise InputError(
            f"{error}; the earlier samples are complete: {error.remedy}, then give the same command again"
        ) from None
