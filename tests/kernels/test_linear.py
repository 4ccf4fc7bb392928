"""The linear map against float64, forward and backward, at ordinary and odd sizes."""

import pytest
import torch
import torch.nn.functional as F
from other_threads import with_threads

from megatron_plm.kernels import cpu
from megatron_plm.kernels import linear as module
from megatron_plm.kernels.linear import Linear, linear, transposed

SIZES = [((4, 7, 320), 960), ((4097, 320), 33), ((1, 64), 1), ((3, 1), 5), ((2, 5, 13), 17), ((513, 1280), 320)]


def exact(x, weight, bias, dy):
    """Output and gradients in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = F.linear(*leaves)
    y.backward(dy.double())
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def close(found, expected, terms):
    """Within the rounding of a sum of `terms` products: √terms · 2⁻²³ of the largest value, with room for its tail."""
    tolerance = 8 * terms**0.5 * 2**-23 * float(expected.abs().max()) + 1e-12
    return float((found.double() - expected).abs().max()) <= tolerance


@pytest.mark.parametrize(("shape", "width"), SIZES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_output_and_gradients_equal_float64(shape, width, with_bias):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(width, shape[-1], requires_grad=True)
    bias = torch.randn(width, requires_grad=True) if with_bias else None
    dy = torch.randn(*shape[:-1], width)
    y = linear(x, weight, bias)
    y.backward(dy)
    tokens = x.numel() // shape[-1]
    found = [y.detach(), x.grad, weight.grad] + ([bias.grad] if with_bias else [])
    for value, expected, terms in zip(
        found, exact(x, weight, bias, dy), [shape[-1], width, tokens, tokens], strict=False
    ):
        assert value.shape == expected.shape
        assert close(value, expected, terms)


def test_inputs_and_gradients_may_lie_in_any_order_in_memory():
    torch.manual_seed(0)
    x = torch.randn(20, 6, 9).transpose(0, 1).requires_grad_()
    weight, bias = torch.randn(9, 4).t().requires_grad_(), torch.randn(4, requires_grad=True)
    y = linear(x, weight, bias)
    dy = torch.ones(()).expand(y.shape)
    gradients = torch.autograd.grad(y, (x, weight, bias), dy)
    expected = exact(x, weight, bias, dy)
    assert all(close(found, e, 120) for found, e in zip((y.detach(), *gradients), expected, strict=True))


def test_only_the_gradients_that_are_needed_are_made():
    layer = Linear(8, 4)
    layer.requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert close(x.grad, layer.weight.double().sum(0).expand(3, 8), 4)


def test_a_bias_is_trained_beside_a_frozen_weight():
    layer, x = Linear(8, 4), torch.randn(3, 8)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert torch.equal(layer.bias.grad, torch.full((4,), 3.0))


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (7, 130), (300, 64), (4097, 33), (512, 320)])
def test_rows_and_columns_are_exchanged_and_summed_alike_by_any_number_of_threads(shape, built, monkeypatch):
    monkeypatch.setattr(cpu, "compiled", cpu.compiled if built else None)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = with_threads((1, 2, 3) if built else (1,), lambda: transposed(x, with_sums=True))
    for out, sums in found:
        assert out.is_contiguous()
        assert torch.equal(out, x.t())
        assert torch.equal(sums, found[0][1])
        assert close(sums, x.double().sum(0), max(shape[0], 1))
    assert transposed(x.t(), with_sums=False)[1] is None
    assert torch.equal(transposed(x.t(), with_sums=False)[0], x), "of another order in memory"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_take_the_reference(dtype):
    x, weight = torch.randn(5, 8, dtype=dtype), torch.randn(3, 8, dtype=dtype)
    assert torch.equal(linear(x, weight, None), F.linear(x, weight))


def test_without_onednn_the_reference_runs(monkeypatch):
    x, weight, bias = torch.randn(5, 8), torch.randn(3, 8), torch.randn(3)
    monkeypatch.setattr(module, "_HAS_ONEDNN", False)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


def test_no_tokens_give_no_output():
    assert linear(torch.randn(0, 8), torch.randn(3, 8), None).shape == (0, 3)


def test_the_fast_path_is_taken_where_torch_has_it():
    if not module._HAS_ONEDNN:
        pytest.skip("this torch was built without oneDNN")
    y = linear(torch.randn(5, 8), torch.randn(3, 8, requires_grad=True), None)
    assert "OneDnnLinear" in type(y.grad_fn).__name__
