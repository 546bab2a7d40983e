"""Sampling that was stopped and goes on, and sampling in several processes: the images of an unbroken run."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import eesampler
import generation.folder
import sampler
from tests.folders import statistics

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def result(folder: Path) -> dict[str, bytes]:
    """Everything that must be the same bit for bit: images, frames, grid; and of the exits, what is in the file."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}
    if (folder / "report" / "exits.npz").exists():
        exits = np.load(folder / "report" / "exits.npz")
        files |= {name: exits[name].tobytes() for name in exits.files}
    return files


@pytest.fixture(params=["sampler", "eesampler"])
def command(request, full, shallow, early_exit):
    """A script's main, and its arguments but for the folder: 9 samples in batches of 2."""
    common = ["--n_samples", "9", "--batch_size", "2", "--device", "cpu", "--quiet"]
    if request.param == "eesampler":
        return eesampler.main, ["--checkpoint_path", str(early_exit), "--threshold", "0.5", *common]
    pair = ["--checkpoint_path", str(shallow), "--checkpoint_path_late", str(full), "--t_switch", "9"]
    return sampler.main, [*pair, *common, "--timesteps_save", "10", "0"]


@pytest.fixture
def unbroken(command, tmp_path):
    main, argv = command
    main([*argv, "--output_folder", str(tmp_path / "unbroken")])
    return result(tmp_path / "unbroken")


@pytest.fixture
def stop_after(monkeypatch):
    """Let the n-th saved sample be the last one: then Ctrl-C, in the middle of a batch or between two."""

    def stop(main, argv, n):
        saved, save = [], generation.folder.save_png

        def stopping(path, image):
            if len(saved) == n:
                raise KeyboardInterrupt
            saved.append(path)
            return save(path, image)

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(generation.folder, "save_png", stopping)
            main(argv)
        assert ended.value.code == 130

    return stop


@pytest.mark.parametrize("n", [0, 3, 4, 8])
def test_a_stopped_run_goes_on(n, command, unbroken, stop_after, tmp_path, capsys):
    main, argv = command
    argv = [*argv, "--output_folder", str(tmp_path / "s")]
    stop_after(main, argv, n)
    assert "stopped; give the same command again" in capsys.readouterr().err
    (tmp_path / "s" / ".000004.png.abcd_123.png").write_bytes(b"half an image")
    main(argv)
    assert result(tmp_path / "s") == unbroken
    assert not list((tmp_path / "s").glob(".*"))
    about = statistics(tmp_path / "s")
    assert about["n_samples"] == about["images_timed"] == 9


def test_finished_batches_are_kept(command, unbroken, stop_after, tmp_path, capsys):
    main, argv = command
    argv = [*argv, "--output_folder", str(tmp_path / "s")]
    stop_after(main, argv, 7)
    kept = tmp_path / "s" / "000000.png"
    before = kept.stat().st_mtime_ns
    capsys.readouterr()
    main(argv)
    assert kept.stat().st_mtime_ns == before
    assert "of them from before" in capsys.readouterr().out
    # A run that is finished has nothing to do, and stays as it is.
    main(argv)
    assert kept.stat().st_mtime_ns == before and result(tmp_path / "s") == unbroken


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "000002.png").unlink(),
        lambda folder: (folder / "000002.png").write_bytes(b""),
        lambda folder: (folder / "000002.png").write_bytes((folder / "000003.png").read_bytes()),
        lambda folder: (folder / "report" / "batches" / "000002-000003.npz").write_bytes(b"PK"),
        lambda folder: (folder / "report" / "batches" / "000002-000003.npz").unlink(),
        lambda folder: (folder / "report" / "statistics.json").unlink(),
    ],
)
def test_what_is_damaged_is_made_again(damage, command, unbroken, tmp_path):
    main, argv = command
    argv = [*argv, "--output_folder", str(tmp_path / "unbroken")]
    damage(tmp_path / "unbroken")
    main(argv)
    assert result(tmp_path / "unbroken") == unbroken


