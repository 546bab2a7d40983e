"""experiments/train_classifier.py: features for scores."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from experiments import train_classifier


@pytest.mark.parametrize("img_size", [8, 16])
def test_a_classifier_gives_features(img_size, tmp_path, run_quietly):
    output = tmp_path / "classifier.pt"
    argv = ["--dataset", "digits", "--img_size", 8, "--in_chans", 1, "--num_classes", 10, "--n_steps", 2]
    assert "held-out accuracy" in run_quietly(train_classifier.main, [*argv, "--output", output])
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    assert torch.jit.load(str(output))(images).shape == (3, 64)
    classifier = train_classifier.Classifier(img_size, 3, 9)
    assert classifier.classify(torch.zeros(2, 3, img_size, img_size, dtype=torch.uint8)).shape == (2, 9)


def test_a_classifier_wants_images(tmp_path, fails):
    for number in range(3):
        (tmp_path / "few" / f"class{number}").mkdir(parents=True)
        Image.new("RGB", (20, 20), (80 * number, 0, 0)).save(tmp_path / "few" / f"class{number}" / "0.png")
    argv = ["--dataset", "folder", "--data_path", tmp_path / "few", "--img_size", 8, "--num_classes", 3]
    fails(train_classifier.main, [*argv, "--output", tmp_path / "x.pt"], "3 images are too few")
