"""experiments/results.py: from the commands to the page, without the hours of training and sampling."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from common.cli import Parser
from common.files import write_json
from common.images import save_png
from evaluation.pairs import psnr
from experiments import measure, page, results, results_page, runner, samples
from experiments.measure import DUODIFF, JOINT
from experiments.sets import NAMES, SAMPLERS
from tests.switches import OPTIONS
from training.settings import BackboneSettings, TrainingSettings

SIDE = {"garments": 28, "digits": 8}


class Scripts(runner.Runner):
    """Lets each script read its flags, and writes what the measurement reads of its work, but does none.

    Images say by their grey how far a way is from the full network: 10 levels. All but that are four times as fast.
    """

    def __call__(self, module, *given, going_on=None, **flags):
        line = runner.line_of(module, runner.words_of(given, flags))
        self.asked[line] = None
        if line in self.seconds:
            return
        self._note(line, 36.0)
        if module in ("train", "main"):
            cls = BackboneSettings if module == "train" else TrainingSettings
            self.train(Parser(prog=module).settings(cls, runner.words_of(given, flags)))
            return
        settings = importlib.import_module(module).parse_settings(runner.words_of(given, flags))
        if module == "calibrate":
            settings.output.write_text(yaml.safe_dump({"stages": []}))
            found = {"options": OPTIONS, "networks": [{"blocks": 3}, {"blocks": 9}]}
            found["chosen"] = OPTIONS[3] if flags["solver"] == "ddpm" else OPTIONS[2]  # as if its own knee were another
            write_json(settings.output.with_suffix(".json"), found)
        else:
            self.sample(settings.output_folder, flags)

    def train(self, settings):
        folder = settings.log_path / settings.exp_name
        folder.mkdir()
        (folder / f"{settings.data.dataset}_{settings.model or 'uvit'}_last.pth").touch()
        rate = 2.0 if settings.teacher.distill_from else 5.0
        (folder / "metrics.jsonl").write_text("\n".join([json.dumps({"steps_per_second": rate})] * 2))

    def sample(self, folder, flags):
        is_full = flags.keys() & {"checkpoint_path_late", "reuse_every", "threshold", "stages"} == set()
        is_full &= "full" in str(flags.get("checkpoint_path"))
        (folder / "report").mkdir(parents=True)
        side, generator = SIDE[folder.parts[-3]], torch.Generator().manual_seed(flags["seed"])
        for i in range(flags["n_samples"]):
            pixels = torch.randint(0, 200, (1, side, side), generator=generator, dtype=torch.uint8)
            save_png(folder / f"{i:06d}.png", pixels if is_full else pixels + 10)
        told = {"seconds_per_image": 0.4 if is_full else 0.1, "network_flops_per_image": 2e9}
        write_json(folder / "report" / "statistics.json", told)


class MeanAndSpread(torch.nn.Module):
    """Stands for a feature extractor."""

    def __call__(self, pixels):
        pixels = pixels.flatten(1).double() / 255
        return torch.stack([pixels.mean(dim=1), pixels.std(dim=1)], dim=1), None


class Real:
    def __len__(self):
        return 30

    def __getitems__(self, indices):
        return torch.randint(0, 256, (30, 1, 8, 8), generator=torch.Generator().manual_seed(9), dtype=torch.uint8), None


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """The folder of the project, where all scripts and the extractor are replaced."""
    (tmp_path / "configs").symlink_to(Path("configs").resolve())
    (tmp_path / "pretrained").symlink_to(Path("pretrained").resolve())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "Runner", Scripts)
    monkeypatch.setattr("evaluation.features.load_extractor", lambda *_: MeanAndSpread())
    monkeypatch.setattr("data.open_dataset", lambda *_, **__: None)
    monkeypatch.setattr(measure, "real_images", lambda *_: Real())
    return tmp_path


def lines_of(text, beginning):
    return [line for line in text.splitlines() if line.startswith(beginning)]


def test_the_page(measured, run_quietly):
    """Images that are 10 levels brighter are 10 log10(255^2 / 10^2) = 28.1 dB away, and four times as fast."""
    argv = ["--sets", "garments", "digits", "--quick", "--samplers", "ddim-50", "--seeds", 4, 5]
    said = run_quietly(results.main, argv)
    folder = measured / "results" / "quick"
    text = (folder / "results.md").read_text()
    assert "worth nothing" in text and "garments was measured anew" in said
    assert text.count("<!-- measured: garments -->") == text.count("<!-- measured: digits -->") == 1
    assert "by `bash scripts/results.sh --sets garments digits --samplers ddim-50 --seeds 4 5 --quick` in" in text

    head, rows = lines_of(text, "|  | DDPM, 50 steps | DDIM, 50 steps |"), lines_of(text, f"| {DUODIFF} |")
    assert len(head) == 2 and len(rows) == 2 and all(row.count(", 4.00x") == 2 for row in rows)
    of_sampler = lines_of(text, "| DDIM, 50 steps |")
    assert len(of_sampler) == 2 * 9 and all("| 400.00 | 2 |" in of_sampler[n] for n in (0, 9))
    assert all("| 28.1 ± 0.0 | 100.00 | 2 |" in line for line in of_sampler[1:9] + of_sampler[10:])

    assert "The knee: DDPM, 50 steps 399; DDIM, 50 steps 599." in text and len(lines_of(text, "| knee | 399 |")) == 2
    assert text.count("### Training the shallow network") == 1, "those of pretrained/ were trained before"
    assert "| distilled | 12 |" in text and "0.40 to 0.40 of the speed" in text, "2 of 5 steps a second"
    names = {f"results_{name}{suffix}.png" for name in SIDE for suffix in ("", "_samples", "_worst", "_switch")}
    assert {path.name for path in folder.glob("*.png")} == names and all(f"]({name})" in text for name in names)


def test_each_command_is_given_once(measured, run_quietly):
    run_quietly(results.main, ["--sets", "garments", "digits", "--quick"])
    lines = [json.loads((measured / f"results/quick/{name}/commands.json").read_text()) for name in SIDE]
    garments, digits = ([line.split(" ", 2)[1:] for line in of] for of in lines)
    shapes = [line for script, line in garments if script == "calibrate.py"]
    assert len(shapes) == 2 * 3, "a switch and two plans in each sampler, the same for both seeds"
    assert sum("--plan" in line for line in shapes) == 4 and all("--precision bf16" in line for line in shapes)
    assert not any(script in ("train.py", "main.py") for script, _ in garments)
    duo = [line for _, line in digits if "--t_switch 399" in line and "shallow_all_timesteps" in line]
    duo = [line for line in duo if "correct_every" not in line and "ddpm" in line]
    timed = [line for line in duo if "/timed/" in line]
    assert len(timed) == 3 and all("--seed 0" in line for line in timed)
    duo = [line for line in duo if line not in timed]
    assert len(duo) == 2, "a way, a switch and a way to train: sampled once for each seed"
    own = [line for script, line in digits if script == "main.py" and "--t_min" in line]
    assert len(own) == 4 and all("--t_min 400" in line for line in own)
    exits = [line for script, line in digits if script == "eesampler.py" and "/timed/" not in line]
    assert len(exits) == 2 * 2 * 2, "thresholds, samplers, seeds"


def test_another_measurement_is_not_taken_for_this_one(measured, run_quietly, fails):
    """Its files have the same names."""
    argv = ["--sets", "digits", "--quick"]
    run_quietly(results.main, argv)
    run_quietly(results.main, argv)
    fails(results.main, [*argv, "--n_samples", 30], "another n_samples", "remove it")
    fails(results.main, [*argv, "--precision", "fp32"], "another precision", "remove it")


def row(label, kid, seconds=0.1, difference=None, interval=None):
    more = {"difference": difference, "interval": interval, "speed_up": [2.0] * 3} if difference else {}
    return {"label": label, "kid": kid, "seconds": [seconds] * 3, "flops": 1e6, **more}


ROWS = [
    row("full", [10.0, 10.1, 9.9], 0.2),
    row("apart", [12.0, 12.1, 11.9], 0.05, [2.0, 2.1, 1.9], [1.5, 2.5]),
    row("over seeds alone", [11.0, 11.1, 10.9], 0.1, [1.0, 1.1, 0.9], [-0.5, 2.5]),
    row("over images alone", [10.5, 14.0, 8.5], 0.1, [0.5, 3.9, -1.4], [0.2, 1.8]),
]


def test_bold_is_what_both_intervals_tell_apart():
    cells = [results_page.difference(of) for of in ROWS]
    assert cells[0] == "" and cells[1] == "**+2.0 ± 0.2 [+1.5, +2.5]**"
    assert [cell.startswith("**") for cell in cells[2:]] == [False, False]


def test_the_fastest_way_that_is_surely_not_much_worse():
    """5 % of the full network's score are 0.5."""
    able = row("able", [10.1, 10.3, 9.9], 0.1, [0.1, 0.2, 0.0], [-0.2, 0.45])
    unsure = {**row("unsure", [10.1, 10.3, 9.9], 0.1, [0.1, 0.2, 0.0], [-0.2, 0.55]), "speed_up": [9.0] * 3}
    said = results_page.verdict({"DDPM": [ROWS[0], unsure, able, ROWS[1]], "DDIM": [ROWS[0], unsure]})
    assert "- DDPM: able, 2.00x, +0.1 ± 0.2 [-0.2, +0.5]." in said and "- DDIM: none." in said


