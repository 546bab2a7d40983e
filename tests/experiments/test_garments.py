"""experiments/garments.py: scores and their intervals, and the page, without the hours of sampling."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from common.images import save_png
from experiments import features, garments, garments_measure
from experiments.garments import SAMPLERS
from experiments.garments_measure import resampled_difference, towards
from experiments.runner import line_of, words_of


def drawn(n, seed, shift=0.0, dims=6):
    return shift + torch.randn(n, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(x, y):
    """The kernel of two rows."""
    return (sum(a * b for a, b in zip(x.tolist(), y.tolist(), strict=True)) / len(x) + 1) ** 3


def test_pairs_of_a_resampling_are_those_of_unlike_images():
    x, counts = drawn(4, 0), [2, 0, 3, 1]
    copies = [i for i, count in enumerate(counts) for _ in range(count)]
    values = [by_hand(x[i], x[j]) for i, j in itertools.product(copies, copies) if i != j]
    found = features.within(x, torch.tensor([counts], dtype=torch.float64))
    assert found.item() == pytest.approx(sum(values) / len(values))


def test_the_term_of_the_real_images_does_not_depend_on_the_samples():
    real, samples = drawn(9, 1), drawn(5, 2, 0.3)
    whole = towards(real, samples) + features.within(real)
    assert whole.item() == pytest.approx(features.kid(samples, real))


def test_the_interval_is_that_of_resampled_pairs():
    """Against a loop that draws images with replacement; both resample the samples of one noise together."""
    real, standard = drawn(40, 3), drawn(60, 4, 0.1)
    samples = standard + 0.05 * drawn(60, 5) + 0.1
    found, low, high = resampled_difference(samples, standard, real)
    assert found == pytest.approx(features.kid(samples, real) - features.kid(standard, real))
    generator, values = np.random.default_rng(1), []
    for _ in range(400):
        rows = generator.integers(60, size=60)
        unlike = torch.from_numpy(rows[:, None] != rows[None])

        def term(x, rows=rows, unlike=unlike):
            within = features.kernel(x[rows], x[rows])[unlike].mean()
            return float(within - 2 * features.kernel(x[rows], real).mean())

        values.append(term(samples) - term(standard))
    assert [low, high] == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=0.12 * (high - low))
    assert low < found < high


class Scripts:
    """In place of the scripts: each run leaves images whose grey says how far the way is from the full network."""

    seconds_in_all = 60.0

    def __init__(self, folder):
        self.lines = []

    def __call__(self, module, **flags):
        self.lines.append(line_of(module, words_of((), flags)))
        if module == "calibrate":
            flags["output"].write_text(yaml.safe_dump({"t_switch": 519, "stages": []}))
            return
        folder = Path(flags["output_folder"])
        (folder / "report").mkdir(parents=True)
        is_full = flags.get("checkpoint_path") == garments_measure.FULL and "reuse_every" not in flags
        generator = torch.Generator().manual_seed(flags["seed"])
        for i in range(flags["n_samples"]):
            pixels = torch.randint(0, 200, (1, 28, 28), generator=generator, dtype=torch.uint8)
            save_png(folder / f"{i:06d}.png", pixels if is_full else pixels + 10)
        told = {"seconds_per_image": 0.4 if is_full else 0.1, "network_flops_per_image": 2e9}
        (folder / "report" / "statistics.json").write_text(json.dumps(told))


class MeanAndSpread(torch.nn.Module):
    """Stands for a feature extractor."""

    def __call__(self, pixels):
        pixels = pixels.flatten(1).double() / 255
        return torch.stack([pixels.mean(dim=1), pixels.std(dim=1)], dim=1), None


@pytest.fixture
def measured(tmp_path, monkeypatch, run_quietly):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(garments, "Runner", Scripts)
    monkeypatch.setattr(garments_measure, "load_extractor", lambda *_: MeanAndSpread())
    real = torch.randint(0, 256, (30, 1, 28, 28), generator=torch.Generator().manual_seed(9), dtype=torch.uint8)
    monkeypatch.setattr(garments_measure.Garments, "real_images", lambda self: real)
    said = run_quietly(garments.main, ["--quick", "--samplers", "ddpm-50", "dpmsolver++-10", "--seeds", "4", "5"])
    return said, tmp_path / "results/garments/quick"


def test_the_page(measured):
    """Images that are 10 levels brighter are 10 log10(255^2 / 10^2) = 28.1 dB away, and four times as fast."""
    said, folder = measured
    page = (folder / "results.md").read_text()
    assert "results.md" in said and page.count("<!-- measured: garments -->") == 1
    rows = [line for line in page.splitlines() if line.startswith("| DuoDiff at the knee |")]
    assert len(rows) == 1 and rows[0].count("4.00x") == 2
    others = [line for line in page.splitlines() if line.startswith("| DDPM, 50 steps |")]
    assert len(others) == 8 and "| 400.0 | 2.00 |" in others[0]
    assert all("| 28.1 ± 0.0 | 100.0 | 2.00 |" in line for line in others[1:])
    assert {path.name for path in folder.glob("*.png")} == {"results_garments.png", "results_garments_worst.png"}


def test_every_way_has_the_flags_of_its_sampler(tmp_path, monkeypatch):
    monkeypatch.setattr(garments_measure, "load_extractor", lambda *_: MeanAndSpread())
    run = Scripts(tmp_path)
    of = garments_measure.Garments(tmp_path, run, None, [1, 2], 20, 8)
    ways = of.ways(("ddim", 50))
    assert next(iter(ways)) == "full" and ways["DuoDiff at the knee"]["t_switch"] == 519
    assert len(run.lines) == 3 and all("--solver ddim --steps 50 --precision fp32" in line for line in run.lines)
    assert sum("--plan" in line for line in run.lines) == 2


@pytest.mark.parametrize("seeds", [["1"], ["2", "2"]])
def test_intervals_need_two_seeds(seeds, fails):
    fails(garments.main, ["--seeds", *seeds], "two or more that differ")


def test_samplers_have_names_for_the_command_line():
    assert set(garments.NAMES.values()) == set(SAMPLERS) and "dpmsolver++-20" in garments.NAMES
