"""The masked-language-model head and its loss.

Shapes: B rows, M labelled positions of a row, D hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_plm.config.options import ModelOptions
from megatron_plm.kernels.linear import Linear, linear


class LabelledPositions(nn.Module):
    """The vectors of the labelled positions: the head, and the gradient behind it, are needed for these only."""

    def forward(self, x_BLD: Tensor, label_index_BM: Tensor) -> Tensor:
        return torch.gather(x_BLD, 1, label_index_BM.unsqueeze(-1).expand(-1, -1, x_BLD.shape[-1]))


class MaskedLanguageModelHead(nn.Module):
    """Linear, exact GELU and LayerNorm, then the token embedding as output matrix, with a bias of its own."""

    def __init__(self, options: ModelOptions, vocab_size: int) -> None:
        super().__init__()
        self.dense = Linear(options.hidden_size, options.hidden_size)
        self.norm = nn.LayerNorm(options.hidden_size, eps=options.layernorm_epsilon)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x_BMD: Tensor, embedding_VD: Tensor) -> Tensor:
        return linear(self.norm(F.gelu(self.dense(x_BMD))), embedding_VD, self.bias)


def summed_cross_entropy(logits_BMV: Tensor, label_id_BM: Tensor) -> Tensor:
    """Sum over the labelled positions of −log p(label) in nats, in fp32; labels of −100 count nothing.

    A sum, so that it adds up over micro-batches and processes; whoever knows the global count divides.
    """
    return F.cross_entropy(logits_BMV.flatten(0, 1).float(), label_id_BM.flatten(), reduction="sum")
