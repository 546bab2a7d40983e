"""The networks that are measured: those of pretrained/, or trained here, of each seed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from common.config import read_yaml
from common.errors import InputError
from common.files import read_json, writable_folder, write_json
from experiments.runner import Flags, Runner
from experiments.sets import TrainedSet, classes_of
from training.checkpoint import step_of

TIMED_ROUNDS = 5
# Ways to train the shallow network, and the flags that take the full network. PLAIN: no flags, all timesteps.
PLAIN = "all timesteps"
VARIANTS = {
    PLAIN: (),
    "own range": (),
    "warm start": ("init_from",),
    "distilled": ("distill_from",),
    "all three": ("init_from", "distill_from"),
}
ON_OWN_RANGE = ("own range", "all three")
PRETRAINED = {name: Path("pretrained") / f"fashion_mnist_{name}" for name in ("full", "shallow", "exits")}


class Pretrained:
    """The networks of pretrained/, the same for all seeds."""

    def __init__(self, data: Flags):
        self.data = data

    def prepare(self, seeds: Sequence[int]) -> None:
        """They are there."""

    def full(self, seed: int) -> Path:
        return PRETRAINED["full"]

    def shallow(self, seed: int) -> Path:
        return PRETRAINED["shallow"]

    def exits(self, seed: int) -> Path:
        return PRETRAINED["exits"]

    def name(self, seed: int) -> str:
        return "pretrained"


class Trained:
    """Networks that are trained on a set of images, other ones for each seed, in the folder `work`."""

    def __init__(self, images: TrainedSet, work: Path, run: Runner):
        self.images, self.work, self.run = images, writable_folder(work), run
        self.data = images.data

    def prepare(self, seeds: Sequence[int]) -> None:
        """The images, and of each seed the full network, its exits and the plain shallow network."""
        self.prepare_images()
        images = self.images
        for seed in seeds:
            self.train("train", f"full_{seed}", images.configs[0], images.full_steps, seed)
            heads: Flags = {"model": "deediff_uvit", "load_backbone": self.full(seed), "freeze_backbone": True}
            self.train("main", f"exits_{seed}", images.configs[2], images.exit_steps, seed, **heads)
            self.train_shallow(PLAIN, seed, images.shallow_steps)

    def prepare_images(self) -> None:
        """The images as the networks see them."""
        images = self.images
        if "data_path" in images.data:
            shape: Flags = {"img_size": images.img_size, "in_chans": images.in_chans, "num_classes": self.num_classes}
            self.data = {**images.data, "data_path": self.work / "packed"}
            self.run("pack", **images.data, **shape, output=self.data["data_path"])

    @property
    def num_classes(self) -> int:
        """-1 for a network without classes."""
        return len(classes_of(self.images.data["data_path"])) or -1

    def full(self, seed: int) -> Path:
        return self.checkpoint(f"full_{seed}")

    def shallow(self, seed: int, variant: str = PLAIN, t_min: int = 0) -> Path:
        return self.checkpoint(shallow_name(variant, seed, t_min))

    def exits(self, seed: int) -> Path:
        return self.checkpoint(f"exits_{seed}", "deediff_uvit")

    def name(self, seed: int) -> str:
        return str(seed)

    def checkpoint(self, name: str, model: str = "uvit") -> Path:
        return self.work / name / f"{self.data['dataset']}_{model}_last.pth"

    def config(self, name: str) -> Path:
        """A network's file in configs/, or a copy of it in `work` for images with another number of classes."""
        path = Path("configs") / f"{name}.yaml"
        content = read_yaml(path)
        params = content["model_params"]
        if "data_path" not in self.images.data or params["num_classes"] in (-1, self.num_classes):
            return path
        params["num_classes"] = self.num_classes
        path = self.work / f"{name}_{self.num_classes}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def train(
        self, script: str, name: str, config: str, n_steps: int, seed: int, log_every: int = 500, **flags: Any
    ) -> None:
        """Go on where it was cut off. A training that was begun with others' weights goes on with its own."""
        flags |= {"config_path": self.config(config), "exp_name": name, "n_steps": n_steps, **self.data}
        flags |= {"batch_size": self.images.training_batch, "lr": self.images.lr, "beta1": 0.9, "num_warmup_steps": 100}
        flags |= {"log_every_n_steps": log_every, "save_every_n_steps": 500, "preview_steps": 0}
        flags |= {"log_path": self.work, "seed": seed}
        if self.images.precision == "bf16":
            flags["use_amp"] = True

        def going_on() -> Flags | None:
            for checkpoint in (self.work / name).glob("*_last.pth"):
                # Stopped between its last checkpoint and the note that it is done, it has nothing left to do.
                finished = step_of(checkpoint) == n_steps
                left = {flag: value for flag, value in flags.items() if flag != "init_from"}
                return None if finished else {**left, "resume": True}
            return flags

        if (self.work / name).exists() and not self.run.began(script, **flags):
            raise InputError(
                f"{self.work / name} was trained by another command than is given now; remove {self.run.path.parent}"
            )
        self.run(script, going_on=going_on, **flags)

    def train_shallow(self, variant: str, seed: int, n_steps: int, t_min: int = 0) -> None:
        """t_min: where the range begins of those that have their own."""
        flags: dict[str, Any] = {flag: self.full(seed) for flag in VARIANTS[variant]}
        if variant in ON_OWN_RANGE:
            flags["t_min"] = t_min
        name = shallow_name(variant, seed, t_min)
        self.train("main", name, self.images.configs[1], n_steps, seed, model="uvit", **flags)

    def step_rates(self, seed: int) -> dict[str, list[float]]:
        """Steps per second of plain training and of distillation, in turns: the other kinds cost as much as plain."""
        path = self.work / "step_rates.json"
        rates: dict[str, list[float]] = {"plain": [], "distilled": []}
        if path.exists():  # the same numbers of steps when a run goes on
            rates = read_json(path)
            return rates
        n, teacher = self.images.timed_steps, {"distill_from": self.full(seed)}
        for number in range(TIMED_ROUNDS):
            for kind, measured in rates.items():
                name, flags = f"timed_{kind}_{number}", teacher if kind == "distilled" else {}
                self.train("main", name, self.images.configs[1], n, 0, log_every=n // 3, model="uvit", **flags)
                lines = (self.work / name / "metrics.jsonl").read_text().splitlines()
                measured.append(statistics.mean(json.loads(line)["steps_per_second"] for line in lines[1:]))
        write_json(path, rates)
        return rates


Networks = Pretrained | Trained


def shallow_name(variant: str, seed: int, t_min: int = 0) -> str:
    """Of a folder."""
    own = f"_{t_min}" if variant in ON_OWN_RANGE else ""
    return f"shallow_{variant.replace(' ', '_')}{own}_{seed}"


def equal_time(variant: str, steps: int, rates: Mapping[str, Sequence[float]]) -> int:
    """Steps of a way to train that take the time of so many plain ones. rates: of `Trained.step_rates`, per second.

    The median of the rounds' ratios counts.
    """
    kind = "distilled" if "distill_from" in VARIANTS[variant] else "plain"
    return max(1, round(steps * statistics.median(b / a for a, b in zip(rates["plain"], rates[kind], strict=True))))
