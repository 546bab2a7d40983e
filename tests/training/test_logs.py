"""What a run tells while it goes."""

from __future__ import annotations

import json
import os
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.errors import InputError
from training.logs import MetricsLog


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def shown(folder):
    """By TensorBoard."""
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def write(folder, start_step, steps, value):
    log = MetricsLog(folder, start_step)
    for step in steps:
        log.write(step, {"loss": value, "skipped_steps": step})
    log.close()


def test_what_comes_after_the_step_that_a_run_goes_on_from_is_forgotten(tmp_path):
    write(tmp_path, 0, (1, 2, 3), 0.5)
    write(tmp_path, 2, (3, 4), float("nan"))
    assert [(line["step"], line["loss"]) for line in logged(tmp_path)] == [(1, 0.5), (2, 0.5), (3, None), (4, None)]
    board = shown(tmp_path)
    assert board["loss"][:2] == [(1, 0.5), (2, 0.5)] and [step for step, _ in board["loss"]] == [1, 2, 3, 4]
    assert board["skipped_steps"] == [(1, 1), (2, 2), (3, 3), (4, 4)]


@pytest.mark.parametrize("damage", [b"\xff\xfe", b'{"step": 1, "loss\xe9": 2}', b"[" * 100_000, b"3", b'{"step": "x"}'])
def test_lines_that_are_none_of_ours_are_dropped(damage, tmp_path):
    whole = b'{"step": 1, "loss": 2}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + damage + b"\n" + whole + damage)
    write(tmp_path, 1, (2,), 3.0)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert lines[:2] == [whole, whole] and len(lines) == 3 and json.loads(lines[2])["step"] == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes of a name")
def test_a_pipe_in_the_place_of_the_log_is_refused(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match=r"metrics\.jsonl: is a pipe or device, wanted a file"):
        MetricsLog(tmp_path, 0)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="the system has no such names")
def test_a_folder_whose_name_is_not_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff\xe9")
    folder.mkdir()
    write(folder, 0, (1, 2), 0.5)
    folder.rename(tmp_path / "legible")  # TensorBoard itself cannot read the other
    assert shown(tmp_path / "legible")["loss"] == [(1, 0.5), (2, 0.5)]
