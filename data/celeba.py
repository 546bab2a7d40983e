"""CelebA (Liu et al. 2015), aligned and cropped, from the distributed archive or its folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from common.errors import InputError
from data import DEFAULT_PATH, missing
from data.files import FolderSource, ImageFiles, Source, ZipSource

SPLIT_FILE = "list_eval_partition.txt"
LAST_TRAINING_IMAGE = 162_770  # the official split is by number: 1..162770 train, then validation and test


class CelebA(ImageFiles):
    """The training images of CelebA, without labels.

    data_path is the images or the folder that contains img_align_celeba.zip or img_align_celeba/, itself or in celeba/.
    list_eval_partition.txt in the same folder lists the training images; without it their numbers give the same split.
    """

    def __init__(self, data_path: Path | None, *, img_size: int, in_chans: int, num_classes: int, crop: str):
        if num_classes > 0:
            raise InputError(f"num_classes={num_classes}: CelebA has no classes; give -1")
        source = self._find(data_path or DEFAULT_PATH)
        names = self._training(source)
        super().__init__("celeba", source, names, None, crop=crop, img_size=img_size, in_chans=in_chans)

    @staticmethod
    def _find(root: Path) -> Source:
        for base in (root, root / "celeba"):
            if (base / "img_align_celeba").is_dir():
                return FolderSource(base / "img_align_celeba")
            if (base / "img_align_celeba.zip").is_file():
                return ZipSource(base / "img_align_celeba.zip")
        if root.is_file():
            return ZipSource(root)
        if any(root.glob("*.jpg")):
            return FolderSource(root)
        raise missing("celeba", root)

    @staticmethod
    def _training(source: Source) -> list[str]:
        split = source.path.parent / SPLIT_FILE
        if split.is_file():
            pairs = [line.split() for line in split.read_text(encoding="utf-8", errors="replace").splitlines()]
            if not all(len(pair) == 2 for pair in pairs if pair):
                raise InputError(f"{split}: wanted lines of a file name and 0, 1 or 2")
            training = {pair[0] for pair in pairs if pair and pair[1] == "0"}
            names = [name for name in source.names if PurePosixPath(name).name in training]
        else:
            number = {name: PurePosixPath(name).stem for name in source.names}
            names = [n for n in source.names if number[n].isdecimal() and int(number[n]) <= LAST_TRAINING_IMAGE]
        if not names:
            raise InputError(f"{source.path}: it contains no training images of CelebA (000001.jpg, ...)")
        return names
