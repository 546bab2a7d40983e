"""Measure DuoDiff and what one would do instead, on digits and on small colour images, and write docs/results.md.

It calls the project's scripts and prints each call as a command. A run that was stopped goes on where it was when it
is given again; what it makes lies in results/, which may be removed to begin anew.
"""

from __future__ import annotations

import importlib
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import Parser
from common.errors import InputError, command
from common.files import read_json, sha256_of, writable_folder, write_json
from common.options import MOST_SEED
from common.settings import Checked, option

SEEDS = (0, 1, 2)  # of all networks, and of the samples that are made with them
SOLVER = "ddpm"
GRID = (999, 900, 800, 700, 600, 500, 400, 300, 200, 100)
THRESHOLDS = (0.1, 0.2)  # of early exit
INTERVALS = (2, 3)  # of caching
SPEEDUP = 1.5  # that one of the rules for the switch asks for
KNEE, KNEEDLE, LEAST_EXCESS, NO_EXCESS = "knee", "farthest from the chord", "least excess", "fastest without excess"
AT_SPEEDUP = f"speed-up {SPEEDUP:g}"
TIMED_ROUNDS = 5
# How the shallow network learns, beside --t_min of its own range: which help of the full one it has.
VARIANTS = {
    "all timesteps": (),
    "own range": (),
    "warm start": ("--init_from",),
    "distilled": ("--distill_from",),
    "all three": ("--init_from", "--distill_from"),
}
ON_OWN_RANGE = ("own range", "all three")

