"""What a training outlives, and what it says when it stops."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import sampler as sampler_script
import train as train_script
from common.errors import WriteError
from tests import processes
from tests.conftest import TINY_FLAGS, TRAINING_FLAGS
from tests.stress import kill_training
from tests.stress.kill_training import differences
from training import checkpoint as checkpoint_module
from training import export, loop
from training.batches import BatchMaker
from training.interruption import MAX_HOURS, SIGTERM, StopRequests

FLAGS = [*TINY_FLAGS, *TRAINING_FLAGS, "--depth", "3", "--lr_schedule", "constant"]
LAST = "digits_uvit_last.pth"


def train(log_path: Path, *flags, steps: int = 8, name: str = "run") -> Path:
    argv = [*FLAGS, "--n_steps", steps, "--log_path", log_path, "--exp_name", name, *flags]
    train_script.main([str(word) for word in argv])
    return log_path / name


def argv_of(log_path: Path, *flags, steps: int = 8) -> list:
    return [*FLAGS, "--n_steps", steps, "--log_path", log_path, "--exp_name", "run", *flags]


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def state(folder: Path, name: str = LAST) -> dict:
    content = read(folder / name)
    return {key: content[key] for key in ("step", "model", "ema", "optimizer", "scaler", "counters")}


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """8 steps, of which 2, 4, 6 and 8 stay."""
    return train(tmp_path_factory.mktemp("logs"), "--save_new_every_n_steps", 2)


@pytest.fixture
def small_disk():
    """Within the block files cannot grow beyond so many bytes; that fails as on a full disk, at the same place."""

    @contextlib.contextmanager
    def limit(size: int):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture
def run(unbroken, tmp_path) -> Path:
    return Path(shutil.copytree(unbroken, tmp_path / "run"))


@pytest.mark.slow
def test_killed_at_random_moments(capfd):
    assert kill_training.main(["--kills", "2", "--seed", "3"]) == 0
    assert "2 of 2" in capfd.readouterr().out


class TestStopping:
    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")
    @pytest.mark.parametrize("number, status", [(15, 143), (2, 130), (1, 129), (signal.SIGUSR1, 128 + signal.SIGUSR1)])
    @pytest.mark.slow
    def test_a_signal_ends_the_run_after_its_step(self, number, status, unbroken, tmp_path, fails):
        """It reaches the processes that load images as well, as from a terminal or a queue."""
        argv = argv_of(tmp_path, "--num_workers", 1, steps=2000)
        (process,) = processes.start("train", argv, tmp_path / "said.txt")
        log = tmp_path / "run" / "metrics.jsonl"
        processes.wait_for(lambda: log.exists() and log.read_text(), "the first log")
        busy = f"another training run uses this folder (process {process.pid} on "
        fails(train_script.main, [*argv, "--resume"], busy)
        for pid in [*processes.children(process.pid), process.pid]:
            os.kill(pid, number)
        assert processes.finish([process]) == [status]
        said = (tmp_path / "said.txt").read_text()
        step = read(tmp_path / "run" / LAST)["step"]
        assert f"stopped after step {step}; continue with: python " in said and "--resume\n" in said
        assert "Traceback" not in said
        assert all(line["step"] % 4 == 0 for line in metrics(tmp_path / "run"))
        train(tmp_path, "--resume", steps=step + 1)
        assert metrics(tmp_path / "run")[0]["loss"] == metrics(unbroken)[0]["loss"]

    def test_max_hours_ends_well_and_goes_on_to_the_same(self, unbroken, tmp_path, capsys):
        run = train(tmp_path, "--max_hours", 1e-9)
        assert read(run / LAST)["step"] == 1 and not (run / "previews").exists()
        said = capsys.readouterr().err
        assert "--max_hours: stopped after step 1; continue with: python" in said
        train(tmp_path, "--resume")
        assert not differences(state(run), state(unbroken))
        assert [{**line, "steps_per_second": 0} for line in metrics(run)] == [
            {**line, "steps_per_second": 0} for line in metrics(unbroken)
        ]

    def test_a_second_ctrl_c_ends_at_once(self):
        with StopRequests(None) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert sum(stop.asked()) == 1
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_reasons(self):
        assert not any(StopRequests(time.monotonic() + 100).asked())
        assert StopRequests(time.monotonic() - 1).asked()[MAX_HOURS] == 1
        with StopRequests(None) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.asked()[SIGTERM] == 1

    def test_the_command_to_go_on_with(self, unbroken, tmp_path, capsys):
        start = unbroken / "digits_uvit_step-2.pth"
        train(tmp_path, "--load_checkpoint_path", start, "--max_hours", 1e-9)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "continue with" in line]
        assert "--load_checkpoint_path" not in line and str(start) not in line and line.endswith("--resume")


class TestCheckpoints:
    def test_the_newest_is_found_by_its_step(self, run):
        folder = checkpoint_module.CheckpointFolder(run, "digits_uvit")
        (run / "digits_uvit_step-2.pth").rename(run / "digits_uvit_step-10.pth")  # its name lies
        shutil.copy(run / "digits_uvit_step-4.pth", run / LAST)
        names = [path.name for path in folder.newest_first()]
        assert names == [f"digits_uvit_{name}.pth" for name in ("step-8", "step-6", "last", "step-4", "step-10")]

    @pytest.mark.parametrize("damage", ["cut", "a changed byte", "empty", "other"])
    def test_damaged_ones_are_moved_aside(self, damage, run, unbroken, caplog):
        for name in (LAST, "digits_uvit_step-8.pth"):
            content = bytearray((run / name).read_bytes())
            content[len(content) // 2] ^= 1
            damaged = {"cut": content[:5000], "a changed byte": content, "empty": b"", "other": b"something else"}
            (run / name).write_bytes(damaged[damage])
        train(run.parent, "--resume", "--save_new_every_n_steps", 2)
        assert f"{LAST}.damaged" in caplog.text and "digits_uvit_step-8.pth.damaged" in caplog.text
        assert {path.name for path in run.glob("*.damaged")} == {f"{LAST}.damaged", "digits_uvit_step-8.pth.damaged"}
        assert not differences(state(run), state(unbroken))
        assert [line["step"] for line in metrics(run)] == [4, 8]

    def test_nothing_is_left_but_damage(self, run, fails):
        for path in run.glob("*.pth"):
            path.write_bytes(path.read_bytes()[:-100])
        argv = argv_of(run.parent, "--resume", steps=9)
        with pytest.raises(SystemExit):
            train_script.main([str(word) for word in argv])
        fails(train_script.main, argv, "no checkpoint")
        assert len(list(run.glob("*.damaged"))) == 5

    def test_damaged_names_are_never_taken_twice(self, tmp_path):
        for content in ("one", "two", "three"):
            (tmp_path / "a.pth").write_text(content)
            checkpoint_module.set_aside(tmp_path / "a.pth")
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.pth.damaged{n}" for n in ("", 2, 3)]

    def test_keep_last(self, tmp_path):
        run = train(tmp_path, "--save_new_every_n_steps", 1, "--keep_last", 2, steps=11)
        assert {path.name for path in run.glob("*.pth")} == {LAST} | {f"digits_uvit_step-{n}.pth" for n in (10, 11)}

    def test_what_a_killed_training_was_about_to_do(self, run, unbroken, run_quietly):
        """It had written the one that stays, and neither the last one nor removed what is too many."""
        shutil.copy(run / "digits_uvit_step-6.pth", run / LAST)
        said = run_quietly(train_script.main, argv_of(run.parent, "--resume", "--keep_last", 2))
        assert said == f"finished already: {run / LAST} is at step 8 of 8\n"
        assert (run / LAST).read_bytes() == (unbroken / LAST).read_bytes()
        assert {path.name for path in run.glob("*step*")} == {f"digits_uvit_step-{n}.pth" for n in (6, 8)}

    def test_what_a_killed_write_left_is_cleared_away(self, run):
        left = [run / ".digits_uvit_last.pth.abc123_z.pth", run / ".metrics.jsonl.abcdefgh.jsonl"]
        left.append(run / "previews" / ".step-8.png.12345678.png")
        for path in left:
            path.parent.mkdir(exist_ok=True)
            path.write_text("half")
        (run / ".notes").write_text("of the user")
        train(run.parent, "--resume", steps=9)
        assert not any(path.exists() for path in left) and (run / ".notes").exists()

    def test_a_full_disk(self, unbroken, tmp_path, fails, small_disk):
        run = train(tmp_path, steps=4)
        before = (run / LAST).read_bytes()
        with small_disk(len(before) // 2):
            said = fails(train_script.main, argv_of(tmp_path, "--resume"), "step 8", LAST, "File too large")
        assert f"the newest checkpoint is {run / LAST}: make room, then continue with: python" in said
        assert said.endswith("--resume\n")
        assert (run / LAST).read_bytes() == before
        assert [path.name for path in run.glob(".*")] == [".lock"]
        train(tmp_path, "--resume")
        assert not differences(state(run), state(unbroken))

    @pytest.mark.parametrize("size, step, file", [(10_000, 8, LAST), (100, 4, "metrics.jsonl")])
    def test_a_full_disk_before_the_first_checkpoint(self, size, step, file, unbroken, tmp_path, fails, small_disk):
        with small_disk(size):
            said = fails(train_script.main, argv_of(tmp_path), f"step {step}: {tmp_path / 'run' / file}", "disk at /")
        assert said.endswith("there is no checkpoint yet: make room, then give the same command again\n")
        run = train(tmp_path)
        assert not differences(state(run), state(unbroken))
        assert [line["step"] for line in metrics(run)] == [4, 8]

    def test_a_disk_that_takes_one_checkpoint_of_two(self, tmp_path, fails, monkeypatch):
        """The one that stays is written first."""
        write = loop.write_checkpoint

        def write_checkpoint(path, content):
            if path.name == LAST and content["step"] == 4:
                raise WriteError(path, errno.ENOSPC)
            write(path, content)

        monkeypatch.setattr(loop, "write_checkpoint", write_checkpoint)
        said = fails(train_script.main, argv_of(tmp_path, "--save_new_every_n_steps", 2), "step 4", LAST)
        assert f"the newest checkpoint is {tmp_path / 'run' / 'digits_uvit_step-4.pth'}" in said


class TestBadSteps:
    @pytest.fixture
    def bad(self, monkeypatch):
        """Makes the target of given steps nan. Steps are counted from 1, over all trainings of the test."""
        steps: set[int] = set()
        honest = BatchMaker.__call__

        def make_batch(self, step, *images):
            batch = honest(self, step, *images)
            return batch._replace(target=batch.target * float("nan")) if step + 1 in steps else batch

        monkeypatch.setattr(BatchMaker, "__call__", make_batch)
        return steps

    @pytest.mark.parametrize("flags", [[], ["--use_amp", "--amp_dtype", "float16"], ["--grad_accum_steps", 2]])
    def test_they_change_nothing_and_are_counted(self, flags, bad, tmp_path):
        before = train(tmp_path, *flags, steps=2, name="before")
        bad |= {3, 4}
        after = train(tmp_path, *flags, steps=4, name="after")
        for part in ("model", "ema", "optimizer"):
            ours, theirs = state(after)[part], state(before)[part]
            if part == "optimizer":  # the learning rate follows the step
                ours, theirs = ours["state"], theirs["state"]
            assert not differences(ours, theirs)
        (line,) = metrics(after)
        assert line["skipped_steps"] == 2
        assert line["loss"] == metrics(before)[0]["loss"] and line["grad_norm"] == metrics(before)[0]["grad_norm"]
        train(tmp_path, *flags, "--resume", name="after")
        assert metrics(after)[-1]["skipped_steps"] == 2 and metrics(after)[-1]["loss"] > 0

    def test_too_many_in_a_row_stop_the_training(self, bad, tmp_path, fails):
        bad |= {2, 4, 5, 6}
        argv = argv_of(tmp_path, "--max_bad_steps", 3, "--save_every_n_steps", 3)
        said = fails(train_script.main, argv, "step 6", "3 times in a row", LAST)
        assert str(tmp_path / "run" / LAST) in said
        assert read(tmp_path / "run" / LAST)["step"] == 3

    def test_the_row_goes_on_after_a_stop(self, bad, tmp_path, fails):
        bad |= {3, 4, 5}
        train(tmp_path, steps=4)
        fails(train_script.main, argv_of(tmp_path, "--max_bad_steps", 3, "--resume"), "step 5", "3 times in a row")

    def test_none_is_taken_after_too_many(self, bad, tmp_path, monkeypatch):
        """As where the host reads late: the loop does not hear of it."""
        before = train(tmp_path, steps=2, name="before")
        monkeypatch.setattr(loop, "reason_to_stop", lambda *_: None)
        bad |= {3, 4}
        after = train(tmp_path, "--max_bad_steps", 2, steps=8, name="after")
        assert not differences(read(after / LAST)["model"], read(before / LAST)["model"])

    def test_fp16_may_search_its_scale(self, tmp_path, monkeypatch):
        scaler = torch.amp.GradScaler
        monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, init_scale=2.0**60, **k))
        run = train(tmp_path, "--use_amp", "--amp_dtype", "float16", "--max_bad_steps", 3, steps=60)
        skipped = metrics(run)[-1]["skipped_steps"]
        assert 3 < skipped < 60
        assert read(run / LAST)["counters"]["bad_in_row"] == 0


class TestOtherSettings:
    def test_every_difference_is_named(self, run, fails):
        flags = ["--resume", "--lr", 1, "--seed", 7, "--batch_size", 4, "--depth", 5, "--log_every_n_steps", 2]
        argv = argv_of(run.parent, *flags, "--num_workers", 1, steps=9)
        words = ["lr (0.0002 and 1.0)", "seed (0 and 7)", "batch_size (8 and 4)", "model_params.depth (3 and 5)"]
        said = fails(train_script.main, argv, *words)
        others = said.partition("but allowed: ")[2].removesuffix("))\n").split("), ")
        wanted = ["log_every_n_steps (4 and 2", "n_steps (8 and 9", "num_workers (0 and 1"]
        assert sorted(others) == [*wanted, "save_new_every_n_steps (2 and 100000"]

    def test_some_leave_the_result_as_it_is(self, unbroken, tmp_path, caplog):
        run = train(tmp_path, steps=4)
        train(tmp_path, "--resume", "--num_workers", 1, "--save_every_n_steps", 3)
        assert "num_workers (0 and 1)" in caplog.text and "save_every_n_steps (25000 and 3)" in caplog.text
        assert not differences(state(run), state(unbroken))

    def test_other_images_are_refused_and_moved_ones_are_not(self, tmp_path, fails):
        images = tmp_path / "images"
        images.mkdir()
        for i in range(4):
            Image.new("L", (8, 8), 10 * i).save(images / f"{i}.png")

        def argv(folder: Path) -> list:
            flags = ["--dataset", "folder", "--data_path", folder, "--batch_size", 2, "--resume"]
            return argv_of(tmp_path, *flags, steps=4)

        first = [word for word in argv(images) if word != "--resume"]
        train_script.main([str(word) for word in [*first, "--n_steps", 2]])
        moved = shutil.copytree(images, tmp_path / "moved", copy_function=shutil.copyfile)
        train_script.main([str(word) for word in argv(moved)])
        Image.effect_noise((8, 8), 99).save(moved / "3.png")
        fails(train_script.main, [*argv(moved), "--n_steps", 5], "the files of the dataset")


class TestExport:
    def test_samples_are_the_same(self, full, tmp_path, run_quietly):
        out = tmp_path / "weights.safetensors"
        said = run_quietly(export.main, [full, out])
        assert "ema weights of step 4" in said
        for name, path in (("pth", full), ("safetensors", out)):
            flags = ["--solver", "ddim", "--steps", 2, "--batch_size", 2, "--device", "cpu", "--quiet"]
            run_quietly(sampler_script.main, ["--checkpoint_path", path, *flags, "--output_folder", tmp_path / name])
        for image in ("000000.png", "000001.png"):
            assert (tmp_path / "pth" / image).read_bytes() == (tmp_path / "safetensors" / image).read_bytes()

    def test_a_full_disk(self, full, tmp_path, fails, small_disk):
        out = tmp_path / "weights.safetensors"
        with small_disk(20_000):
            fails(export.main, [full, out], str(out), "File too large", "the same command again")
        assert not any(tmp_path.iterdir())

    def test_raw_weights_are_not_made_up(self, full, tmp_path, run_quietly, fails):
        run_quietly(export.main, [full, tmp_path / "w.safetensors"])
        flags = ["--checkpoint_path", tmp_path / "w.safetensors", "--output_folder", tmp_path / "s"]
        fails(sampler_script.main, [*flags, "--weights", "raw"], "only averaged weights")

    def test_raw_weights_start_a_training(self, full, tmp_path, run_quietly):
        out = tmp_path / "raw.safetensors"
        run_quietly(export.main, [full, out, "--weights", "raw"])
        from models.weights import read_weights

        ours, theirs = read_weights(out), read_weights(full, "raw")
        assert not differences(ours.state_dict, theirs.state_dict) and ours[1:] == theirs[1:]
        train(tmp_path, "--load_checkpoint_path", out, "--depth", 5, steps=1)

    def test_bad_input(self, full, tmp_path, fails):
        out = tmp_path / "out.safetensors"
        fails(export.main, [tmp_path / "none.pth", out], "none.pth")
        fails(export.main, [full, tmp_path / "out.pth"], ".safetensors")
        fails(export.main, [full, tmp_path / "none" / "out.safetensors"], "no such folder")
        export.main([str(full), str(out)])
        fails(export.main, [out, out], "is the file to read")
        fails(export.main, [out, tmp_path / "b.safetensors", "--weights", "raw"], "ema weights")
        torch.save(read(full)["model"], tmp_path / "bare.pth")
        fails(export.main, [tmp_path / "bare.pth", out], "no description")
        (tmp_path / "cut.pth").write_bytes(full.read_bytes()[:1000])
        fails(export.main, [tmp_path / "cut.pth", out], "cut.pth")


@given(
    where=st.sampled_from(["step", "n_steps", "data", "conditions", "config", "options"])
    | st.sampled_from(["model", "ema", "optimizer", "scaler", "counters", "counters/sums"])
    | st.sampled_from(["counters/summed_steps", "counters/skipped_steps", "counters/bad_in_row"]),
    inside=st.integers(0, 3),
    resume=st.booleans(),
    value=st.sampled_from([None, -1, 10**30, 0.5, "x", "\udcff", [], {}, {"a": None}, {0: {}}, torch.zeros(2), True]),
)
@pytest.mark.slow
def test_a_checkpoint_that_was_altered_is_refused_or_serves(where, inside, resume, value, unbroken, tmp_path_factory):
    """One value of its training state, at the top or further in, becomes something else."""
    folder = Path(shutil.copytree(unbroken, tmp_path_factory.mktemp("altered") / "run"))
    content = read(folder / LAST)
    place, (*outer, key) = content, where.split("/")
    for name in outer:
        place = place[name]
    for _ in range(inside):
        if isinstance(place.get(key), dict) and place[key]:
            place, key = place[key], next(iter(place[key]))
    place[key] = value
    for path in folder.glob("*.pth"):
        path.unlink()
    torch.save(content, folder / LAST)
    said = io.StringIO()
    start = ["--resume"] if resume else ["--load_checkpoint_path", folder / LAST]
    argv = [*argv_of(folder.parent, steps=9), "--save_new_every_n_steps", 2, *start]
    with contextlib.redirect_stderr(said):
        try:
            train_script.main([str(word) for word in argv])
        except SystemExit as ended:
            assert ended.code == 2 and said.getvalue().count("\n") == 1, said.getvalue()
    shutil.rmtree(folder.parent)
