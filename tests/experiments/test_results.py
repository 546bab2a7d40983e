"""experiments/: the runs of the scripts, the rules and the page, without the hour of measuring."""

from __future__ import annotations

import importlib
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.cli import Parser
from common.errors import command
from common.files import read_json, sha256_of
from experiments import measure, page, results, runner, sets, train_classifier
from training.settings import BackboneSettings, TrainingSettings


def option(t_switch, n_shallow, divergence, excess, excess_se=0.1, steps=5):
    """As calibrate.py writes it, of a shallow network with a fifth of the full one's cost."""
    return {
        "t_switch": t_switch,
        "steps_of_each": [n_shallow, steps - n_shallow],
        "speed_up": steps / (steps - 0.8 * n_shallow),
        "divergence": divergence,
        "divergence_se": 0.01,
        "divergence_per_dimension": divergence / 64,
        "excess": excess,
        "excess_se": excess_se,
    }


OPTIONS = [
    option(999, 0, 0.0, 0.0, 0.0),
    option(799, 1, 0.1, -0.3),
    option(599, 2, 0.2, -0.5),
    option(399, 3, 0.3, -0.1),
    option(199, 4, 5.0, 4.0),
]


def estimate(mean, half_width=0.1):
    return {"mean": mean, "half_width": half_width}


def label(name, score, seconds, difference):
    told = {"label": name, "seeds": [0, 1, 2], "score": estimate(score), "difference": estimate(difference, 0.2)}
    by_seed = (0.05, -0.05, 0) if difference else (-0.05, 0, 0.05)  # so that differences vary too
    told["scores"] = [score + more for more in by_seed]
    return told | {"seconds_per_image": estimate(seconds, 0.0), "flops_per_image": 1e6, "speed_up": 0.01 / seconds}


def compared(tmp_path, labels):
    picture = tmp_path / "picture.png"
    Image.new("L", (8, 8)).save(picture)
    return {"labels": labels, "confidence": 0.95, "n_samples": 100, "picture": str(picture)}


@pytest.fixture
def measured(tmp_path):
    """What an Experiment gives, of scores that are easy to judge."""
    scores = [10.0, 10.1, 10.4, 11.0, 14.0]
    return {
        "name": "dots",
        "about": "dots",
        "score": "distance",
        "training": {"full": 10, "exits": 5, "shallow": {"all timesteps": 10, "own range": 10, "distilled": 4}},
        "step_rates": {"plain": [10.0, 10.0], "distilled": [4.0, 5.0]},
        "sampling": {"solver": "ddpm", "steps": 5},
        "blocks": [1, 7],
        "t_switch": 399,
        "levels": {"DuoDiff": 7.25},
        "rule": "knee",
        "grid": [999, 799, 599, 199],
        "switches": OPTIONS,
        "rules": {"knee": 399, "least excess": 599, "speed-up 1.5": 199},
        "knees": [399, 599, 199],
        "table": compared(
            tmp_path,
            [label("full", 10, 0.01, 0), label("DuoDiff", 10.1, 0.005, 0.1), label("slow", 12, 0.02, 2.0)],
        ),
        "variants": compared(
            tmp_path,
            [
                label("all timesteps", 11, 0.005, 0),
                label("own range", 10, 0.005, -1.0),
                label("distilled", 12, 0.005, 1),
            ],
        ),
        "scores": compared(
            tmp_path,
            [label(str(s), s, 0.002 * (5 - 0.8 * n), s - 10.0) for n, s in enumerate(scores)],
        ),
    }