EMOJI = "emoji-datasource-google@15.1.2"
EMOJI_SHA256 = "d44462c604b8b8ddeea1bded87031fe73beadd92b9569d977dbd6224e45dc850"
EMOJI_IMAGES, EMOJI_NAMES = "package/img/google/64/", "package/emoji.json"
NO_CATEGORY = "Component"  # of emoji.json: parts of others


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """What is done on one set of images."""

    name: str
    folder: str  # in results/
    about: str
    img_size: int
    in_chans: int
    configs: tuple[str, str, str]  # the full network's, the shallow one's and that of early exit
    extractor: Path  # of the features that samples are scored in
    classifier_steps: int = 0  # that it is trained for; 0: it is there
    data: tuple[str, ...]  # flags
    training_batch: int = 128
    full_steps: int
    shallow_steps: int  # on all timesteps; other kinds of training have the same time
    exit_steps: int
    n_samples: int
    sampling_steps: int = 50
    timed_steps: int = 60  # of a training that is timed
    n_calibration: int = 256

    def quick(self) -> ImageSet:
        """The same with little of everything: to see it work, not to believe the numbers."""
        few: dict[str, Any] = {"n_samples": 40, "sampling_steps": 10, "timed_steps": 6, "n_calibration": 16}
        for name in ("full_steps", "shallow_steps", "exit_steps", "classifier_steps"):
            few[name] = -(-getattr(self, name) // 50)
        return replace(self, **few)


class Runner:
    """Calls scripts, each with the same arguments once: commands.json has the seconds of each, none while it runs."""

    def __init__(self, folder: Path):
        self.path = folder / "commands.json"
        self.seconds: dict[str, float | None] = read_json(self.path) if self.path.exists() else {}
        self.asked: dict[str, None] = {}  # in this run, done before or not

    def __call__(self, module: str, *argv: object, going_on: Callable[[], Sequence[object]] | None = None) -> None:
        """going_on: gives the arguments in place of argv where the same call was cut off; none if nothing is left."""
        line = line_of(module, argv)
        self.asked[line] = None
        if self.seconds.get(line) is not None:
            return
        words = [str(word) for word in (going_on() if going_on and line in self.seconds else argv)]
        self._note(line, None)
        print(f"\n$ {line_of(module, words)}" if words else f"done before: {line}", flush=True)
        started = time.perf_counter()
        if words:
            own, sys.argv = sys.argv, [f"{module}.py", *words]  # what scripts call themselves when they are stopped
            try:
                importlib.import_module(module).main(words)
            finally:
                sys.argv = own
        self._note(line, time.perf_counter() - started)

    def began(self, module: str, *argv: object) -> bool:
        """Whether the same call was made before, to its end or not."""
        return line_of(module, argv) in self.seconds

    def _note(self, line: str, seconds: float | None) -> None:
        self.seconds[line] = seconds
        write_json(self.path, self.seconds)

    @property
    def seconds_in_all(self) -> float:
        """Of what this run asked for."""
        return sum(self.seconds[line] or 0 for line in self.asked)


def line_of(module: str, argv: Sequence[object]) -> str:
    """The call as one would type it."""
    script = f"-m {module}" if "." in module else f"{module}.py"
    return f"python {script} {shlex.join(map(str, argv))}"


@dataclass(frozen=True, kw_only=True)
class ResultsSettings(Checked):
    """Settings of results.py."""

    folder: Path | None = option(
        None,
        "colour images, a sub-folder for each of their classes (default: emoji, which npm fetches)",
        positional=True,
        metavar="FOLDER",
    )
    sets: tuple[str, ...] = option(("digits", "colour"), "the sets to measure on", choices=("digits", "colour"))
    seeds: tuple[int, ...] = option(SEEDS, "of networks and samples, two or more", least=0, most=MOST_SEED)
    quick: bool = option(
        False, "little of everything, to see that it works; all of it, the document too, goes to results/quick"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folder and "colour" not in self.sets:
            raise InputError(f"{self.folder}: colour images belong to --sets colour")
        if len(self.seeds) < 2 or len(set(self.seeds)) < len(self.seeds):
            raise InputError("--seeds: give two or more that differ, for there are intervals over them")


def parse_settings(argv: Sequence[str] | None) -> ResultsSettings:
    return Parser(description=__doc__.partition("\n")[0]).settings(ResultsSettings, argv, network=False)


@command
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(argv)
    work = writable_folder(Path("results/quick" if settings.quick else "results"))
    sets = []
    if "digits" in settings.sets:
        sets.append(digits())
    if "colour" in settings.sets:
        sets.append(colour(work, settings.folder or fetched_emoji(Path("results")), is_emoji=settings.folder is None))
    if settings.quick:
        sets = [images.quick() for images in sets]

    from benchmarking.measure import describe_machine
    from common.devices import pick_device
    from scripts.results_document import write_document

    run = Runner(work)
    measured = [Experiment(images, work / images.folder, run, settings.seeds).measure() for images in sets]
    document = (work if settings.quick else writable_folder(Path("docs"))) / "results.md"
    machine = describe_machine(pick_device("auto"))
    said = shlex.join(sys.argv[1:] if argv is None else map(str, argv))
    repeated = write_document(document, measured, machine, run.seconds_in_all, said, quick=settings.quick)
    print("\n".join(["", *repeated]))
    print(f"-> {document}; it took {run.seconds_in_all / 60:.1f} minutes in all")


def digits() -> ImageSet:
    return ImageSet(
        name="digits",
        folder="digits",
        about="the project's handwritten digits, 8 x 8 grey",
        img_size=8,
        in_chans=1,
        configs=("uvit_digits", "uvit_digits_1", "deediff_digits"),
        extractor=Path("scripts/digits_classifier.pt"),
        data=("--dataset", "digits"),
        full_steps=4000,
        shallow_steps=2000,
        exit_steps=1000,
        n_samples=1000,
    )


def colour(work: Path, folder: Path, is_emoji: bool) -> ImageSet:
    """Raises InputError where the folder has no classes of images."""
    classes_of(folder)
    name = "emoji" if is_emoji else "images"
    # Other images are not to be taken for these.
    own = name if is_emoji else f"{name}_{zlib.crc32(str(folder.resolve()).encode()):08x}"
    return ImageSet(
        name=name,
        folder=own,
        about=f"{f'emoji of 64 x 64 ({EMOJI})' if is_emoji else f'the images in {folder}'}, reduced to 16 x 16 colour",
        img_size=16,
        in_chans=3,
        configs=("uvit_emoji16", "uvit_emoji16_1", "deediff_emoji16"),
        extractor=Path("scripts/emoji_classifier.pt") if is_emoji else work / own / "classifier.pt",
        classifier_steps=0 if is_emoji else 600,
        data=("--dataset", "folder", "--data_path", str(folder)),
        training_batch=64,
        full_steps=4500,
        shallow_steps=1500,
        exit_steps=1000,
        n_samples=500,
    )


def classes_of(folder: Path) -> list[str]:
    """Its sub-folders. Raises InputError where there are not two with images, or images beside them."""
    from data.files import image_names

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    names = list(image_names(folder))
    classes = sorted({name.split("/")[0] for name in names if "/" in name})
    if len(classes) < 2 or any("/" not in name for name in names):
        raise InputError(
            f"{folder}: wanted a sub-folder of images for each class, two at least (their classifier is what scores)"
        )
    return classes


def fetched_emoji(folder: Path) -> Path:
    """The emoji in a folder for each category, fetched by npm if they are not there. Raises InputError if it cannot."""
    images = writable_folder(folder) / "emoji_64"
    if images.is_dir():
        return images
    archive = folder / "emoji-datasource-google-15.1.2.tgz"
    if not archive.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise InputError("npm, which fetches the emoji, is not there: install Node.js, or name a folder of images")
        argv = ["npm", "pack", EMOJI, "--pack-destination", str(folder)]
        print(f"$ {shlex.join(argv)}", flush=True)
        done = subprocess.run([npm, *argv[1:]], capture_output=True, text=True, check=False)
        if done.returncode or not archive.exists():
            said = [line for line in done.stderr.splitlines() if "error" in line.lower()] or ["it said nothing"]
            raise InputError(
                f"npm pack {EMOJI} failed ({said[0]:.200}); is there a network? Or name a folder of images"
            )
    if sha256_of(archive) != EMOJI_SHA256:
        raise InputError(f"{archive} is not the one that is expected (SHA-256 {EMOJI_SHA256[:8]}...): remove it")
    unpack_emoji(archive, images)
    archive.unlink()
    return images


def unpack_emoji(archive: Path, images: Path) -> None:
    """The images of 64 x 64, each into the folder of its category; there are all of them or none."""
    partial = images.with_name(images.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as tar:
        names = tar.extractfile(EMOJI_NAMES)
        assert names is not None, f"{EMOJI_NAMES} is a file"
        categories = categories_of(json.load(names))
        for member in tar:
            category = categories.get(member.name.removeprefix(EMOJI_IMAGES))
            if category and member.isfile() and member.name.startswith(EMOJI_IMAGES):
                target = partial / category / Path(member.name).name
                target.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                assert content is not None, f"{member.name} is a file"
                target.write_bytes(content.read())
    partial.rename(images)


def categories_of(emoji: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The category of each image, of skin tones too, as a name for a folder."""
    found = {}
    for entry in emoji:
        if entry["category"] != NO_CATEGORY:
            category = "_".join(entry["category"].lower().replace("&", " ").split())
            for image in (entry, *entry.get("skin_variations", {}).values()):
                found[image["image"]] = category
    return found


class Experiment:
    """All that is measured on one set of images."""

    def __init__(self, images: ImageSet, work: Path, run: Runner, seeds: Sequence[int]):
        self.images, self.work, self.run, self.seeds = images, writable_folder(work), run, seeds
        self.data = images.data
        # The same numbers everywhere: not every machine calculates in bf16.
        self.sampling = ("--solver", SOLVER, "--steps", images.sampling_steps, "--precision", "fp32")

    def measure(self) -> dict[str, Any]:
        """Everything, as plain values, which are also kept in results.json."""
        self.prepare()
        rates = self.step_rates()
        steps = {name: self.equal_time(name, rates) for name in VARIANTS}
        for seed in self.seeds:
            self.train_shallow("all timesteps", seed, steps["all timesteps"], t_min=0)
        calibrations = [self.calibrate(seed) for seed in self.seeds]
        options = averaged(calibrations)
        rules = chosen_by_rules(options)
        chosen = rules[KNEE]
        for seed in self.seeds:
            for name in VARIANTS:
                self.train_shallow(name, seed, steps[name], t_min=chosen["t_switch"] + 1)

        switches = {**grid_of(options), **{option["t_switch"]: option for option in rules.values()}}
        switches = dict(sorted(switches.items(), reverse=True))
        result = {
            "name": self.images.name,
            "about": self.images.about,
            "score": f"Fréchet distance in the features of {self.images.extractor}",
            "training": {"full": self.images.full_steps, "exits": self.images.exit_steps, "shallow": steps},
            "step_rates": rates,
            "sampling": {"solver": SOLVER, "steps": self.images.sampling_steps},
            "blocks": [network["blocks"] for network in calibrations[0]["networks"]],
            "t_switch": chosen["t_switch"],
            "rule": KNEE,
            "grid": sorted(grid_of(options), reverse=True),
            "switches": list(switches.values()),
            "rules": {name: option["t_switch"] for name, option in rules.items()},
            "knees": [knee_of(averaged([calibration]))["t_switch"] for calibration in calibrations],
        }
        # Seed by seed, so that a machine that is slower for a while is so for all of them.
        table, variants, grid = [], [], []
        for seed in self.seeds:
            table += self.methods(seed, chosen["t_switch"])
            variants += [(name, self.duo(chosen["t_switch"], seed, name)) for name in VARIANTS]
            grid += [(name_of_switch(s), self.duo(t, seed)) for t, s in switches.items()]
        result["table"] = self.compare("methods", table)
        # Not of full itself, nor in other steps, where another image comes of the same noise.
        others = [label for label in dict(table) if not label.startswith("full")]
        result["levels"] = {label: levels_from_full(table, label) for label in others}
        result["variants"] = self.compare("training", variants)
        result["scores"] = self.compare("switches", grid)
        write_json(self.work / "results.json", result)
        return result

    def prepare(self) -> None:
        """The images as the networks see them, what scores them, the full networks and their exits."""
        images = self.images
        if "--data_path" in images.data:
            shape = ("--img_size", images.img_size, "--in_chans", images.in_chans)
            classes = ("--num_classes", len(classes_of(Path(images.data[-1]))))
            packed = self.work / "packed"
            self.run("data.pack", *images.data, *shape, *classes, "--output", packed)
            self.data = (*images.data[:-1], str(packed))
            if images.classifier_steps:
                classifying = ("--n_steps", images.classifier_steps, "--output", images.extractor)
                self.run("scripts.train_classifier", *self.data, *shape, *classes, *classifying)
        full, _, exits = images.configs
        for seed in self.seeds:
            self.train("train", f"full_{seed}", full, images.full_steps, seed)
            heads = ("--model", "deediff_uvit", "--load_backbone", self.full(seed), "--freeze_backbone")
            self.train("main", f"exits_{seed}", exits, images.exit_steps, seed, *heads)

    def full(self, seed: int) -> Path:
        return self.checkpoint(f"full_{seed}")

    def shallow(self, variant: str, seed: int, t_min: int = 0) -> Path:
        return self.checkpoint(shallow_name(variant, seed, t_min))

    def checkpoint(self, name: str, model: str = "uvit") -> Path:
        return self.work / name / f"{self.images.data[1]}_{model}_last.pth"

    def train(
        self, script: str, name: str, config: str, n_steps: int, seed: int, *flags: object, log_every: int = 500
    ) -> None:
        """Go on where it was cut off. A training that was begun with others' weights goes on with its own."""
        from training.checkpoint import step_of

        argv = [*flags, "--config_path", f"configs/{config}.yaml", "--exp_name", name, "--n_steps", n_steps]
        argv += [*self.data, "--batch_size", self.images.training_batch]
        argv += ["--lr", 2e-3, "--beta1", 0.9, "--num_warmup_steps", 100]
        argv += ["--log_every_n_steps", log_every, "--save_every_n_steps", 500, "--preview_steps", 0]
        argv += ["--log_path", self.work, "--seed", seed]

        def going_on() -> Sequence[object]:
            for checkpoint in (self.work / name).glob("*_last.pth"):
                start = argv.index("--init_from") if "--init_from" in argv else len(argv)
                # Stopped between its last checkpoint and the note that it is done, it has nothing left to do.
                finished = step_of(checkpoint) == n_steps
                return [] if finished else [*argv[:start], *argv[start + 2 :], "--resume"]
            return argv

        if (self.work / name).exists() and not self.run.began(script, *argv):
            raise InputError(
                f"{self.work / name} was trained by another command than is given now; remove {self.run.path.parent}"
            )
        self.run(script, *argv, going_on=going_on)

    def train_shallow(self, variant: str, seed: int, n_steps: int, t_min: int) -> None:
        flags: list[object] = [word for flag in VARIANTS[variant] for word in (flag, self.full(seed))]
        if variant in ON_OWN_RANGE:
            flags += ["--t_min", t_min]
        name = shallow_name(variant, seed, t_min)
        self.train("main", name, self.images.configs[1], n_steps, seed, "--model", "uvit", *flags)

    def step_rates(self) -> dict[str, list[float]]:
        """Steps per second of plain training and of distillation, in turns: the other kinds cost as much as plain."""
        path = self.work / "step_rates.json"
        if path.exists():  # the same numbers of steps when a run goes on
            return dict(read_json(path))
        rates: dict[str, list[float]] = {"plain": [], "distilled": []}
        n, every, teacher = self.images.timed_steps, self.images.timed_steps // 3, self.full(self.seeds[0])
        for number in range(TIMED_ROUNDS):
            for kind, measured in rates.items():
                flags = ["--model", "uvit", *(("--distill_from", teacher) if kind == "distilled" else ())]
                name = f"timed_{kind}_{number}"
                self.train("main", name, self.images.configs[1], n, 0, *flags, log_every=every)
                lines = (self.work / name / "metrics.jsonl").read_text().splitlines()
                measured.append(statistics.mean(json.loads(line)["steps_per_second"] for line in lines[1:]))
        write_json(path, rates)
        return rates

    def equal_time(self, variant: str, rates: Mapping[str, Sequence[float]]) -> int:
        """Steps of a kind of training that take the time of shallow_steps plain ones."""
        taught = "--distill_from" in VARIANTS[variant]
        return steps_at_equal_time(self.images.shallow_steps, rates["plain"], rates["distilled" if taught else "plain"])

    def calibrate(self, seed: int) -> dict[str, Any]:
        """Of every switch what calibrate.py says."""
        output = self.work / f"calibration_{seed}.yaml"
        networks = (self.shallow("all timesteps", seed), self.full(seed))
        # The rules are applied to the mean over seeds afterwards.
        measuring = ("--n_images", self.images.n_calibration, "--output", output)
        self.run("calibrate", "--checkpoint_path", *networks, *self.data, *self.sampling, *measuring)
        return dict(read_json(output.with_suffix(".json")))

    def methods(self, seed: int, t_switch: int) -> list[tuple[str, Path]]:
        """Folders of scored samples by label, the full network first."""
        full, n = ("--checkpoint_path", self.full(seed)), self.images.sampling_steps
        runs = [("full", self.duo(GRID[0], seed)), ("DuoDiff", self.duo(t_switch, seed))]
        exits = ("--checkpoint_path", self.checkpoint(f"exits_{seed}", "deediff_uvit"))
        for threshold in THRESHOLDS:
            name = f"early exit {threshold:g}"
            runs.append((name, self.sampled(name, seed, *exits, "--threshold", threshold, script="eesampler")))
        for interval in INTERVALS:
            name = f"caching every {interval}"
            runs.append((name, self.sampled(name, seed, *full, "--cache_interval", interval)))
        both = self.duo(t_switch, seed, "all timesteps", "--cache_interval", INTERVALS[0])
        runs.append((f"DuoDiff + caching every {INTERVALS[0]}", both))
        for solver, steps in (("ddpm", n // 2), ("dpmsolver++", n // 2), ("dpmsolver++", n // 5)):
            name = f"full by {solver} in {steps} steps"
            runs.append((name, self.sampled(name, seed, *full, "--solver", solver, "--steps", steps)))
        alone = ("--checkpoint_path", self.shallow("all timesteps", seed))
        runs.append(("shallow alone", self.sampled("shallow alone", seed, *alone)))
        return runs

    def duo(self, t_switch: int, seed: int, variant: str = "all timesteps", *flags: object) -> Path:
        """Scored samples of a shallow network and the full one; of that alone where the switch is at the start."""
        if t_switch == GRID[0]:
            return self.sampled("full", seed, "--checkpoint_path", self.full(seed))
        shallow = self.shallow(variant, seed, t_switch + 1)
        networks = ("--checkpoint_path", shallow, "--checkpoint_path_late", self.full(seed))
        name = f"switch {t_switch} {variant} {' '.join(map(str, flags))}"
        return self.sampled(name, seed, *networks, "--t_switch", t_switch, *flags)

    def sampled(self, name: str, seed: int, *argv: object, script: str = "sampler") -> Path:
        name = "".join(c if c.isalnum() or c == "." else "_" for c in name.replace("--", "").strip())
        folder = self.work / "samples" / f"{name}_{seed}"
        # Of options given twice the last one counts: argv may name another solver.
        some = ("--n_samples", self.images.n_samples, "--batch_size", min(250, self.images.n_samples))
        self.run(script, *self.sampling, *argv, *some, "--seed", seed, "--output_folder", folder)
        scoring = ("--feature_extractor", self.images.extractor, "--cache_dir", self.work / "cache")
        self.run("fid", "--samples_path", folder, *self.data, *scoring)
        return folder

    def compare(self, name: str, runs: Sequence[tuple[str, Path]]) -> dict[str, Any]:
        """The numbers of compare.py, and its picture. Raises InputError where times are not to be compared."""
        picture = self.work / f"{name}_{'_'.join(map(str, self.seeds))}.png"
        labelled = [f"{label}={folder}" for label, folder in runs]
        self.run("compare", *labelled, "--output", picture, "--json", picture.with_suffix(".json"))
        compared = read_json(picture.with_suffix(".json"))
        if notes := compared.get("notes"):
            raise InputError(f"{'; '.join(notes)}. Remove {self.run.path.parent} and measure all on one machine")
        return {**compared, "picture": str(picture)}


def shallow_name(variant: str, seed: int, t_min: int) -> str:
    """Of a folder. t_min: where its own range begins, of those that have one."""
    own = f"_{t_min}" if variant in ON_OWN_RANGE else ""
    return f"shallow_{variant.replace(' ', '_')}{own}_{seed}"


def name_of_switch(option: Mapping[str, Any]) -> str:
    return "full" if option["steps_of_each"][0] == 0 else f"t_switch {option['t_switch']}"


def levels_from_full(runs: Sequence[tuple[str, Path]], label: str) -> float:
    """How far its samples are from those that the full network makes of the same noise: root mean square, of 255."""
    import torch

    from common.images import read_png

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

    rules = {
        KNEEDLE: max(options, key=from_chord),
        LEAST_EXCESS: min(options, key=lambda option: option["excess"]),
        NO_EXCESS: [option for option in options if option["excess"] <= 2 * option["excess_se"]][-1],
        AT_SPEEDUP: next((o for o in options if o["speed_up"] >= SPEEDUP), options[-1]),
    }
    return {KNEE: knee_of(options)} | rules


def knee_of(options: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What calibrate.py chooses if nothing else is said."""
    import numpy as np

    from calibration.choice import Option, knee

    names = ("speed_up", "divergence", "divergence_se", "excess", "excess_se")
    points = [Option(np.empty(0), **{name: option[name] for name in names}) for option in options]
    return dict(options[points.index(knee(points))])


if __name__ == "__main__":
    main()