def switching(rows):
    chosen = {"knee": 399, "least excess": 599, "speed-up 1.5": 199}
    return {"rows": rows, "grid": [999, 799, 599, 199], "rules": chosen, "knees": [399, 599, 199]}


def test_what_rules_choose_is_held_against_the_grid():
    kids = [10.0, 10.1, 10.4, 11.0, 14.0]
    rows = [row(str(n), [kid] * 3) | {"option": of} for n, (kid, of) in enumerate(zip(kids, OPTIONS, strict=True))]
    text = results_page.rules(switching(rows))
    for words in (
        "| knee | 399 | **+10.0 %** (t_switch 999) | -21.4 % (t_switch 199) |",
        "| least excess | 599 | +4.0 % (t_switch 999) | +0.0 % (t_switch 599) |",
        "| speed-up 1.5 | 199 | **+40.0 %** (t_switch 999) | +0.0 % (t_switch 199) |",
        "own networks: 399, 599, 199.",
        "(of their ranks 1.00)",
    ):
        assert words in text, words
    text = results_page.switching({"switching": switching(rows), "t_switch": {"DDPM": [399, 399]}}, "DDPM")
    assert "| 399 (not of the grid) | 3 + 2 | 1.00x | 0.30 | -0.10 ± 0.10 | 11.0 ± 0.0 |  | knee |" in text


