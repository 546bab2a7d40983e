"""Processes beside the one that trains or packs: too little room for them, and their ends."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing import popen_fork
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import open_dataset
from data.packing import work as packing
from data.workers import ASKING_TO_END, end_with_parent, signals_held

resource = pytest.importorskip("resource", reason="the system has no such limits")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def limited():
    """Call with the soft and the hard limit of open files; the hard one cannot be raised again, so in a child."""

    def run(soft, hard, code):
        code = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard})); {code}"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
        )
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def pictures(tmp_path):
    """More than two chunks."""
    (tmp_path / "pictures").mkdir()
    for i in range(200):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / "pictures" / f"{i:03d}.png")
    return tmp_path / "pictures"


@pytest.mark.slow
def test_packing_with_too_few_open_files_ends_in_one_line(limited, pictures, tmp_path):
    argv = ["--dataset=folder", f"--data_path={pictures}", "--img_size=8", "--num_workers=8", f"--output={tmp_path}/p"]
    code = f"from data.packing import work; work.CHUNK_IMAGES = 8; from pack import main; main({argv})"
    status, _, said = limited(20, 20, code)
    assert status == 2 and said.count("\n") == 1, said
    assert "--num_workers 8" in said and "20 (ulimit -n)" in said
    fewer = said.rstrip().rpartition(" ")[2]  # what the line proposes is possible
    assert limited(20, 20, code.replace("num_workers=8", f"num_workers={fewer}"))[0] == 0


def test_the_limit_is_raised_where_the_system_allows_it(limited):
    code = """
from data.workers import check_open_files
check_open_files(8, 6)
held = [open("/dev/null") for _ in range(8 * 6)]
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    assert limited(20, 4096, code) == (0, "(84, 4096)\n", "")
    status, _, said = limited(20, 40, code)
    assert status == 1 and "the limit of 40 (ulimit -n)" in said
    assert limited(10, 10, "from data.workers import check_open_files; check_open_files(0, 6)")[0] == 0


TRAINING = """
from pathlib import Path
from common.errors import command
from data import open_dataset
from data.dataset import training_batches

@command
def main(argv=None):
    dataset = open_dataset("folder", Path({pictures!r}), img_size=8, in_chans=3, packed=False)
    batches = training_batches(dataset, 4, 0, 0, {num_workers}, pin_memory=False)
    held = []
    for step in range(200):
        while {all_taken} and len(held) < 40:
            try:
                held.append(open("/dev/null"))
            except OSError:
                break
        next(batches)

main()
"""


@pytest.mark.slow
def test_training_with_too_few_open_files_ends_in_one_line(limited, pictures):
    about = {"pictures": str(pictures), "all_taken": False}
    status, _, said = limited(40, 40, TRAINING.format(num_workers=8, **about))
    assert status == 2 and said.count("\n") == 1 and "40 (ulimit -n)" in said, said
    fewer = said.rstrip().rpartition(" ")[2]
    status, _, said = limited(40, 40, TRAINING.format(num_workers=fewer, **about))
    assert status == 0 and int(fewer) > 0, said


@pytest.mark.slow
def test_open_files_that_run_out_later_end_training_in_one_line(limited, pictures):
    code = TRAINING.format(pictures=str(pictures), num_workers=2, all_taken=True)
    status, _, said = limited(40, 40, code)
    assert status == 2 and said.count("\n") == 1 and "(ulimit -n)" in said, said


def test_processes_that_started_before_one_could_not_are_ended(pictures, tmp_path, monkeypatch):
    """The interpreter would wait for their end for ever."""
    monkeypatch.setattr(packing, "CHUNK_IMAGES", 8)
    launch, launched = popen_fork.Popen._launch, []

    def failing(self, process):
        if len(launched) == 3:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        launched.append(process)
        launch(self, process)

    monkeypatch.setattr(popen_fork.Popen, "_launch", failing)
    if multiprocessing.get_start_method() != "fork":
        pytest.skip("processes are not forked here")
    dataset = open_dataset("folder", pictures, img_size=8, in_chans=3, packed=False)
    with pytest.raises(BlockingIOError):
        packing.pack(dataset, tmp_path / "p", num_workers=8)
    for process in launched:
        process.join(20)
    assert [process.exitcode for process in launched] == [-signal.SIGKILL] * 3
    monkeypatch.undo()
    assert len(packing.pack(dataset, tmp_path / "p", num_workers=2).blocks_crc32)


def _worker(started, go_on):
    started.set()
    go_on.wait(20)
    end_with_parent()
    os.kill(os.getpid(), signal.SIGINT)
    os._exit(7)


def test_a_process_of_a_pool_leaves_ctrl_c_to_its_parent_from_its_start():
    context = multiprocessing.get_context("fork")
    started, go_on = context.Event(), context.Event()
    process = context.Process(target=_worker, args=(started, go_on))
    with signals_held():
        process.start()
    assert started.wait(20)
    os.kill(process.pid, signal.SIGINT)  # before it can have said that it does not want it
    go_on.set()
    process.join(20)
    assert process.exitcode == 7
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {*ASKING_TO_END}
