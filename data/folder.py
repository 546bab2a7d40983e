"""Any folder of images: nested, of mixed formats and sizes."""

from __future__ import annotations

from pathlib import Path

from common.errors import InputError
from common.image_files import BrokenImage, in_chans_of
from data.dataset import check_labels, say_left_out
from data.files import SUFFIXES, FolderSource, ImageFiles


class ImageFolder(ImageFiles):
    """The images below a folder.

    With num_classes > 0 the first level of sub-folders, in sorted order, gives labels 0..K-1.
    """

    def __init__(self, data_path: Path | None, *, img_size: int, in_chans: int, num_classes: int, crop: str):
        if data_path is None:
            raise InputError("--dataset folder needs --data_path, the folder of images")
        if not data_path.is_dir():
            raise InputError(f"--data_path {data_path}: no such folder")
        source = FolderSource(data_path)
        self.left_out = {name: why for name in source.names if (why := self._unreadable(data_path / name))}
        say_left_out(self.left_out, data_path)
        names = [name for name in source.names if name not in self.left_out]
        if not names:
            raise InputError(f"--data_path {data_path}: no readable images ({', '.join(sorted(SUFFIXES))})")
        self.classes, labels = [], None
        if num_classes > 0:
            if loose := [name for name in names if "/" not in name]:
                raise InputError(
                    f"--data_path {data_path}: {loose[0]} is not in a sub-folder, so it has no class; "
                    "give every class a folder, or train without classes (--num_classes -1)"
                )
            self.classes = sorted({name.split("/")[0] for name in names})
            folders = {path.name for path in data_path.iterdir() if path.is_dir() and not path.name.startswith(".")}
            if empty := sorted(folders - set(self.classes) - {"packed"}):
                raise InputError(f"--data_path {data_path}: {empty[0]}/ has no readable images; fill or remove it")
            number = {name: k for k, name in enumerate(self.classes)}
            labels = [number[name.split("/")[0]] for name in names]
            check_labels(len(self.classes) - 1, num_classes, data_path)
        super().__init__("folder", source, names, labels, crop=crop, img_size=img_size, in_chans=in_chans)

    @staticmethod
    def _unreadable(path: Path) -> str | None:
        """The reason why the header is not that of an image, or None; the pixels are decoded later."""
        try:
            in_chans_of(path)
        except (BrokenImage, OSError) as error:
            return str(error)
        return None
