"""The fused ops against the modules that they stand for, differentiated by torch: values, gradients, sizes, dtypes."""

import itertools

import pytest
import torch
from fused_cases import CASES, EPS, RATE, SITE, add_norm_case, angles, keys_of, outcome, rotary_case

from megatron_plm.kernels.dropout import dropout, dropout_add
from megatron_plm.kernels.norm import dropout_add_norm

SIZES = [(5, 320), (1, 1), (4097, 24), (3, 7, 48)]


@pytest.mark.parametrize(("name", "shape"), list(itertools.product(CASES, SIZES)))
def test_values_and_gradients_are_those_of_the_modules(name, shape):
    torch.manual_seed(0)
    op, plain, given = CASES[name](shape, torch.float64)
    for found, expected in zip(outcome(op, given), outcome(plain, given), strict=True):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "dtype"), list(itertools.product(CASES, [torch.float32, torch.bfloat16])))
def test_low_precision_loses_only_the_rounding_of_what_is_stored(name, dtype):
    """Against float64 arithmetic on the same stored values. fp32: rounding in sums of 320 features or 64 tokens. bf16:
    each result is rounded once (2^-9), as is the sum that a norm and its gradient read, which the norm magnifies."""
    torch.manual_seed(0)
    op, _, given = CASES[name]((64, 320), dtype)
    torch.manual_seed(0)
    _, exact, _ = CASES[name]((64, 320), torch.float64)  # the same keys; angles are those before rounding
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-6}[dtype]
    for found, expected in zip(outcome(op, given), outcome(exact, [v.double() for v in given]), strict=True):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == dtype
            assert float((ours.double() - theirs).norm() / theirs.norm()) < tolerance


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name):
    torch.manual_seed(0)
    op, _, given = CASES[name]((2, 3), torch.float64)
    assert torch.autograd.gradcheck(op, [value.requires_grad_() for value in given])


def test_the_norm_alone_and_the_sum_alone_have_gradients():
    """A post-LN block uses nothing but the norm; the sum alone gives the weights none."""
    torch.manual_seed(0)
    op, plain, given = add_norm_case((4, 6), torch.float64)
    for index in (0, 1):
        ours, theirs = (outcome(lambda *v, f=f, i=index: (f(*v)[i],), given) for f in (op, plain))
        for found, expected in zip(ours[1], theirs[1], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_inputs_and_gradients_may_lie_in_any_order_in_memory():
    torch.manual_seed(0)
    op, _, given = rotary_case((6, 24), torch.float64, with_bias=False)
    turned = [given[0].transpose(0, 1).contiguous().transpose(0, 1)]
    assert not turned[0].is_contiguous()
    for function in (lambda x: (op(x)[0].transpose(0, 1),), lambda x: (op(x)[2].transpose(1, 2),)):
        _, (grad,) = outcome(function, turned)
        _, (same,) = outcome(function, [given[0].contiguous()])
        torch.testing.assert_close(grad, same)
    assert all(part.is_contiguous() for part in op(*turned))


def test_queries_keys_and_values_have_memory_of_their_own():
    op, _, given = rotary_case((6, 24), torch.float32)
    parts = op(*given)
    assert len({part.untyped_storage().data_ptr() for part in (*parts, given[0])}) == 4
    assert all(part.untyped_storage().nbytes() == part.numel() * 4 for part in parts)


def samples():
    """Arguments of every op as it is registered, forward ones with gradients: (op, arguments)."""
    ops, T, N, H, D = torch.ops.megatron_plm, 5, 2, 4, 6

    def some(*shape):
        return torch.randn(shape, requires_grad=True)

    keys, (cos, sin) = keys_of((T,)), angles(T, H, torch.float32)
    for by_tanh in (False, True):
        yield ops.bias_gelu, (some(T, D), some(D), by_tanh)
        yield ops.bias_gelu_backward, (torch.randn(T, D), torch.randn(T, D), torch.randn(D), by_tanh)
    yield ops.bias_gelu, (some(T, D), None, False)
    yield ops.bias_gelu_backward, (torch.randn(T, D), torch.randn(T, D), None, False)
    for bias in (some(D), None):
        yield ops.bias_swiglu, (some(T, D), bias)
        detached = None if bias is None else bias.detach()
        yield ops.bias_swiglu_backward, (torch.randn(T, D // 2), torch.randn(T, D), detached)
    for bias in (some(3 * N * H), None):
        yield ops.bias_rotary, (some(T, N, 3, H), bias, cos, sin)
        grads = [torch.randn(T, N, H) for _ in range(3)]
        yield ops.bias_rotary_backward, (*grads, cos, sin, bias is not None)
    for residual in (some(T, D), None):
        yield ops.dropout_add, (some(T, D), residual, keys, RATE, SITE)
    for is_rms, rate, bias in [(False, RATE, some(D)), (False, 0.0, None), (True, RATE, None), (True, 0.0, None)]:
        used = keys if rate else None
        yield ops.dropout_add_norm, (some(T, D), some(T, D), some(D), bias, used, rate, SITE, EPS, is_rms)
        mean = torch.randn(0 if is_rms else T)
        tail = (torch.rand(T), used, rate, SITE, is_rms, bias is not None)
        for grad in (torch.randn(T, D), None):
            yield (
                ops.dropout_add_norm_backward,
                (grad, torch.randn(T, D), torch.randn(T, D), torch.randn(D), mean, *tail),
            )


@pytest.mark.parametrize("index", range(len(list(samples()))))
def test_schema_shapes_without_data_and_tracing_hold(index):
    torch.manual_seed(0)
    op, given = list(samples())[index]
    torch.library.opcheck(op.default, given)


def test_every_registered_op_is_among_the_samples():
    registered = {
        schema.name.removeprefix("megatron_plm::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("megatron_plm::")
    }
    # Those of attention are there where another test has imported it, and test_cpu_attention.py has samples of them.
    assert registered - {"packed_attention", "packed_attention_backward"} == {op.__name__ for op, _ in samples()}


def test_dropout_add_drops_what_dropout_does_to_the_bit():
    x, residual, keys = torch.randn(2, 9, 40), torch.randn(2, 9, 40), keys_of((2, 9))
    expected = residual + dropout(x, keys, RATE, SITE)
    assert torch.equal(dropout_add(x, residual, keys, rate=RATE, site=SITE), expected)
    weight = torch.ones(40)
    given = {"rate": RATE, "site": SITE, "eps": EPS, "kind": "RMSNorm"}
    assert torch.equal(dropout_add_norm(x, residual, weight, None, keys, **given)[0], expected)


def test_without_tokens_there_is_nothing_and_no_error():
    op, _, given = add_norm_case((0, 8), torch.float32)
    results, grads = outcome(op, given)
    assert [result.shape for result in results] == [(0, 8), (0, 8)]
    assert not grads[2].any()
