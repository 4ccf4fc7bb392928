"""The attention seam against softmax written out, with a block-diagonal mask, in float64."""

import pytest
import torch

from megatron_plm.model.attention import Sequences, packed_attention

NUM_HEADS, HEAD_SIZE = 3, 8


def explicit(q, k, v, lengths, causal=False):
    """softmax(q·kᵀ / √H + mask) · v over all tokens at once; q, k, v are [T, N, H]."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    scores = torch.einsum("tnh,snh->nts", q, k) / HEAD_SIZE**0.5
    scores = scores.masked_fill(owner[:, None] != owner[None, :], float("-inf"))
    if causal:
        later = torch.arange(sum(lengths))[None, :] > torch.arange(sum(lengths))[:, None]
        scores = scores.masked_fill(later, float("-inf"))
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("nts,snh->tnh", weights, v)


def inputs(total, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (total, NUM_HEADS, HEAD_SIZE)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def sequences(lengths):
    cuts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Sequences.from_cu_seqlens(cuts, max(lengths), torch.float64)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[1], [64], [5, 1, 33, 2, 16], [1] * 12, [100, 3]])
def test_output_and_gradients_equal_masked_softmax(lengths, causal):
    q, k, v = inputs(sum(lengths))
    ours = packed_attention(q, k, v, sequences(lengths), causal=causal)
    expected = explicit(q, k, v, lengths, causal)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    ours_gradients = torch.autograd.grad((ours * weight).sum(), (q, k, v))
    expected_gradients = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for ours_gradient, expected_gradient in zip(ours_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours_gradient, expected_gradient, rtol=1e-11, atol=1e-12)


def test_float32_is_as_exact_as_float32_can_be():
    lengths = [40, 7, 90]
    q, k, v = inputs(sum(lengths), seed=1)
    ours = packed_attention(q.float(), k.float(), v.float(), sequences(lengths))
    # A mean of up to 90 values of order 1, each with a rounding of 6e-8 in its weight.
    torch.testing.assert_close(ours.double(), explicit(q, k, v, lengths), rtol=0, atol=90 * 6e-8)


def test_empty_sequences_change_nothing():
    q, k, v = inputs(12)
    plain, gaps = sequences([4, 8]), sequences([4, 0, 0, 8, 0])
    assert plain.lengths == gaps.lengths == (4, 8)
    torch.testing.assert_close(packed_attention(q, k, v, plain), packed_attention(q, k, v, gaps), rtol=0, atol=0)


def test_nothing_flows_between_sequences():
    q, k, v = inputs(20)
    output = packed_attention(q, k, v, sequences([8, 12]))
    for gradient in torch.autograd.grad(output[:8].sum(), (q, k, v)):
        assert (gradient[8:] == 0).all()
