"""The two looks of a plot, light and dark, and the drawing of a figure in each.

Colours are Okabe and Ito's, which stay distinct under colour blindness (jfly.uni-koeln.de/color).
"""

import io
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# drawn at twice the size at which the page shows them, for dense screens
_PIXELS_PER_INCH = 192
# of the title's bold letters, so that a long name takes another line instead of leaving the figure
_TITLE_LETTERS_PER_INCH = 11.5


@dataclass(frozen=True)
class Theme:
    """Colours of one look; `first` marks the model under test, `second` and `third` its baselines."""

    background: str
    text: str
    muted: str
    grid: str
    first: str
    second: str
    third: str


LIGHT = Theme("#ffffff", "#1f2328", "#57606a", "#e1e4e8", first="#0072B2", second="#D55E00", third="#7a7f85")
DARK = Theme("#161b22", "#e6edf3", "#9da7b3", "#30363d", first="#56B4E9", second="#E69F00", third="#9aa1a9")


@dataclass(frozen=True)
class Plot:
    """A drawn plot: `name` for its file, `alt` for readers who don't see it, PNG bytes in both looks.

    `width` and `height` are in CSS pixels; `caption` goes beneath, empty where the title says all.
    """

    name: str
    alt: str
    light: bytes
    dark: bytes
    width: int
    height: int
    caption: str


def render(
    name: str,
    title: str,
    alt: str,
    size: tuple[float, float],
    draw: "Callable[[Figure, Theme], None]",
    caption: str = "",
) -> Plot:
    """Draw a figure of `size` (width, height in inches) under a title, once in each look.

    No state of matplotlib is changed, and names that look like formulas ($…$) are drawn as they are.
    """
    images = [_png(title, size, theme, draw) for theme in (LIGHT, DARK)]
    width, height = (round(inches * _PIXELS_PER_INCH / 2) for inches in size)
    return Plot(name, f"{title}. {alt}", images[0], images[1], width, height, caption)


def _png(title: str, size: tuple[float, float], theme: Theme, draw: "Callable[[Figure, Theme], None]") -> bytes:
    """Return one look of a figure as PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {
        "text.parse_math": False,
        "font.size": 9.0,
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "axes.edgecolor": theme.muted,
        "axes.facecolor": theme.background,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlesize": 9.0,
        "grid.color": theme.grid,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "hatch.linewidth": 0.6,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, dpi=_PIXELS_PER_INCH, facecolor=theme.background, layout="constrained")
        FigureCanvasAgg(figure)
        lines = textwrap.wrap(title, width=int(size[0] * _TITLE_LETTERS_PER_INCH))
        figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10, fontweight="bold")
        draw(figure, theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def label_line_ends(axes: "Axes", ends: list[tuple[float, str, str]]) -> None:
    """Write each line's name right of the axes at the height of its end, moved apart where names would touch.

    `ends` holds (y in data units, name, colour); entries whose y is not a number get no name.
    """
    placed = sorted((end for end in ends if math.isfinite(end[0])), key=lambda end: end[0])
    bottom, top = axes.get_ylim()
    height = axes.get_window_extent().height / axes.figure.dpi * 72  # points
    gap = 11.0 / height * (top - bottom)
    lowest = -math.inf
    # later names may only move up: start low enough that the last one still ends inside the axes
    ceiling = top - gap * 0.4
    heights = []
    for y, _, _ in placed:
        lowest = max(y, lowest + gap)
        heights.append(lowest)
    for index in range(len(heights) - 1, -1, -1):
        heights[index] = min(heights[index], ceiling)
        ceiling = heights[index] - gap
    for (_, name, colour), y in zip(placed, heights, strict=True):
        axes.text(1.015, y, name, color=colour, va="center", transform=axes.get_yaxis_transform())
