"""Measure how features rank images that are broken more and more, and write docs/features.md.

Half of the images of a set stays as it is. The other half is broken in four ways, each in growing strength, and its
distance to the first half is measured in several kinds of features. A score that can be trusted grows with the
strength. npm fetches the colour images.
"""

from __future__ import annotations

if __name__ == "__main__":
    from common.startup import end_in_one_line

    end_in_one_line()  # on a signal during the imports below

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from common.cli import Parser
from common.devices import pick_device
from common.errors import command
from common.files import replacing, writable_folder
from common.settings import Checked, option
from data import open_dataset
from evaluation.features import extract_all, load_extractor
from evaluation.images import evenly_spaced
from evaluation.settings import EFFICIENTNET
from evaluation.statistics import frechet_distance, sums_of
from experiments.kid import kid
from experiments.sets import FLUENT, GOOGLE, all_or_none, fetched_emoji, npm_archive, unpack

BATCH = 100  # images per call of a feature extractor
WORK = Path("results")  # what npm fetches
CLASSIFIERS = {name: f"experiments/{name}_classifier.pt" for name in ("digits", "emoji")}


@dataclass(frozen=True)
class Corruption:
    """One way to break images: `apply` takes uint8 (N, C, H, W), a strength and a generator, and returns the same."""

    name: str
    strengths: tuple[float, ...]
    apply: Callable[[Tensor, float, torch.Generator], Tensor]
    colour_alone: bool = False


