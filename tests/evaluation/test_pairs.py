"""Images of two runs from the same noise: their distances, and when they are no pairs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import torch
from PIL import Image

import compare
from evaluation.pairs import feature_distance, psnr
from tests.folders import sampled_and_scored

SAMPLES, SIDE = 5, 6


class Corner(torch.nn.Module):
    """Three features: the pixels of the first row's beginning."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, 0, :3].float()


@pytest.fixture
def extractor(tmp_path) -> Path:
    path = tmp_path / "corner.pt"
    torch.jit.trace(Corner(), torch.zeros(2, 1, SIDE, SIDE, dtype=torch.uint8)).save(str(path))
    return path


@pytest.fixture
def sampled(tmp_path):
    """Makes a scored run with images (N, H, W) or (N, H, W, 3). Returns its folder."""

    def make(name: str, images: np.ndarray, seed: int = 0, **about: object) -> Path:
        folder = sampled_and_scored(tmp_path / name, 10.0, 0.01, seed)
        path = folder / "report" / "statistics.json"
        content = json.loads(path.read_text())
        content["settings"] |= about.pop("settings", {})
        path.write_text(json.dumps(content | about))
        for index, image in enumerate(images):
            Image.fromarray(image).save(folder / f"{index:06d}.png")
        return folder

    return make


@pytest.fixture
def compared(tmp_path, run_quietly):
    """Calls compare.py. Returns the lines that it prints, and the pairs in its numbers by label."""

    def call(*argv: object) -> tuple[list[str], dict[str, dict]]:
        out = ["--output", tmp_path / "x.png", "--json", tmp_path / "x.json", "--device", "cpu"]
        lines = run_quietly(compare.main, [*argv, *out]).splitlines()
        return lines, {of["label"]: of["pairs"] for of in json.loads((tmp_path / "x.json").read_text())["labels"]}

    return call


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (SAMPLES, SIDE, SIDE), dtype=np.uint8)


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    """By its definition, with a root mean square."""
    rms = np.sqrt(np.mean((one.astype(float) - other.astype(float)) ** 2))
    return 20 * np.log10(255 / rms)


def test_psnr():
    one, other = (torch.from_numpy(noise(seed, 3, 2, 4, 4)) for seed in (0, 1))
    other[2] = one[2]
    other[1] = one[1].flip(0)
    found = psnr(one, other)
    assert found[:2].tolist() == pytest.approx([decibels(one[i].numpy(), other[i].numpy()) for i in (0, 1)])
    off_by_one = one[2].clone()
    off_by_one[0, 0, 0] = off_by_one[0, 0, 0] ^ 1
    assert found[2] == pytest.approx(decibels(one[2].numpy(), off_by_one.numpy())), "equal: as the nearest unequal"
    assert psnr(one, 255 - one).shape == (3,) and psnr(one[:1] * 0, one[:1] * 0 + 255).item() == pytest.approx(0)


def test_feature_distance_is_twice_the_cosine_distance():
    one, other = (np.random.default_rng(seed).normal(size=(4, 7)) for seed in (0, 1))
    found = feature_distance(torch.from_numpy(one), torch.from_numpy(other)).tolist()
    assert found == pytest.approx([2 * scipy.spatial.distance.cosine(a, b) for a, b in zip(one, other, strict=True)])
    assert feature_distance(torch.ones(1, 3), -5 * torch.ones(1, 3)).item() == pytest.approx(4)
    assert feature_distance(torch.ones(1, 3), 5 * torch.ones(1, 3)).item() == pytest.approx(0)


def test_means_and_intervals_over_seeds(sampled, compared, extractor):
    images = {(label, seed): noise(10 * seed + len(label)) for label in ("full", "quick") for seed in (0, 1, 2)}
    runs = [f"{label}={sampled(f'{label}_{seed}', of, seed)}" for (label, seed), of in images.items()]
    lines, pairs = compared(*reversed(runs), "--pair_with", "full", "--feature_extractor", extractor)
    assert pairs["full"] is None and pairs["quick"]["to"] == "full" and pairs["quick"]["unshared"] is None

    def corner(image: np.ndarray) -> np.ndarray:
        return image[0, :3].astype(float)

    by_seed: dict[str, list[float]] = {"psnr": [], "feature_distance": []}
    for seed in (0, 1, 2):
        both = list(zip(images["quick", seed], images["full", seed], strict=True))
        by_seed["psnr"].append(np.mean([decibels(a, b) for a, b in both]))
        cosines = [2 * scipy.spatial.distance.cosine(corner(a), corner(b)) for a, b in both]
        by_seed["feature_distance"].append(np.mean(cosines))
    for name, values in by_seed.items():
        low, high = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
        found = pairs["quick"][name]
        assert found["mean"] == pytest.approx(np.mean(values))
        assert [found["mean"] - found["half_width"], found["mean"] + found["half_width"]] == pytest.approx([low, high])
    assert "PSNR to full" in lines[0] and "feature distance" in lines[0]
    assert (
        f"{np.mean(by_seed['psnr']):.2f} ± " in lines[2] and f"{np.mean(by_seed['feature_distance']):.4f}" in lines[2]
    )


