"""Progress bars: the task of a script, its progress, images per second, and the remaining time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from torch import Tensor


class Progress(tqdm):  # type: ignore[misc]  # it ships no types
    """A bar on standard error; none if standard error is not a terminal, or for `quiet`.

    what: what the script does, such as "sampling". images: of one unit of the bar, for the rate; None for a bar that
    counts no images, which has no rate. The bar may count parts of an image.
    """

    def __init__(
        self,
        what: str,
        total: float,
        unit: str = "images",
        *,
        images: float | None = 1,
        initial: int = 0,
        quiet: bool = False,
    ):
        self.images = images
        shown = "{desc}: {percentage:3.0f}%|{bar}| {n:,.0f} of {total:,.0f} {unit} "
        shown += "[{elapsed}<{remaining}{speed}]{postfix}"
        super().__init__(
            desc=what, total=total, unit=unit, initial=initial, bar_format=shown, disable=True if quiet else None
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().format_dict
        done = values["n"] - values["initial"]
        rate = values["rate"] or (done / values["elapsed"] if values["elapsed"] else 0)
        speed = f", {images_per_second(rate * self.images)}" if self.images and rate else ""
        whole = min(values["n"], values["total"])  # parts of images may add up to a little more
        return values | {"n": whole, "speed": speed}


def images_per_second(rate: float) -> str:
    """ "1,310 images/s", "4.2 images/s"; below one "3.5 s/image"."""
    if rate < 1:
        return f"{1 / rate:.3g} s/image"
    return f"{rate:,.0f} images/s" if rate >= 10 else f"{rate:.1f} images/s"


def counted(batches: Iterable[Tensor], what: str, total: int, quiet: bool) -> Iterator[Tensor]:
    """The batches (B, ...) under a bar that counts their images."""
    with Progress(what, total, quiet=quiet) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def duration(seconds: float) -> str:
    """A time in human units: "0.8 s", "42 s", "3 min 20 s", "5 h 7 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