def blurred(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """By a Gaussian whose standard deviation is this share of the side."""
    std = share * images.shape[-1]
    blur: Tensor = gaussian_blur(images, [2 * math.ceil(3 * std) + 1] * 2, [std, std])
    return blur


def noisy(images: Tensor, levels: float, generator: torch.Generator) -> Tensor:
    """Normal noise of this standard deviation, of 255 levels."""
    noise = torch.randn(images.shape, generator=generator)
    return (images + levels * noise).clamp(0, 255).round().to(torch.uint8)


def swapped(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """This share of the images has green in place of blue, red in place of green, blue in place of red."""
    chosen = torch.randperm(len(images), generator=generator)[: round(share * len(images))]
    images = images.clone()
    images[chosen] = images[chosen].roll(1, dims=1)
    return images


def patched(images: Tensor, count: float, generator: torch.Generator) -> Tensor:
    """So many squares of an eighth of the side in each image, of a colour whose channels are 0 or 255.

    The first squares are those of a smaller count. They are what early exit at a bad threshold makes.
    """
    (n, channels, height, width), side = images.shape, max(2, images.shape[-1] // 8)
    images = images.clone()
    for _ in range(round(count)):
        colours = 255 * torch.randint(2, (n, channels, 1, 1), dtype=torch.uint8, generator=generator)
        tops, lefts = (torch.randint(end - side + 1, (n,), generator=generator) for end in (height, width))
        for image, colour, top, left in zip(images, colours, tops, lefts, strict=True):
            image[:, top : top + side, left : left + side] = colour
    return images


BLUR = Corruption("blur, % of the side", (0.05, 0.07, 0.1, 0.13), blurred)
NOISE = Corruption("noise, levels", (5, 15, 30, 60), noisy)
SWAPPED = Corruption("swapped colours, % of images", (0.125, 0.25, 0.5, 1), swapped, colour_alone=True)
PATCHES = Corruption("broken patches an image", (1, 2, 4, 8), patched)
CORRUPTIONS = (BLUR, NOISE, SWAPPED, PATCHES)


@dataclass(frozen=True)
class RealImages:
    about: str
    dataset: str
    side: int
    in_chans: int
    extractors: tuple[str, ...]


SETS = {
    "digits": RealImages("the project's digits", "digits", 8, 1, (EFFICIENTNET, CLASSIFIERS["digits"])),
    "garments": RealImages("Fashion-MNIST", "fashion_mnist", 28, 1, (EFFICIENTNET,)),
    "emoji": RealImages(f"emoji of 64 x 64 ({GOOGLE.package})", "folder", 16, 3, (EFFICIENTNET, CLASSIFIERS["emoji"])),
    "shaded": RealImages(f"shaded emoji ({FLUENT.package}) on white", "folder", 32, 3, (EFFICIENTNET,)),
}


@dataclass(frozen=True, kw_only=True)
class FeatureSettings(Checked):
    """Settings of features.py."""

    sets: tuple[str, ...] = option(tuple(SETS), "sets of images to measure on", choices=tuple(SETS))
    data_path: Path | None = option(None, "path of Fashion-MNIST (default: datasets/)", exists="path")
    n_images: int = option(400, "images in each half of a set, at most", least=4, most=100_000)
    output: Path = option(Path("docs/features.md"), "page to write")


def parse_settings(argv: Sequence[str] | FeatureSettings | None) -> FeatureSettings:
    parser = Parser(prog="features.py", description=__doc__.partition("\n")[0])
    return parser.settings(FeatureSettings, argv, network=False)


@command
def main(argv: Sequence[str] | FeatureSettings | None = None) -> None:
    settings = parse_settings(argv)
    writable_folder(settings.output.parent)
    parts = []
    for name in settings.sets:
        images, side = images_of(name, settings.data_path), SETS[name].side
        chosen = evenly_spaced(len(images), min(len(images), 2 * settings.n_images))
        rows = measure(images[chosen], SETS[name].extractors)
        about = f"{SETS[name].about}, {side} x {side}, {len(chosen) // 2} against {len(chosen) // 2} images"
        parts.append(f"## {name.capitalize()}\n\n{about[0].upper()}{about[1:]}.\n\n{as_table(rows)}")
        print(f"{name}: {verdict(rows)}")
    with replacing(settings.output) as temporary:
        temporary.write_text("\n\n".join([PAGE, *parts]) + "\n", encoding="utf-8")
    print(f"-> {settings.output}")


def images_of(name: str, data_path: Path | None) -> Tensor:
    """All images of a set, uint8 (N, C, H, W)."""
    real = SETS[name]
    fetch = {"emoji": lambda folder: fetched_emoji(folder, GOOGLE), "shaded": fetched_shaded}
    path = fetch[name](WORK) if name in fetch else data_path if name == "garments" else None
    dataset = open_dataset(real.dataset, path, img_size=real.side, in_chans=real.in_chans)
    return dataset.__getitems__(range(len(dataset)))[0]


def fetched_shaded(folder: Path) -> Path:
    """The shaded emoji as files, fetched by npm if they are not there. Raises InputError if it cannot."""
    images = writable_folder(folder) / "shaded_emoji"
    if images.is_dir():
        return images
    archive = npm_archive(FLUENT.package, FLUENT.sha256, folder)
    with all_or_none(images) as partial:
        unpack(archive, partial, lambda path: path.name if path.suffix == ".webp" else None)
    archive.unlink()
    return images


@dataclass(frozen=True)
class Row:
    """The scores of images that are broken in one way: (Fréchet distance, KID) by the name of the features."""

    corruption: str  # "" for images that are whole
    strength: float
    scores: Mapping[str, tuple[float, float]]


def measure(images: Tensor, extractors: Sequence[str]) -> list[Row]:
    """images: uint8 (N, C, H, W); those of odd numbers are broken, the others are what they are held against."""
    loaded = {name: load_extractor(name, None, pick_device("auto")) for name in extractors}

    def features(pixels: Tensor, name: str) -> Tensor:
        found, _ = extract_all(loaded[name], pixels.split(BATCH))
        assert found is not None, "this is the only process"
        return found

    n = len(images) // 2
    whole, to_break = images[0 : 2 * n : 2], images[1 : 2 * n : 2]
    real = {name: features(whole, name) for name in extractors}
    return [
        Row(corruption, strength, {name: distances(features(pixels, name), real[name]) for name in extractors})
        for corruption, strength, pixels in broken(to_break)
    ]


def broken(images: Tensor) -> Iterator[tuple[str, float, Tensor]]:
    """The images as they are, then broken in all ways: name, strength and uint8 (N, C, H, W)."""
    yield "", 0, images
    for corruption in CORRUPTIONS:
        for strength in corruption.strengths if images.shape[1] == 3 or not corruption.colour_alone else ():
            yield corruption.name, strength, corruption.apply(images, strength, torch.Generator().manual_seed(0))


def distances(features: Tensor, real: Tensor) -> tuple[float, float]:
    """Fréchet distance, and KID of all images at once. features: (N, D). real: (M, D)."""
    fitted = [sums_of(each.split(BATCH)).finish() for each in (features, real)]
    return frechet_distance(*fitted), kid(features.double(), real.double())


def falls(rows: Sequence[Row]) -> list[str]:
    """Where a score is no larger than at the strength before it; images that are whole come before the first."""
    found = []
    for before, row in pairwise(rows):
        previous = before if before.corruption == row.corruption else rows[0]
        for name, scores in row.scores.items():
            for score, new, old in zip(("Fréchet distance", "KID"), scores, previous.scores[name], strict=True):
                if new <= old:
                    found.append(f"{score} in {Path(name).stem} at {shown(row)}")
    return found


def verdict(rows: Sequence[Row]) -> str:
    found = falls(rows)
    return f"not monotone: {'; '.join(found)}" if found else "all scores grow with the strength of all corruptions"


def as_table(rows: Sequence[Row]) -> str:
    names = list(rows[0].scores)
    head = ["", *(f"{Path(name).stem}: {score}" for name in names for score in ("Fréchet distance", "KID x 1000"))]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        values = [value for name in names for value in (row.scores[name][0], 1000 * row.scores[name][1])]
        lines.append([shown(row), *(f"{value:.4g}" for value in values)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    said = verdict(rows)
    return f"{table}\n\n**{said[0].upper()}{said[1:]}.**"


def shown(row: Row) -> str:
    """The corruption and its strength."""
    if not row.corruption:
        return "whole"
    return f"{row.corruption}: {100 * row.strength if '%' in row.corruption else row.strength:g}"


PAGE = """# What features see

With this page you choose the features of a score by the damage that they detect. Real images are damaged in four ways,
each stronger from row to row, and compared with other real images of the same set. In features that can be trusted the
distance grows from row to row.

In short: use KID in `efficientnet-lite0` for small images, or for fewer than some thousands; use Inception, the default
of `fid.py`, for scores that are compared with published ones. The small classifiers miss weak noise.

`python -m experiments.features` measures this page again (`--data_path` for Fashion-MNIST; npm downloads the emoji;
`pip install -r requirements-eval.txt`). `efficientnet-lite0` stands for `--feature_extractor efficientnet-lite0`:
EfficientNet-Lite0 with weights of ImageNet, the means of its last feature map over images resized to 96 x 96 (bicubic,
antialiased; grey as three equal channels). The others are the small classifiers in experiments/.

- Blur: the standard deviation of the Gaussian. A person still recognises most images at the strongest blur here. Far
  beyond it, at 20 % of the side, KID of the shaded emoji no longer grows (2040 at 13 %, 2013 at 20 %).
- Noise: its standard deviation, of 255 levels.
- Swapped colours: images whose channels are exchanged in a circle.
- Broken patches: squares of an eighth of the side (two pixels at least) of a colour whose channels are 0 or 255. Early
  exit leaves such patches at a bad threshold.
- KID is unbiased, so for undamaged images it is near 0 on the scale of its column, and may be negative. The Fréchet
  distance of so few images is far above 0 even then: with fewer images than features its covariances are singular."""


if __name__ == "__main__":
    main()
