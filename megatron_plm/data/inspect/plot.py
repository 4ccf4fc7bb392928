"""Lengths and letters of a dataset as a picture."""

import math
from pathlib import Path
from typing import Any

from megatron_plm.data.inspect.contents import Contents, most_frequent
from megatron_plm.errors import UserError
from megatron_plm.files import atomic_file

_BLUE, _ORANGE, _TEXT, _GRID = "#0072B2", "#D55E00", "#1f2328", "#e1e4e8"  # Okabe and Ito's, stay distinct
_MOST_LETTERS = 40


def require_matplotlib() -> None:
    """Raise UserError unless plots can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(f"--plot needs {error.name}; install it with: pip install 'megatron-plm[report]'") from None


def draw(path: Path, title: str, contents: Contents) -> None:
    """Write a PNG of the length histogram, on a logarithmic axis, above the letter frequencies."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {
        "text.parse_math": False,
        "font.size": 9.0,
        "text.color": _TEXT,
        "axes.labelcolor": _TEXT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": _GRID,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.2, 6.0), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
        above, below = figure.subplots(2)
        _draw_lengths(above, contents)
        _draw_letters(below, contents)
        with atomic_file(path) as aside:
            figure.savefig(aside, format="png")


def _draw_lengths(axes: Any, contents: Contents) -> None:
    filled = [(low, high, count) for low, high, count in contents.lengths if low > 0]
    # Per doubling, so that on the logarithmic axis equal areas are equal counts, however wide the bins.
    axes.bar(
        [low for low, _, _ in filled],
        [count / math.log2(high / low) for low, high, count in filled],
        width=[high - low for low, high, _ in filled],
        align="edge",
        color=_BLUE,
        edgecolor="white",
        linewidth=0.4,
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(axis="y")
    axes.set_xlabel(f"length in tokens ({contents.shortest:,} to {contents.longest:,})")
    axes.set_ylabel("sequences a doubling of length")


def _draw_letters(axes: Any, contents: Contents) -> None:
    letters = list(most_frequent(contents.tokens))
    total = sum(count for _, count in letters) or 1
    shown = letters[:_MOST_LETTERS]
    axes.bar(range(len(shown)), [100 * count / total for _, count in shown], color=_ORANGE)
    axes.set_xticks(range(len(shown)), [name for name, _ in shown], rotation=0 if len(shown) <= 30 else 90)
    axes.grid(axis="y")
    more = f", the {_MOST_LETTERS} most frequent of {len(letters):,}" if len(letters) > _MOST_LETTERS else ""
    axes.set_xlabel(f"letter{more}")
    axes.set_ylabel("% of all letters")
