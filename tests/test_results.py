"""scripts/results.py, train_classifier.py and the document, without the hours of measuring."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
import torch
from PIL import Image

from common.files import sha256_of
from scripts import results, results_document, train_classifier


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


def test_the_document_says_what_the_numbers_say(measured, tmp_path):
    path = tmp_path / "results.md"
    results_document.write_document(path, [measured], {"device": "cpu", "cores": 2}, 600)
    text = path.read_text()
    for words in (
        "in 10 minutes",
        "DuoDiff: 2.00x the speed of full; no difference in score from full that these seeds could tell (+1.0 %)",
        "slow: 0.50x the speed of full; the score is worse than that of full (+20.0 %)",
        "better mean score than: full, DuoDiff.",
        "slow (full)",
        "| DuoDiff | 10.10 ± 0.10 | +0.10 ± 0.20 | 7.2 | 5.00 |",
        "| slow | 12.00 ± 0.10 | +2.00 ± 0.20 |  | 20.00 |",
        "own range: the score is better than that of all timesteps (-9.1 %)",
        "distilled: the score is worse",
        "0.40 to 0.50 of their speed",
        "399 (not of the grid)",
        "knee chose t_switch 399. The best of the grid is t_switch 999: the chosen one scores 10.0 % above it; "
        "within 5 %: **no**. At its speed or faster: yes.",
        "Of those as fast as the chosen one the best is t_switch 199: the chosen one scores 21.4 % below it; "
        "within 5 %: yes.",
        "least excess chose t_switch 599. The best of the grid is t_switch 999: the chosen one scores 4.0 % above it; "
        "within 5 %: yes.",
        "speed-up 1.5 chose t_switch 199. The best of the grid is t_switch 999: the chosen one scores 40.0 % above it; "
        "within 5 %: **no**. At its speed or faster: yes. Of those as fast as the chosen one none has a better mean",
        "own networks: 399, 599, 199.",
        "(of their ranks 1.00)",
    ):
        assert words in text, words
    assert "worth nothing" not in text
    for name in ("results_dots.png", "results_dots_switch.png"):
        assert f"]({name})" in text and Image.open(tmp_path / name)


def test_a_document_of_a_quick_run_says_so(measured, tmp_path):
    results_document.write_document(tmp_path / "results.md", [measured], {"device": "cpu"}, 60, quick=True)
    assert "worth nothing" in (tmp_path / "results.md").read_text()


def test_a_run_is_held_against_the_one_before(measured, tmp_path):
    def write(of_sets, torch):
        path = tmp_path / "results.md"
        said = results_document.write_document(path, of_sets, {"device": "cpu", "torch": torch}, 60, "--seeds 0 1 2")
        assert all(line in path.read_text() for line in said)
        return said

    assert write([measured], "1") == []
    assert "`bash scripts/results.sh --seeds 0 1 2` in 1 minutes" in (tmp_path / "results.md").read_text()
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
    rules = {name: of["t_switch"] for name, of in results.chosen_by_rules(OPTIONS).items()}
    assert rules == {
        "knee": 399,
        "farthest from the chord": 399,
        "least excess": 599,
        "fastest without excess": 399,
        "speed-up 1.5": 399,
    }
    straight = [option(999 - 200 * n, n, 0.8 * n, 1.0 * n, 0.01) for n in range(5)]
    rules = {name: of["t_switch"] for name, of in results.chosen_by_rules(straight).items()}
    assert rules["knee"] == 199 and rules["least excess"] == rules["fastest without excess"] == 999


def test_switches_of_the_grid_are_timesteps_that_are_visited():
    assert list(results.grid_of(OPTIONS)) == [999, 799, 599, 399, 199]


def test_means_over_calibrations():
    slower = [of | {"speed_up": 1.0, "excess": of["excess"] + 1} for of in OPTIONS]
    mean = results.averaged([{"options": OPTIONS}, {"options": slower}])
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
    assert results.levels_from_full(runs, "full") == 0
    assert results.levels_from_full(runs, "quick") == pytest.approx(350**0.5)


def test_steps_at_equal_time():
    assert results.steps_at_equal_time(1000, [10, 20, 10], [5, 8, 6]) == 500
    assert results.steps_at_equal_time(2, [10], [1]) == 1


def test_a_command_that_is_done_is_not_done_again(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("compare.main", calls.append)
    run = results.Runner(tmp_path)
    run("compare", "a b", 1)
    results.Runner(tmp_path)("compare", "a b", 1, going_on=pytest.fail)
    results.Runner(tmp_path)("compare", "a b", 2, going_on=pytest.fail)
    assert calls == [["a b", "1"], ["a b", "2"]]
    assert "$ python compare.py 'a b' 1\n" in capsys.readouterr().out
    assert run.seconds_in_all == results.read_json(tmp_path / "commands.json")["python compare.py 'a b' 1"]


def test_a_command_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    calls = []

    def cut_off(words):
        calls.append(words)
        raise KeyboardInterrupt

    monkeypatch.setattr("compare.main", cut_off)
    for going_on in (pytest.fail, lambda: ["a", "--resume"]):
        with pytest.raises(KeyboardInterrupt):
            results.Runner(tmp_path)("compare", "a", going_on=going_on)
    results.Runner(tmp_path)("compare", "a", going_on=lambda: [])
    results.Runner(tmp_path)("compare", "a", going_on=pytest.fail)
    assert calls == [["a"], ["a", "--resume"]]


def test_trainings_go_on_where_they_were_cut_off(tmp_path, monkeypatch, run_quietly, fails):
    """With the same arguments alone: a network that was trained otherwise is not taken for the one asked for."""
    experiment = results.Experiment(results.digits().quick(), tmp_path, results.Runner(tmp_path), (0, 1))
    train = ("train", "net", "uvit_digits_1")
    run_quietly(lambda _: experiment.train(*train, 3, 0), [])
    assert experiment.checkpoint("net").exists()
    commands = results.read_json(tmp_path / "commands.json")
    (line,) = commands
    (tmp_path / "commands.json").write_text(json.dumps({line: None}))  # stopped before it was noted
    experiment.run = results.Runner(tmp_path)
    assert "done before" in run_quietly(lambda _: experiment.train(*train, 3, 0), [])
    fails(
        results.command(lambda _: experiment.train(*train, 3, 0, "--t_min", 500)),
        [],
        "another command",
        f"remove {tmp_path}",
    )


def test_times_that_cannot_be_compared_end_it(tmp_path, fails):
    """Its page is of one clock; a run that went on elsewhere is not."""
    picture, numbers = tmp_path / "methods_0_1.png", tmp_path / "methods_0_1.json"
    line = results.line_of("compare", ["--output", picture, "--json", numbers])
    (tmp_path / "commands.json").write_text(json.dumps({line: 1.0}))  # compare.py is done
    experiment = results.Experiment(results.digits(), tmp_path, results.Runner(tmp_path), (0, 1))
    numbers.write_text(json.dumps({"labels": ["full"], "notes": []}))
    assert experiment.compare("methods", [])["labels"] == ["full"]
    numbers.write_text(json.dumps({"labels": ["full"], "notes": ["DuoDiff: threads 4, not 2"]}))
    fails(results.command(lambda _: experiment.compare("methods", [])), [], "threads 4, not 2", f"Remove {tmp_path}")


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
    folder = results.EMOJI_IMAGES
    content = {results.EMOJI_NAMES: json.dumps(names).encode(), f"{folder}unknown.png": b"u", f"{folder}part.png": b"p"}
    content |= {f"{folder}{name}": name.encode() for name in (smile, wave, dark)} | {f"package/{smile}": b"another"}
    archive = tmp_path / "emoji-datasource-google-15.1.2.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    monkeypatch.setattr(results, "EMOJI_SHA256", sha256_of(archive))
    images = results.fetched_emoji(tmp_path)
    assert not archive.exists()
    found = {path.relative_to(images).as_posix(): path.read_text() for path in images.glob("*/*")}
    assert found == {
        f"smileys_emotion/{smile}": smile,
        f"people_body/{wave}": wave,
        f"people_body/{dark}": dark,
    }
    assert results.fetched_emoji(tmp_path) == images  # as it is, without npm


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
