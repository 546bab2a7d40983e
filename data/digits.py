"""The 1,797 handwritten digits of 8 x 8 pixels in this project (see digits.md for their source)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import InputError
from data.dataset import InMemoryDataset, check_labels, check_shape

FILE = Path(__file__).with_name("digits.npz")


class Digits(InMemoryDataset):
    random_flip = False  # a mirrored 3 is not a digit

    def __init__(self, data_path: Path | None, *, img_size: int, in_chans: int, num_classes: int, crop: str):
        if data_path is not None:
            raise InputError(f"--data_path {data_path}: the digits are part of the project; leave it out")
        check_shape("the digits", (8, 1), (img_size, in_chans))
        with np.load(FILE, allow_pickle=False) as file:
            levels, labels = file["images"], file["labels"]
        # The source has 17 grey levels, 0..16.
        self.images = torch.from_numpy(np.rint(levels * (255 / 16)).astype(np.uint8))[:, None]
        self.labels = torch.from_numpy(labels.astype(np.int64))
        check_labels(9, num_classes, "digits")

    def describe(self) -> dict[str, Any]:
        return {"dataset": "digits", "images": len(self), "img_size": 8, "in_chans": 1, "crop": "none"}
