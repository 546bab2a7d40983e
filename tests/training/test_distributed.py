"""Several processes train as one would."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import train as train_script
from common import errors
from common.distributed import part_of
from data.dataset import SeededBatches
from tests import processes
from tests.conftest import TINY_FLAGS, TRAINING_FLAGS
from tests.stress.kill_training import differences
from training.parallel import gradients_shared

# 14 images in two parts, for two or three processes: no two have the same work.
FLAGS = [*TINY_FLAGS, *TRAINING_FLAGS, "--depth", 3, "--batch_size", 14, "--grad_accum_steps", 2, "--random_flip"]
FLAGS += ["--num_classes", 11, "--label_dropout", 0.3, "--log_every_n_steps", 1, "--lr_schedule", "constant"]
PIECES = ["--fsdp", "--grad_checkpointing"]
HEADS = [*TINY_FLAGS, *TRAINING_FLAGS, "--model", "deediff_uvit", "--depth", 5, "--freeze_backbone", "--batch_size", 7]
HEADS += ["--classifier_type", "mlp_probe_per_layer_per_timestep", "--log_every_n_steps", 1]


def run(logs: Path, name: str, *more, count=1, steps=20, flags=FLAGS, script="train") -> Path:
    argv = [*flags, "--n_steps", steps, "--log_path", logs, "--exp_name", name, *more]
    statuses = processes.run(script, argv, logs / f"{name}.txt", count)
    assert statuses == [0] * count, (logs / f"{name}.txt").read_text()
    return logs / name


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last(folder: Path) -> dict:
    (path,) = folder.glob("*_last.pth")
    return torch.load(path, weights_only=True)


def assert_same_training(a: Path, b: Path) -> None:
    """Losses to a relative 1e-5; weights as far as Adam lets the last digits of a small gradient grow."""
    ours, theirs = metrics(a), metrics(b)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"steps_per_second", "grad_norm"}:
            assert one[name] == pytest.approx(other[name], rel=1e-5), name
    for part in ("model", "ema"):
        for name, value in last(a)[part].items():
            torch.testing.assert_close(value, last(b)[part][name], rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def alone(logs) -> Path:
    """20 steps on one process."""
    return run(logs, "alone")


@pytest.fixture(scope="module")
def by_two(logs) -> Path:
    return run(logs, "by-two", count=2)


@pytest.mark.slow
def test_two_train_as_one(by_two, alone):
    assert_same_training(by_two, alone)


@pytest.mark.slow
def test_three_train_as_one(logs, alone):
    assert_same_training(run(logs, "by-three", count=3), alone)


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_and_in_pieces(logs, alone):
    """5 steps alone, 5 as two copies, 5 as two pieces with previews, and 5 alone again."""
    run(logs, "mixed", steps=5)
    run(logs, "mixed", "--resume", steps=10, count=2)
    run(logs, "mixed", "--resume", "--fsdp", "--preview_steps", 2, "--log_every_n_steps", 5, steps=15, count=2)
    assert (logs / "mixed" / "previews" / "step-15.png").exists()
    mixed = run(logs, "mixed", "--resume", steps=20)
    thinned = logs / "thinned"
    shutil.copytree(alone, thinned)  # the third part logged steps 11 to 15 as one
    kept = [line for line in metrics(alone) if line["step"] not in (11, 12, 13, 14, 15)]
    (thinned / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    lines = [line for line in metrics(mixed) if line["step"] != 15]
    (mixed / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert_same_training(mixed, thinned)
    assert "processes (1 and 2)" in (logs / "mixed.txt").read_text()


@pytest.fixture(scope="module")
def pieces(logs) -> Path:
    return run(logs, "pieces", *PIECES, count=2, steps=10)


@pytest.mark.parametrize("unbroken, steps, more", [("by_two", 20, []), ("pieces", 10, PIECES)])
@pytest.mark.slow
def test_two_that_go_on_are_two_that_never_stopped(unbroken, steps, more, logs, request):
    """Bit for bit, unlike one process beside two."""
    unbroken, name = request.getfixturevalue(unbroken), f"{unbroken}-broken"
    run(logs, name, *more, count=2, steps=steps // 2)
    broken = run(logs, name, "--resume", *more, count=2, steps=steps)
    for part in ("step", "model", "ema", "optimizer", "scaler", "counters"):
        assert not differences(last(broken)[part], last(unbroken)[part])


def test_pieces_train_as_copies(pieces, by_two):
    for ours, theirs in zip(metrics(pieces), metrics(by_two), strict=False):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        # Adam does not tell a sum of the processes' gradients from their mean: the norm does.
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    ours, theirs = last(pieces), last(by_two)
    assert ours.keys() == theirs.keys()
    for part in ("model", "ema", "optimizer"):
        assert shapes(ours[part]) == shapes(theirs[part])


def shapes(content) -> object:
    if isinstance(content, dict):
        return {key: shapes(value) for key, value in content.items() if key != "param_groups"}
    return type(content), content.shape


@pytest.mark.parametrize("more", [[], ["--fsdp", "--preview_steps", 2, "--n_samples", 2]])
@pytest.mark.slow
def test_heads_on_a_frozen_backbone(more, logs, runs):
    backbone = ["--load_backbone", runs / "full" / "digits_uvit_last.pth"]
    if not (logs / "heads").exists():
        run(logs, "heads", *backbone, steps=5, flags=HEADS, script="main")
    name = f"heads-{len(more)}"
    several = run(logs, name, *backbone, *more, count=2, steps=5, flags=HEADS, script="main")
    assert_same_training(several, logs / "heads")


def test_all_stop_at_the_step_at_which_one_is_told_to(logs, alone):
    argv = [*FLAGS, "--n_steps", 2000, "--log_path", logs, "--exp_name", "told"]
    started = processes.start("train", argv, logs / "told.txt", 2)
    log = logs / "told" / "metrics.jsonl"
    processes.wait_for(lambda: log.exists() and log.read_text().count("\n") > 2, "three steps")
    os.kill(started[1].pid, signal.SIGTERM)
    assert processes.finish(started) == [143, 143]
    said = (logs / "told.txt").read_text()
    step = last(logs / "told")["step"]
    assert said.count(f"SIGTERM: stopped after step {step}; continue with: torchrun ...") == 1
    assert metrics(logs / "told")[-1]["step"] == step
    loss = metrics(logs / "told")[2]["loss"]
    assert loss == pytest.approx(metrics(alone)[2]["loss"], rel=1e-5)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")
@pytest.mark.slow
def test_two_launchers_one_of_whose_processes_is_killed(logs, alone):
    """torchrun itself, as on two machines; what one of them loses ends the other, and one process goes on alone."""
    argv = [*FLAGS, "--n_steps", 20, "--save_every_n_steps", 2, "--log_path", logs, "--exp_name", "machines"]
    port = processes.free_port()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "test"]
    outputs = [logs / f"machine-{i}.txt" for i in range(2)]
    slow = [*map(str, argv), "--n_steps", "2000"]
    started = [
        subprocess.Popen(
            [*launcher, "train.py", *slow],
            stdout=output.open("w"),
            stderr=subprocess.STDOUT,
            cwd=Path(train_script.__file__).parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for output in outputs
    ]
    try:
        log = logs / "machines" / "metrics.jsonl"
        processes.wait_for(lambda: log.exists() and log.read_text().count("\n") > 2, "three steps")
        (worker,) = processes.children(started[1].pid)
        began = time.monotonic()
        os.kill(worker, signal.SIGKILL)
        for process in started:
            assert process.wait(processes.PATIENCE) != 0
        assert time.monotonic() - began < 60
    finally:
        for process in started:
            process.kill()
    said = "".join(output.read_text() for output in outputs)
    assert "another process of this run ended" in said
    step = last(logs / "machines")["step"]
    if step < 20:  # killed while it was among the steps that the unbroken one knows
        assert_same_training(run(logs, "machines", "--resume"), alone)
    else:
        lines = metrics(logs / "machines")[:20]
        assert [m["loss"] for m in lines] == pytest.approx([m["loss"] for m in metrics(alone)], rel=1e-5)
        run(logs, "machines", "--resume", steps=step + 1)


def test_parts_make_up_the_batch(monkeypatch):
    batch = next(iter(SeededBatches(100, 14, seed=1)))
    for count in (1, 2, 3, 14):
        monkeypatch.setenv("WORLD_SIZE", str(count))
        parts = []
        for rank in range(count):
            monkeypatch.setenv("RANK", str(rank))
            parts.append(next(iter(SeededBatches(100, 14, seed=1, part=part_of(14)))))
        assert list(itertools.chain.from_iterable(parts)) == batch
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_gradients_travel_once_a_step(tmp_path):
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        model = DistributedDataParallel(nn.Linear(2, 2))
        travels = []

        def hook(state, bucket):
            travels.append(bucket.index())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        model.register_comm_hook(None, hook)
        for now in (False, False, True):
            with gradients_shared(model, now):
                model(torch.ones(1, 2)).sum().backward()
            assert len(travels) == now
        assert torch.equal(model.module.weight.grad, torch.full((2, 2), 3.0))
    finally:
        distributed.destroy_process_group()


class TestBadInput:
    def test_pieces_need_several_processes(self, tmp_path, fails):
        argv = [*FLAGS, "--n_steps", 2, "--log_path", tmp_path, "--fsdp"]
        fails(train_script.main, argv, "--fsdp", "torchrun")

    def test_a_batch_that_leaves_a_process_without_work(self, tmp_path, fails, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "8")
        fails(train_script.main, [*FLAGS, "--n_steps", 2, "--log_path", tmp_path], "--batch_size 14", "at least 16")

    def test_process_0_speaks_first(self, monkeypatch, fails, tmp_path):
        waits = []
        monkeypatch.setenv("RANK", "3")
        monkeypatch.setattr(errors.time, "sleep", waits.append)
        said = fails(train_script.main, [*FLAGS, "--n_steps", 0, "--log_path", tmp_path], "process 3: ", "--n_steps")
        assert len(waits) == 1, said

    def test_all_end_on_what_process_0_alone_met(self, logs, alone):
        """A run that is there already is found by process 0, which also writes."""
        argv = [*FLAGS, "--n_steps", 20, "--log_path", logs, "--exp_name", "alone"]
        assert processes.run("train", argv, logs / "again.txt", 2) == [2, 2]
        said = (logs / "again.txt").read_text()  # with torch 2.9, beside lines of gloo's own ("[Gloo] Rank 0 is ...")
        assert said.count("train.py: ") == said.count("already contains a run") == 1, said
        assert "Traceback" not in said