def test_the_page_says_what_the_numbers_say(measured, tmp_path):
    path = tmp_path / "results.md"
    page.write_page(path, [measured], "`a command` in 10 minutes", {"device": "cpu", "cores": 2})
    text = path.read_text()
    for words in (
        "`a command` in 10 minutes. Machine: device cpu, cores 2.",
        "| full | 10.00 ± 0.10 | +0.00 ± 0.20 |  | 10.00 | 1 | 1.00x |  |",
        "| DuoDiff | 10.10 ± 0.10 | +0.10 ± 0.20 | 7.2 | 5.00 | 1 | 2.00x |  |",
        "| slow | 12.00 ± 0.10 | **+2.00 ± 0.20** |  | 20.00 | 1 | 0.50x | full |",
        "| own range | 10 | 10.00 ± 0.10 | **-1.00 ± 0.20** |",
        "| distilled | 4 | 12.00 ± 0.10 | **+1.00 ± 0.20** |",
        "0.40 to 0.50 of the speed",
        "| 399 (not of the grid) | 3 + 2 |",
        "| knee | 399 | **+10.0 %** (t_switch 999) | -21.4 % (t_switch 199) |",
        "| least excess | 599 | +4.0 % (t_switch 999) | +0.0 % (t_switch 599) |",
        "| speed-up 1.5 | 199 | **+40.0 %** (t_switch 999) | +0.0 % (t_switch 199) |",
        "own networks: 399, 599, 199.",
        "(of their ranks 1.00)",
    ):
        assert words in text, words
    assert "worth nothing" not in text
    for name in ("results_dots.png", "results_dots_switch.png"):
        assert f"]({name})" in text and Image.open(tmp_path / name)


def test_a_picture_of_the_page_is_small(tmp_path):
    """Noise, which compresses worst: the page's copy takes a byte per pixel at most, and keeps the proportions."""
    Image.effect_noise((1560, 780), 90).convert("RGB").save(tmp_path / "large.png")
    page.copy_for_page(tmp_path / "large.png", tmp_path / "small.png")
    with Image.open(tmp_path / "small.png") as small:
        assert small.size == (1200, 600) and len(small.getcolors()) <= 256
    assert (tmp_path / "small.png").stat().st_size < 1.1 * 1200 * 600


def test_what_people_wrote_on_the_page_stays(measured, tmp_path):
    path = tmp_path / "results.md"
    page.write_page(path, [measured, measured | {"name": "lines"}], "once", {})
    by_hand = "\\1 of what I see: $5 {x}\n"
    parts = path.read_text().split("<!-- end -->")
    path.write_text(f"Before\n{parts[0]}<!-- end -->\n\n{by_hand}{parts[1]}<!-- end -->{parts[2]}After\n")
    remarks = page.write_page(path, [measured | {"t_switch": 599}], "twice", {})
    again = path.read_text().split("<!-- end -->")
    assert again[0].startswith("Before\n# Results\n") and "twice" in again[0] and "once" not in again[0]
    assert again[1] == f"\n\n{by_hand}{parts[1]}" and again[2] == f"{parts[2]}After\n"
    assert "dots was measured anew" in remarks[-1] and "lines" not in "".join(remarks)


def test_a_page_of_a_quick_run_says_so(measured, tmp_path):
    page.write_page(tmp_path / "results.md", [measured], "", {}, quick=True)
    assert "worth nothing" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_a_run_is_held_against_the_one_before(measured, tmp_path):
    def write(of_sets, torch):
        path = tmp_path / "results.md"
        said = page.write_page(path, of_sets, "", {"device": "cpu", "torch": torch})
        said = [line for line in said if "measured anew" not in line]
        assert all(line in path.read_text() for line in said)
        return said

    assert write([measured], "1") == []
    assert write([measured], "1") == [], "a page that is written again is not held against itself"
    other = json.loads(json.dumps(measured))
    other["t_switch"] = 599
    own_range, distilled = other["variants"]["labels"][1:]
    own_range["scores"] = [score + 0.08 for score in own_range["scores"]]  # 1.96 standard errors: p = 0.12
    own_range["score"]["mean"] += 0.08
    distilled["scores"] = [score + 0.15 for score in distilled["scores"]]  # 3.67: p = 0.02
    distilled["score"]["mean"] += 0.15
    distilled["speed_up"] *= 1.25
    second = (
        "- dots (before: seeds 0, 1, 2; device cpu, torch 1): of 9 mean scores 8 lie in the interval they had before; "
        "Welch's t-test tells 1 (distilled) apart, and of 8 differences to the first row of a table 0; "
        "speed-ups differ by 0.0 % in the middle, by 25.0 % at most; the knee was 399, it is 599."
    )
    assert write([other], "2") == [second]
    assert write([other], "2") == [second], "what was found when it was measured stays"
    assert write([other, other | {"name": "lines"}], "2") == [second], "one more set is new"
    assert write([other | {"name": "lines"}], "2") == []
    assert write([other], "2") == [second], "the set that was left out was kept"


