"""ImageNet (ILSVRC 2012) as a folder per class, for all sizes."""

from __future__ import annotations

import difflib
import logging
import re
from pathlib import Path

from common.errors import InputError
from data import DEFAULT_PATH, missing
from data.dataset import check_labels
from data.files import SUFFIXES, FolderSource, ImageFiles

log = logging.getLogger(__name__)

IMAGENET_CLASSES = 1000
SYNSETS = Path(__file__).with_name("imagenet_synsets.txt")  # the 1000 WordNet ids, sorted: line k has label k
WORDNET_ID = re.compile(r"n\d{8}")
PLACES = ("ILSVRC2012_img_train", "ILSVRC/Data/CLS-LOC/train", "train", ".")  # possible parents of the class folders


class ImageNet(ImageFiles):
    """Training images of ImageNet, labelled by their folders.

    The label of a folder with a WordNet id is its position 0..999 in the sorted list of all 1000 ids, even if some
    folders are missing. Folders with other names have labels 0..K-1 in sorted order.
    """

    def __init__(self, dataset: str, folder: Path, *, img_size: int, in_chans: int, num_classes: int, crop: str):
        source = FolderSource(folder)
        names = [name for name in source.names if "/" in name]
        if len(names) < len(source.names):
            log.warning("%s: left out %d images outside the class folders", folder, len(source.names) - len(names))
        classes = [name.split("/")[0] for name in names]
        folders = class_folders(folder)
        if empty := sorted(set(folders).difference(classes)):
            raise InputError(f"{folder / empty[0]}: a class folder without images; fill it or remove it")
        label_of = labels_of(folders)
        check_labels(max(label_of.values()), num_classes, folder)
        labels = [label_of[name] for name in classes]
        super().__init__(dataset, source, names, labels, crop=crop, img_size=img_size, in_chans=in_chans)


def find_classes(dataset: str, root: Path) -> Path:
    """The folder whose sub-folders are the classes. Raises InputError if there is none under root."""
    named = [root / name / place for name in (dataset, "imagenet") for place in PLACES]
    here = [root / place for place in PLACES]
    for folder in (*named, *here):
        if any(WORDNET_ID.fullmatch(name) for name in class_folders(folder)):
            return folder
    # Folders with other names may be anything, so do not search for them in the default folder of all datasets.
    for folder in named if root == DEFAULT_PATH else (*named, *here):
        if any(file.suffix.lower() in SUFFIXES for name in class_folders(folder) for file in (folder / name).iterdir()):
            return folder
    raise missing(dataset, root)


def class_folders(folder: Path) -> list[str]:
    """Names of the sub-folders, without `packed`, which contains packed datasets."""
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != "." and p.name != "packed")


def label_of_name(name: str) -> int:
    """The label 0..999 of an English name, in any capitals. Raises InputError, with similar names, for others."""
    from torchvision.models import ResNet50_Weights  # reads the names of the classes; nothing is downloaded

    def plain(text: str) -> str:
        return " ".join(text.replace("_", " ").lower().split())

    known = {plain(each): n for n, each in enumerate(ResNet50_Weights.IMAGENET1K_V2.meta["categories"])}
    wanted = plain(name)
    if wanted in known:
        return known[wanted]
    containing = [each for each in known if wanted in each]
    nearest = dict.fromkeys([*difflib.get_close_matches(wanted, known, n=3), *containing[:3]])
    raise InputError(
        f"--class_name {name!r:.60}: no class of ImageNet"
        + (f"; did you mean {', '.join(nearest)}?" if nearest else ", nor similar to one")
    )


def labels_of(folders: list[str]) -> dict[str, int]:
    known = {synset: label for label, synset in enumerate(SYNSETS.read_text(encoding="ascii").split())}
    if known.keys() >= set(folders):
        return {name: known[name] for name in folders}
    if some := [name for name in folders if name in known]:
        other = next(name for name in folders if name not in known)
        log.warning(
            "%s is no WordNet id of ImageNet, %s is: labels are 0..%d in sorted order", other, some[0], len(folders) - 1
        )
    return {name: label for label, name in enumerate(sorted(folders))}
