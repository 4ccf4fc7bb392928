"""The arithmetic and the indices of the CUDA kernels, compiled for the host, against the references in float64."""

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_plm.kernels import activation, norm, rotary  # noqa: F401 (they make the ops known)
from megatron_plm.kernels.dropout import dropout

REPOSITORY = Path(__file__).resolve().parents[2]
OPS = torch.ops.megatron_plm
RATE, SITE, EPS = 0.3, 2, 1e-5
# bf16: what is stored is rounded to 2^-9 of itself; fp32: the rounding of sums of a few hundred.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}

# Of the rows below, 130 are more than a tile.
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the kernels for the host")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The library, called with tensors, numbers and None."""
    path = tmp_path_factory.mktemp("host") / "kernels.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    source = Path(__file__).with_name("host_kernels.cpp")
    subprocess.run(["g++", *flags, f"-I{REPOSITORY / 'csrc' / 'kernels'}", source, "-o", path], check=True, timeout=200)
    library = ctypes.CDLL(str(path))

    def call(name, *given):
        converted = []
        for value in given:
            if isinstance(value, torch.Tensor):
                assert value.is_contiguous()
                converted.append(ctypes.c_void_p(value.data_ptr()))
            elif isinstance(value, float):
                converted.append(ctypes.c_double(value))
            else:
                converted.append(ctypes.c_void_p(None) if value is None else ctypes.c_int64(int(value)))
        return getattr(library, name)(*converted)

    return call


def close(found, expected, dtype, *, summed=False):
    """`summed`: in fp32, of values that are rounded only where they are stored."""
    tolerance = TOLERANCE[torch.float32 if summed else dtype]
    assert float((found.double() - expected).norm()) <= tolerance * float(expected.norm()) + 1e-12


def some(dtype, *shape, scale=1.0):
    return (scale * torch.randn(shape)).to(dtype)


