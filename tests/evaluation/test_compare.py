"""compare.py: what is compared, and labels of any letters. test_scoring_scripts.py has the scores."""

from __future__ import annotations

import io
import json
import sys
import warnings
from types import SimpleNamespace

import pytest
from matplotlib import ft2font, get_data_path

import compare
import sampler
from common import plots
from common.tables import columns_of
from tests.folders import sampled_and_scored, statistics

HERE = {"batch_size": 1, "compile": False, "device": "cpu", "processes": 1, "threads": 2, "torch": "2.6.0"}
UNLIKE = {
    **{"batch_size": 64, "compile": True, "offload": True, "min_group": 8, "device": "NVIDIA H100", "processes": 2},
    **{"threads": 4, "torch": "2.7.0", "precision": "bf16"},
}
PLAIN = {**HERE, "offload": False, "min_group": 1, "precision": "fp32"}  # offload and min_group are not of all scripts


@pytest.fixture
def scored(tmp_path):
    """Makes a scored run, timed as HERE unless other conditions are given. Returns LABEL=FOLDER."""

    def make(label, score, seconds, seed=0, **conditions) -> str:
        folder = tmp_path / f"run_{len(list(tmp_path.iterdir()))}"
        conditions = HERE | {"precision": "fp32"} | conditions
        sampled_and_scored(folder, score, seconds, seed, precision=conditions["precision"])
        path = folder / "report" / "statistics.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | conditions))
        return f"{label}={folder}"

    return make


