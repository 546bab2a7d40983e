"""Pages of measurements: programs write the measured parts, people write all else."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from common.files import replacing

PAGE_WIDTHS = (1200, 1000, 800, 600)  # pixels of a picture
MOST_BYTES = 300_000  # of a picture
QUICK = "**Made with `--quick`: it shows that everything works; the numbers are worth nothing.**"


def about_machine(machine: Mapping[str, Any]) -> str:
    """A machine, of benchmarking.measure, in words."""
    return ", ".join(f"{key} {value}" for key, value in machine.items() if isinstance(value, str | int))


def begun(path: Path, title: str, quick: bool) -> str:
    """The page as it is, or a new one. quick: a new one says that its numbers are worth nothing."""
    return path.read_text("utf-8") if path.exists() else "\n\n".join([f"# {title}", *[QUICK] * quick])


def save_page(path: Path, page: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def copy_for_page(picture: Path, path: Path) -> None:
    """Copy a picture with 256 colours, as wide as MOST_BYTES allow, because every clone of the project loads it."""
    with Image.open(picture) as image:
        image = image.convert("RGB")
    for width in PAGE_WIDTHS:
        size = min(width, image.width), round(image.height * min(1, width / image.width))
        file = io.BytesIO()
        image.resize(size, Image.Resampling.LANCZOS).quantize(256).save(file, "PNG", optimize=True)
        if len(file.getvalue()) <= MOST_BYTES:
            break
    with replacing(path) as temporary:
        temporary.write_bytes(file.getvalue())


def filled(page: str, name: str, text: str) -> str:
    """The page with the measured part of that name replaced, or added at its end; all else stays as it is."""
    part = f"<!-- measured: {name} -->\n{text}\n<!-- end -->"
    pattern = re.compile(rf"<!-- measured: {re.escape(name)} -->.*?<!-- end -->", re.DOTALL)
    return pattern.sub(lambda _: part, page) if pattern.search(page) else f"{page.rstrip()}\n\n{part}\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def percent(share: float, sign: str = "") -> str:
    return f"{100 * share:{sign}.1f} %"


def bold(text: str, is_bold: bool) -> str:
    return f"**{text}**" if is_bold else text
