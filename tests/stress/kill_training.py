"""Kill a small training at random moments, let it go on, and compare with one that was left alone.

    python tests/stress/kill_training.py --kills 30 --seed 0

Compared are, bit for bit, the weights, their averages, the optimizer's state and what was logged; also that
metrics.jsonl and TensorBoard have each step once, and that nothing half-written is left. Takes about three seconds
a kill on an idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the project, when this file is run as a script

from tests import processes

FLAGS = [
    *("--img_size", "8", "--patch_size", "4", "--in_chans", "1", "--embed_dim", "32", "--num_heads", "4"),
    *("--dataset", "digits", "--batch_size", "8", "--num_timesteps", "20", "--num_warmup_steps", "2", "--depth", "3"),
    *("--n_steps", "25", "--log_every_n_steps", "3", "--save_every_n_steps", "2", "--save_new_every_n_steps", "6"),
    *("--keep_last", "2", "--preview_steps", "1", "--n_samples", "1", "--device", "cpu", "--quiet"),
]


def train(logs: Path, name: str, *more: str) -> list:
    return processes.start("train", [*FLAGS, "--log_path", logs, "--exp_name", name, *more], logs / f"{name}.txt")


def outcome(folder: Path) -> dict[str, Any]:
    """What must not depend on the kills."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every run that went on
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        "checkpoints": {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pth"))},
        "metrics": [{name: v for name, v in line.items() if name != "steps_per_second"} for line in logged],
        "tensorboard": [(event.step, event.value) for event in board.Scalars("loss")],
        "files": sorted(path.name for path in folder.iterdir()),
        "half-written": sorted(path.name for path in folder.rglob(".*") if path.name != ".lock"),
    }


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two nested contents differ, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [found for key in a for found in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{where}/{i}")]
    return [] if a == b else [where]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if every training that was killed ended as the one that was not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as place:
        logs = Path(place)
        processes.finish(train(logs, "warm-up"))
        began = time.perf_counter()
        assert processes.finish(train(logs, "unbroken")) == [0], (logs / "unbroken.txt").read_text()
        seconds = time.perf_counter() - began
        wanted = outcome(logs / "unbroken")
        same = writing = kill = 0
        for attempt in itertools.count():
            if kill == args.kills:
                break
            name = f"attempt-{attempt}"
            (process,) = train(logs, name)
            process.join(moments.uniform(0, seconds))
            if process.exitcode is not None:  # it was done before
                continue
            process.kill()
            process.join()
            kill += 1
            folder = logs / name
            in_writing = any(folder.glob(".*.pth"))
            writing += in_writing
            begun = any(folder.glob("[!.]*.pth"))
            (status,) = processes.finish(train(logs, name, *["--resume"] * begun))
            different = [f"status {status}"] if status else differences(wanted, outcome(folder))
            same += not different
            print(
                f"kill {kill}: {'went on' if begun else 'began anew'}{', was writing a checkpoint' * in_writing}: "
                f"{'the same' if not different else ', '.join(different)}",
                flush=True,
            )
            if different:
                print((logs / f"{name}.txt").read_text())
        print(f"{same} of {args.kills} ended as the unbroken one ({writing} were killed while writing a checkpoint)")
    return 0 if same == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
