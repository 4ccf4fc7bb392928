"""TAPE's own heads, shape by shape, to compare with its scores (Rao et al. 2019, arXiv:1906.08230; tape-proteins 0.5).

They read features as they come: the secondary-structure head has a BatchNorm, and the one for whole proteins reads
`<cls>` through a pooler. Weights are normalized as a whole (Salimans & Kingma 2016, arXiv:1602.07868). TAPE's contact
head is `LinearContactHead`.

Shapes: T tokens of packed proteins, n proteins, D width of a feature vector, O outputs.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tape_finetune.heads import Head, Reads, in_one_row

_HIDDEN_SIZE = 512
_WHOLE = -1  # a weight has one length, that of all its numbers


class TapeConvHead(Head):
    """BatchNorm, convolution over 5 tokens, ReLU, convolution over 3: [T, D] → [T, O], `<cls>` and `<eos>` among the
    tokens. In training the norm's statistics are those of the pass."""

    reads: ClassVar[Reads] = "tokens"

    def __init__(self, num_features: int, num_outputs: int, hidden_size: int = _HIDDEN_SIZE) -> None:
        super().__init__(num_features, standardized=False)
        self.norm = nn.BatchNorm1d(num_features)
        self.hidden = weight_norm(nn.Conv1d(num_features, hidden_size, kernel_size=5, padding=2), dim=_WHOLE)
        self.output = weight_norm(nn.Conv1d(hidden_size, num_outputs, kernel_size=3, padding=1), dim=_WHOLE)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        super().initialize(seed)
        _set_lengths(self.hidden, self.output)

    def forward(self, features: Tensor, lengths: Sequence[int]) -> Tensor:
        row, index_T, is_token = in_one_row(self.norm(features), lengths, gap=2)
        hidden = F.relu(self.hidden(row.T[None])) * is_token
        return self.output(hidden)[0].T[index_T]


class TapePooledHead(Head):
    """A pooler, linear and tanh, of the vector of `<cls>`; then linear, ReLU, linear: [n, D] → [n, O]."""

    reads: ClassVar[Reads] = "first"

    def __init__(self, num_features: int, num_outputs: int, hidden_size: int = _HIDDEN_SIZE) -> None:
        super().__init__(num_features, standardized=False)
        self.pooler = nn.Linear(num_features, num_features)
        self.hidden = weight_norm(nn.Linear(num_features, hidden_size), dim=_WHOLE)
        self.output = weight_norm(nn.Linear(hidden_size, num_outputs), dim=_WHOLE)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        super().initialize(seed)
        _set_lengths(self.hidden, self.output)

    def forward(self, features: Tensor, lengths: Sequence[int]) -> Tensor:  # noqa: ARG002
        return self.output(F.relu(self.hidden(self.pooler(features).tanh())))


def _set_lengths(*modules: nn.Module) -> None:
    """Let each normalized weight begin as its direction was drawn: its length is a parameter of its own."""
    for module in modules:
        length, direction = module.parametrizations.weight.parameters()  # type: ignore[union-attr]
        length.copy_(direction.norm())
