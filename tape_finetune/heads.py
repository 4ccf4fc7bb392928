"""What stands on top of the features: small modules from feature vectors to a task's outputs.

Shapes: R residues of packed proteins, n proteins, D width of a feature vector, O outputs, L residues of one protein,
K hidden units. A task's level says what its heads read, if a head doesn't say so itself: "protein" the mean feature
vectors [n, D], "residue" and "pair" the residues' [R, D].

Every head here first brings the features to a common scale, so that one learning rate suits encoders of any kind.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_plm.philox import derive_key, normal

Level = Literal["residue", "protein", "pair"]
# "mean" and "first" (the vector of <cls>) have one row a protein, "residues" and "tokens" (with <cls> and <eos>) one
# for each of them, "attention" one a pair of residues, which holds its attention weights.
Reads = Literal["mean", "first", "residues", "tokens", "attention"]
_READS: dict[Level, Reads] = {"protein": "mean", "residue": "residues", "pair": "residues"}


class Standardize(nn.Module):
    """(x − mean) / scale with constants that `fit` takes from features of training proteins."""

    mean: Tensor
    scale: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Take mean and standard deviation of x [rows, D]; a feature that varies less than the average one is divided
        by the average deviation, so that a rare letter is not blown up."""
        variance = x.var(0, correction=0)
        variance = torch.maximum(variance, variance.mean())
        self.mean.copy_(x.mean(0))
        self.scale.copy_(torch.where(variance > 0, variance, 1.0).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale


class Head(nn.Module, ABC):
    """A head reads features and the proteins' lengths; `seed` and the parameters' names decide its first weights.

    `reads` of None is what the task's level says. Without `standardized` features are taken as they come.
    """

    reads: ClassVar[Reads | None] = None

    def __init__(self, num_features: int, *, standardized: bool = True) -> None:
        super().__init__()
        self.standardized = standardized
        if standardized:
            self.standardize = Standardize(num_features)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Matrices normal with deviation fan-in^-½, weights of norms 1, biases 0."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
                continue
            values = torch.from_numpy(normal(derive_key("head", seed, name), 0, parameter.numel()))
            parameter.copy_(values.view(parameter.shape) / math.sqrt(parameter[0].numel()))

    @abstractmethod
    def forward(self, features: Tensor, lengths: Sequence[int]) -> Tensor:
        """The task's outputs; `lengths` are the rows of each protein, those of residues or tokens."""


HeadTable = Mapping[str, Callable[[int, int], Head]]  # (width of the features, outputs) → head


class LinearHead(Head):
    """One linear map of each feature vector, for probing: [R, D] → [R, O] or [n, D] → [n, O]."""

    def __init__(self, num_features: int, num_outputs: int) -> None:
        super().__init__(num_features)
        self.output = nn.Linear(num_features, num_outputs)

    def forward(self, features: Tensor, lengths: Sequence[int]) -> Tensor:  # noqa: ARG002
        return self.output(self.standardize(features))


class MLPHead(Head):
    """Linear, ReLU, linear on each protein's mean feature vector: [n, D] → [n, O]; TAPE's has the same shape."""

    def __init__(self, num_features: int, num_outputs: int, hidden_size: int = 512) -> None:
        super().__init__(num_features)
        self.hidden = nn.Linear(num_features, hidden_size)
        self.output = nn.Linear(hidden_size, num_outputs)

    def forward(self, features: Tensor, lengths: Sequence[int]) -> Tensor:  # noqa: ARG002
        return self.output(F.relu(self.hidden(self.standardize(features))))


class ConvHead(Head):
    """Convolution over 5 residues, ReLU, convolution over 3: [R, D] → [R, O], zeros beyond each protein's ends.

    The shape of TAPE's secondary-structure head (Rao et al. 2019, arXiv:1906.08230).
    """

    def __init__(self, num_features: int, num_outputs: int, hidden_size: int = 256) -> None:
        super().__init__(num_features)
        self.hidden = nn.Conv1d(num_features, hidden_size, kernel_size=5, padding=2)
        self.output = nn.Conv1d(hidden_size, num_outputs, kernel_size=3, padding=1)

    def forward(self, features: Tensor, lengths: Sequence[int]) -> Tensor:
        row, index_R, is_residue = in_one_row(self.standardize(features), lengths, gap=2)
        hidden = F.relu(self.hidden(row.T[None])) * is_residue
        return self.output(hidden)[0].T[index_R]


class ContactHead(Head):
    """Product and difference of two residues' vectors, then an MLP, symmetrised: [R, D] → [Σ L²] contact logits.

    The logit of residues i and j is the mean of f(i, j) and f(j, i), f = v·ReLU(P (x_i ∘ x_j) + Q (x_i − x_j) + b) + c,
    where x is a linear map of the features. Without the ReLU the differences would cancel, as they do in TAPE's head.
    Each protein's L² pairs lie row by row, protein after protein.
    """

    def __init__(self, num_features: int, num_outputs: int = 1, width: int = 64, hidden_size: int = 32) -> None:
        assert num_outputs == 1, "a pair has one logit"
        super().__init__(num_features)
        self.project = nn.Linear(num_features, width)
        self.product = nn.Linear(width, hidden_size)
        self.difference = nn.Linear(width, hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, num_outputs)

    def forward(self, features: Tensor, lengths: Sequence[int]) -> Tensor:
        x_RD = self.project(self.standardize(features))
        return torch.cat([self._pairs(x_LD).flatten() for x_LD in x_RD.split(list(lengths))])

    def _pairs(self, x_LD: Tensor) -> Tensor:
        """Logits [L, L]. P (x_i ∘ x_j) is K bilinear forms, so no [L, L, D] is ever made."""
        products_KLL = (x_LD * self.product.weight[:, None, :]) @ x_LD.T + self.product.bias[:, None, None]
        single_KL = self.difference(x_LD).T
        hidden_KLL = F.relu(products_KLL + (single_KL[:, :, None] - single_KL[:, None, :]))
        half_LL = torch.einsum("k,kij->ij", self.output.weight[0] / 2, hidden_KLL)
        return half_LL + half_LL.T + self.output.bias


class LinearContactHead(Head):
    """A weighted product of two residues' vectors: [R, D] → [Σ L²] contact logits, laid out as in `ContactHead`.

    Exactly what is left of a linear map of [product; difference] once it is symmetrised, that is, of TAPE's head.
    """

    def __init__(self, num_features: int, num_outputs: int = 1) -> None:
        assert num_outputs == 1, "a pair has one logit"
        super().__init__(num_features)
        self.output = nn.Linear(num_features, num_outputs)

    def forward(self, features: Tensor, lengths: Sequence[int]) -> Tensor:
        x_RD = self.standardize(features)
        pairs = [(x_LD * self.output.weight) @ x_LD.T + self.output.bias for x_LD in x_RD.split(list(lengths))]
        return torch.cat([pair_LL.flatten() for pair_LL in pairs])


def what_is_read(head: Head, level: Level) -> Reads:
    """The features that a head takes for a task of this level."""
    return head.reads or _READS[level]


def in_one_row(features: Tensor, lengths: Sequence[int], *, gap: int) -> tuple[Tensor, Tensor, Tensor]:
    """All proteins in one row, with `gap` rows of zeros between them, over which no window of so many reaches.

    Takes [R, D]; returns the row [S, D], where the R are in it, and 1 there and 0 elsewhere, [S].
    """
    protein = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    index_R = (torch.arange(len(features)) + gap * protein).to(features.device)
    row = features.new_zeros(len(features) + gap * len(lengths), features.shape[1])
    is_there = features.new_zeros(len(row)).index_fill(0, index_R, 1.0)
    return row.index_copy(0, index_R, features), index_R, is_there


def mean_over_residues(features: Tensor, lengths: Sequence[int]) -> Tensor:
    """The mean feature vector of each protein: [R, D] → [n, D]."""
    return torch.segment_reduce(features, "mean", lengths=torch.tensor(lengths, device=features.device), axis=0)
