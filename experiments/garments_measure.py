"""What ways to save work cost and score with the networks of pretrained/: plans, samples, features, intervals."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from common.devices import pick_device
from common.files import read_json, replacing, writable_folder
from data import open_dataset
from evaluation.features import extract_all, load_extractor
from evaluation.images import FinishedImages, evenly_spaced
from evaluation.pairs import psnr
from evaluation.settings import EFFICIENTNET
from experiments.features import kernel, within
from experiments.runner import Flags, Runner, slug

FULL, SHALLOW, EXITS = (Path("pretrained") / f"fashion_mnist_{name}" for name in ("full", "shallow", "exits"))
FULL_ALONE = "full"
SPEED_UP = 2.0  # of the plans, as predicted
THRESHOLD = 0.1  # of early exit
N_REAL = 10_000  # of the 60,000 real images, evenly spaced
BATCH = 100
RESAMPLINGS, PERCENTILES = 1000, (2.5, 97.5)

Sampler = tuple[str, int]  # solver and steps


class Garments:
    """A measurement in the folder `work`: n_samples images of each seed, for each way to save work and each sampler."""

    def __init__(
        self, work: Path, run: Runner, data_path: Path | None, seeds: Sequence[int], n_samples: int, n_paths: int
    ):
        self.work, self.run, self.seeds, self.n_samples, self.n_paths = work, run, seeds, n_samples, n_paths
        self.data: dict[str, Any] = {"dataset": "fashion_mnist"}
        if data_path:
            self.data["data_path"] = data_path
        self.extractor = load_extractor(EFFICIENTNET, None, pick_device("auto"))

    def measure(self, samplers: Mapping[str, Sampler]) -> dict[str, Any]:
        """The rows of each sampler, as plain values."""
        real = self.features("real", self.real_images).double()
        of_real = within(real)
        return {
            "seeds": list(self.seeds),
            "n_samples": self.n_samples,
            "n_real": len(real),
            "samplers": {name: self.rows(sampler, real, of_real) for name, sampler in samplers.items()},
        }

    def rows(self, sampler: Sampler, real: Tensor, of_real: Tensor) -> list[dict[str, Any]]:
        """A row for each way, the full network first, with a value for each seed.

        real: (M, D). of_real: (1,), the term of KID that does not depend on the samples.
        """
        ways = self.ways(sampler)
        folders: dict[str, list[Path]] = {label: [] for label in ways}
        for seed in self.seeds:  # so that a machine that is slower for a while is so for all ways
            for label, how in ways.items():
                folders[label].append(self.sampled(sampler, label, how, seed))

        features = {
            label: torch.stack([self.features_of(folder) for folder in of]).double() for label, of in folders.items()
        }
        rows = []
        for label, of_label in folders.items():
            reports = [read_json(folder / "report" / "statistics.json") for folder in of_label]
            rows.append(
                {
                    "label": label,
                    "folders": [str(folder) for folder in of_label],
                    "seconds": [report["seconds_per_image"] for report in reports],
                    "flops": statistics.mean(report["network_flops_per_image"] for report in reports),
                    "kid": [1000 * float(towards(real, own) + of_real) for own in features[label]],
                }
            )
        standard = rows[0]
        for row, of_label in zip(rows[1:], list(folders.values())[1:], strict=True):
            row["speed_up"] = [a / b for a, b in zip(standard["seconds"], row["seconds"], strict=True)]
            row["psnr"] = [psnr_of(*pair).mean().item() for pair in zip(folders[FULL_ALONE], of_label, strict=True)]
            own, full = (features[label].flatten(0, 1) for label in (row["label"], FULL_ALONE))
            row["resampled"] = [1000 * of for of in resampled_difference(own, full, real)]
        return rows

    def ways(self, sampler: Sampler) -> dict[str, Flags]:
        """The flags of each way by its label, the full network first: a new way is a line in here."""
        full, both = {"checkpoint_path": FULL}, (SHALLOW, FULL)
        switch = self.calibrated(sampler, "switch", checkpoint_path=both)
        t_switch = yaml.safe_load(switch.read_text())["t_switch"]
        duo = {"checkpoint_path": SHALLOW, "checkpoint_path_late": FULL, "t_switch": t_switch}
        plans = {
            name: self.calibrated(sampler, name, checkpoint_path=networks, plan=True, speedup=SPEED_UP)
            for name, networks in {"exit layers": (EXITS,), "plan of all": (SHALLOW, EXITS)}.items()
        }
        return {
            FULL_ALONE: full,
            "DuoDiff at the knee": duo,
            "DuoDiff, then corrected every 4": {**duo, "correct_every": 4},
            "middle reused every 2": {**full, "reuse_every": 2},
            f"early exit {THRESHOLD:g}": {"checkpoint_path": EXITS, "threshold": THRESHOLD},
            "exit layers by plan": {"stages": plans["exit layers"]},
            "plan of all": {"stages": plans["plan of all"]},
            "shallow alone": {"checkpoint_path": SHALLOW},
        }

    def calibrated(self, sampler: Sampler, name: str, **flags: Any) -> Path:
        """The file of stages that calibrate.py chooses for the sampler."""
        output = writable_folder(self.work / "stages") / f"{slug(name, *sampler)}.yaml"
        some: Flags = {"n_images": self.n_paths, "batch_size": min(BATCH, self.n_paths), "output": output}
        self.run("calibrate", **flags, **self.data, **of_sampler(sampler), **some)
        return output

    def sampled(self, sampler: Sampler, label: str, how: Flags, seed: int) -> Path:
        folder = self.work / "samples" / slug(label, *sampler, seed)
        some: Flags = {"n_samples": self.n_samples, "batch_size": min(BATCH, self.n_samples), "seed": seed}
        script = "eesampler" if "threshold" in how else "sampler"
        self.run(script, **how, **of_sampler(sampler), **some, output_folder=folder)
        return folder

    def features_of(self, folder: Path) -> Tensor:
        return self.features(folder.name, lambda: images_of(folder))

    def features(self, name: str, images: Callable[[], Tensor]) -> Tensor:
        """Features (N, D) of uint8 images (N, C, H, W), from their file if there is one."""
        path = writable_folder(self.work / "features") / f"{name}.npy"
        if not path.exists():
            print(f"features: {name}", flush=True)
            found, _ = extract_all(self.extractor, images().split(BATCH))
            assert found is not None, "this is the only process"
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, found.cpu().numpy())
        return torch.from_numpy(np.load(path))

    def real_images(self) -> Tensor:
        """uint8 (N, 1, 28, 28)."""
        dataset = open_dataset("fashion_mnist", self.data.get("data_path"), img_size=28, in_chans=1)
        images: Tensor = dataset.__getitems__(evenly_spaced(len(dataset), min(N_REAL, len(dataset))))[0]
        return images


def of_sampler(sampler: Sampler) -> Flags:
    # The same numbers everywhere: not every machine calculates in bf16.
    return {"solver": sampler[0], "steps": sampler[1], "precision": "fp32"}


def images_of(folder: Path) -> Tensor:
    """All samples of a folder by their numbers, uint8 (N, C, H, W)."""
    return torch.cat(list(FinishedImages(folder).batches(BATCH)))


def psnr_of(full: Path, other: Path) -> Tensor:
    """Of each image to the full network's image of the same noise. Returns (N,)."""
    return psnr(images_of(other), images_of(full))


def towards(real: Tensor, samples: Tensor, weights: Tensor | None = None) -> Tensor:
    """KID but for the term of the real images alone, which does not depend on the samples.

    real: (M, D). samples: (N, D). weights: (R, N), see `within`. Returns (R,).
    """
    weights = samples.new_ones(1, len(samples)) if weights is None else weights
    return within(samples, weights) - 2 * weights @ kernel(samples, real).mean(dim=1) / weights.sum(dim=1)


def resampled_difference(samples: Tensor, standard: Tensor, real: Tensor) -> list[float]:
    """KID of samples minus that of others of the same noise, and its 95 % interval by the bootstrap over images.

    samples, standard: (N, D), resampled alike. Returns the difference and both ends.
    """
    n = len(samples)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLINGS)
    weights = torch.from_numpy(np.concatenate([np.ones((1, n)), drawn])).to(samples)  # first the samples as they are
    difference, *resampled = (towards(real, samples, weights) - towards(real, standard, weights)).tolist()
    return [difference, *np.percentile(resampled, PERCENTILES).tolist()]
