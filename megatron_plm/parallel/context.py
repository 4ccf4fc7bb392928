"""Context parallelism: each of a few processes holds a stretch of the tokens of every row.

Everything but attention works token by token. For attention the processes swap: each gives away all heads of its
tokens but a share, and gets that share of the heads of all tokens (Jacobs et al. 2023, "DeepSpeed Ulysses",
arXiv:2309.14509). So attention sees whole packed rows, with the same code as in one process. Heads that don't divide
are filled up with empty ones.

Shapes: B rows, L tokens of a row, C processes, N heads, H head size; T = B·L packed tokens, t = T/C of them here.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd

from megatron_plm.data.loader import IGNORED_LABEL, Batch
from megatron_plm.model.attention import Sequences
from megatron_plm.model.heads import LabelledPositions
from megatron_plm.model.layers import DropoutKeys, RotaryEmbedding, TokenEmbedding
from megatron_plm.model.transformer import Attention


def apply_context_parallel(model: nn.Module, group: dist.ProcessGroup, rank: int) -> None:
    """Let `model`, in place, take whole rows and work on this process's stretch of each, number `rank` of `group`.

    The embedding sees whole rows, as token dropout counts the masks of a protein; what leaves it is cut. Labels outside
    the stretch give the vector of some token inside: `own_labels` sees that they count nothing.
    """
    size = group.size()

    def stretch(x: Tensor) -> Tensor:
        """This process's tokens of [B, L, …]."""
        return x.chunk(size, dim=1)[rank]

    for module in list(model.modules()):
        if isinstance(module, TokenEmbedding | DropoutKeys):
            module.register_forward_hook(lambda _, __, x: stretch(x))
        elif isinstance(module, RotaryEmbedding):
            module.register_forward_pre_hook(lambda _, arguments: (stretch(arguments[0]), *arguments[1:]))
        elif isinstance(module, LabelledPositions):
            module.register_forward_pre_hook(lambda _, arguments: _own_index(*arguments, rank=rank))
        elif isinstance(module, Attention):
            module.attend = SwappedAttention(module.attend, group)


def own_labels(batch: Batch, size: int, rank: int) -> Batch:
    """The batch with the labels of stretch `rank` of `size` only; the others are ignored."""
    length = batch.tokens.shape[1] // size
    own = batch.label_index // length == rank
    return replace(batch, label_id=batch.label_id.masked_fill(~own, IGNORED_LABEL))


def _own_index(x_BlD: Tensor, label_index_BM: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    length = x_BlD.shape[1]
    return x_BlD, (label_index_BM - rank * length).clamp(0, length - 1)


class SwappedAttention(nn.Module):
    """Attention of some heads over all tokens, from and to all heads of some tokens."""

    def __init__(self, attend: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.attend = attend
        self.group = group

    def forward(self, q_tNH: Tensor, k_tNH: Tensor, v_tNH: Tensor, sequences: Sequences) -> Tensor:
        C, (t, N, H) = self.group.size(), q_tNH.shape
        L = sequences.max_length
        B = t * C // L
        qkv = torch.stack([q_tNH, k_tNH, v_tNH], dim=2)  # [t, N, 3, H]
        qkv = nn.functional.pad(qkv, (0, 0, 0, 0, 0, -N % C))
        n = qkv.shape[1] // C
        # By receiver: process c gets the heads c·n … (c + 1)·n.
        outgoing = qkv.view(B, L // C, C, n, 3, H).permute(2, 0, 1, 3, 4, 5)
        incoming = self._swapped(outgoing)  # [C senders, B, L/C, n, 3, H]
        q, k, v = incoming.transpose(0, 1).reshape(B * L, n, 3, H).unbind(2)
        out_TnH = self.attend(q, k, v, sequences)
        # By receiver: process c gets the c-th stretch of each row.
        outgoing = out_TnH.view(B, C, L // C, n, H).transpose(0, 1)
        incoming = self._swapped(outgoing)  # [C senders, B, L/C, n, H]
        return incoming.permute(1, 2, 0, 3, 4).reshape(t, C * n, H)[:, :N]

    def _swapped(self, x: Tensor) -> Tensor:
        """Part c of dim 0 goes to process c; what comes back is by sender."""
        swapped: Any = all_to_all_single_autograd(x.contiguous(), None, None, self.group)
        return swapped
