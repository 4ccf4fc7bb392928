"""Proteins longer than a model takes: overlapping windows.

A window is a stretch of `<cls> residues <eos>`, as the crops of pretraining are: a cut end has no `<cls>` or `<eos>`,
and positions restart in it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Window(NamedTuple):
    """Tokens `start` to `end` (exclusive) of a protein with its specials."""

    start: int
    end: int


def windows(num_tokens: int, max_tokens: int, overlap: int) -> list[Window]:
    """Windows of at most `max_tokens` that cover `num_tokens`, neighbours sharing at least `overlap` tokens.

    All but a single one have `max_tokens`; the last is moved back to end with the protein.
    """
    assert 0 <= overlap < max_tokens
    if num_tokens <= max_tokens:
        return [Window(0, num_tokens)]
    last = num_tokens - max_tokens
    starts = [*range(0, last, max_tokens - overlap), last]
    return [Window(start, start + max_tokens) for start in starts]


def coverage(parts: Sequence[Window]) -> npt.NDArray[np.int64]:
    """In how many windows each token lies, [number of tokens]."""
    steps = np.zeros(parts[-1].end + 1, dtype=np.int64)
    for part in parts:
        steps[part.start] += 1
        steps[part.end] -= 1
    return np.cumsum(steps)[:-1]


def most_central(parts: Sequence[Window]) -> npt.NDArray[np.int64]:
    """Of each token the number of the window in which it is farthest from the nearest cut end; of equal ones the first.

    The protein's own ends are no cuts. [number of tokens]; the work is that of as many tokens as the windows hold.
    """
    end = parts[-1].end
    chosen = np.zeros(end, dtype=np.int64)
    farthest = np.full(end, -1, dtype=np.int64)
    for number, part in enumerate(parts):
        size = part.end - part.start
        before = np.arange(size) if part.start else np.full(size, end)
        after = np.arange(size)[::-1] if part.end < end else np.full(size, end)
        distance = np.minimum(before, after)
        here = slice(part.start, part.end)
        chosen[here][distance > farthest[here]] = number
        np.maximum(farthest[here], distance, out=farthest[here])
    return chosen