def test_rules():
    rules = {name: of["t_switch"] for name, of in measure.chosen_by_rules(OPTIONS).items()}
    assert rules == {
        "knee": 399,
        "farthest from the chord": 399,
        "least excess": 599,
        "fastest without excess": 399,
        "speed-up 1.5": 399,
    }
    straight = [option(999 - 200 * n, n, 0.8 * n, 1.0 * n, 0.01) for n in range(5)]
    rules = {name: of["t_switch"] for name, of in measure.chosen_by_rules(straight).items()}
    assert rules["knee"] == 199 and rules["least excess"] == rules["fastest without excess"] == 999


def test_switches_of_the_grid_are_timesteps_that_are_visited():
    assert list(measure.grid_of(OPTIONS)) == [999, 799, 599, 399, 199]


def test_means_over_calibrations():
    slower = [of | {"speed_up": 1.0, "excess": of["excess"] + 1} for of in OPTIONS]
    mean = measure.averaged([{"options": OPTIONS}, {"options": slower}])
    assert mean[4]["excess"] == 4.5 and mean[4]["t_switch"] == 199
    assert 1 / mean[4]["speed_up"] == pytest.approx((1 / OPTIONS[4]["speed_up"] + 1) / 2)


def test_levels_are_those_of_the_same_image(tmp_path):
    """Two seeds of two images of 2 x 2: apart by 0, 10, 20 and 30 levels everywhere."""
    runs = []
    for seed in range(2):
        for label, step in (("full", 0), ("quick", 10)):
            runs.append((label, tmp_path / f"{label}_{seed}"))
            runs[-1][1].mkdir()
            for i in range(2):
                grey = 100 + step * (2 * seed + i)
                Image.new("L", (2, 2), grey).save(runs[-1][1] / f"{i:06d}.png")
    assert measure.levels_from_full(runs, "full") == 0
    assert measure.levels_from_full(runs, "quick") == pytest.approx(350**0.5)


def test_steps_at_equal_time():
    assert measure.steps_at_equal_time(1000, [10, 20, 10], [5, 8, 6]) == 500
    assert measure.steps_at_equal_time(2, [10], [1]) == 1


def test_a_command_line_has_all_flags():
    flags = {"seeds": (1, 2), "quick": True, "folder": Path("a b"), "lr": 2e-3}
    words = ["x", "--seeds", "1", "2", "--quick", "--folder", "a b", "--lr", "0.002"]
    assert runner.words_of(["x"], flags) == words
    assert runner.line_of("train", words[-4:-2]) == "python train.py --folder 'a b'"
    assert runner.line_of("experiments.results", ["1"]) == "python -m experiments.results 1"
    settings = results.parse_settings(["x y", "--seeds", "3", "4"])
    words = ["x y", *settings.words("folder")]
    assert words == ["x y", "--seeds", "3", "4"]
    assert results.parse_settings(words) == settings == results.parse_settings(settings)


