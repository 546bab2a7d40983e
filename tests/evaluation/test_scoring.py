"""Scores of few images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

import evaluation.features
import fid
from common.errors import InputError
from evaluation.scoring import kernel_distance


class MeanColour(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3))


class Times(torch.nn.Module):
    """The mean colour times a number."""

    def __init__(self, number: float):
        super().__init__()
        self.number = number

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3)) * self.number


@pytest.fixture
def folder_of(tmp_path):
    def make(name: str, n: int):
        (tmp_path / name).mkdir()
        for i in range(n):
            Image.new("RGB", (8, 8), (10 * i, 20, 30)).save(tmp_path / name / f"{i:06d}.png")
        return tmp_path / name

    return make


@pytest.mark.parametrize(("metric", "least"), [("fid", 2), ("kid", 2), ("prc", 4)])
def test_too_few_images_are_refused_before_any_is_looked_at(metric, least, folder_of, tmp_path, fails, monkeypatch):
    torch.jit.trace(MeanColour(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).save(tmp_path / "mean.pt")
    few, many = folder_of("few", least - 1), folder_of("many", least)
    flags = ["--feature_extractor", tmp_path / "mean.pt", "--device", "cpu", "--quiet", "--metrics", metric]
    monkeypatch.setattr(evaluation.features.FeatureExtractor, "__call__", pytest.fail)
    told = (f"--metrics {metric}: {least - 1} images are too few to score", f"at least {least}")
    fails(fid.main, [*flags, "--samples_path", few, "--reference", many], *told)
    fails(fid.main, [*flags, "--samples_path", many, "--reference", few], *told, "to score against")
    monkeypatch.undo()
    fid.main([str(arg) for arg in [*flags, "--samples_path", many, "--reference", many]])


@pytest.mark.parametrize("metric", ["fid", "kid", "prc"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_give_no_score(metric, number, folder_of, tmp_path, fails):
    torch.jit.script(Times(number)).save(tmp_path / "odd.pt")
    folder = folder_of("images", 4)
    argv = ["--samples_path", folder, "--reference", folder, "--feature_extractor", tmp_path / "odd.pt"]
    fails(fid.main, [*argv, "--metrics", metric, "--device", "cpu", "--quiet"], "values that are not finite")
    assert not (folder / "report" / "metrics.json").exists()


def test_a_score_that_is_not_finite_is_none(folder_of, tmp_path, fails, capsys):
    """Features of 1e32 are finite, and the square of their kernel, (x y / D + 1)^3, is not: it is about 1e382."""
    torch.jit.script(Times(1e30)).save(tmp_path / "large.pt")
    folder, argv = folder_of("images", 4), ["--feature_extractor", tmp_path / "large.pt", "--device", "cpu", "--quiet"]
    argv += ["--samples_path", folder, "--reference", folder]
    fails(fid.main, [*argv, "--metrics", "kid"], "kid", "not finite", "too large")
    assert not (folder / "report" / "metrics.json").exists()


def test_kid_of_two_images_is_its_formula():
    """The unbiased estimate with the kernel (x y / D + 1)^3 (Binkowski et al. 2018), and none of one image."""
    x, y = np.random.default_rng(0).normal(size=(2, 2, 3))

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    crossed = np.mean([kernel(a, b) for a in x for b in y])
    want = kernel(*x) + kernel(*y) - 2 * crossed
    assert kernel_distance(torch.tensor(x), torch.tensor(y))["kid"] == pytest.approx(want)
    with pytest.raises(InputError, match="1 images are too few"):
        kernel_distance(torch.tensor(x[:1]), torch.tensor(y))
