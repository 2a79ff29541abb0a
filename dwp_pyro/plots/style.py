"""Colors and file formats of all plots."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from dwp_pyro.runtime.files import atomic_path

__all__ = ["COLORS", "save_figure", "to_svg"]

#: Color-blind safe palette of Okabe and Ito 2008, without yellow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

_INK = "#010203"  # placeholder of text and axes in an SVG; replaced by the text color of the page

#: Settings of matplotlib for figures on a page.
_PAGE_STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "dwp-pyro",
}


def save_figure(path: Path, figure: Figure, dpi: int = 120) -> None:
    """Write a figure as a PNG file, atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")


def to_svg(draw: Callable[..., Figure | None], *args: Any, **kwargs: Any) -> str:
    """Return the figure that `draw` returns as an SVG element with font and color of the page; "" for None."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context(_PAGE_STYLE):
        figure = draw(*args, **kwargs)
        if figure is None:
            return ""
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    # Group ids repeat between figures and must be unique on a page; nothing refers to them.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    return svg.replace(_INK, "currentColor")
