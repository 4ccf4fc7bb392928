"""Weights of a model with another vocabulary: its rows go by token, and a token that it lacks keeps initial values."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_plm.parallel.apply import piece_here
from megatron_plm.tokenizers import Tokenizer, matching_rows

# The parameters that have a row, or a value, for each token.
BY_TOKEN = ("encoder.embedding.tokens.weight", "head.weight", "head.bias")
_MAX_LISTED = 12


@dataclass(frozen=True)
class OtherVocabulary:
    """The vocabulary of a run, and another one, of the weights that it begins with."""

    ours: Tokenizer
    theirs: Tokenizer

    @property
    def shares_residues(self) -> bool:
        """Whether any letter or piece has a row in both."""
        rows = matching_rows(self.ours, self.theirs)
        return any(rows[i] is not None for i in self.ours.residue_ids)

    def room_for(self, parameter: Tensor) -> Tensor:
        """Memory for the tensor of the other model in place of `parameter`, which may be a shard: the whole of it."""
        return torch.empty(self.theirs.vocab_size, *parameter.shape[1:], dtype=parameter.dtype)

    def fill(self, parameter: Tensor, whole: Tensor) -> None:
        """Copy the rows of the other model's tensor into what this process holds of ours."""
        held, start = piece_here(parameter)
        rows = matching_rows(self.ours, self.theirs)[start[0] : start[0] + held.shape[0]]
        pairs = [(here, there) for here, there in enumerate(rows) if there is not None]
        if not pairs:
            return
        here, there = (torch.tensor(ids) for ids in zip(*pairs, strict=True))
        values = whole[there]
        if held.dim() > 1:
            values = values[:, start[1] : start[1] + held.shape[1]]
        held[here.to(held.device)] = values.to(held.device)

    def told(self) -> str:
        """What becomes of which rows, in words."""
        rows = matching_rows(self.ours, self.theirs)
        new = [token for token, row in zip(self.ours.tokens, rows, strict=True) if row is None]
        left = [token for i, token in enumerate(self.theirs.tokens) if i not in set(rows)]
        words = f"its rows of {self.theirs.name} go by name to {len(rows) - len(new)} of {len(rows)} tokens"
        if new:
            words += f", initial values to {_listed(new)}"
        if left:
            words += f"; without a place here: {_listed(left)}"
        return words


def _listed(tokens: Iterable[str]) -> str:
    shown = list(tokens)
    rest = len(shown) - _MAX_LISTED
    return " ".join(shown[:_MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")
