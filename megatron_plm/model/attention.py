"""The one seam of attention: packed proteins in, packed proteins out, never a protein seeing another.

Shapes: T packed tokens, N heads, H head size.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_plm.kernels.accelerators import VarlenAttention
from megatron_plm.kernels.attention import cpu_attention, cpu_attention_path
from megatron_plm.kernels.cpu import has_cpu_kernels

OneCall = Literal["flash", "cpu"]  # torch's variable-length attention on a GPU, or kernels.attention


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of T packed tokens begin and end."""

    cu_seqlens: Tensor  # int32 [number of sequences + 1], from 0 to T; empty sequences are allowed
    max_length: int
    lengths: tuple[int, ...]  # of the sequences that are not empty; none where attention is one call for all
    one_call: OneCall | None  # which call that is, if any

    @staticmethod
    def from_cu_seqlens(
        cu_seqlens: Tensor, max_length: int, dtype: torch.dtype, *, dropout: bool = False
    ) -> "Sequences":
        """Read the lengths where attention over `dtype` needs them; on a GPU, that makes the host wait."""
        one_call = None if dropout else _one_call(cu_seqlens.device, dtype)
        lengths = () if one_call else tuple(n for n in cu_seqlens.diff().tolist() if n)
        return Sequences(cu_seqlens, max_length, lengths, one_call)


def attention_path(
    device: torch.device, dtype: torch.dtype, *, dropout: bool = False, implementation: str = "torch"
) -> str:
    """In words, how attention over `dtype` is computed on `device` in training, and why not faster."""
    if implementation != "torch":
        return f"{implementation}, all proteins at once"
    if dropout:
        return "protein by protein (attention of all at once has no dropout: --attention-dropout 0 is faster)"
    if _has_flash_attention(device, dtype):
        return "flash, all proteins at once"
    if device.type == "cpu" and dtype == torch.float32:
        return cpu_attention_path()
    slower = f" (flash attention takes no {str(dtype).removeprefix('torch.')}: --bf16 is faster)"
    return "fused kernel, protein by protein" + (slower if device.type == "cuda" else "")


def _one_call(device: torch.device, dtype: torch.dtype) -> OneCall | None:
    if _has_flash_attention(device, dtype):
        return "flash"
    return "cpu" if has_cpu_kernels(device, dtype) else None


def _has_flash_attention(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


class PackedAttention(nn.Module):
    """`packed_attention` as a module, the place where another way to compute it goes.

    `varlen`: another package's attention of all sequences at once; it has dropout, too.
    """

    def __init__(self, *, causal: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.causal, self.dropout = causal, dropout
        self.varlen: VarlenAttention | None = None

    def forward(self, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, sequences: Sequences) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if self.varlen is not None:
            return self.varlen(q_TNH, k_TNH, v_TNH, sequences.cu_seqlens, sequences.max_length, self.causal, dropout)
        return packed_attention(q_TNH, k_TNH, v_TNH, sequences, causal=self.causal, dropout=dropout)


def packed_attention(
    q_TNH: Tensor,
    k_TNH: Tensor,
    v_TNH: Tensor,
    sequences: Sequences,
    *,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention inside each sequence, scaled by H^-½; returns [T, N, H]. `causal` hides what comes later.

    `dropout` of the attention weights draws from torch's generator: nothing but a kernel sees them.

    On a GPU all sequences are one call of variable-length flash attention, which torch has for 16-bit numbers
    only, and on the CPU, in fp32, one of our own kernel; both without dropout. Else each sequence is one call of
    torch's fused kernel.
    """
    assert not (dropout and sequences.one_call), "attention of all sequences at once has no dropout"
    if sequences.one_call == "cpu":
        return cpu_attention(q_TNH, k_TNH, v_TNH, sequences.cu_seqlens, causal=causal)
    if sequences.one_call == "flash":
        # Imported here: the module exists only in builds of torch that have the CUDA kernel.
        from torch.nn.attention.varlen import varlen_attn

        cuts, longest = sequences.cu_seqlens, sequences.max_length
        # The window of a causal token reaches back to the first and ahead to none.
        window: dict[str, Any] = {"window_size": (-1, 0)} if causal else {}
        out_TNH = varlen_attn(q_TNH, k_TNH, v_TNH, cuts, cuts, longest, longest, **window)
        assert isinstance(out_TNH, Tensor)  # a pair only where the logarithms of the sums are asked for too
        return out_TNH
    return _one_by_one(q_TNH, k_TNH, v_TNH, sequences, causal, dropout)


@torch.compiler.disable  # other lengths in every batch: it would be compiled anew for each
def _one_by_one(
    q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, sequences: Sequences, causal: bool, dropout: float
) -> Tensor:
    parts = (x.split(sequences.lengths) for x in (q_TNH, k_TNH, v_TNH))
    return torch.cat([_attend(q, k, v, causal, dropout) for q, k, v in zip(*parts, strict=True)])


def _attend(q_LNH: Tensor, k_LNH: Tensor, v_LNH: Tensor, causal: bool, dropout: float) -> Tensor:
    """Attention of one sequence of L tokens; torch takes its fused CPU kernel only for four dims [1, N, L, H]."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_LNH, k_LNH, v_LNH))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout)
    return out.squeeze(0).transpose(0, 1)