def test_a_command_that_is_done_is_not_done_again(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("compare.main", calls.append)
    run = runner.Runner(tmp_path)
    run("compare", "a b", output=1)
    runner.Runner(tmp_path)("compare", "a b", output=1, going_on=pytest.fail)
    runner.Runner(tmp_path)("compare", "a b", output=2, going_on=pytest.fail)
    assert calls == [["a b", "--output", "1"], ["a b", "--output", "2"]]
    assert "$ python compare.py 'a b' --output 1\n" in capsys.readouterr().out
    assert run.seconds_in_all == read_json(tmp_path / "commands.json")["python compare.py 'a b' --output 1"]


def test_a_command_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    calls = []

    def cut_off(words):
        calls.append(words)
        raise KeyboardInterrupt

    monkeypatch.setattr("compare.main", cut_off)
    for going_on in (pytest.fail, lambda: {"resume": True}):
        with pytest.raises(KeyboardInterrupt):
            runner.Runner(tmp_path)("compare", "a", going_on=going_on)
    runner.Runner(tmp_path)("compare", "a", going_on=lambda: None)
    runner.Runner(tmp_path)("compare", "a", going_on=pytest.fail)
    assert calls == [["a"], ["a", "--resume"]]


def test_trainings_go_on_where_they_were_cut_off(tmp_path, monkeypatch, run_quietly, fails):
    """With the same arguments alone: a network that was trained otherwise is not taken for the one asked for."""
    experiment = measure.Experiment(sets.digits().quick(), tmp_path, runner.Runner(tmp_path), (0, 1))
    train = ("train", "net", "uvit_digits_1")
    run_quietly(lambda _: experiment.train(*train, 3, 0), [])
    assert experiment.checkpoint("net").exists()
    commands = read_json(tmp_path / "commands.json")
    (line,) = commands
    (tmp_path / "commands.json").write_text(json.dumps({line: None}))  # stopped before it was noted
    experiment.run = runner.Runner(tmp_path)
    assert "done before" in run_quietly(lambda _: experiment.train(*train, 3, 0), [])
    fails(
        command(lambda _: experiment.train(*train, 3, 0, t_min=500)),
        [],
        "another command",
        f"remove {tmp_path}",
    )


class Parsed(runner.Runner):
    """Lets each script read its flags, and writes what the measurement reads of its work, but does none."""

    def __call__(self, module, *given, going_on=None, **flags):
        words = runner.words_of(given, flags)
        if (line := runner.line_of(module, words)) in self.seconds:
            return
        self.seconds[line] = 1.0
        if module in ("train", "main"):
            cls = BackboneSettings if module == "train" else TrainingSettings
            settings = Parser(prog=module).settings(cls, words)
            folder = settings.log_path / settings.exp_name
            folder.mkdir()
            (folder / f"{settings.data.dataset}_{settings.model or 'uvit'}_last.pth").touch()
            rate = 2.0 if settings.teacher.distill_from else 5.0
            lines = [json.dumps({"step": n, "steps_per_second": rate}) for n in range(2)]
            (folder / "metrics.jsonl").write_text("\n".join(lines))
            return
        settings = importlib.import_module(module).parse_settings(words)
        if module == "calibrate":
            numbers = {"options": OPTIONS, "networks": [{"blocks": 1}, {"blocks": 7}]}
            settings.output.with_suffix(".json").write_text(json.dumps(numbers))
        elif module == "compare":
            names = dict.fromkeys(name for name, _ in settings.runs)
            settings.json.write_text(json.dumps({"labels": [label(name, 9, 0.1, 0.0) for name in names]}))
        elif module in ("sampler", "eesampler"):
            settings.output_folder.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8)).save(settings.output_folder / "000000.png")


def test_scripts_can_read_all_that_they_are_told(tmp_path):
    run = Parsed(tmp_path)
    result = measure.Experiment(sets.digits(), tmp_path / "digits", run, (0, 1)).measure()
    assert result["training"]["shallow"] == {
        **dict.fromkeys(("all timesteps", "own range", "warm start"), 2000),
        **dict.fromkeys(("distilled", "all three"), 800),
    }
    names = [of["label"] for of in result["table"]["labels"]]
    assert names[:2] == ["full", "DuoDiff"] and len(names) == 11 and set(result["levels"].values()) == {0.0}
    assert [of["label"] for of in result["scores"]["labels"]] == ["full"] + [
        f"t_switch {t}" for t in (799, 599, 399, 199)
    ]
    switches = [line for line in run.seconds if "sampler.py" in line and "--t_switch 399" in line]
    assert len(switches) == 2 * 6, "five trainings and caching, of each seed, each once"
    own = [line for line in run.seconds if "--t_min" in line]
    assert len(own) == 4 and all("--t_min 400" in line for line in own)


