"""Train a small classifier of the classes of a dataset, whose features are used to score small images.

It writes a TorchScript module that maps uint8 (N, C, H, W) to the 64 features before its last layer, for
fid.py --feature_extractor. experiments/digits_classifier.pt was made with

    python -m experiments.train_classifier --dataset digits --img_size 8 --in_chans 1 --num_classes 10 \\
        --output experiments/digits_classifier.pt

and experiments/emoji_classifier.pt, from the emoji that experiments/plans.py fetches (by category) and packs, with

    python -m experiments.train_classifier --dataset folder --data_path results/plans/emoji/packed --img_size 16 \\
        --num_classes 9 --n_steps 600 --output experiments/emoji_classifier.pt

The files are kept, because scores with another classifier are not comparable.
"""

from __future__ import annotations

if __name__ == "__main__":
    from common.startup import end_in_one_line

    end_in_one_line()  # on a signal during the imports below

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.cli import Parser
from common.errors import InputError, command
from common.files import replacing, writable_folder
from common.options import MOST_SEED
from common.settings import Checked, option
from data import DATASETS, open_dataset

BATCH_SIZE, HELD_OUT = 128, 297
LEAST_SIDE = 2  # of the features before the last layers


class Classifier(nn.Module):
    """Features for scoring; `classify` is for training and for judging it."""

    def __init__(self, img_size: int, in_chans: int, num_classes: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(in_chans, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
        channels, side = 32, img_size
        while side > LEAST_SIDE:
            layers += [nn.Conv2d(channels, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
            channels, side = 64, side // 2
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side**2, 64))
        self.head = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> (N, 64)."""
        features: Tensor = self.features(images.float() / 127.5 - 1)
        return features

    @torch.jit.export
    def classify(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> logits (N, num_classes)."""
        logits: Tensor = self.head(F.relu(self.forward(images)))
        return logits


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings(Checked):
    """Settings of train_classifier.py."""

    dataset: str = option(help="training images", choices=tuple(DATASETS))
    data_path: Path | None = option(None, "path of the dataset (default: datasets/)", exists="path")
    img_size: int = option(help="side of the images", least=LEAST_SIDE, most=4096)
    in_chans: int = option(3, "channels: 3 colour, 1 grey", least=1, most=256)
    num_classes: int = option(help="number of classes of the dataset", least=2, most=1_000_000)
    n_steps: int = option(1500, f"optimiser steps of {BATCH_SIZE} images", least=1, most=10**9)
    seed: int = option(0, "seed of the weights and batches", least=0, most=MOST_SEED)
    output: Path = option(help="TorchScript file to write")


def parse_settings(argv: Sequence[str] | ClassifierSettings | None) -> ClassifierSettings:
    return Parser(prog="train_classifier.py", description=__doc__.partition("\n")[0]).settings(
        ClassifierSettings, argv, network=False
    )


@command
def main(argv: Sequence[str] | ClassifierSettings | None = None) -> None:
    settings = parse_settings(argv)
    torch.manual_seed(settings.seed)
    shape: dict[str, Any] = {
        "img_size": settings.img_size,
        "in_chans": settings.in_chans,
        "num_classes": settings.num_classes,
    }
    dataset = open_dataset(settings.dataset, settings.data_path, **shape)
    if len(dataset) < 2 * HELD_OUT:
        raise InputError(f"{len(dataset)} images are too few, {2 * HELD_OUT} are needed: {HELD_OUT} are held out")
    writable_folder(settings.output.parent)
    images, labels = dataset.__getitems__(torch.randperm(len(dataset)).tolist())
    classifier = Classifier(**shape)
    train(classifier, images[HELD_OUT:], labels[HELD_OUT:], settings.n_steps)

    parts = {"training": slice(HELD_OUT, None), "held-out": slice(0, HELD_OUT)}
    for name, part in parts.items():
        print(f"{name} accuracy {accuracy(classifier, images[part], labels[part]):.4f}")
    content = io.BytesIO()  # given a path, torch ends the process where the disk is full
    torch.jit.save(torch.jit.script(classifier), content)
    with replacing(settings.output) as temporary:
        temporary.write_bytes(content.getbuffer())
    print(f"{settings.output} ({settings.output.stat().st_size / 1024:.0f} KB)")


def train(classifier: Classifier, images: Tensor, labels: Tensor, n_steps: int) -> None:
    """images: uint8 (N, C, H, W). labels: (N,). Leaves the classifier in evaluation mode."""
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for _ in range(n_steps):
        chosen = torch.randint(len(images), (BATCH_SIZE,))
        loss = F.cross_entropy(classifier.classify(images[chosen]), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    classifier.eval()


@torch.no_grad()
def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """The share of images that it puts into their class."""
    return (classifier.classify(images).argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    main()
