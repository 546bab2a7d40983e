"""Common functions for plots, without pyplot, so that they need no display and no global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.font_manager import FontProperties, findfont, get_font

from common.files import replacing
from common.tables import escaped

BLUE, GREY, ORANGE = "#2a6f97", "#8d99ae", "#bc6c25"
MARKERS = "os^Dv<>pP*XhHd"
LONGEST = 60  # characters of a label; longer labels are cut in the middle


def drawable(label: str) -> str:
    """A label with escapes for letters that the font lacks, cut to LONGEST characters."""
    letters = get_font(findfont(FontProperties())).get_charmap()
    label = escaped(label, lambda character: ord(character) in letters)
    return label if len(label) <= LONGEST else f"{label[: LONGEST // 2]}…{label[1 - LONGEST // 2 :]}"


def add_legend(owner: Axes | SubFigure, handles: Sequence[Any], labels: Sequence[str], **where: Any) -> None:
    """Add a legend with literal labels: matplotlib itself skips labels with a leading _, and reads $ as mathematics.

    handles: lines, or containers of error bars, which the types of a figure's legend leave out.
    """
    legend = owner.legend(handles, ["label"] * len(labels), **where)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set(text=drawable(label), parse_math=False)


def save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