def of_set(rows):
    return {
        "about": "dots",
        "n_samples": 100,
        "precision": "fp32",
        "seeds": [0, 1, 2],
        "t_switch": {"DDPM": [399]},
        "samplers": {"DDPM": rows},
        "switching": {"rows": []},
    }


def test_a_run_is_held_against_the_one_before():
    """One mean of three leaves its interval, and Welch's t-test sees it."""
    before = results_page.numbers_of(of_set(ROWS[:3]), "an old machine") | {"repeated": None}
    again = results_page.numbers_of(of_set(ROWS[:3]), "an old machine")
    assert results_page.held_against("dots", None, again) is None
    assert results_page.held_against("dots", before, again) is None, "it is not held against itself"
    moved = {**ROWS[1], "kid": [13.0, 13.1, 12.9], "difference": [3.0, 3.1, 2.9], "speed_up": [2.5] * 3}
    now = results_page.numbers_of(of_set([ROWS[0], moved, ROWS[2]]), "a new machine")
    said = results_page.held_against("dots", before, now)
    assert said == (
        "- dots (before: seeds 0, 1, 2; an old machine): of 3 mean scores 2 lie in the interval they had before; "
        "Welch's t-test tells 1 (DDPM: apart) apart, and of 2 differences to the first row of a table 1 (DDPM: apart); "
        "speed-ups differ by 12.5 % in the middle, by 25.0 % at most."
    )
    assert results_page.held_against("dots", now | {"repeated": said}, now) == said, "what was found stays"
    assert results_page.held_against("dots", before | {"n_samples": 50}, now) is None, "that is no repeat"


def test_what_people_wrote_on_the_page_stays():
    text = "Before\n<!-- measured: a -->\nold\n<!-- end -->\n\\1 of what I see: $5 {x}\n"
    text = page.filled(text, "a", "new \\1")
    assert text == "Before\n<!-- measured: a -->\nnew \\1\n<!-- end -->\n\\1 of what I see: $5 {x}\n"
    assert page.filled(text, "b", "more").endswith("{x}\n\n<!-- measured: b -->\nmore\n<!-- end -->\n")


def test_a_picture_of_the_page_is_small(tmp_path):
    """Noise, which compresses worst: it is reduced until it fits, in its proportions. Others keep their size."""
    for size, wanted in (((1560, 780), (800, 400)), ((300, 200), (300, 200))):
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / "large.png")
        page.copy_for_page(tmp_path / "large.png", tmp_path / "small.png")
        with Image.open(tmp_path / "small.png") as small:
            assert small.size == wanted and len(small.getcolors()) <= 256
        assert (tmp_path / "small.png").stat().st_size <= page.MOST_BYTES


def test_samplers_have_names_for_the_command_line():
    chosen = results.parse_settings(["--samplers", *NAMES]).samplers
    assert chosen == tuple(NAMES) and set(NAMES.values()) == set(SAMPLERS)
    assert NAMES["ddpm-50"] == measure.HOME and JOINT != DUODIFF


def test_psnr_is_to_the_image_of_the_same_noise(tmp_path):
    for folder, greys in (("full", (100, 100)), ("other", (100, 110))):
        (tmp_path / folder).mkdir()
        for i, grey in enumerate(greys):
            Image.new("L", (2, 2), grey).save(tmp_path / folder / f"{i:06d}.png")
    found = psnr(*(samples.images_of(tmp_path / name) for name in ("other", "full"))).tolist()
    assert found[1] == pytest.approx(20 * math.log10(25.5)) and found[0] > 50


def test_refusals(tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    fails(results.main, ["--sets", "garments"], "fashion_mnist", "datasets")
    fails(results.main, ["--sets", "colour"], "npm", "Node.js")
    fails(results.main, [tmp_path / "nowhere", "--sets", "colour"], "no such folder")
    fails(results.main, [tmp_path, "--sets", "colour"], "no images")
    fails(results.main, [tmp_path, "--sets", "digits"], "--sets colour")
    fails(results.main, ["--sets", "digits", "--seeds", 1], "two or more")
    fails(results.main, ["--sets", "digits", "--seeds", 1, 2, 1], "two or more")
    fails(results.main, ["--samplers", "ddpm-7"], "--samplers")
