"""Train the small classifier whose features the demo scores digits with.

It writes scripts/digits_classifier.pt, a TorchScript module that maps uint8 (N, 1, 8, 8) to the 64
features before its last layer. Run from the project's root: python scripts/train_digits_classifier.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data import open_dataset  # noqa: E402

STEPS, BATCH_SIZE, HELD_OUT = 1500, 128, 297


class DigitsClassifier(nn.Module):
    """Features for scoring; `classify` is for training and for judging it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(256, 64)),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, 1, 8, 8) -> (N, 64)."""
        return self.features(images.float() / 127.5 - 1)

    @torch.jit.export
    def classify(self, images: Tensor) -> Tensor:
        """uint8 (N, 1, 8, 8) -> logits (N, 10)."""
        return self.head(F.relu(self.forward(images)))


def main() -> None:
    torch.manual_seed(0)
    dataset = open_dataset("digits", None, img_size=8, in_chans=1, num_classes=10)
    images, labels = dataset.__getitems__(torch.randperm(len(dataset)).tolist())
    held_out, training = slice(0, HELD_OUT), slice(HELD_OUT, None)
    classifier = DigitsClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(HELD_OUT, len(images), (BATCH_SIZE,))
        loss = F.cross_entropy(classifier.classify(images[chosen]), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    classifier.eval()
    with torch.no_grad():
        for name, part in (("training", training), ("held-out", held_out)):
            right = (classifier.classify(images[part]).argmax(1) == labels[part]).float().mean()
            print(f"{name} accuracy {right:.4f}")
    path = ROOT / "scripts" / "digits_classifier.pt"
    torch.jit.script(classifier).save(str(path))
    print(f"{path} ({path.stat().st_size / 1024:.0f} KB)")


if __name__ == "__main__":
    main()
