"""All that is measured on one set of images: the networks, their samples and scores, and where to switch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from calibration.choice import knee
from common.errors import InputError
from common.files import read_json, writable_folder, write_json
from common.images import read_png
from experiments.runner import Flags, Runner, slug
from experiments.sets import ImageSet, classes_of
from training.checkpoint import step_of

SOLVER = "ddpm"
GRID = (999, 900, 800, 700, 600, 500, 400, 300, 200, 100)
SPEEDUP = 1.5  # that one of the rules for the switch asks for
KNEE = "knee"
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


class Experiment:
    """A measurement on one set of images, in the folder `work`, with networks and samples of each seed."""

    def __init__(self, images: ImageSet, work: Path, run: Runner, seeds: Sequence[int]):
        self.images, self.work, self.run, self.seeds = images, writable_folder(work), run, seeds
        self.data = images.data

    def measure(self) -> dict[str, Any]:
        """Everything, as plain values, which are also kept in results.json."""
        self.prepare()
        rates = self.step_rates()
        steps = {name: self.equal_time(name, rates) for name in VARIANTS}
        for seed in self.seeds:
            self.train_shallow(PLAIN, seed, steps[PLAIN], t_min=0)
        calibrations = [self.calibrate(seed) for seed in self.seeds]
        options = averaged(calibrations)
        rules = chosen_by_rules(options)
        t_switch = rules[KNEE]["t_switch"]
        for seed in self.seeds:
            for name in VARIANTS:
                self.train_shallow(name, seed, steps[name], t_min=t_switch + 1)

        switches = {**grid_of(options), **{option["t_switch"]: option for option in rules.values()}}
        switches = dict(sorted(switches.items(), reverse=True))
        # Seed by seed, so that a machine that is slower for a while is so for all of them.
        table, variants, grid = [], [], []
        for seed in self.seeds:
            table += [(label, self.sampled(seed, how)) for label, how in self.methods(seed, t_switch).items()]
            variants += [(name, self.sampled(seed, self.duo(t_switch, seed, name))) for name in VARIANTS]
            grid += [(name_of_switch(s), self.sampled(seed, self.duo(t, seed))) for t, s in switches.items()]
        # Not of full itself, nor in other steps, where another image comes of the same noise.
        others = [label for label in dict(table) if not label.startswith("full")]
        result = {
            "name": self.images.name,
            "about": self.images.about,
            "score": self.images.score,
            "training": {"full": self.images.full_steps, "exits": self.images.exit_steps, "shallow": steps},
            "step_rates": rates,
            "sampling": {"solver": SOLVER, "steps": self.images.sampling_steps},
            "blocks": [network["blocks"] for network in calibrations[0]["networks"]],
            "t_switch": t_switch,
            "grid": sorted(grid_of(options), reverse=True),
            "switches": list(switches.values()),
            "rules": {name: option["t_switch"] for name, option in rules.items()},
            "knees": [knee_of(averaged([calibration]))["t_switch"] for calibration in calibrations],
            "table": self.compare("methods", table),
            "levels": {label: levels_from_full(table, label) for label in others},
            "variants": self.compare("training", variants),
            "scores": self.compare("switches", grid),
        }
        write_json(self.work / "results.json", result)
        return result

    def methods(self, seed: int, t_switch: int) -> dict[str, Flags]:
        """The rows of the first table by their labels, the full network first: a new one is a line in here."""
        steps = self.images.sampling_steps
        full, shallow = {"checkpoint_path": self.full(seed)}, {"checkpoint_path": self.shallow(PLAIN, seed)}
        exits = {"checkpoint_path": self.checkpoint(f"exits_{seed}", "deediff_uvit")}
        duo = self.duo(t_switch, seed)
        return {
            "full": full,
            "DuoDiff": duo,
            "early exit 0.1": {**exits, "threshold": 0.1},
            "early exit 0.2": {**exits, "threshold": 0.2},
            "caching every 2": {**full, "reuse_every": 2},
            "caching every 3": {**full, "reuse_every": 3},
            "DuoDiff + caching every 2": {**duo, "reuse_every": 2},
            f"full by ddpm in {steps // 2} steps": {**full, "steps": steps // 2},
            f"full by dpmsolver++ in {steps // 2} steps": {**full, "solver": "dpmsolver++", "steps": steps // 2},
            f"full by dpmsolver++ in {steps // 5} steps": {**full, "solver": "dpmsolver++", "steps": steps // 5},
            "shallow alone": shallow,
        }

    def duo(self, t_switch: int, seed: int, variant: str = PLAIN) -> Flags:
        """A shallow network and the full one; that one alone where the switch is at the start."""
        full = self.full(seed)
        if t_switch == GRID[0]:
            return {"checkpoint_path": full}
        shallow = self.shallow(variant, seed, t_switch + 1)
        return {"checkpoint_path": shallow, "checkpoint_path_late": full, "t_switch": t_switch}

    @property
    def sampling(self) -> Flags:
        # The same numbers everywhere: not every machine calculates in bf16.
        return {"solver": SOLVER, "steps": self.images.sampling_steps, "precision": "fp32"}

    def prepare(self) -> None:
        """The images, the full networks and their exits."""
        self.prepare_images()
        images = self.images
        full, _, exits = images.configs
        for seed in self.seeds:
            self.train("train", f"full_{seed}", full, images.full_steps, seed)
            heads: Flags = {"model": "deediff_uvit", "load_backbone": self.full(seed), "freeze_backbone": True}
            self.train("main", f"exits_{seed}", exits, images.exit_steps, seed, **heads)

    def prepare_images(self) -> None:
        """The images as the networks see them, and what scores them."""
        images = self.images
        if "data_path" in images.data:
            num_classes = len(classes_of(images.data["data_path"]))
            shape: Flags = {"img_size": images.img_size, "in_chans": images.in_chans, "num_classes": num_classes}
            self.data = {**images.data, "data_path": self.work / "packed"}
            self.run("pack", **images.data, **shape, output=self.data["data_path"])
            if steps := images.classifier_steps:
                output = images.extractor
                self.run("experiments.train_classifier", **self.data, **shape, n_steps=steps, output=output)

    def full(self, seed: int) -> Path:
        return self.checkpoint(f"full_{seed}")

    def shallow(self, variant: str, seed: int, t_min: int = 0) -> Path:
        return self.checkpoint(shallow_name(variant, seed, t_min))

    def checkpoint(self, name: str, model: str = "uvit") -> Path:
        return self.work / name / f"{self.data['dataset']}_{model}_last.pth"

    def train(
        self, script: str, name: str, config: str, n_steps: int, seed: int, log_every: int = 500, **flags: Any
    ) -> None:
        """Go on where it was cut off. A training that was begun with others' weights goes on with its own."""
        flags |= {"config_path": f"configs/{config}.yaml", "exp_name": name, "n_steps": n_steps, **self.data}
        flags |= {"batch_size": self.images.training_batch, "lr": 2e-3, "beta1": 0.9, "num_warmup_steps": 100}
        flags |= {"log_every_n_steps": log_every, "save_every_n_steps": 500, "preview_steps": 0}
        flags |= {"log_path": self.work, "seed": seed}

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

    def train_shallow(self, variant: str, seed: int, n_steps: int, t_min: int) -> None:
        flags: dict[str, Any] = {flag: self.full(seed) for flag in VARIANTS[variant]}
        if variant in ON_OWN_RANGE:
            flags["t_min"] = t_min
        name = shallow_name(variant, seed, t_min)
        self.train("main", name, self.images.configs[1], n_steps, seed, model="uvit", **flags)

    def step_rates(self) -> dict[str, list[float]]:
        """Steps per second of plain training and of distillation, in turns: the other kinds cost as much as plain."""
        path = self.work / "step_rates.json"
        rates: dict[str, list[float]] = {"plain": [], "distilled": []}
        if path.exists():  # the same numbers of steps when a run goes on
            rates = read_json(path)
            return rates
        n, teacher = self.images.timed_steps, {"distill_from": self.full(self.seeds[0])}
        for number in range(TIMED_ROUNDS):
            for kind, measured in rates.items():
                name, flags = f"timed_{kind}_{number}", teacher if kind == "distilled" else {}
                self.train("main", name, self.images.configs[1], n, 0, log_every=n // 3, model="uvit", **flags)
                lines = (self.work / name / "metrics.jsonl").read_text().splitlines()
                measured.append(statistics.mean(json.loads(line)["steps_per_second"] for line in lines[1:]))
        write_json(path, rates)
        return rates

    def equal_time(self, variant: str, rates: Mapping[str, Sequence[float]]) -> int:
        """Steps of a kind of training that take the time of shallow_steps plain ones."""
        kind = "distilled" if "distill_from" in VARIANTS[variant] else "plain"
        return steps_at_equal_time(self.images.shallow_steps, rates["plain"], rates[kind])

    def calibrate(self, seed: int) -> dict[str, Any]:
        """Of every switch what calibrate.py says. The rules are applied to the mean over seeds afterwards."""
        output, networks = self.work / f"calibration_{seed}.yaml", (self.shallow(PLAIN, seed), self.full(seed))
        measuring = {**self.data, **self.sampling, "n_images": self.images.n_calibration, "output": output}
        self.run("calibrate", checkpoint_path=networks, **measuring)
        calibration: dict[str, Any] = read_json(output.with_suffix(".json"))
        return calibration

    def sampled(self, seed: int, how: Flags) -> Path:
        """The folder of scored samples that a sampler makes with these flags."""
        words = [of.parent.name if isinstance(of, Path) else f"{flag}_{of}" for flag, of in how.items()]
        folder = self.work / "samples" / slug(*words)
        n = self.images.n_samples
        some: Flags = {"n_samples": n, "batch_size": min(250, n), "seed": seed, "output_folder": folder}
        script = "eesampler" if "threshold" in how else "sampler"
        self.run(script, **{**self.sampling, **how}, **some)
        scoring: Flags = {**self.images.scoring, "cache_dir": self.work / "cache"}
        self.run("fid", samples_path=folder, **self.data, **scoring)
        return folder

    def compare(self, name: str, runs: Sequence[tuple[str, Path]]) -> dict[str, Any]:
        """The numbers of compare.py, and its picture. Raises InputError where times are not to be compared."""
        picture = self.work / f"{name}_{'_'.join(map(str, self.seeds))}.png"
        numbers = picture.with_suffix(".json")
        self.run("compare", *(f"{label}={folder}" for label, folder in runs), output=picture, json=numbers)
        compared: dict[str, Any] = read_json(numbers)
        if notes := compared.get("notes"):
            raise InputError(f"{'; '.join(notes)}. Remove {self.run.path.parent} and measure all on one machine")
        return compared | {"picture": str(picture)}


def shallow_name(variant: str, seed: int, t_min: int) -> str:
    """Of a folder. t_min: where its own range begins, of those that have one."""
    own = f"_{t_min}" if variant in ON_OWN_RANGE else ""
    return f"shallow_{variant.replace(' ', '_')}{own}_{seed}"


def name_of_switch(option: Mapping[str, Any]) -> str:
    return "full" if option["steps_of_each"][0] == 0 else f"t_switch {option['t_switch']}"


def levels_from_full(runs: Sequence[tuple[str, Path]], label: str) -> float:
    """How far its samples are from those that the full network makes of the same noise: root mean square, of 255."""
    full, own = ([folder for name, folder in runs if name == wanted] for wanted in ("full", label))
    squares = [
        (read_png(one).float() - read_png(other / one.name).float()).square().mean()
        for standard, other in zip(full, own, strict=True)
        for one in sorted(standard.glob("*.png"))
    ]
    return float(torch.stack(squares).mean().sqrt())


def steps_at_equal_time(steps: int, plain: Sequence[float], other: Sequence[float]) -> int:
    """plain, other: steps per second, measured in turns. The median of the rounds' ratios counts."""
    return max(1, round(steps * statistics.median(b / a for a, b in zip(plain, other, strict=True))))


def averaged(calibrations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The options over several calibrations: means, of speed-ups in time; standard errors too, for they measured on
    the same images."""
    options = []
    for same in zip(*(calibration["options"] for calibration in calibrations), strict=True):
        option = {key: same[0][key] for key in ("t_switch", "steps_of_each")}
        option["speed_up"] = statistics.harmonic_mean([of["speed_up"] for of in same])
        for key in ("divergence", "divergence_se", "divergence_per_dimension", "excess", "excess_se"):
            option[key] = statistics.mean(of[key] for of in same)
        options.append(option)
    return options


def grid_of(options: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """The options of the grid by their switch, which is the next timestep that the sampler visits."""
    reached = (next((o for o in options if o["t_switch"] <= t), None) for t in GRID)
    return {option["t_switch"]: option for option in reached if option is not None}


def chosen_by_rules(options: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What each rule chooses. options: rising in speed, the full network alone first. KNEE is calibrate.py's own."""
    quickest, most = options[-1]["speed_up"], options[-1]["divergence"]

    def from_chord(option: Mapping[str, Any]) -> float:
        """How far below the line from the first option to the last (Satopaa et al. 2011)."""
        saved, all_saved = (1 - 1 / speed_up for speed_up in (option["speed_up"], quickest))
        return saved / all_saved - option["divergence"] / most if all_saved > 0 and most > 0 else 0.0

    return {
        KNEE: knee_of(options),
        "farthest from the chord": max(options, key=from_chord),
        "least excess": min(options, key=lambda option: option["excess"]),
        "fastest without excess": [option for option in options if option["excess"] <= 2 * option["excess_se"]][-1],
        f"speed-up {SPEEDUP:g}": next((o for o in options if o["speed_up"] >= SPEEDUP), options[-1]),
    }


def knee_of(options: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What calibrate.py chooses by default."""
    rows: list[Any] = [SimpleNamespace(**option) for option in options]  # the numbers of an Option, not its networks
    chosen: SimpleNamespace = knee(rows)
    return vars(chosen)
