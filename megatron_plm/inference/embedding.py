"""Embeddings of proteins: hidden states of some layers, as they are or pooled.

Shapes: T packed tokens, R residues among them, K layers, D hidden size, n proteins of a group, L residues of one.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_plm.errors import UserError
from megatron_plm.inference.groups import Columns, Group
from megatron_plm.inference.rows import filled, pack
from megatron_plm.inference.runner import Runner
from megatron_plm.inference.windows import Window, coverage, windows

POOLINGS = ("mean", "cls", "residues")


@dataclass(frozen=True)
class Plan:
    """What is computed, and how.

    Attributes:
        layers: of which hidden states are taken.
        poolings: of POOLINGS: the mean over a protein's residues, its first token's vector, each residue's.
        dtype: of the written values, float32 or float16.
        max_tokens: of a protein with its specials, that the model takes at once; longer ones go through in windows.
        overlap: tokens that neighbouring windows share.
        batch_tokens: of one packed row, at most; at least `max_tokens`.
    """

    layers: tuple[int, ...]
    poolings: tuple[str, ...]
    dtype: np.dtype[Any]
    max_tokens: int
    overlap: int
    batch_tokens: int

    def column(self, pooling: str, layer: int) -> str:
        """The name under which values are written: the pooling, and the layer where there are several."""
        return pooling if len(self.layers) == 1 else f"{pooling}_layer{layer}"

    @property
    def per_residue(self) -> frozenset[str]:
        """The columns with a row for each residue, not for each protein."""
        return frozenset(self.column("residues", layer) for layer in self.layers if "residues" in self.poolings)

    def identity(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "layers": list(self.layers),
            "pooling": list(self.poolings),
            "dtype": str(self.dtype),
            "max_length": self.max_tokens,
            "overlap": self.overlap,
            "batch_tokens": self.batch_tokens,
        }

    def column_dtypes(self, hidden_size: int) -> dict[str, np.dtype[Any]]:
        """The dtypes of the rows that `Embedder` yields, by name."""
        row = np.dtype((self.dtype, (hidden_size,)))
        return {self.column(pooling, layer): row for pooling in self.poolings for layer in self.layers}


class _Piece(NamedTuple):
    """A window of a protein of a group; `shares` are 1 over the number of windows that each of its residues lies in."""

    protein: int
    window: Window
    num_residues: int  # of the protein
    shares: npt.NDArray[np.float32]

    @property
    def num_tokens(self) -> int:
        return self.window.end - self.window.start

    @property
    def residues(self) -> tuple[int, int]:
        """The first residue of the protein that it holds, and the one behind its last."""
        return _residues(self.window, self.num_residues)


class _Launched(NamedTuple):
    """A row that the device may still be computing."""

    group: Group
    pieces: list[_Piece]
    ends_group: bool
    values: dict[str, Tensor]


class Embedder:
    """Runs a model over groups of proteins."""

    def __init__(self, runner: Runner, plan: Plan) -> None:
        self._runner = runner
        self._plan = plan

    def compute(self, groups: Iterator[Group]) -> Iterator[tuple[Group, Columns]]:
        """Yield the values of each group: of the mean and the first token [n, D], of residues [R, D].

        While the device computes one row, the values of the one before are fetched. Raises UserError where a value is
        beyond the range of the dtype.
        """
        sums: dict[str, npt.NDArray[np.float32]] = {}
        for row in _one_behind(self._launched(groups)):
            if not sums:
                sums = self._zeros(row.group)
            self._add(row, sums)
            if row.ends_group:
                yield row.group, self._columns(sums)
                sums = {}

    def _launched(self, groups: Iterator[Group]) -> Iterator[_Launched]:
        for group in groups:
            rows = deque(filled(self._pieces(group), self._plan.batch_tokens))
            while rows:
                pieces = rows.popleft()
                yield _Launched(group, pieces, not rows, self._launch(group, pieces))

    def _pieces(self, group: Group) -> Iterator[_Piece]:
        for number, protein in enumerate(group.proteins):
            num_residues = len(protein.tokens)
            parts = windows(num_residues + 2, self._plan.max_tokens, self._plan.overlap)
            shares = (1 / coverage(parts)[1:-1]).astype(np.float32)
            for part in parts:
                yield _Piece(number, part, num_residues, shares[slice(*_residues(part, num_residues))])

    def _launch(self, group: Group, pieces: Sequence[_Piece]) -> dict[str, Tensor]:
        """Pooled values of one row on the device: [pieces, K, D] of the mean (a sum, of residues that several windows
        hold a share) and of the first token, [R, K, D] of residues (likewise)."""
        plan, runner = self._plan, self._runner
        row = pack([_tokens(runner, group, piece) for piece in pieces])
        spans = np.array([piece.residues for piece in pieces], dtype=np.int64)
        counts = spans[:, 1] - spans[:, 0]
        first = row.starts + (np.array([piece.window.start for piece in pieces]) == 0)
        index = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        shares = np.concatenate([piece.shares for piece in pieces])
        is_shared = bool((shares != 1).any())
        starts, indices, sizes, weights = (_tensor(x, runner) for x in (row.starts, index, counts, shares))
        values: dict[str, list[Tensor]] = {pooling: [] for pooling in plan.poolings}
        for state_TD in runner.hidden_states(row, plan.layers):
            if "cls" in plan.poolings:
                values["cls"].append(state_TD[starts].float())
            if plan.poolings == ("cls",):
                continue
            residues_RD = state_TD[indices].float()
            if is_shared:
                residues_RD = residues_RD * weights[:, None]
            if "residues" in plan.poolings:
                values["residues"].append(residues_RD)
            if "mean" in plan.poolings:
                values["mean"].append(torch.segment_reduce(residues_RD, "sum", lengths=sizes, unsafe=True))
        return {pooling: torch.stack(layers, dim=1) for pooling, layers in values.items()}

    def _zeros(self, group: Group) -> dict[str, npt.NDArray[np.float32]]:
        sizes = {"mean": len(group.proteins), "cls": len(group.proteins), "residues": group.num_tokens}
        shape = (len(self._plan.layers), self._runner.options.hidden_size)
        return {pooling: np.zeros((sizes[pooling], *shape), dtype=np.float32) for pooling in self._plan.poolings}

    def _add(self, row: _Launched, sums: dict[str, npt.NDArray[np.float32]]) -> None:
        """Add a row's values to those of its group."""
        starts = np.cumsum([0, *(len(protein.tokens) for protein in row.group.proteins)])
        for name, tensor in row.values.items():
            values, at = tensor.cpu().numpy(), 0
            for number, piece in enumerate(row.pieces):
                begin, end = piece.residues
                if name == "residues":
                    target = starts[piece.protein]
                    sums[name][target + begin : target + end] += values[at : at + end - begin]
                    at += end - begin
                elif name == "mean":
                    sums[name][piece.protein] += values[number] / piece.num_residues
                elif piece.window.start == 0:
                    sums[name][piece.protein] = values[number]

    def _columns(self, sums: Columns) -> Columns:
        columns = {}
        for pooling, values in sums.items():
            with np.errstate(over="ignore"):
                narrow = values.astype(self._plan.dtype)
            if np.isinf(narrow).any() and np.isfinite(values).all():
                raise UserError(f"a value is beyond the range of {self._plan.dtype} ({pooling}); use --dtype float32")
            for number, layer in enumerate(self._plan.layers):
                columns[self._plan.column(pooling, layer)] = narrow[:, number]
        return columns


def _one_behind(rows: Iterator[_Launched]) -> Iterator[_Launched]:
    waiting: deque[_Launched] = deque()
    for row in rows:
        waiting.append(row)
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def _residues(window: Window, num_residues: int) -> tuple[int, int]:
    """The first residue that a window holds of a protein with so many, and the one behind its last."""
    return max(window.start - 1, 0), min(window.end - 1, num_residues)


def _tokens(runner: Runner, group: Group, piece: _Piece) -> npt.NDArray[np.integer]:
    """The window's token ids, with the specials that it holds."""
    begin, end = piece.residues
    tokenizer, window = runner.tokenizer, piece.window
    first = [tokenizer.cls_id] if window.start == 0 else []
    last = [tokenizer.eos_id] if window.end == piece.num_residues + 2 else []
    return np.concatenate([first, group.proteins[piece.protein].tokens[begin:end], last]).astype(np.int64)


def _tensor(array: npt.NDArray[Any], runner: Runner) -> Tensor:
    return torch.from_numpy(array).to(runner.device, non_blocking=True)
