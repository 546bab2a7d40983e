"""What a folder of samples remembers of the run that makes it, so that a run that was stopped can go on.

    report/run.json             what decides the images, written before the first of them
    report/batches/FIRST-LAST.npz   a finished batch, written after its images

A batch whose file is there, and whose images are what the file says, is kept. Everything else is made in whole
batches: with the same --batch_size the images are, bit for bit, those of a run that was never stopped.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from calibration.options import CALIBRATION_IMAGES
from common.config import carried_settings, in_words
from common.devices import device_name
from common.distributed import world_size
from common.errors import InputError
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
from models.loading import Network

# The options that decide the images, beside the weights. Those that do not: --n_samples (image i of a longer run is
# image i), --batch_size, the number of processes, --quiet, and of speed --compile, --offload and --min_group; of
# these, batches of another size and compiled networks round differently.
DECIDING = (
    *("seed", "solver", "steps", "eta", "clip_x0", "class_id", "guidance_scale", "guidance_scale_late"),
    *("t_switch", "threshold", "timesteps_save", "precision"),
)
# Those of them that came later, and what they are where nothing is said: that is not recorded, so that folders made
# before can be gone on with.
DECIDING_LATER = {
    **{"stages": None, "cache_interval": 1, "cache_outer": 1},
    **{"dataset": None, "n_images": CALIBRATION_IMAGES, "speedup": None, "budget": None},  # of --t_switch auto
}
# The options that decide how long they take, and what they are of a script that has them not: images made under others
# are not timed together.
CONDITIONS = {"batch_size": None, "compile": False, "offload": False, "min_group": 1}

ADVICE = "choose another --output_folder or give --overwrite"
SAMPLE_NAME = re.compile(r"\d{6,}\.png")
BATCH_NAME = re.compile(r"(\d{6,})-(\d{6,})\.npz")
# What this project writes into report/; anything else there is the user's.
REPORT_NAMES = {
    *("grid_image.png", "frames.png", "frames", "statistics.json", "metrics.json", "exits.npz", "exit_layer.png"),
    *("run.json", "batches", "calibration.yaml", "calibration.json", "calibration.png"),
}


class Batch(NamedTuple):
    """A finished batch, as its file holds it."""

    indices: range  # of its samples
    checksums: np.ndarray  # (1 + K, B) uint32: CRC-32 of its files, the samples and the frames at K timesteps
    seconds: np.ndarray  # (3,) of sampling, decoding and saving
    conditions: dict[str, Any]  # see `conditions_of`
    arrays: dict[str, np.ndarray]  # what else is known of its images


def deciding_settings(args: argparse.Namespace, networks: Sequence[Network], device: torch.device) -> dict[str, Any]:
    """Everything the images depend on, as plain values: what run.json holds."""
    given = {name: getattr(args, name) for name in DECIDING if hasattr(args, name)}
    later = {name: getattr(args, name, plain) for name, plain in DECIDING_LATER.items()}
    given |= {name: value for name, value in later.items() if value != DECIDING_LATER[name]}
    autoencoders = [n.config.autoencoder for n in networks if n.config.autoencoder]
    paths = [Path(a.checkpoint_path) for a in autoencoders if a.checkpoint_path]
    return {
        **given,
        "timesteps_save": sorted(set(args.timesteps_save), reverse=True),
        "device": device.type,  # each kind draws noise of its own
        "autoencoder_sha256": sha256_of(paths[0]) if paths else None,
        "networks": [
            {"sha256": sha256_of(network.path), "weights": network.weights, **carried_settings(network.config)}
            for network in networks
        ],
    }


def conditions_of(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What the time of an image depends on, beside its settings."""
    return {
        **{name: getattr(args, name) for name in CONDITIONS if hasattr(args, name)},
        "device": device_name(device),
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def recorded_conditions(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """All that two runs must share for their times to be compared, of a statistics.json."""
    of_machine = dict.fromkeys(("device", "processes", "threads", "torch"), "unknown")
    recorded = {name: statistics.get(name, plain) for name, plain in {**CONDITIONS, **of_machine}.items()}
    return recorded | {"precision": statistics["settings"].get("precision", "unknown")}


def samples_in(folder: Path) -> list[Path]:
    """The samples in a folder, if it is there. Raises InputError where it holds what no sampling run made."""
    files = _listed(folder)
    samples = [path for path in files if SAMPLE_NAME.fullmatch(path.name)]
    if others := [path for path in files if path not in set(samples) and path.name != "report"]:
        raise InputError(f"{folder} holds {others[0].name}, which is no sample; choose a folder of its own")
    report = folder / "report"
    if foreign := sorted(path.name for path in _listed(report) if path.name not in REPORT_NAMES):
        raise InputError(f"{report} holds {foreign[0]}, which is of no sampling run; choose another folder")
    return samples


def _listed(folder: Path) -> list[Path]:
    """What is in a folder but for hidden files; nothing if it is not there."""
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except FileNotFoundError:
        return []
    except OSError as error:  # a file, or no permission; an InputError ends the other processes too
        raise InputError(f"{folder}: cannot be looked into ({error.strerror})") from None


def recorded_settings(folder: Path) -> Any:
    """What decided the samples that are in a folder: its run.json. Raises InputError where there is none."""
    path = folder / "report" / "run.json"
    if not path.exists():
        raise InputError(
            f"{folder} holds {len(samples_in(folder))} samples already, and no report/run.json that says of what run; "
            f"{ADVICE}"
        )
    return read_json(path)


class RunRecord:
    """The folder of a run. Process 0 opens it, and lays down what is to do; every process adds its batches.

    settings: of `deciding_settings`. frames: timesteps at which noisy images are saved too.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder, self.report, self.batches = folder, folder / "report", folder / "report" / "batches"
        self.settings = json.loads(json.dumps(settings))  # as it will be read back
        self.frames: list[int] = self.settings["timesteps_save"]
        self.goes_on = False  # with samples that are there
        self.kept: list[Batch] = []

    def open(self, n_samples: int, batch_size: int, overwrite: bool) -> list[range]:
        """The batches that are to be made; nothing is changed yet.

        Raises InputError unless samples can be written there, by nobody else at the same time, and nothing is
        lost: of the user's, of a run with other settings, or of a longer one.
        """
        writable_folder(self.folder)
        samples = samples_in(self.folder)
        self.report.mkdir(exist_ok=True)
        self._lock = lock(self.report / ".lock", f"{self.folder}: another process is sampling into it")
        if samples and not overwrite:
            self._refuse_another(samples, n_samples)
            self.goes_on, self.kept = True, self._kept(n_samples)
        ends = [0, *(batch.indices.stop for batch in self.kept)]
        starts = [*(batch.indices.start for batch in self.kept), n_samples]
        return [
            range(first, min(first + batch_size, start))
            for end, start in zip(ends, starts, strict=True)
            for first in range(end, start, batch_size)
        ]

    def _refuse_another(self, samples: Sequence[Path], n_samples: int) -> None:
        holds = f"{self.folder} holds {len(samples)} samples"
        if different := setting_differences(recorded_settings(self.folder), self.settings):
            raise InputError(f"{holds} of another run ({', '.join(different)}); {ADVICE}")
        if max(int(path.stem) for path in samples) >= n_samples:
            raise InputError(f"{holds}, more than --n_samples {n_samples}; {ADVICE}")

    def _kept(self, n_samples: int) -> list[Batch]:
        """The batches that are whole and follow each other without overlap."""
        kept: list[Batch] = []
        for batch in self.finished():
            fits = (kept[-1].indices.stop if kept else 0) <= batch.indices.start and batch.indices.stop <= n_samples
            if fits and np.array_equal(batch.checksums, self._checksums(batch.indices)):
                kept.append(batch)
        # A shorter run cut its last batch short; a longer one makes it whole, as if it had been so from the start.
        if kept and kept[-1].indices.stop < n_samples and len(kept[-1].indices) < kept[-1].conditions["batch_size"]:
            kept.pop()
        return kept

    def _checksums(self, indices: range) -> np.ndarray | None:
        """Of the files as they are; None where one is missing."""
        try:
            return np.array(
                [
                    [zlib.crc32(path.read_bytes()) for path in self.paths(indices, frame)]
                    for frame in (None, *self.frames)
                ],
                np.uint32,
            )
        except OSError:
            return None

    def paths(self, indices: Sequence[int], frame: int | None = None) -> list[Path]:
        """The files of samples, or of their noisy images at a timestep."""
        folder = self.folder if frame is None else self.report / "frames" / f"t{frame:04d}"
        return [folder / f"{index:06d}.png" for index in indices]

    def begin(self, n_samples: int, to_do: Sequence[range]) -> None:
        """Remove all that is not of the batches to keep, and say what is being made."""
        folders = [self.folder, self.report, *(self.paths([0], t)[0].parent for t in self.frames)]
        if not self.goes_on:
            for path in self.report.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != ".lock":
                    path.unlink()
        for folder in (*folders, self.batches):
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
        kept = {index for batch in self.kept for index in batch.indices}
        for folder in (self.folder, *folders[2:]):
            for path in folder.iterdir():
                if SAMPLE_NAME.fullmatch(path.name) and int(path.stem) not in kept:
                    path.unlink()
        ranges = {batch.indices for batch in self.kept}
        for path in self.batches.iterdir():
            if _indices_of(path) not in ranges:
                path.unlink()
        write_json(self.report / "run.json", self.settings)
        if to_do:
            # Known before the first image is: a run that was stopped is not taken for a whole one.
            (self.report / "metrics.json").unlink(missing_ok=True)
            write_json(self.report / "statistics.json", {"n_samples": n_samples})

    def forget(self) -> None:
        """Remove what `begin` wrote, if no sample was made: what is refused leaves nothing. A calibration stays."""
        if any(self.batches.iterdir()):
            return
        self._lock.__exit__(None, None, None)  # it cannot be removed everywhere while it is open
        for name in ("run.json", "statistics.json", ".lock"):
            (self.report / name).unlink(missing_ok=True)
        for name in ("batches", "frames"):
            shutil.rmtree(self.report / name, ignore_errors=True)
        with suppress(OSError):  # where something is left
            self.report.rmdir()

    def add(self, batch: Batch) -> None:
        path = self.batches / f"{batch.indices.start:06d}-{batch.indices.stop - 1:06d}.npz"
        content = {"checksums": batch.checksums, "seconds": batch.seconds, "conditions": json.dumps(batch.conditions)}
        with replacing(path, durable=False) as temporary:
            np.savez_compressed(temporary, **content, **batch.arrays)

    def finished(self) -> list[Batch]:
        """The batches whose files can be read, by their first sample."""
        found = [(indices, path) for path in self.batches.glob("*.npz") if (indices := _indices_of(path))]
        batches = []
        for indices, path in sorted(found, key=lambda pair: pair[0].start):
            try:
                content = read_arrays(path)
                conditions = json.loads(str(content.pop("conditions")))
                batches.append(Batch(indices, content.pop("checksums"), content.pop("seconds"), conditions, content))
            except (InputError, KeyError, ValueError):
                continue  # cut off in a power cut; to be made again
        return batches


def _indices_of(path: Path) -> range | None:
    match = BATCH_NAME.fullmatch(path.name)
    return range(int(match[1]), int(match[2]) + 1) if match else None


def setting_differences(there: Any, wanted: Any, name: str = "") -> list[str]:
    """["seed 0, not 1", "networks.0.model_params.depth 3, not 5", ...]: what two nested settings differ in."""
    if isinstance(there, Mapping) and isinstance(wanted, Mapping):
        keys = {**there, **wanted}
        pairs = [(f"{name}.{key}".lstrip("."), there.get(key), wanted.get(key)) for key in keys]
    elif isinstance(there, list) and isinstance(wanted, list) and len(there) == len(wanted):
        pairs = [(f"{name}.{i}", *pair) for i, pair in enumerate(zip(there, wanted, strict=True))]
    else:
        return [] if there == wanted else [f"{name} {in_words(there):.40}, not {in_words(wanted):.40}"]
    return [difference for pair in pairs for difference in setting_differences(pair[1], pair[2], pair[0])]
