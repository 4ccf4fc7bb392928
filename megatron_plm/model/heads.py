"""The masked-language-model head and its loss.

Shapes: B rows, M labelled positions of a row, D hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_plm.config.options import ModelOptions
from megatron_plm.kernels.linear import Linear, linear
from megatron_plm.model.layers import build_norm


class LabelledPositions(nn.Module):
    """The vectors of the labelled positions: the head, and the gradient behind it, are needed for these only."""

    def forward(self, x_BLD: Tensor, label_index_BM: Tensor) -> Tensor:
        return torch.gather(x_BLD, 1, label_index_BM.unsqueeze(-1).expand(-1, -1, x_BLD.shape[-1]))


class MaskedLanguageModelHead(nn.Module):
    """Linear, exact GELU and norm, where the options ask for them; then the output matrix, with a bias.

    The matrix is the head's own, or the token embedding, which the caller hands over.
    """

    def __init__(self, options: ModelOptions, vocab_size: int) -> None:
        super().__init__()
        self.has_transform = options.head_transform
        if self.has_transform:
            self.dense = Linear(options.hidden_size, options.hidden_size)
            self.norm = build_norm(options)
        self.weight: nn.Parameter | None = None
        if options.untie_embeddings_and_output_weights:
            self.weight = nn.Parameter(torch.empty(vocab_size, options.hidden_size))
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x_BMD: Tensor, embedding_VD: Tensor | None) -> Tensor:
        if self.has_transform:
            x_BMD = self.norm(F.gelu(self.dense(x_BMD)))
        output_VD = embedding_VD if self.weight is None else self.weight
        assert output_VD is not None, "a tied head needs the token embedding"
        return linear(x_BMD, output_VD, self.bias)


def summed_cross_entropy(logits_BMV: Tensor, label_id_BM: Tensor) -> Tensor:
    """Sum over the labelled positions of −log p(label) in nats, in fp32; labels of −100 count nothing.

    A sum, so that it adds up over micro-batches and processes; whoever knows the global count divides.
    """
    return F.cross_entropy(logits_BMV.flatten(0, 1).float(), label_id_BM.flatten(), reduction="sum")


class ContactHead(nn.Module):
    """Which residues of a protein touch, by a logistic regression on its attention maps (Rao et al. 2021,
    doi:10.1101/2020.12.15.422761), as ESM-2 has it: the logits are the regression's bias and what each layer adds.

    No model is trained with one: a checkpoint has it where the published one that it comes from had it. Shapes: K
    layers, N heads, L residues.
    """

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.num_heads = options.num_attention_heads
        self.regression = nn.Linear(options.num_layers * self.num_heads, 1)

    def layer_logits(self, layer: int, attention_NLL: Tensor) -> Tensor:
        """What the attention of one layer among the residues (no `<cls>`, no `<eos>`) adds to the logits, [L, L]."""
        weight_N = self.regression.weight[0, layer * self.num_heads : (layer + 1) * self.num_heads]
        return torch.einsum("n,nij->ij", weight_N, corrected_attention(attention_NLL))


def corrected_attention(attention_NLL: Tensor) -> Tensor:
    """Symmetrised attention weights less their average product correction, which takes out what rows and columns have
    in all their pairs."""
    both_NLL = attention_NLL + attention_NLL.transpose(-1, -2)
    rows_NL1, columns_N1L = both_NLL.sum(-1, keepdim=True), both_NLL.sum(-2, keepdim=True)
    return both_NLL - rows_NL1 * columns_N1L / rows_NL1.sum(-2, keepdim=True)
