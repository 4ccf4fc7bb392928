"""Stands in for flash-attn: its varlen function, with torch's arithmetic, on any device and dtype."""

import torch
import torch.nn.functional as F

CALLS = []  # the dropout of each


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
):
    assert softmax_scale is None
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    lengths = [n for n in cu_seqlens_q.diff().tolist() if n]
    assert cu_seqlens_q.equal(cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k >= max(lengths)
    CALLS.append(dropout_p)
    parts = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)
    each = (F.scaled_dot_product_attention(*part, dropout_p=dropout_p, is_causal=causal) for part in parts)
    return torch.cat([out.transpose(0, 1) for out in each])