@pytest.fixture
def compared(tmp_path, run_quietly, monkeypatch):
    """Calls compare.py. Returns its lines, the labels' numbers by label, and its picture as a Figure."""

    def call(*runs: str) -> SimpleNamespace:
        figures = []
        save = plots.save
        monkeypatch.setattr(plots, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
        argv = [*runs, "--output", tmp_path / "x.png", "--json", tmp_path / "x.json"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # they would stand on standard error
            lines = run_quietly(compare.main, argv).splitlines()
        monkeypatch.setattr(plots, "save", save)
        numbers = json.loads((tmp_path / "x.json").read_text())
        labels = {label["label"]: label for label in numbers["labels"]}
        return SimpleNamespace(lines=lines, labels=labels, notes=numbers["notes"], figure=figures[0])

    return call


def times_drawn(figure) -> list[float]:
    """Where the points of the time axis lie."""
    axes = [axes for axes in figure.axes if axes.get_xlabel() == "seconds per image, measured"]
    return [points.lines[0].get_xdata()[0] for of_time in axes for points in of_time.containers]


@pytest.mark.parametrize("name", UNLIKE)
def test_times_of_unlike_conditions_are_not_compared(name, scored, compared):
    full, quick = scored("full", 10.0, 0.010), scored("quick", 11.0, 0.004)
    odd = scored("odd one", 12.0, 0.001, **{name: UNLIKE[name]})
    found = compared(full, quick, odd)
    difference = f"odd one: {name} ({UNLIKE[name]} and {PLAIN[name]})"
    assert [line.count("x") for line in found.lines[2:5]] == [1, 1, 0] and found.lines[3].endswith("2.50x")
    assert difference in found.lines[5:] and difference in found.notes
    assert found.labels["quick"]["speed_up"] == pytest.approx(2.5) and found.labels["odd one"]["speed_up"] is None
    assert found.labels["odd one"]["score"]["mean"] == 12.0 and "12.000" in found.lines[4]
    assert times_drawn(found.figure) == [0.010, 0.004]
    about_scores = [line for line in found.notes if "--precision fp32" in line]
    assert len(about_scores) == (name == "precision")


def test_what_only_one_script_can_do_is_no_difference_where_it_is_not_done(scored, compared):
    found = compared(scored("full", 10.0, 0.010, offload=False), scored("early exit", 11.0, 0.005, min_group=1))
    assert found.notes == [] and found.lines[3].endswith("2.00x")
    assert all("times" not in line for line in found.lines)


@pytest.mark.parametrize("which", ["full", "quick"])
def test_seeds_of_unlike_conditions_have_no_mean_time(which, scored, compared):
    """A score they have."""
    runs = [
        scored(label, score + seed, seconds, seed, threads=4 if (label, seed) == (which, 1) else 2)
        for label, score, seconds in (("full", 10.0, 0.01), ("quick", 11.0, 0.004))
        for seed in (0, 1)
    ]
    found = compared(*runs)
    assert found.notes[1:] == [f"{which} (seed 1): threads (4 and 2)"]
    assert found.labels[which]["seconds_per_image"] is None and found.labels[which]["score"]["mean"] > 10
    assert found.labels["quick"]["speed_up"] is None
    assert times_drawn(found.figure) == ([0.01] if which == "quick" else [])
    assert found.lines[2 + (which == "quick")].split()[-1] == "1", "FLOPs are the last of its cells"


def test_a_report_records_all_that_times_depend_on(full, tmp_path, run_quietly):
    argv = ["--checkpoint_path", full, "--n_samples", 2, "--steps", 2, "--output_folder", tmp_path / "s"]
    run_quietly(sampler.main, [*argv, "--device", "cpu"])
    sampled_and_scored(tmp_path / "scored", 10.0, 0.01, 0)
    (tmp_path / "scored" / "report" / "metrics.json").rename(tmp_path / "s" / "report" / "metrics.json")
    about, conditions = statistics(tmp_path / "s"), compare.read_run("full", tmp_path / "s", "fid").conditions
    assert set(conditions) == set(UNLIKE)
    assert all(conditions[name] == about[name] for name in {*HERE, "offload"})
    assert conditions["min_group"] == 1, "of eesampler.py alone: its default"
    assert conditions["precision"] == about["settings"]["precision"] in ("fp32", "bf16")


LABELS = ["$x_1$ costs $", "_hidden", r"a\b^2_{3", "100 % {0} %s", r"$\frac{1}", "漢字", "two\nlines", "bell\a", "😀 ∞"]


def test_labels_are_shown_to_the_letter(scored, compared):
    """In the picture too, but for letters that its font does not have: those are given by their code points."""
    runs = [scored(label, 10.0 + i, 0.01) for i, label in enumerate(LABELS)]
    found = compared(*runs)
    in_table = [label.replace("\n", r"\n").replace("\a", r"\x07") for label in LABELS]
    for label, row in zip(in_table, found.lines[2:], strict=False):
        assert row.startswith(label + "  ") and columns_of(row) == columns_of(found.lines[0])
    assert list(found.labels) == LABELS

    font = ft2font.FT2Font(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf")
    assert font.get_char_index(ord("∞")) and not font.get_char_index(ord("漢"))
    drawn = [label.replace("漢字", r"\u6f22\u5b57") for label in in_table]
    (legend,) = (legend for of in found.figure.subfigs for legend in of.legends)
    titles = [axes.get_title(loc="left") for axes in found.figure.axes if axes.get_title(loc="left")]
    assert [text.get_text() for text in legend.get_texts()] == titles == drawn
    assert not any(text.get_parse_math() for text in legend.get_texts())


def test_long_labels_keep_their_ends_in_the_picture(scored, compared):
    long = [f"{'a very long label ' * 20}{end}" for end in "ab"]
    found = compared(*(scored(label, 10.0, 0.01) for label in long))
    assert [row[: len(label)] for row, label in zip(found.lines[2:4], long, strict=True)] == long
    legend = next(axes.get_legend() for axes in found.figure.axes if axes.get_legend())
    shown = [text.get_text() for text in legend.get_texts()]
    assert [text[-1] for text in shown] == ["a", "b"] and max(map(len, shown)) == plots.LONGEST


def test_letters_that_the_output_lacks(scored, tmp_path, monkeypatch):
    """Standard output of ASCII alone: the numbers are all there, and labels can be told apart."""
    runs = [scored(label, 10.0 + seed, 0.01, seed) for label in ("漢", "字") for seed in (0, 1)]
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    compare.main([*runs, "--output", str(tmp_path / "x.png")])
    lines = written.getvalue().decode("ascii").splitlines()
    assert r"minus \u6f22" in lines[0]
    assert lines[2].startswith(r"\u6f22  10.500 +- 6.353") and lines[3].startswith(r"\u5b57  10.500 +- 6.353")
    assert "+- half the 95%" in lines[4]
