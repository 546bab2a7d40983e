"""experiments/runner.py: calls of scripts that are made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.files import read_json
from experiments import results, runner
from experiments.settings import words


def test_a_command_line_has_all_flags():
    flags = {"seeds": (1, 2), "quick": True, "folder": Path("a b"), "lr": 2e-3}
    line = ["x", "--seeds", "1", "2", "--quick", "--folder", "a b", "--lr", "0.002"]
    assert runner.words_of(["x"], flags) == line
    assert runner.line_of("train", line[-4:-2]) == "python train.py --folder 'a b'"
    assert runner.line_of("experiments.results", ["1"]) == "python -m experiments.results 1"
    settings = results.parse_settings(["x y", "--seeds", "3", "4"])
    line = ["x y", *words(settings, "folder")]
    assert line == ["x y", "--seeds", "3", "4"]
    assert results.parse_settings(line) == settings == results.parse_settings(settings)


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