def test_times_that_cannot_be_compared_end_it(tmp_path, fails):
    """Its page is of one clock; a run that went on elsewhere is not."""
    picture, numbers = tmp_path / "methods_0_1.png", tmp_path / "methods_0_1.json"
    line = runner.line_of("compare", ["--output", str(picture), "--json", str(numbers)])
    (tmp_path / "commands.json").write_text(json.dumps({line: 1.0}))  # compare.py is done
    experiment = measure.Experiment(sets.digits(), tmp_path, runner.Runner(tmp_path), (0, 1))
    numbers.write_text(json.dumps({"labels": ["full"], "notes": []}))
    assert experiment.compare("methods", [])["labels"] == ["full"]
    numbers.write_text(json.dumps({"labels": ["full"], "notes": ["DuoDiff: threads 4, not 2"]}))
    fails(command(lambda _: experiment.compare("methods", [])), [], "threads 4, not 2", f"Remove {tmp_path}")


def images_in(folder, classes=3):
    for number in range(classes):
        (folder / f"class{number}").mkdir(parents=True)
        Image.new("RGB", (20, 20), (80 * number, 0, 0)).save(folder / f"class{number}" / "0.png")
    return folder


def test_refusals(tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    fails(results.main, [], "npm", "Node.js")
    fails(results.main, [tmp_path / "nowhere"], "no such folder")
    fails(results.main, [tmp_path], "sub-folder")
    fails(results.main, [images_in(tmp_path / "one", classes=1)], "sub-folder")
    fails(results.main, [tmp_path, "--sets", "digits"], "--sets colour")
    fails(results.main, ["--sets", "digits", "--seeds", 1], "two or more")
    fails(results.main, ["--sets", "digits", "--seeds", 1, 2, 1], "two or more")
    (tmp_path / "results" / "emoji-datasource-google-15.1.2.tgz").write_bytes(b"other")
    fails(results.main, [], "SHA-256")


def test_emoji_are_unpacked_by_category(tmp_path, monkeypatch):
    smile, wave, dark = (f"1f{n}.png" for n in (600, 601, 602))
    names = [
        {"image": smile, "category": "Smileys & Emotion"},
        {"image": wave, "category": "People & Body", "skin_variations": {"1F3FF": {"image": dark}}},
        {"image": "part.png", "category": "Component"},
    ]
    folder = sets.EMOJI_IMAGES
    content = {sets.EMOJI_NAMES: json.dumps(names).encode(), f"{folder}unknown.png": b"u", f"{folder}part.png": b"p"}
    content |= {f"{folder}{name}": name.encode() for name in (smile, wave, dark)} | {f"package/{smile}": b"another"}
    archive = tmp_path / "emoji-datasource-google-15.1.2.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    monkeypatch.setattr(sets, "EMOJI_SHA256", sha256_of(archive))
    images = sets.fetched_emoji(tmp_path)
    assert not archive.exists()
    found = {path.relative_to(images).as_posix(): path.read_text() for path in images.glob("*/*")}
    assert found == {
        f"smileys_emotion/{smile}": smile,
        f"people_body/{wave}": wave,
        f"people_body/{dark}": dark,
    }
    assert sets.fetched_emoji(tmp_path) == images  # as it is, without npm


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
    argv = ["--dataset", "folder", "--data_path", images_in(tmp_path / "few"), "--img_size", 8, "--num_classes", 3]
    fails(train_classifier.main, [*argv, "--output", tmp_path / "x.pt"], "3 images are too few")
