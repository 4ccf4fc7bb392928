"""Histograms as text, for a terminal of 80 columns."""

from collections.abc import Sequence
from itertools import groupby

from megatron_plm.data.inspect.contents import Histogram

WIDTH = 80
_EIGHTHS = " ▏▎▍▌▋▊▉"


def bars(rows: Sequence[tuple[str, int]], *, unicode: bool) -> list[str]:
    """One line for each (label, count): label, bar, count and share of all counts; at most `WIDTH` columns."""
    total, most = sum(count for _, count in rows), max((count for _, count in rows), default=0)
    labels = max((len(label) for label, _ in rows), default=0)
    counts = max((len(f"{count:,}") for _, count in rows), default=0)
    width = WIDTH - labels - counts - len("  100.0 %") - 2
    return [
        f"{label:>{labels}} {_bar(count / most if most else 0, width, unicode=unicode):<{width}} {count:>{counts},}"
        f"  {100 * count / total if total else 0:>5.1f} %"
        for label, count in rows
    ]


def length_rows(histogram: Histogram) -> list[tuple[str, int]]:
    """Neighbouring bins joined to two for every doubling, as (label, count)."""

    def half_doubling(entry: tuple[int, int, int]) -> tuple[int, bool]:
        doubling = entry[0].bit_length()
        return doubling, 2 * entry[0] >= 3 << (doubling - 1) if entry[0] else False

    rows = []
    for _, group in groupby(histogram, key=half_doubling):
        entries = list(group)
        low, high = entries[0][0], entries[-1][1] - 1
        label = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        rows.append((label, sum(count for *_, count in entries)))
    return rows


def _bar(share: float, width: int, *, unicode: bool) -> str:
    if not unicode:
        return "#" * round(share * width)
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