def test_more_samples(command, unbroken, tmp_path, fails):
    """A longer run goes on from a shorter one, whose last batch was cut short; a shorter one is refused."""
    main, argv = command
    argv = [*argv, "--output_folder", str(tmp_path / "s")]
    (tmp_path / "s" / "report").mkdir(parents=True)
    main([*argv, "--n_samples", "5"])
    (tmp_path / "s" / "report" / "metrics.json").write_text("{}")
    main(argv)
    assert result(tmp_path / "s") == unbroken
    assert not (tmp_path / "s" / "report" / "metrics.json").exists(), "a score of fewer samples"
    fails(main, [*argv, "--n_samples", "5"], "9 samples", "--n_samples 5", "--overwrite")


def test_another_batch_size_keeps_what_is_there(command, unbroken, tmp_path):
    main, argv = command
    argv = [*argv, "--output_folder", str(tmp_path / "s")]
    main([*argv, "--n_samples", "4"])
    before = (tmp_path / "s" / "000003.png").stat().st_mtime_ns
    main([*argv, "--batch_size", "3"])
    assert (tmp_path / "s" / "000003.png").stat().st_mtime_ns == before
    assert result(tmp_path / "s").keys() == unbroken.keys()
    about = statistics(tmp_path / "s")
    assert about["images_timed"] == 5 and about["batch_size"] == 3, "what other batches took is not mixed in"


def test_other_settings_are_refused(full, early_exit, runs, tmp_path, fails, run_quietly):
    one = ["--output_folder", tmp_path / "s", "--n_samples", 2, "--device", "cpu", "--quiet"]
    run_quietly(sampler.main, ["--checkpoint_path", full, *one])
    before = result(tmp_path / "s")
    other = ["--seed", 1, "--solver", "ddim", "--steps", 5]
    fails(sampler.main, ["--checkpoint_path", full, *one, *other], "seed (0 and 1)", "steps (20 and 5)", "--overwrite")
    fails(sampler.main, ["--checkpoint_path", full, *one, "--weights", "raw"], "weights (ema and raw)")
    fails(sampler.main, ["--checkpoint_path", runs / "shallow" / "digits_uvit_last.pth", *one], "depth (5 and 1)")
    fails(sampler.main, ["--checkpoint_path", full, *one, "--timesteps_save", 0], "timesteps_save")
    fails(eesampler.main, ["--checkpoint_path", early_exit, *one, "--threshold", 0.5], "threshold (none and 0.5)")
    assert result(tmp_path / "s") == before
    # The weights are told by what they are, not by where they lie.
    (tmp_path / "moved.pth").write_bytes(full.read_bytes())
    run_quietly(sampler.main, ["--checkpoint_path", tmp_path / "moved.pth", *one])
    content = torch.load(full, weights_only=True)
    content["ema"]["norm.bias"] += 1
    torch.save(content, tmp_path / "moved.pth")
    fails(sampler.main, ["--checkpoint_path", tmp_path / "moved.pth", *one], "sha256")
    (tmp_path / "s" / "report" / "run.json").unlink()
    fails(sampler.main, ["--checkpoint_path", full, *one], "no report/run.json")


