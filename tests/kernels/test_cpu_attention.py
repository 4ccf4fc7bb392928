"""Our attention on the CPU against softmax written out in float64, forward and backward."""

import sys

import pytest
import torch
from other_threads import with_threads

from megatron_plm.kernels import cpu
from megatron_plm.kernels.attention import cpu_attention
from megatron_plm.kernels.cpu import has_cpu_kernels
from megatron_plm.model.attention import Sequences, attention_path, packed_attention

pytestmark = pytest.mark.skipif(cpu.compiled is None, reason="csrc/cpu was not built")

# Around the widths of vectors (4, 8, 16 numbers), of blocks (16, 32, 64, 128), and far from them.
LENGTHS = [1, 2, 15, 0, 16, 17, 0, 31, 65, 129, 300]


def cuts_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def inputs(lengths, heads, head_size, *, seed=0, spread=1.0):
    """Query, key and value as the model has them: parts of one tensor; and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    joint = torch.randn(sum(lengths), heads, 3, head_size, generator=generator) * spread
    dout = torch.randn(sum(lengths), heads, head_size, generator=generator)
    return *(x.detach().requires_grad_() for x in joint.unbind(2)), dout


def explicit(q, k, v, lengths, causal):
    """softmax(q·kᵀ / √H) · v, sequence by sequence."""
    outputs = []
    for q_LNH, k_LNH, v_LNH in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        scores = torch.einsum("qnh,knh->nqk", q_LNH, k_LNH) / q.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), float("-inf"))
        outputs.append(torch.einsum("nqk,knh->qnh", scores.softmax(-1), v_LNH))
    return torch.cat(outputs)


def with_gradients(attend, q, k, v, dout):
    out = attend(q, k, v)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def exact(q, k, v, dout, lengths, causal):
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    return with_gradients(lambda *qkv: explicit(*qkv, lengths, causal), *wide, dout.double())


def ours(q, k, v, dout, lengths, causal=False):
    return with_gradients(lambda *qkv: cpu_attention(*qkv, cuts_of(lengths), causal=causal), q, k, v, dout)


def largest_difference(found, expected):
    """Of the output and each gradient, in shares of its largest value."""
    pairs = zip(found, expected, strict=True)
    return [float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_size", [1, 5, 8, 16, 20, 24, 32, 40, 64])
def test_output_and_gradients_equal_float64(head_size, causal):
    given = inputs(LENGTHS, 3, head_size)
    # Scores of up to about 10 are sums rounded at 2⁻²³ of that, which a weight repeats: 1e-6; doubled for the sums.
    differences = largest_difference(ours(*given, LENGTHS, causal), exact(*given, LENGTHS, causal))
    assert max(differences) < 5e-6, differences


def test_a_long_protein_is_many_blocks():
    given = inputs([1100], 1, 24, seed=1)
    for causal in (False, True):
        assert max(largest_difference(ours(*given, [1100], causal), exact(*given, [1100], causal))) < 5e-6


@pytest.mark.parametrize("shift", [-1e4, 0.0, 1e4])
def test_scores_may_be_large(shift):
    """2^(score - largest) never overflows, and loses nothing where all scores are far from zero."""
    lengths = [33, 200]
    q, k, v, dout = inputs(lengths, 2, 16, spread=4.0)
    with torch.no_grad():  # the first feature adds `shift` to all scores
        q[..., 0], k[..., 0] = 4.0, shift
    found, expected = ours(q, k, v, dout, lengths), exact(q, k, v, dout, lengths, False)
    # The scores are rounded at 2⁻²⁴ of 1e4, a few times.
    tolerance = 1e-4 if not shift else 1e-2
    assert max(largest_difference(found[:1] + found[3:], expected[:1] + expected[3:])) < tolerance
    assert all(x.isfinite().all() for x in found)


def test_what_is_no_number_stays_visible():
    q, k, v, _ = inputs([20, 5], 2, 16)
    with torch.no_grad():
        k[3, 1] = float("nan")
    out = cpu_attention(q, k, v, cuts_of([20, 5]), causal=False)
    assert out[:20, 1].isnan().all()
    assert not out[:20, 0].isnan().any()
    assert not out[20:].isnan().any()


def test_empty_sequences_and_no_tokens():
    given = inputs([4, 8], 2, 16)
    plain, gaps = ours(*given, [4, 8]), ours(*given, [0, 4, 0, 0, 8, 0])
    assert all(torch.equal(a, b) for a, b in zip(plain, gaps, strict=True))
    none = torch.empty(0, 2, 16, requires_grad=True)
    assert ours(none, none, none, torch.empty(0, 2, 16), [])[0].shape == (0, 2, 16)


def test_inputs_and_gradients_may_lie_in_any_order_in_memory():
    lengths = [40, 9]
    q, k, v, dout = inputs(lengths, 3, 24)
    expected = ours(q, k, v, dout, lengths)
    turned = [x.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_() for x in (q, k, v)]
    found = ours(*turned, dout.transpose(0, 1).contiguous().transpose(0, 1), lengths)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    ones = torch.ones(()).expand(dout.shape)
    found, expected = ours(q, k, v, ones, lengths), ours(q, k, v, ones.contiguous(), lengths)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(
    sys.platform != "linux" or not torch.backends.openmp.is_available(), reason="this torch has no OpenMP to share"
)
def test_its_threads_are_torchs():
    assert cpu.compiled.thread_pool() == "OpenMP", "a second pool would wait for the cores that torch's threads spin on"


def test_bitwise_the_same_again_and_with_other_threads():
    lengths = [300, 17, 1, 120]
    given = inputs(lengths, 5, 16)
    results = with_threads((1, 2, 2, 3), lambda: ours(*given, lengths))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_nothing_flows_between_sequences():
    q, k, v, _ = inputs([8, 40], 2, 16)
    out = cpu_attention(q, k, v, cuts_of([8, 40]), causal=False)
    for gradient in torch.autograd.grad(out[:8].sum(), (q, k, v)):
        assert (gradient[8:] == 0).all()
        assert (gradient[:8] != 0).any()


@pytest.mark.parametrize("causal", [False, True])
def test_the_ops_keep_torchs_rules(causal):
    lengths = [7, 0, 20]
    q, k, v, dout = inputs(lengths, 2, 8)
    ops = torch.ops.megatron_plm
    torch.library.opcheck(ops.packed_attention.default, (q, k, v, cuts_of(lengths), causal))
    out, statistics = ops.packed_attention(q, k, v, cuts_of(lengths), causal)
    assert not statistics.requires_grad
    given = (dout, *(x.detach() for x in (q, k, v, out)), statistics, cuts_of(lengths), causal)
    torch.library.opcheck(ops.packed_attention_backward.default, given)


def test_a_second_derivative_is_refused():
    q, k, v, dout = inputs([7, 20], 2, 8)
    out = cpu_attention(q, k, v, cuts_of([7, 20]), causal=False)
    (gradient,) = torch.autograd.grad(out, q, dout, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_torchs_default_dtype_changes_nothing():
    given = inputs([7, 20], 2, 8)
    expected = ours(*given, [7, 20])
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = ours(*given, [7, 20])
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_other_lengths_need_no_other_graph():
    compiled = torch.compile(cpu_attention, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([7, 20], [20, 7], [1, 26]):
            given = inputs(lengths, 2, 8)
            found = with_gradients(lambda *qkv: compiled(*qkv, cuts_of(lengths), causal=True), *given)  # noqa: B023
            assert all(torch.equal(a, b) for a, b in zip(found, ours(*given, lengths, True), strict=True))


@pytest.mark.parametrize("cuts", [[0, 5, 3, 12], [0, 5], [1, 12], [0, 20]])
def test_cuts_that_do_not_fit_are_refused(cuts):
    q, k, v, _ = inputs([12], 2, 8)
    with pytest.raises(ValueError, match="cu_seqlens"):
        cpu_attention(q, k, v, torch.tensor(cuts, dtype=torch.int32), causal=False)


def test_it_is_for_float32_on_the_cpu():
    assert has_cpu_kernels(torch.device("cpu"), torch.float32)
    assert not has_cpu_kernels(torch.device("cpu"), torch.bfloat16)
    assert not has_cpu_kernels(torch.device("cpu"), torch.float64)
    assert not has_cpu_kernels(torch.device("cuda"), torch.float32)


def test_the_path_that_is_told_is_taken(monkeypatch):
    q, k, v, _ = inputs([20, 5], 2, 16)

    def attended(**options):
        return packed_attention(q, k, v, Sequences.from_cu_seqlens(cuts_of([20, 5]), 20, torch.float32, **options))

    out = attended()
    assert "packed_attention" in type(out.grad_fn).__name__
    assert attention_path(torch.device("cpu"), torch.float32).startswith("all proteins at once on the CPU")
    for options, built, told in [({"dropout": True}, True, "has no dropout"), ({}, False, "was not built")]:
        monkeypatch.setattr(cpu, "compiled", cpu.compiled if built else None)
        reference = attended(**options)
        assert "packed_attention" not in type(reference.grad_fn).__name__
        assert told in attention_path(torch.device("cpu"), torch.float32, **options)
        torch.testing.assert_close(reference, out, rtol=0, atol=5e-6)  # as against float64
