"""Kill sampling runs at random moments, run them again, and compare every file with an unbroken run's.

From the project's root: python tests/stress/kill_sampling.py --kills 30 --seed 0
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.config import build_config  # noqa: E402
from models.loading import build_network  # noqa: E402

PARAMS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "num_heads": 4}
PAUSE = 0.002  # seconds between two looks at a folder
# Few steps a batch: most of the time goes into files, which is where a kill could do harm.
N_SAMPLES = 240
COMMON = [
    "--n_samples",
    str(N_SAMPLES),
    "--batch_size",
    "3",
    "--solver",
    "ddim",
    "--steps",
    "4",
    "--device",
    "cpu",
    "--quiet",
]


def write_network(path: Path, **settings: object) -> list[str]:
    """A tiny network of random weights and its YAML file. Returns the two as arguments."""
    torch.manual_seed(0)
    network = build_network(build_config(settings, "stress"))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    torch.save(network.state_dict(), path)
    path.with_suffix(".yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return [str(path), str(path.with_suffix(".yaml"))]


def commands(folder: Path) -> list[list[str]]:
    """A sampler.py and an eesampler.py, but for the output folder."""
    shallow, shallow_yaml = write_network(folder / "shallow.pth", model_params={**PARAMS, "depth": 1})
    full, full_yaml = write_network(folder / "full.pth", model_params={**PARAMS, "depth": 5})
    heads = {"model": "deediff_uvit", "classifier_type": "mlp_probe_per_layer"}
    early, early_yaml = write_network(folder / "early.pth", model_params={**PARAMS, "depth": 5}, **heads)
    pair = ["--checkpoint_path", shallow, "--config_path", shallow_yaml, "--t_switch", "600"]
    late = ["--checkpoint_path_late", full, "--config_path_late", full_yaml, "--timesteps_save", "999", "249"]
    return [
        [sys.executable, "sampler.py", *pair, *late, *COMMON],
        [
            sys.executable,
            "eesampler.py",
            "--checkpoint_path",
            early,
            "--config_path",
            early_yaml,
            "--threshold",
            "0.5",
            *COMMON,
        ],
    ]


def start(command: list[str], output: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    argv = [*command, "--output_folder", str(output)]
    return subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def finish(command: list[str], output: Path) -> float:
    """Run to the end. Returns the seconds from its first file to its last image."""
    process, first, last = start(command, output), None, None
    while process.poll() is None:
        if first is None and (output / "report" / "run.json").exists():
            first = time.perf_counter()
        if last is None and (output / f"{N_SAMPLES - 1:06d}.png").exists():
            last = time.perf_counter()
        time.sleep(PAUSE)
    if process.returncode:
        sys.exit(f"{command[1]} ended with status {process.returncode}")
    return last - first


def kill(command: list[str], output: Path, after: float) -> None:
    """Start a run and end it by SIGKILL, so many seconds after it touched its folder."""
    process = start(command, output)
    before = state(output)
    while process.poll() is None and state(output) == before:
        time.sleep(PAUSE)
    time.sleep(after)
    process.kill()
    process.wait()


def state(output: Path) -> int:
    """Changes when run.json is written, which a run does before anything else it keeps."""
    path = output / "report" / "run.json"
    return path.stat().st_mtime_ns if path.exists() else 0


def content(output: Path) -> dict[str, object]:
    """All files without times and memory, which differ; not the lock, which holds the process."""
    files: dict[str, object] = {}
    for path in sorted(path for path in output.rglob("*") if path.is_file() and path.name != ".lock"):
        name = str(path.relative_to(output))
        if path.parent.name == "batches" and path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                files[name] = {key: arrays[key].tobytes() for key in arrays.files if key != "seconds"}
        elif name == "report/statistics.json":
            about = json.loads(path.read_text(encoding="utf-8"))
            about["settings"].pop("output_folder")
            files[name] = {
                key: value for key, value in about.items() if "second" not in key and key != "peak_memory_bytes"
            }
        else:
            files[name] = path.read_bytes()
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    equal = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        runs = []
        for number, command in enumerate(commands(folder)):
            unbroken = folder / f"unbroken{number}"
            runs.append((command, finish(command, unbroken), content(unbroken)))
        for number in range(args.kills):
            command, seconds, wanted = runs[number % len(runs)]
            output = folder / "killed"
            after = moments.uniform(0, 1.15 * seconds)  # a few while the report is written
            kill(command, output, after)
            there = len(list(output.glob("*.png")))
            finish(command, output)
            found = content(output)
            different = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
            equal += not different
            said = f"differ: {', '.join(different[:3])}" if different else "equal"
            print(f"{command[1]} killed {after:.2f} s after its first file, {there} images there: {said}", flush=True)
            shutil.rmtree(output)
    print(f"{equal} of {args.kills}")
    sys.exit(equal != args.kills)


if __name__ == "__main__":
    main()