def test_one_run_at_a_time(full, tmp_path, fails):
    (tmp_path / "s" / "report").mkdir(parents=True)
    code = (
        "import pathlib, sys; from common.files import lock; a = lock(pathlib.Path(sys.argv[1]), ''); print(); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-u", "-c", code, str(tmp_path / "s" / "report" / ".lock")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        other.stdout.readline()
        words = ["another process is sampling into it", f"(process {other.pid} on "]
        fails(sampler.main, ["--checkpoint_path", full, "--output_folder", tmp_path / "s"], *words)
        other.communicate(b"\n")


def in_middle(monkeypatch, event, nth=5) -> None:
    """Let the event happen when the n-th sample is written."""
    written, write_bytes = [], Path.write_bytes

    def write(path, data):
        if path.name.endswith(".png"):
            written.append(path)
            if len(written) == nth:
                event(path)
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", write)


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_says_how_to_go_on(number, command, unbroken, tmp_path, capsys, monkeypatch):
    main, argv = command
    argv = [*argv, "--output_folder", str(tmp_path / "s")]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        in_middle(patch, lambda path: os.kill(os.getpid(), number))
        main(argv)
    said = capsys.readouterr().err
    assert ended.value.code == 128 + number and said.endswith(": stopped; give the same command again to continue\n")
    main(argv)
    assert result(tmp_path / "s") == unbroken


def test_a_full_disk_says_how_to_go_on(command, unbroken, tmp_path, fails, monkeypatch):
    def refuse(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    main, argv = command
    argv = [*argv, "--output_folder", str(tmp_path / "s")]
    with monkeypatch.context() as patch:
        in_middle(patch, refuse)
        said = fails(main, argv, "No space left on device", "the disk at ", "make room")
    assert said.endswith("the earlier samples are complete: make room, then give the same command again\n")
    assert not [path for path in (tmp_path / "s").rglob(".*") if path.name != ".lock"]
    main(argv)
    assert result(tmp_path / "s") == unbroken


def test_outside_of_the_main_thread(command, unbroken, tmp_path):
    """As in a server; only the main thread may set handlers of signals."""
    main, argv = command
    with ThreadPoolExecutor() as pool:
        pool.submit(main, [*argv, "--output_folder", str(tmp_path / "s")]).result()
    assert result(tmp_path / "s") == unbroken


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM")
@pytest.mark.slow
def test_sigterm_says_how_to_go_on(full, tmp_path):
    argv = ["--checkpoint_path", full, "--output_folder", tmp_path / "s", "--n_samples", 5000, "--batch_size", 1]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    argv = [sys.executable, ROOT / "sampler.py", *argv, "--device", "cpu", "--quiet"]
    with subprocess.Popen(list(map(str, argv)), stderr=subprocess.PIPE, text=True, env=environment) as run:
        while not list((tmp_path / "s" / "report" / "batches").glob("*.npz")):
            assert run.poll() is None
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)
        said = run.stderr.read()
    assert run.returncode == 143 and said == "sampler.py: stopped; give the same command again to continue\n"
    assert not list((tmp_path / "s").glob(".*"))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
@pytest.mark.slow
def test_several_processes_make_the_same_images(command, unbroken, tmp_path, torchrun):
    main, argv = command
    processes = 2 if main is sampler.main else 3
    argv = [*argv, "--output_folder", str(tmp_path / "s")]
    done = torchrun(f"{main.__module__}.py", argv, processes)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "s") == unbroken
    about = statistics(tmp_path / "s")
    assert about["processes"] == processes and about["images_timed"] == 9
    assert about["images_per_second"] == pytest.approx(9 / about["seconds"] * processes)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
@pytest.mark.slow
def test_what_one_process_meets_ends_all(full, tmp_path, torchrun):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "cat.png").write_bytes(b"a cat")
    done = torchrun("sampler.py", ["--checkpoint_path", str(full), "--output_folder", str(tmp_path / "s")], 2)
    assert done.returncode != 0
    assert done.stderr.count("which is not a sample") == 1, done.stderr


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system does not tell a process's children")
@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_another_number_goes_on(full, tmp_path):
    argv = ["--checkpoint_path", full, "--n_samples", 400, "--batch_size", 4, "--device", "cpu", "--quiet"]
    argv = [str(arg) for arg in [*argv, "--solver", "ddim", "--steps", 4]]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "sampler.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = [*launcher, *argv, "--output_folder", str(tmp_path / "killed")]
    with subprocess.Popen(killed, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as run:
        while len(list((tmp_path / "killed" / "report" / "batches").glob("*.npz"))) < 4:
            assert run.poll() is None
            time.sleep(0.01)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        since = time.perf_counter()
        said = run.stderr.read()
    assert run.returncode != 0 and time.perf_counter() - since < 60
    assert "sampler.py: stopped; give the same command again to continue" in said
    for name in ("killed", "unbroken"):
        sampler.main([*argv, "--output_folder", str(tmp_path / name)])
    assert result(tmp_path / "killed") == result(tmp_path / "unbroken")