def test_the_first_images_are_compared(sampled, compared):
    one, other = noise(0), noise(1)
    runs = [f"full={sampled('full', one)}", f"quick={sampled('quick', other)}"]
    lines, pairs = compared(*runs, "--n_pairs", 2)
    assert pairs["quick"]["psnr"]["mean"] == pytest.approx(np.mean([decibels(one[i], other[i]) for i in (0, 1)]))
    assert pairs["quick"]["samples_per_seed"] == 2 and pairs["quick"]["feature_distance"] is None
    assert any("the first 2 samples" in line for line in lines)


DDIM = {"solver": "ddim", "eta": 0.0}
UNLIKE = {
    "seed": {"seed": 3},
    "class": {"settings": {"class_id": [7]}},
    "noise": {"settings": {"steps": 20}},
    "device": {"device": "NVIDIA H100"},
    "samples": {"images": noise(2, 3, SIDE, SIDE)},
    "shape": {"images": noise(2, SAMPLES, SIDE, SIDE, 3)},
}


@pytest.mark.parametrize("word", UNLIKE)
def test_what_is_not_shared_is_said_in_one_word(word, sampled, compared):
    about = {"images": noise(1), **UNLIKE[word]}
    lines, pairs = compared(f"full={sampled('full', noise(0))}", f"odd={sampled('odd', **about)}")
    assert pairs["odd"]["unshared"] == word and pairs["odd"]["psnr"] is None
    assert f"({word})" in lines[3] and any("in parentheses" in line for line in lines)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (DDIM | {"steps": 50}, DDIM | {"steps": 20}, True),  # the noise at the start alone
        (DDIM | {"steps": 50}, {"solver": "dpmsolver++", "steps": 20}, True),
        (DDIM | {"eta": 1.0, "steps": 50}, {"solver": "ddpm", "steps": 50}, True),
        (DDIM | {"eta": 0.5, "steps": 50}, DDIM | {"steps": 50}, False),
        ({"solver": "ddpm", "steps": 50, "guidance_scale": 1.0}, {"solver": "ddpm", "steps": 50}, True),
    ],
)
def test_which_solvers_share_their_noise(one, other, same, sampled, compared):
    runs = [f"{label}={sampled(label, noise(0), settings=of)}" for label, of in (("full", one), ("quick", other))]
    assert (compared(*runs)[1]["quick"]["unshared"] is None) == same


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (("cpu", "Intel Xeon"), ("cuda", "NVIDIA H100"), False),
        (("cpu", "Intel Xeon"), ("cpu", "AMD EPYC"), True),
        (("cpu", "Intel Xeon"), (None, "cpu"), True),  # a report from before the type stood in it
        (("cuda", "NVIDIA H100"), (None, "NVIDIA A10"), True),
    ],
)
def test_the_type_of_the_device_decides_its_noise(one, other, same, sampled, compared):
    """Whatever the model of a CPU is called, it does not draw what a graphics card draws."""

    def run(label, device_type, name):
        about = {"device": name} | ({"device_type": device_type} if device_type else {})
        return f"{label}={sampled(label, noise(0), **about)}"

    assert compared(run("full", *one), run("quick", *other))[1]["quick"]["unshared"] == (None if same else "device")


def test_graphics_cards_draw_the_same_noise(sampled, compared):
    names = ("NVIDIA H100", "NVIDIA A10")
    runs = [f"{name}={sampled(name, noise(0), device=name)}" for name in names]
    assert compared(*runs)[1]["NVIDIA A10"]["unshared"] is None


def test_bad_input(sampled, fails, tmp_path):
    run = f"full={sampled('full', noise(0))}"
    fails(compare.main, [run, "--pair_with", "fool"], "--pair_with fool", "no run")
    fails(compare.main, [run, "--feature_extractor", "nowhere.pt"], "nowhere.pt")
    fails(compare.main, [run, "--html", "x.png"], "--html x.png", ".html")
    fails(compare.main, [run, "--n_pairs", "0"], "--n_pairs", "1..10000000")
    fails(compare.main, [run, "--html_samples", "0"], "--html_samples", "1..10000")
    (tmp_path / "full" / "000003.png").write_bytes(b"broken")
    fails(compare.main, [run, f"same={sampled('same', noise(0))}", "--output", tmp_path / "x.png"], "000003.png")


def test_the_commands_of_the_docs(tmp_path, monkeypatch):
    """They are taken as they stand, and name the folders that the demo makes."""
    root = Path(compare.__file__).parent
    demo = (root / "scripts" / "demo.sh").read_text()
    text = (root / "docs" / "comparing.md").read_text()
    commands = [shlex.split(block.replace("\\\n", "")) for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]
    assert [command[:2] for command in commands] == [
        ["bash", "scripts/demo.sh"],
        *[["venv/bin/python", "compare.py"]] * 2,
        ["bash", "scripts/results.sh"],
    ]
    monkeypatch.chdir(root)
    for command in commands[1:3]:
        for folder in [word.rpartition("=")[2] for word in command if "=demo/" in word]:
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            name = re.sub(r"_\d+$", "_$t_switch", folder.removeprefix("demo/"))
            assert f'"$demo/{name}"' in demo, f"the demo makes no {folder}"
        words = [word.replace("=demo/", f"={tmp_path}/demo/") for word in command[2:]]
        assert len(compare.parse_settings(words).runs) >= 3
