"""Text for the terminal: tables, and escapes for characters that it cannot show."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Sequence


def escaped(text: str, can_show: Callable[[str], bool]) -> str:
    """Replace characters that cannot be shown or printed by their code points: \\n, \\u6f22."""
    return "".join(c if c.isprintable() and can_show(c) else c.encode("unicode_escape").decode("ascii") for c in text)


def on_terminal(text: str) -> str:
    """A line in the encoding of standard output: ± becomes +-, other missing characters are escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"

    def can_show(character: str) -> bool:
        try:
            return bool(character.encode(encoding))
        except UnicodeEncodeError:
            return False

    return escaped(text if can_show("±") else text.replace("±", "+-"), can_show)


def columns_of(text: str) -> int:
    """The width of text on a terminal: Chinese letters take two columns, combining characters none."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def table(head: Sequence[str], rows: Sequence[Sequence[object]], left: int = 0) -> str:
    """A table with a header. The first `left` columns are left-aligned, the others right-aligned."""
    cells = [[on_terminal(str(cell)) for cell in row] for row in [head, *rows]]
    widths = [max(columns_of(row[k]) for row in cells) for k in range(len(head))]
    lines = []
    for row in cells:
        padding = [" " * (width - columns_of(cell)) for cell, width in zip(row, widths, strict=True)]
        padded = [
            cell + pad if k < left else pad + cell for k, (cell, pad) in enumerate(zip(row, padding, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join([lines[0], "-" * columns_of(lines[0]), *lines[1:]])
