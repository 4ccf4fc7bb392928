"""The CPU's rotation of queries and keys: that of torch in float64, both ways, at any size and number of threads."""

import pytest
import torch
from other_threads import with_threads

from megatron_plm.kernels import cpu
from megatron_plm.kernels.rotary import _backward_reference, _reference, bias_rotary, rotated

pytestmark = pytest.mark.skipif(cpu.compiled is None, reason="csrc/cpu was not built")

SIZES = [(0, 2, 8), (1, 1, 2), (33, 3, 6), (64, 20, 16), (31, 5, 24), (70, 2, 64)]  # tokens, heads, head size


def given(T, N, H, dtype=torch.float32):
    generator = torch.Generator().manual_seed(T + N + H)
    shapes = [(T, N, 3, H), (3 * N * H,), (T, H), (T, H)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_are_those_of_the_reference_in_float64(size, with_bias):
    qkv, bias, cos, sin = given(*size)
    bias = bias.requires_grad_() if with_bias else None
    parts = bias_rotary(qkv.requires_grad_(), bias, cos, sin)
    exact = _reference(*(None if x is None else x.detach().double() for x in (qkv, bias, cos, sin)))
    gradients = [torch.randn_like(part) for part in parts]
    wanted = _backward_reference(*(x.double() for x in (*gradients, cos, sin)), with_bias)
    found = torch.autograd.grad(parts, [qkv, bias] if with_bias else [qkv], gradients)
    for ours, theirs in zip((*parts, *found), (*exact, *wanted[: len(found)]), strict=True):
        # A value is the sum of three products, a bias's gradient that of all tokens.
        torch.testing.assert_close(ours.detach().double(), theirs, rtol=1e-5, atol=1e-5)


def test_bitwise_the_same_with_any_number_of_threads():
    qkv, bias, cos, sin = given(300, 4, 16)
    found = with_threads((1, 2, 3), lambda: bias_rotary(qkv, bias, cos, sin))
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("wrong", ["bias", "cos", "sin", "shorter", "odd"])
def test_what_the_kernel_would_misread_is_refused(wrong):
    T, N, H = 6, 2, 7 if wrong == "odd" else 8
    qkv, bias, cos, sin = given(T, N, H)
    changed = {"bias": bias.bfloat16(), "cos": cos.double(), "sin": sin[:1]}
    arguments = {"qkv": qkv, "bias": bias, "cos": cos, "sin": sin} | {k: v for k, v in changed.items() if k == wrong}
    if wrong == "shorter":
        arguments["bias"] = bias[:-1]
    with pytest.raises(AssertionError):
        torch.ops.megatron_plm.bias_rotary(**arguments)


def test_the_ops_take_tensors_in_any_order_of_memory():
    qkv, bias, cos, sin = given(10, 4, 8)
    plain = torch.ops.megatron_plm.bias_rotary(qkv, bias, cos, sin)
    turned = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    for ours, theirs in zip(torch.ops.megatron_plm.bias_rotary(turned, bias, cos, sin), plain, strict=True):
        assert torch.equal(ours, theirs)
    others = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in plain]
    backward = torch.ops.megatron_plm.bias_rotary_backward
    for ours, theirs in zip(backward(*others, cos, sin, True), backward(*plain, cos, sin, True), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("built", [True, False])
def test_the_models_rotation_is_the_same_with_the_kernel_and_without(built, monkeypatch):
    qkv, _, cos, sin = given(50, 2, 8)
    monkeypatch.setattr(cpu, "compiled", cpu.compiled if built else None)
    parts = rotated(qkv.requires_grad_(), cos[:, None, None], sin[:, None, None])
    assert ("bias_rotary" in type(parts[0].grad_fn).__name__) == built
    wanted = _reference(qkv.detach().double(), None, cos.double(), sin.double())
    (dqkv,) = torch.autograd.grad(parts, qkv, [part.detach() for part in parts])
    exact, _ = _backward_reference(*wanted, cos.double(), sin.double(), False)
    for ours, theirs in zip((*parts, dqkv), (*wanted, exact), strict=True):
        torch.testing.assert_close(ours.detach().double(), theirs, rtol=1e-5, atol=1e-5)
