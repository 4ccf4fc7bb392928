"""Sequences end to end in one row, without any padding: what the model computes at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedRow:
    """One row of T tokens that n sequences fill; the four tensors are the encoder's arguments."""

    tokens: Tensor  # int64 [1, T]
    positions: Tensor  # int64 [1, T], 0 at the first token of each sequence
    segment_ids: Tensor  # int64 [1, T], 1, 2, …
    cu_seqlens: Tensor  # int32 [n + 1], from 0 to T
    starts: npt.NDArray[np.int64]  # [n], where in the row each sequence begins
    max_length: int  # of the longest sequence

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The encoder's arguments on `device`."""
        tensors = (self.tokens, self.positions, self.segment_ids, self.cu_seqlens)
        if device.type == "cpu":
            return tensors
        first, second, third, fourth = (x.pin_memory().to(device, non_blocking=True) for x in tensors)
        return first, second, third, fourth


def pack(sequences: Sequence[npt.NDArray[np.integer]]) -> PackedRow:
    """Lay sequences of token ids, specials included, end to end."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    positions = np.arange(ends[-1]) - np.repeat(starts, lengths)
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return PackedRow(
        tokens=torch.from_numpy(np.concatenate(sequences).astype(np.int64))[None],
        positions=torch.from_numpy(positions)[None],
        segment_ids=torch.from_numpy(segments)[None],
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        starts=starts,
        max_length=int(lengths.max()),
    )


class Sized(Protocol):
    """What takes some tokens of a row."""

    @property
    def num_tokens(self) -> int:
        """How many."""


Item = TypeVar("Item", bound=Sized)


def filled(items: Iterator[Item], max_tokens: int) -> Iterator[list[Item]]:
    """The items in order, each time as many as fit into `max_tokens` together, but at least one.

    Nothing is sorted: a row without padding is as good as any other, and order and memory are kept.
    """
    row: list[Item] = []
    used = 0
    for item in items:
        if row and used + item.num_tokens > max_tokens:
            yield row
            row, used = [], 0
        row.append(item)
        used += item.num_tokens
    if row:
        yield row
