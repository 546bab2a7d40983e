"""What plans and single mechanisms cost in nats, in seconds and in the score, at equal speed and elsewhere."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from calibration.plan import ALONE, PlanMeasurement, denoisers_of, other_images, planned_stages
from calibration.plan_report import MECHANISMS, entries_of
from calibration.planning import Prices, best_plan, frontier
from calibration.settings import Measurement
from common.devices import pick_device
from common.errors import InputError
from common.files import read_json, writable_folder, write_json
from common.options import SolverSettings
from common.timing import in_turns, ratio
from diffusion.sampling import sample, split_timesteps
from diffusion.schedulers import process_of
from evaluation.images import FinishedImages
from evaluation.pairs import psnr
from experiments.networks import PLAIN, Trained, shallow_name
from experiments.plans_sets import PlanSet
from experiments.runner import Flags, Runner, slug
from generation.denoisers import make_stages
from generation.run import noise_of, solver_of
from generation.settings import CalibrationSettings, SamplerSettings, SavingSettings
from generation.stages import Plan, PlannedStage, StageFile, plan_of, stages_described, write_stages
from models.loading import load_together

SPEED_UPS = (2.0, 3.0)
MOVED = 3.0  # the speed-up of the plan that is used elsewhere
T_SWITCH = 439  # the knee of digits networks that were trained for 4,000 steps
ROUNDS = 2  # of sampling, in turns
TIMED_ROUNDS, TIMED_BATCH = 5, 100
SHALLOW, FULL = 0, 1  # places among the networks
LEAST_PATHS = 16  # where many steps leave time for few
FULL_ALONE, JOINT, BROUGHT, OWN = "full", "plan of all", "plan brought here", "plan made here"
TOLD = ("stages", "speed_up", "predicted", "measured", "sampled", "coherence")  # of a plan

Stages = Sequence[PlannedStage]


class Setting(NamedTuple):
    """A way to sample, which plans are made for."""

    name: str
    solver: str
    steps: int
    halfway: bool = False  # the networks as they were after half of their training


def settings_of(steps: int) -> list[Setting]:
    """Where plans are measured: first where they are made, with DDPM's own noise, then elsewhere."""
    few, more = max(2, 2 * steps // 5), 20 * steps
    return [
        Setting(f"ddpm, {steps} steps", "ddpm", steps),
        Setting(f"ddpm, {few} steps", "ddpm", few),
        Setting(f"ddpm, {more} steps", "ddpm", more),
        Setting(f"ddim, {steps} steps", "ddim", steps),
        Setting(f"dpmsolver++, {few} steps", "dpmsolver++", few),
        Setting(f"ddpm, {steps} steps, networks halfway", "ddpm", steps, halfway=True),
    ]


def schemes() -> dict[str, Stages]:
    """Plans that were made by hand."""
    duo = PlannedStage(SHALLOW, T_SWITCH + 1, 0.0, "")

    def full(**saving: int) -> PlannedStage:
        cheap = SHALLOW if "correct_every" in saving else None
        return PlannedStage(FULL, 0, 0.0, "", saving=SavingSettings(**saving), cheap=cheap)

    return {
        f"switch at {T_SWITCH}": [duo, full()],
        "middle reused every 2": [full(reuse_every=2, reuse_order=0, reuse_outer=1)],
        "corrected every 4, extrapolated": [full(correct_every=4, correct_order=1)],
        "corrected every 4, held": [full(correct_every=4, correct_order=0)],
        f"switch at {T_SWITCH}, then corrected every 4, extrapolated": [duo, full(correct_every=4, correct_order=1)],
        f"switch at {T_SWITCH}, then corrected every 4, held": [duo, full(correct_every=4, correct_order=0)],
    }


class Evidence:
    """A measurement on one set of images: networks, plans and samples of each seed, in the folder `work`."""

    def __init__(self, images: PlanSet, work: Path, run: Runner, seeds: Sequence[int], elsewhere: bool = True):
        self.images, self.work, self.run, self.seeds = images, work, run, seeds
        self.networks = Trained(images, work, run)
        self.device = pick_device("auto")
        self.settings = settings_of(images.sampling_steps)[: None if elsewhere else 1]

    def measure(self) -> dict[str, Any]:
        """Everything, as plain values."""
        self.train()
        home, *elsewhere = self.settings
        plans = {seed: self.kept(seed, home, self.made_here) for seed in self.seeds}
        for seed, of_seed in plans.items():
            for label, value in self.coherence(seed, of_seed["plans"]).items():
                of_seed["plans"][label]["coherence"] = value
        rows = self.sampled(home, plans)
        moved = {}
        for setting in elsewhere:
            there = {seed: self.kept(seed, setting, self.brought_there) for seed in self.seeds}
            moved[setting.name] = {"unit": there[self.seeds[0]]["unit"], "rows": self.sampled(setting, there)}
        return {
            "name": self.images.name,
            "about": self.images.about,
            "score": self.images.score,
            "training": [self.images.full_steps, self.images.shallow_steps],
            "seeds": list(self.seeds),
            "n_samples": self.images.n_samples,
            "n_paths": self.images.n_calibration,
            "setting": home.name,
            "rows": rows,
            "moved": moved,
            "curves": plans[self.seeds[0]]["curves"],
        }

    # Networks

    def train(self) -> None:
        """A full and a shallow network of each seed, both also as they were halfway."""
        images, networks = self.images, self.networks
        networks.prepare_images()
        for seed in self.seeds:
            for script, name, config, steps, flags in (
                ("train", f"full_{seed}", images.configs[0], images.full_steps, {}),
                ("main", shallow_name(PLAIN, seed), images.configs[1], images.shallow_steps, {"model": "uvit"}),
            ):
                more: Flags = {**flags, "save_new_every_n_steps": steps // 2}
                networks.train(script, name, config, steps, seed, **more)

    def files(self, seed: int, setting: Setting) -> list[Path]:
        """The shallow and the full network."""
        last = [self.networks.shallow(seed), self.networks.full(seed)]
        if not setting.halfway:
            return last
        steps = self.images.shallow_steps // 2, self.images.full_steps // 2
        return [path.with_name(path.name.replace("_last", f"_step-{n}")) for path, n in zip(last, steps, strict=True)]

    # Plans and their divergence

    def kept(self, seed: int, setting: Setting, make: Callable[[int, Setting], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gives, from its file if there is one."""
        path = writable_folder(self.work / "plans") / f"{slug(setting.name)}_{seed}.json"
        if not path.exists():
            print(f"\nplans for {setting.name}, seed {seed}", flush=True)
            write_json(path, make(seed, setting))
        found: dict[str, Any] = read_json(path)
        return found

    def measurement(self, seed: int, setting: Setting, paths: str = "data") -> PlanMeasurement:
        networks = load_together(
            [(path, None) for path in self.files(seed, setting)], {}, device=self.device, process_of=process_of
        )
        n = self.fewer(self.images.n_calibration, setting, least=LEAST_PATHS)
        return PlanMeasurement(
            Measurement(
                choice=CalibrationSettings(**self.networks.data, n_images=n, paths=paths),
                solver=SolverSettings(solver=setting.solver, steps=setting.steps),
                precision="fp32",
                batch_size=min(128, n),
                seed=seed,
                quiet=True,
            ),
            networks,
            self.device,
        )

    def made_here(self, seed: int, setting: Setting) -> dict[str, Any]:
        """Of each speed-up each mechanism alone and the plan of all; and the plans made by hand."""
        measurement, sampled = self.measurement(seed, setting), self.measurement(seed, setting, "sampled")
        prices = measurement.prices()
        of_mechanism = {MECHANISMS[name]: prices.only(name) for name in ALONE if prices.has(name)} | {JOINT: prices}
        plans: dict[str, Stages] = {}
        for speed_up in SPEED_UPS:
            for name, some in of_mechanism.items():
                try:
                    chosen = best_plan(some, seconds=prices.seconds_full / speed_up)
                except InputError:  # it is never so fast
                    continue
                plans[at_speed(name, speed_up)] = planned_stages(some, chosen, 0.0)
        plans |= schemes()
        numbers = {label: self.numbers(measurement, prices, stages) for label, stages in plans.items()}
        for label, stages in plans.items():
            numbers[label]["sampled"] = measurement_of(sampled, stages)
        d = dimensions_of(measurement)
        curves = {
            name: [[option.speed_up, d * option.divergence] for option in frontier(some)]
            for name, some in of_mechanism.items()
        }
        return {"unit": unit_of(measurement), "plans": numbers, "curves": curves}

    def brought_there(self, seed: int, setting: Setting) -> dict[str, Any]:
        """The plan of all from the first setting, and the one that is made here for the same speed."""
        measurement = self.measurement(seed, setting)
        prices = measurement.prices()
        described = self.kept(seed, self.settings[0], self.made_here)["plans"][at_speed(JOINT, MOVED)]["stages"]
        brought = self.numbers(measurement, prices, stages_described(described, self.work))
        plans = {BROUGHT: brought}
        try:
            own = best_plan(prices, seconds=prices.seconds_full / brought["speed_up"])
            plans[OWN] = self.numbers(measurement, prices, planned_stages(prices, own, 0.0))
        except InputError:  # the brought one is fast without the full network at the last step, which is infinitely far
            pass
        return {"unit": unit_of(measurement), "plans": plans}

    def coherence(self, seed: int, plans: Mapping[str, Any]) -> dict[str, float]:
        """`coherence_of` of each plan, from its file if there is one."""
        path = writable_folder(self.work / "coherence") / f"{seed}.json"
        if not path.exists():
            measurement = self.measurement(seed, self.settings[0])
            stages = {label: stages_described(plan["stages"], self.work) for label, plan in plans.items()}
            write_json(path, {label: coherence_of(measurement, of) for label, of in stages.items()})
        found: dict[str, float] = read_json(path)
        return found

    def numbers(self, measurement: PlanMeasurement, prices: Prices, stages: Stages) -> dict[str, Any]:
        """Of a plan: its stages, what is predicted, and its divergence as a whole along other paths."""
        speed_up, predicted = predicted_of(prices, stages)
        return {
            "stages": Plan([], stages).described(measurement.ground.solver.schedule.num_timesteps),
            "speed_up": speed_up,
            "predicted": dimensions_of(measurement) * predicted,
            "measured": measurement_of(measurement, stages),
        }

    # Samples

    def sampled(self, setting: Setting, plans: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """A row for each plan that all seeds have, the full network first, with a value for each seed."""
        labels = [
            label for label in plans[self.seeds[0]]["plans"] if all(label in of["plans"] for of in plans.values())
        ]
        n = self.fewer(self.images.n_samples, setting, least=ROUNDS)
        scored = n == self.images.n_samples
        rows: dict[str, dict[str, Any]] = {}
        for seed in self.seeds:
            hows: dict[str, Flags] = {FULL_ALONE: {"checkpoint_path": self.files(seed, setting)[FULL]}}
            for label in labels:
                hows[label] = {"stages": self.stage_file(seed, setting, label, plans[seed]["plans"][label]["stages"])}
            if setting is self.settings[0]:
                for solver in ("ddpm", "dpmsolver++"):
                    few = setting.steps // 3
                    how = {**hows[FULL_ALONE], "solver": solver, "steps": few}
                    hows[f"full in {few} steps, {solver}"] = how
            folders = self.folders_of(seed, setting, hows, n, scored)
            seconds = self.timed(seed, setting, hows, n)
            for label, folder in folders.items():
                row = rows.setdefault(label, {"label": label})
                told = {key: plans[seed]["plans"].get(label, {}).get(key) for key in TOLD}
                told["seconds"] = statistics.median(seconds[label])
                told["sampled_speed_up"] = ratio(seconds[FULL_ALONE], seconds[label])
                if scored:
                    scores = read_json(folder / "report" / "metrics.json")
                    told["score"] = self.images.scale * scores[self.images.metric]
                if label in labels:
                    told |= pairs_of(folders[FULL_ALONE], folder)
                for key, value in told.items():
                    row.setdefault(key, []).append(value)
        return list(rows.values())

    def folders_of(
        self, seed: int, setting: Setting, hows: Mapping[str, Flags], n: int, scored: bool
    ) -> dict[str, Path]:
        """The folders of samples by the labels, made in turns, so that a slower machine is so for all of them."""
        folders = {label: self.work / "samples" / slug(setting.name) / f"{slug(label)}_{seed}" for label in hows}
        for part in range(1, ROUNDS + 1):
            for label, how in hows.items():
                sampling: Flags = {"solver": setting.solver, "steps": setting.steps, "precision": "fp32", **how}
                some: Flags = {"n_samples": n * part // ROUNDS, "batch_size": min(250, n // ROUNDS), "seed": seed}
                self.run("sampler", **sampling, **some, output_folder=folders[label])
        if scored:
            for folder in folders.values():
                scoring: Flags = {**self.images.scoring, "cache_dir": self.work / "cache"}
                self.run("fid", samples_path=folder, **self.networks.data, **scoring)
        return folders

    def timed(self, seed: int, setting: Setting, hows: Mapping[str, Flags], n: int) -> dict[str, list[float]]:
        """Seconds per image of sampling a batch, of each label in each round, from its file if there is one."""
        path = writable_folder(self.work / "seconds") / f"{slug(setting.name)}_{seed}.json"
        if not path.exists():
            print(f"\ntimes for {setting.name}, seed {seed}", flush=True)
            count = min(self.fewer(TIMED_BATCH, setting, least=1), n)
            tasks = {label: self.sampling_task(seed, setting, how, count) for label, how in hows.items()}
            found = in_turns(tasks, TIMED_ROUNDS, self.device, quiet=True)
            write_json(path, {label: [of / count for of in seconds] for label, seconds in found.items()})
        seconds: dict[str, list[float]] = read_json(path)
        return seconds

    def sampling_task(self, seed: int, setting: Setting, how: Flags, count: int) -> Callable[[], object]:
        """A function that samples a batch as sampler.py does, without its files."""
        own = {"solver": setting.solver, "steps": setting.steps, **how}
        of_solver = SolverSettings(solver=own.pop("solver"), steps=own.pop("steps"))
        settings = SamplerSettings(output_folder=self.work, solver=of_solver, **own)
        plan = plan_of(settings)
        networks = load_together(plan.files, {}, device=self.device, process_of=process_of)
        configs = [network.config for network in networks]
        solver, timesteps = solver_of(of_solver, configs, plan.forecasts_noise)
        stages = make_stages(plan, networks, solver, timesteps, torch.float32, self.device)
        shape = configs[-1].model_params.image_shape
        return lambda: sample(stages, solver, noise_of(seed, range(count), self.device), shape)

    def fewer(self, n: int, setting: Setting, least: int) -> int:
        """So many images or paths that they take no longer in more steps."""
        steps = self.images.sampling_steps
        return max(least, n * steps // max(setting.steps, steps))

    def stage_file(self, seed: int, setting: Setting, label: str, described: Sequence[Any]) -> Path:
        path = writable_folder(self.work / "stages") / f"{slug(setting.name)}_{slug(label)}_{seed}.yaml"
        files = [(file, None) for file in self.files(seed, setting)]
        entries = entries_of(stages_described(described, self.work), files, described[0]["t_max"])
        write_stages(path, StageFile(stages=entries))
        return path


def at_speed(name: str, speed_up: float) -> str:
    return f"{name}, {speed_up:g}x"


def dimensions_of(measurement: PlanMeasurement) -> int:
    return math.prod(measurement.shape)


def unit_of(measurement: PlanMeasurement) -> str:
    return "nats" if measurement.random else "squared shift"


def measurement_of(measurement: PlanMeasurement, stages: Stages) -> float:
    """The divergence of a plan as a whole, per image."""
    return dimensions_of(measurement) * measurement.measured(stages).divergence


@torch.inference_mode()
def coherence_of(measurement: PlanMeasurement, stages: Stages) -> float:
    """Whether the errors of a plan's steps point the same way: |sum of z|^2 / sum of |z|^2, means over paths.

    z: by how many standard deviations of its noise the error moves a step; its nats are |z|^2 / 2. The result is 1 for
    errors that have nothing to do with each other, more where they add up, less where they make up for each other.
    """
    ground = measurement.ground
    denoisers = denoisers_of(stages, measurement.networks, measurement.running, ground)
    scale = np.sqrt(2 * measurement.weights).tolist()
    scale[-1] = 0.0  # no noise
    totals: list[Tensor] = []  # of each batch of paths
    squares = 0.0
    for at in measurement.walk(other_images(measurement.settings, ground), "checking a plan"):
        output = denoisers[at.step](at.x_t, at.t, at.y)
        z = scale[at.step] * (ground.solver.eps(output, at.x_t, at.t) - ground.solver.eps(at.output, at.x_t, at.t))
        if at.step == 0:
            totals.append(torch.zeros_like(z))
        totals[-1] += z
        squares += float(z.square().sum())
    return float(torch.cat(totals).square().sum()) / squares


def predicted_of(prices: Prices, stages: Stages) -> tuple[float, float]:
    """The speed-up and the divergence per dimension of any plan, the sums over its steps.

    A last step without noise, whose divergence is infinite or 0, is left out. Raises InputError for a way without a
    price.
    """
    of, states = prices.states, []
    own = split_timesteps(prices.timesteps, [stage.t_min for stage in stages])
    for stage, visited in zip(stages, own, strict=True):
        wanted = stage.network, stage.saving, stage.cheap
        able = [n for n, way in enumerate(prices.ways) if (way.network, way.saving, way.cheap) == wanted]
        if not able:
            raise InputError(f"a plan has a stage that saves no time here: {stage}")
        state = of.starts[able[0]]
        for _ in visited:
            states.append(state)
            state = of.following[state]
    divergence = prices.divergence[of.row[states], np.arange(len(states))]  # (S, N)
    seconds = of.total(of.seconds, np.array(states))
    return prices.seconds_full / seconds, float(np.nan_to_num(divergence).sum(axis=0).mean())


def pairs_of(full: Path, other: Path) -> dict[str, float]:
    """How far samples are from the full network's of the same noise: mean PSNR, and mean squared distance of x0."""
    ratios, squares = [], []
    for one, two in zip(FinishedImages(full).batches(250), FinishedImages(other).batches(250), strict=True):
        ratios += psnr(two, one).tolist()
        squares += ((one.double() - two.double()) / 127.5).square().flatten(1).sum(dim=1).tolist()
    return {"psnr": statistics.mean(ratios), "distance": statistics.mean(squares)}
