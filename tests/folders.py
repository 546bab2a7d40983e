"""Folders of samples: what sampler.py and eesampler.py left in them, and folders that stand in for a scored run."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def samples(folder: Path) -> dict[str, np.ndarray]:
    """The images by their file names."""
    return {path.name: np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def statistics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report" / "statistics.json").read_text())


def timesteps_told(said: str) -> dict[str, int]:
    """The timesteps of each network in the table that a sampling run ends with."""
    lines = said.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:2] == ["network", "timesteps"])
    rows = itertools.takewhile(lambda line: line.endswith("%"), lines[head + 2 :])
    return {name: int(timesteps) for name, timesteps, *_ in (re.split(r" {2,}", row) for row in rows)}


def equal(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    """Whether both hold the same images, bit for bit; there must be some."""
    return one.keys() == other.keys() and bool(one) and all(np.array_equal(one[key], other[key]) for key in one)


def sampled_and_scored(folder: Path, score: float, seconds: float, seed: int, **settings: object) -> Path:
    """The least that compare.py needs of a run."""
    (folder / "report").mkdir(parents=True)
    Image.new("L", (8, 8)).save(folder / "000000.png")
    scores = {"fid": score, "n_samples": 100, "reference": "digits", "feature_extractor": "classifier"}
    (folder / "report" / "metrics.json").write_text(json.dumps(scores))
    content = {"device": "cpu", "threads": 2, "seconds_per_image": seconds, "network_flops_per_image": 1e6}
    content["stages"] = [{"network": 0, "t_min": 0, "t_max": 999, "guidance_scale": 0.0}]
    content["settings"] = {"seed": seed, "checkpoint_path": f"shallow_{seed}.pth", "steps": 50} | settings
    (folder / "report" / "statistics.json").write_text(json.dumps(content))
    return folder
