"""Larger heads for contacts; the small ones are in tape_finetune.heads.

Shapes: R residues of packed proteins, L residues of one, D width of a feature vector, C channels. The logits of each
protein's L² pairs lie row by row, protein after protein.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tape_finetune.heads import Head, Reads


class ResidualContactHead(Head):
    """A residual convolutional net over products and differences, symmetrised: [R, D] → [Σ L²] contact logits.

    The shape of the contact head of ProteinLM's fork, which has 30 blocks: a linear map of [product; difference] of two
    residues' vectors to 64 channels, blocks of two 3×3 convolutions, a logit. Norms are over a protein's own map, where
    the fork's are over the batch; so what comes out for a protein depends on no other.
    """

    def __init__(self, num_features: int, num_outputs: int = 1, channels: int = 64, num_blocks: int = 4) -> None:
        assert num_outputs == 1, "a pair has one logit"
        super().__init__(num_features)
        self.product = nn.Linear(num_features, channels)
        self.difference = nn.Linear(num_features, channels, bias=False)
        self.blocks = nn.ModuleList(_ResidualBlock(channels) for _ in range(num_blocks))
        self.output = nn.Conv2d(channels, num_outputs, kernel_size=1)

    def forward(self, features: Tensor, lengths: Sequence[int]) -> Tensor:
        x_RD = self.standardize(features)
        return torch.cat([self._pairs(x_LD).flatten() for x_LD in x_RD.split(list(lengths))])

    def _pairs(self, x_LD: Tensor) -> Tensor:
        """Logits [L, L]. The map of products is C bilinear forms, so no [L, L, D] is ever made."""
        products_CLL = (x_LD * self.product.weight[:, None, :]) @ x_LD.T + self.product.bias[:, None, None]
        single_CL = self.difference(x_LD).T
        maps_1CLL = (products_CLL + (single_CL[:, :, None] - single_CL[:, None, :]))[None]
        for block in self.blocks:
            maps_1CLL = block(maps_1CLL)
        logits_LL = self.output(maps_1CLL)[0, 0]
        return (logits_LL + logits_LL.T) / 2


class _ResidualBlock(nn.Module):
    """Norm, ReLU, 3×3 convolution, twice; added to what goes in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = (nn.GroupNorm(1, channels) for _ in range(2))
        self.first, self.second = (nn.Conv2d(channels, channels, kernel_size=3, padding=1) for _ in range(2))

    def forward(self, x_1CLL: Tensor) -> Tensor:
        inner_1CLL = self.first(F.relu(self.first_norm(x_1CLL)))
        return x_1CLL + self.second(F.relu(self.second_norm(inner_1CLL)))


class AttentionContactHead(Head):
    """A logistic regression on a pair's attention weights, symmetrised and APC-corrected, of all layers and heads:
    [Σ L², layers · heads] → [Σ L²] logits (Rao et al. 2021, doi:10.1101/2020.12.15.422761).

    ESM-2's is fitted with an L1 penalty; here the optimizer's weight decay stands in its place.
    """

    reads: ClassVar[Reads] = "attention"

    def __init__(self, num_features: int, num_outputs: int = 1) -> None:
        assert num_outputs == 1, "a pair has one logit"
        super().__init__(num_features)
        self.regression = nn.Linear(num_features, 1)

    def forward(self, features: Tensor, lengths: Sequence[int]) -> Tensor:  # noqa: ARG002
        return self.regression(self.standardize(features))[:, 0]
