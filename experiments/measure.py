"""All that docs/results.md says of one set of images: ways to save work, where to switch, how to train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.files import read_json, writable_folder
from evaluation.features import FeatureExtractor
from experiments.networks import VARIANTS, Networks, Trained, equal_time
from experiments.runner import Flags, Runner, slug
from experiments.samples import BATCH, Row, Samples, Ways, real_images
from experiments.sets import NAMES, SAMPLERS, ImageSet, Sampler
from experiments.switches import GRID, averaged, chosen_by_rules, grid_of, knee_of

HOME = "DDPM, 50 steps"  # where switches and ways to train are compared
FULL, DUODIFF, EXITS, JOINT = "full", "DuoDiff at the knee", "exit layers by plan", "plan of all"
PLANNED = 2.0  # the speed-up of the plans, as predicted
THRESHOLDS = (0.1, 0.2)  # of early exit
LEAST_PATHS = 16  # where many steps leave time for few


class Experiment:
    """A measurement on one set of images with its networks, in the folder `work`."""

    def __init__(self, images: ImageSet, networks: Networks, extractor: FeatureExtractor, work: Path, run: Runner):
        self.images, self.networks, self.work, self.run = images, networks, writable_folder(work), run
        self.extractor, self.seeds = extractor, images.seeds

    def measure(self) -> dict[str, Any]:
        """Everything, as plain values."""
        images, networks = self.images, self.networks
        networks.prepare(self.seeds)
        real = real_images(networks.data, images.img_size, images.in_chans)
        samples = Samples(real, self.extractor, self.work, self.run, self.seeds, images.n_samples, images.precision)
        home, samplers = SAMPLERS[HOME], dict.fromkeys([HOME, *(NAMES[name] for name in images.samplers)])
        calibrations = [self.calibration(home, seed) for seed in self.seeds]
        result = {
            "name": images.name,
            "about": images.about,
            "seeds": list(self.seeds),
            "n_samples": images.n_samples,
            "n_real": samples.n_real,
            "precision": images.precision,
            "blocks": [network["blocks"] for network in calibrations[0]["networks"]],
            "samplers": {name: self.compared(samples, SAMPLERS[name]) for name in samplers},
            "t_switch": {name: [self.chosen(SAMPLERS[name], seed) for seed in self.seeds] for name in samplers},
            "switching": self.switching(samples, home, calibrations),
        }
        if isinstance(networks, Trained):
            of = networks.images
            result["steps"] = {"full": of.full_steps, "shallow": of.shallow_steps, "exits": of.exit_steps}
            t_switch = knee_of(averaged(calibrations))["t_switch"]
            if of.compares_training and t_switch < GRID[0]:  # else the shallow networks have no range of their own
                result["training"] = self.training(networks, samples, home, t_switch)
        return result

    def compared(self, samples: Samples, sampler: Sampler) -> Sequence[Row]:
        ways = self.ways(sampler)
        return samples.timed(sampler, ways, samples.rows(sampler, ways))

    def ways(self, sampler: Sampler) -> Ways:
        """The full network first: a new way is a line in here."""
        of = self.networks

        def full(seed: int) -> Flags:
            return {"checkpoint_path": of.full(seed)}

        def duo(seed: int) -> Flags:
            return self.duo(self.chosen(sampler, seed), seed)

        def corrected(seed: int) -> Flags:
            cheap = duo(seed)
            return {**cheap, "correct_every": 4} if "t_switch" in cheap else cheap

        ways: dict[str, Callable[[int], Flags]] = {
            FULL: full,
            DUODIFF: duo,
            "DuoDiff, then corrected every 4": corrected,
            "middle reused every 2": lambda seed: {**full(seed), "reuse_every": 2},
        }
        for threshold in THRESHOLDS:
            ways[f"early exit {threshold:g}"] = partial(self.early_exit, threshold)
        return {
            **ways,
            EXITS: lambda seed: {"stages": self.plan(sampler, seed, EXITS, of.exits(seed))},
            JOINT: lambda seed: {"stages": self.plan(sampler, seed, JOINT, of.shallow(seed), of.exits(seed))},
            "shallow alone": lambda seed: {"checkpoint_path": of.shallow(seed)},
        }

    def early_exit(self, threshold: float, seed: int) -> Flags:
        return {"checkpoint_path": self.networks.exits(seed), "threshold": threshold}

    def duo(self, t_switch: int, seed: int, shallow: Path | None = None) -> Flags:
        """The shallow network and the full one; that one alone where the switch is at the start."""
        full = self.networks.full(seed)
        if t_switch == GRID[0]:
            return {"checkpoint_path": full}
        shallow = shallow or self.networks.shallow(seed)
        return {"checkpoint_path": shallow, "checkpoint_path_late": full, "t_switch": t_switch}

    # What calibrate.py chooses

    def chosen(self, sampler: Sampler, seed: int) -> int:
        """The switch of the networks of a seed; of a sampler without noise calibrate.py takes DDPM's knee."""
        t_switch: int = self.calibration(sampler, seed)["chosen"]["t_switch"]
        return t_switch

    def calibration(self, sampler: Sampler, seed: int) -> dict[str, Any]:
        """All switches between the networks of a seed."""
        networks = self.networks.shallow(seed), self.networks.full(seed)
        output = self.calibrated(sampler, seed, "switch", checkpoint_path=networks)
        measured: dict[str, Any] = read_json(output.with_suffix(".json"))
        return measured

    def plan(self, sampler: Sampler, seed: int, name: str, *networks: Path) -> Path:
        return self.calibrated(sampler, seed, name, checkpoint_path=networks, plan=True, speedup=PLANNED)

    def calibrated(self, sampler: Sampler, seed: int, name: str, **flags: Any) -> Path:
        """The file of stages that calibrate.py writes."""
        words = sampler.solver, str(sampler.steps), name, self.networks.name(seed)
        output = writable_folder(self.work / "stages") / f"{slug(*words)}.yaml"
        n = max(LEAST_PATHS, self.images.n_calibration * 50 // max(50, sampler.steps))
        some: Flags = {"n_images": n, "batch_size": min(BATCH, n), "precision": self.images.precision, "output": output}
        self.run("calibrate", **flags, **self.networks.data, **sampler._asdict(), **some)
        return output

    # Where to switch, and how to train

    def switching(
        self, samples: Samples, sampler: Sampler, calibrations: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Switches of a grid and those that rules choose, by calibrate.py's numbers and by the scores of samples."""
        options = averaged(calibrations)
        rules = chosen_by_rules(options)
        switches = grid_of(options) | {option["t_switch"]: option for option in rules.values()}
        switches = dict(sorted(switches.items(), reverse=True))
        rows = samples.rows(sampler, {name_of_switch(t): partial(self.duo, t) for t in switches})
        return {
            "rows": [
                # Predicted, because these samples are not timed.
                {**row, "option": switch, "speed_up": [switch["speed_up"]]}
                for switch, row in zip(switches.values(), rows, strict=True)
            ],
            "grid": list(grid_of(options)),
            "rules": {name: option["t_switch"] for name, option in rules.items()},
            "knees": [knee_of(averaged([calibration]))["t_switch"] for calibration in calibrations],
        }

    def training(self, networks: Trained, samples: Samples, sampler: Sampler, t_switch: int) -> dict[str, Any]:
        """Ways to train the shallow network, at equal time."""
        rates = networks.step_rates(self.seeds[0])
        steps = {name: equal_time(name, networks.images.shallow_steps, rates) for name in VARIANTS}
        for seed in self.seeds:
            for name in VARIANTS:
                networks.train_shallow(name, seed, steps[name], t_min=t_switch + 1)

        def way(variant: str, seed: int) -> Flags:
            return self.duo(t_switch, seed, networks.shallow(seed, variant, t_switch + 1))

        return {
            "steps": steps,
            "rates": rates,
            "t_switch": t_switch,
            "rows": samples.rows(sampler, {name: partial(way, name) for name in VARIANTS}),
        }


def name_of_switch(t_switch: int) -> str:
    return FULL if t_switch == GRID[0] else f"t_switch {t_switch}"
