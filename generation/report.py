"""The report of a sampling run: statistics.json and pictures, in the folder report/ of its samples."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from common.devices import in_units, peak_memory
from common.distributed import gather
from common.files import write_json
from common.images import captions, enlarge, read_png, save_grid, save_png
from common.progress import duration, images_per_second
from common.settings import flat
from common.tables import table
from generation.folder import Batch, SampleFolder
from generation.settings import RunSettings

GRID_SAMPLES = 100  # shown in grid_image.png
FRAME_SAMPLES = 8  # shown in frames.png


def write_report(
    folder: SampleFolder,
    settings: RunSettings,
    batches: Sequence[Batch],
    backbones: Sequence[Mapping[str, Any]],
    flops: float,
    memory: int | None,
) -> str:
    """Write statistics.json and the pictures. Returns a line about the run.

    batches: all batches of the run. backbones: the description of each network and the number of its calls. flops: of
    all networks, per image. memory: see `most_memory`.
    """
    save_pictures(folder)
    timing = timing_of(folder, batches)
    content = timing | {
        "peak_memory_bytes": memory,
        "device_type": folder.fingerprint["device"],  # each draws noise of its own from a seed
        "network_flops_per_image": flops,
        "backbones": list(backbones),
        "timesteps": folder.fingerprint["steps"],
        "stages": folder.fingerprint["stages"],
        "settings": flat(settings),
    }
    write_json(folder.report / "statistics.json", content)
    kept = sum(len(batch.indices) for batch in folder.kept)
    spent = duration(timing["images_timed"] / timing["images_per_second"])
    return (
        f"{folder.n_samples:,} images{f', {kept:,} of them from before' if kept else ''} "
        f"({timing['images_timed']:,} in {spent}, {images_per_second(timing['images_per_second'])} on "
        f"{timing['device']}{f', peak memory {in_units(memory)}' if memory else ''}) -> {folder.folder}"
    )


def table_of_work(work: Sequence[Mapping[str, Any]]) -> str:
    """The work of each network as a table. work: its name, timesteps, calls and FLOPs per image."""
    whole = sum(network["flops_per_image"] for network in work)
    rows = [
        (
            network["name"],
            network["timesteps"],
            f"{network['calls']:,}",
            f"{network['flops_per_image'] / 1e9:.3g}",
            f"{network['flops_per_image'] / whole:.0%}",
        )
        for network in work
    ]
    return table(("network", "timesteps", "calls", "GFLOP/image", "share"), rows, left=1)


def most_memory(device: torch.device) -> int | None:
    """The largest `peak_memory` of a process of the run, on process 0; None if unknown. All processes must call it."""
    return max((peak for peak in gather(peak_memory(device)) or () if peak is not None), default=None)


def timing_of(folder: SampleFolder, batches: Sequence[Batch]) -> dict[str, Any]:
    """The times of the images made under the conditions of this process, or of the last batch if there are none."""
    made_now = [batch for batch in batches if batch.conditions == folder.conditions]
    conditions = folder.conditions if made_now else batches[-1].conditions
    timed = [batch for batch in batches if batch.conditions == conditions]
    sampling, decoding, saving = (float(seconds) for seconds in reduce(np.add, (batch.seconds for batch in timed)))
    images_timed = sum(len(batch.indices) for batch in timed)
    return {
        "n_samples": folder.n_samples,
        "images_timed": images_timed,
        **conditions,
        "seconds": sampling,  # sum over all processes
        # The median over batches, which ignores short disturbances by other programs.
        "seconds_per_image": statistics.median(float(b.seconds[0]) / len(b.indices) for b in timed),
        "images_per_second": images_timed / sampling * conditions["processes"],
        "seconds_decoding": decoding,
        "seconds_saving": saving,
    }


def save_pictures(folder: SampleFolder) -> None:
    """Write the first samples as a grid, and their noisy images as frames."""
    indices = range(min(GRID_SAMPLES, folder.n_samples))
    images = torch.stack([read_png(path) for path in folder.paths(indices)])
    save_grid(folder.report / "grid_image.png", images, GRID_SAMPLES)
    if folder.frames:
        few = indices[:FRAME_SAMPLES]
        frames = {t: torch.stack([read_png(path) for path in folder.paths(few, t)]) for t in folder.frames}
        save_frames(folder.report / "frames.png", frames, images)


def save_frames(path: Path, frames: Mapping[int, Tensor], images: Tensor) -> None:
    """One row per sample, one column per timestep with its t underneath, the final image last.

    frames: by timestep, falling, each uint8 (N, C, H, W) as images.
    """
    columns = [enlarge(column[:FRAME_SAMPLES], least_side=64) for column in [*frames.values(), images]]
    tiles = F.pad(torch.stack(columns, dim=1), (1, 1, 1, 1), value=255)
    rows = rearrange(tiles, "n k c h w -> c (n h) (k w)")
    under = captions([*(f"t = {t}" for t in frames), "image"], tiles.shape[-1])
    save_png(path, torch.cat([rows, under.expand(len(rows), -1, -1)], dim=1))