def double(*tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


def layouts(*widths):
    """(dtype, values of a vector, width) as the launches choose them, and single values."""
    for dtype, full in ((torch.float32, 4), (torch.bfloat16, 8)):
        for width in widths:
            yield from ((dtype, size, width) for size in {full, 1} if width % size == 0)


@pytest.mark.parametrize(("dtype", "size", "width"), list(layouts(320, 333)))
def test_dropout_drops_the_same_values_and_adds(host, dtype, size, width):
    keys = torch.randint(0, 2**32, (40,))
    x, residual, out = torch.ones(40, width, dtype=dtype), some(dtype, 40, width), torch.empty(40, width, dtype=dtype)
    for rate, site in itertools.product([0.02, 0.1, 0.5, 0.9], [0, 1, 2]):
        tail = (keys, out, 40, width, rate, site)
        assert host("dropout_and_sum", dtype == torch.bfloat16, size, x, None, *tail) == 0
        expected = dropout(x.double(), keys, rate, site)
        assert torch.equal(out > 0, expected > 0)
        close(out, expected, dtype)
        assert host("dropout_and_sum", dtype == torch.bfloat16, size, x, residual, *tail) == 0
        close(out, expected + residual.double(), dtype)


@pytest.mark.parametrize(("dtype", "size", "width"), list(layouts(1, 24, 320, 1000)))
@pytest.mark.parametrize(("is_rms", "rate", "rows"), [(False, RATE, 130), (True, RATE, 1), (False, 0.0, 1)])
def test_the_norm_of_a_sum_forward_and_backward(host, dtype, size, width, is_rms, rate, rows):
    torch.manual_seed(width)
    x, residual, weight = some(dtype, rows, width), some(dtype, rows, width), some(dtype, width)
    bias = None if is_rms else some(dtype, width)
    keys = torch.randint(0, 2**32, (rows,)) if rate else None
    kind = (dtype == torch.bfloat16, size)
    total, normed = torch.empty_like(x), torch.empty_like(x)
    mean, r = torch.empty(rows), torch.empty(rows)
    tail = (rows, width, rate, SITE)
    given = (x, residual, weight, bias, keys)
    assert host("add_norm", *kind, *given, total, normed, mean, r, *tail, EPS, is_rms) == 0
    exact = OPS.dropout_add_norm(*double(x, residual, weight, bias), keys, rate, SITE, EPS, is_rms)
    close(total, exact[0], dtype)
    if width > 1:  # of a single feature the norm is 0, but for the rounding of the sum
        again = OPS.dropout_add_norm(*double(total, 0 * total, weight, bias), None, 0.0, SITE, EPS, is_rms)
        close(normed, again[1], dtype)
        close(r, again[3], dtype, summed=True)

    grad_total, grad = some(dtype, rows, width), some(dtype, rows, width)
    ds, dx, dweight, dbias = torch.empty_like(x), torch.empty_like(x), torch.zeros(width), torch.zeros(width)
    for of_total in (grad_total, None):
        assert (
            host(
                "add_norm_backward", *kind, of_total, grad, total, weight, mean, r, keys, ds, dx, dweight, dbias,
                *tail, is_rms,
            )
            == 0
        )  # fmt: skip
        statistics = (mean[:0] if is_rms else mean).double(), r.double()
        exact = OPS.dropout_add_norm_backward(
            *double(of_total, grad, total, weight), *statistics, keys, rate, SITE, is_rms, True
        )
        if width > 1 or of_total is not None:
            close(ds, exact[0], dtype)
        if rate:
            expected = dropout(ds.double(), keys, rate, SITE)
            assert torch.equal(dx == 0, expected == 0)
            close(dx, expected, dtype)
        if width > 1:
            close(dweight, exact[2], dtype, summed=True)
        close(dbias, exact[3], dtype, summed=True)


@pytest.mark.parametrize(("dtype", "size", "width"), list(layouts(24, 320)))
@pytest.mark.parametrize(("kind", "with_bias", "rows"), [(0, True, 130), (1, True, 130), (1, False, 1), (2, True, 130)])
def test_activations_forward_and_backward(host, dtype, size, width, kind, with_bias, rows):
    torch.manual_seed(width)
    size = max(size, 2) if kind == 2 else size
    x, bias = some(dtype, rows, width, scale=3.0), some(dtype, width) if with_bias else None
    outputs = width // 2 if kind == 2 else width
    y, grad = torch.empty(rows, outputs, dtype=dtype), some(dtype, rows, outputs)
    head = (dtype == torch.bfloat16, size, kind)
    assert host("activation", *head, x, bias, y, rows, width) == 0
    given = double(x, bias)
    exact = OPS.bias_swiglu(*given) if kind == 2 else OPS.bias_gelu(*given, kind == 1)
    close(y, exact, dtype)
    dx, dbias = torch.empty_like(x), torch.zeros(width)
    assert host("activation_backward", *head, grad, x, bias, dx, dbias, rows, width) == 0
    given = double(grad, x, torch.zeros(width) if bias is None else bias)
    exact = OPS.bias_swiglu_backward(*given) if kind == 2 else OPS.bias_gelu_backward(*given, kind == 1)
    close(dx, exact[0], dtype)
    close(dbias, exact[1], dtype, summed=True)


def test_gelu_of_large_numbers_is_flat_and_without_overflow(host):
    x = torch.tensor([[-80.0, -12.0, -6.0, 6.0, 12.0, 80.0, 0.0, -0.0]])
    y, dx, dbias = torch.empty_like(x), torch.empty_like(x), torch.zeros(8)
    for kind in (0, 1):
        host("activation", 0, 1, kind, x, None, y, 1, 8)
        torch.testing.assert_close(y, x.clamp_min(0), rtol=1e-6, atol=1e-7)
        host("activation_backward", 0, 1, kind, torch.ones_like(x), x, None, dx, dbias, 1, 8)
        torch.testing.assert_close(dx, torch.tensor([[0, 0, 0, 1, 1, 1, 0.5, 0.5]]), rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("head_size", "size"), [(16, 1), (16, 4), (16, 8), (24, 4), (2, 1), (64, 8)])
@pytest.mark.parametrize(("with_bias", "rows"), [(True, 130), (False, 1)])
def test_rotary_positions_forward_and_backward(host, dtype, head_size, size, with_bias, rows):
    torch.manual_seed(head_size)
    heads = 5
    qkv, bias = some(dtype, rows, heads, 3, head_size), some(dtype, heads * 3 * head_size) if with_bias else None
    # Not alike in both halves of a head, as angles are: the op is the general one.
    cos, sin = some(dtype, rows, head_size), some(dtype, rows, head_size)
    q, k, v = (torch.empty(rows, heads, head_size, dtype=dtype) for _ in range(3))
    shape, kind = (rows, heads, head_size), (dtype == torch.bfloat16, size)
    assert host("rotary", *kind, qkv, bias, cos, sin, q, k, v, *shape) == 0
    for found, expected in zip((q, k, v), OPS.bias_rotary(*double(qkv, bias, cos, sin)), strict=True):
        close(found, expected, dtype)
    grads = [some(dtype, rows, heads, head_size) for _ in range(3)]
    dqkv, dbias = torch.empty_like(qkv), torch.zeros(heads * 3 * head_size)
    assert host("rotary_backward", *kind, *grads, cos, sin, dqkv, dbias, *shape) == 0
    exact = OPS.bias_rotary_backward(*double(*grads, cos, sin), True)
    close(dqkv, exact[0], dtype)
    close(dbias, exact[1], dtype, summed=True)


def test_the_largest_sizes_of_the_issue(host):
    """4,097 rows of 320 and one row of 1, each op once in fp32 by vectors and by single values."""
    for rows, width, size in ((4097, 320, 4), (1, 1, 1)):
        x, residual, weight = (some(torch.float32, *shape) for shape in ((rows, width), (rows, width), (width,)))
        keys = torch.randint(0, 2**32, (rows,))
        total, normed, mean, r = torch.empty_like(x), torch.empty_like(x), torch.empty(rows), torch.empty(rows)
        given = (x, residual, weight, None, keys, total, normed, mean, r, rows, width, RATE, SITE, EPS, True)
        assert host("add_norm", 0, size, *given) == 0
        exact = OPS.dropout_add_norm(*double(x, residual, weight), None, keys, RATE, SITE, EPS, True)
        close(normed, exact[1], torch.float32)
        y, dx, dbias = torch.empty_like(x), torch.empty_like(x), torch.zeros(width)
        assert host("activation", 0, size, 0, x, weight, y, rows, width) == 0
        close(y, OPS.bias_gelu(*double(x, weight), False), torch.float32)
        assert host("activation_backward", 0, size, 0, residual, x, weight, dx, dbias, rows, width) == 0
        exact = OPS.bias_gelu_backward(*double(residual, x, weight), False)
        close(dx, exact[0], torch.float32)
        assert float((dbias - exact[1]).norm()) <= 1e-5 * float(exact[1].norm())  # 4,097 rows, added one by one
