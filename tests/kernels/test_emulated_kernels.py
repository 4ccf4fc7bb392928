"""The CUDA kernels, run on the host with a thread for each of CUDA's, against the references in float64: sums across
threads, tiles and blocks, which the arithmetic of one thread doesn't show."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_plm.kernels import activation, norm, rotary  # noqa: F401 (they make the ops known)
from megatron_plm.kernels.dropout import dropout

REPOSITORY = Path(__file__).resolve().parents[2]
OPS = torch.ops.megatron_plm
EPS = 1e-5
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the kernels for the host")


class Norm(ctypes.Structure):
    """As emulated_kernels.cpp has it."""

    POINTERS = (
        "x", "residual", "weight", "bias", "grad_total", "grad", "keys",
        "total", "normed", "ds", "dx", "mean", "r", "partials",
    )  # fmt: skip
    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in ("rows", "width", "is_rms", "max_blocks")),
        ("rate", ctypes.c_double),
        ("eps", ctypes.c_double),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulated") / "kernels.so"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC", "-pthread"]
    source = Path(__file__).with_name("emulated_kernels.cpp")
    subprocess.run(["g++", *flags, f"-I{REPOSITORY / 'csrc' / 'kernels'}", source, "-o", path], check=True, timeout=200)
    return ctypes.CDLL(str(path))


def call(function, *given):
    assert all(value.is_contiguous() for value in given if isinstance(value, torch.Tensor))
    function(*(ctypes.c_void_p(v.data_ptr()) if isinstance(v, torch.Tensor) else ctypes.c_int64(v) for v in given))


def some(dtype, *shape):
    return torch.randn(shape).to(dtype)


def unwritten(like, *shape):
    """Of what a kernel does not write, nothing is close to anything."""
    return torch.full(shape or like.shape, torch.nan, dtype=like.dtype)


def close(found, expected, dtype):
    assert float((found.double() - expected).norm()) <= TOLERANCE[dtype] * float(expected.norm())


@pytest.mark.parametrize(
    ("dtype", "fit", "width", "rows"),
    [
        (torch.float32, 0, 256, 13),
        (torch.bfloat16, 0, 320, 9),
        (torch.float32, 1, 640, 3),
        (torch.bfloat16, 1, 1280, 3),
        (torch.bfloat16, 2, 2560, 2),
        (torch.bfloat16, 3, 5120, 2),
        (torch.float32, 4, 333, 3),
    ],
)
@pytest.mark.parametrize(("is_rms", "rate"), [(False, 0.3), (True, 0.0)])
def test_the_norm_of_a_sum(library, dtype, fit, width, rows, is_rms, rate):
    torch.manual_seed(width)
    x, residual, grad_total, grad = (some(dtype, rows, width) for _ in range(4))
    weight, bias = some(dtype, width), None if is_rms else some(dtype, width)
    keys = torch.randint(0, 2**32, (rows,)) if rate else None
    made = {name: unwritten(x) for name in ("total", "normed", "ds", "dx")}
    made |= {name: unwritten(torch.empty(0), rows) for name in ("mean", "r")}
    # Two blocks: each has several rows to go through.
    made["partials"] = unwritten(torch.empty(0), 2, 2, width)
    given = {"x": x, "residual": residual, "weight": weight, "bias": bias, "grad_total": grad_total, "grad": grad}
    tensors = {**given, "keys": keys, **made}
    pointers = {name: None if value is None else value.data_ptr() for name, value in tensors.items()}
    of = Norm(**pointers, rows=rows, width=width, is_rms=is_rms, max_blocks=2, rate=rate, eps=EPS)
    assert library.norm(int(dtype == torch.bfloat16), fit, ctypes.byref(of)) == 0

    wide = {name: None if value is None else value.double() for name, value in tensors.items()}
    total, mean, r = made["total"], made["mean"], made["r"]
    close(total, wide["residual"] + dropout(wide["x"], keys, rate, 2), dtype)
    zeros, shape = torch.zeros_like(wide["x"]), (wide["weight"], wide["bias"])
    _, normed, _, exact_r = OPS.dropout_add_norm(wide["total"], zeros, *shape, None, 0.0, 2, EPS, is_rms)
    close(made["normed"], normed, dtype)
    close(r, exact_r, torch.float32)
    statistics = (mean[:0] if is_rms else mean).double(), r.double()
    ds, _, dweight, dbias = OPS.dropout_add_norm_backward(
        wide["grad_total"], wide["grad"], wide["total"], wide["weight"], *statistics, keys, rate, 2, is_rms, True
    )
    close(made["ds"], ds, dtype)
    for part, exact in zip(made["partials"].sum(0), (dweight, dbias), strict=True):
        close(part, exact, torch.float32)
    if rate:
        close(made["dx"], dropout(made["ds"].double(), keys, rate, 2), dtype)


@pytest.mark.parametrize(("name", "dtype", "width"), [("gelu", torch.float32, 132), ("swiglu", torch.bfloat16, 264)])
def test_activations(library, name, dtype, width):
    torch.manual_seed(0)
    rows = 130  # more than a tile
    x, bias = some(dtype, rows, width), some(dtype, width)
    grad = some(dtype, rows, width // 2 if name == "swiglu" else width)
    y, dx, dbias, partials = unwritten(grad), unwritten(x), unwritten(bias), unwritten(torch.empty(0), 2, width)
    call(getattr(library, name), x, bias, y, grad, dx, dbias, partials, rows, width)
    wide, tail = [value.double() for value in (x, bias)], (False,) if name == "gelu" else ()
    close(y, getattr(OPS, f"bias_{name}")(*wide, *tail), dtype)
    exact = getattr(OPS, f"bias_{name}_backward")(grad.double(), *wide, *tail)
    close(dx, exact[0], dtype)
    close(dbias, exact[1], dtype)


def test_rotary_positions(library):
    torch.manual_seed(0)
    rows, heads, size = 130, 7, 24
    qkv, bias = torch.randn(rows, heads, 3, size), torch.randn(heads * 3 * size)
    cos, sin = torch.randn(rows, size), torch.randn(rows, size)
    grads = [torch.randn(rows, heads, size) for _ in range(3)]
    results = [unwritten(grad) for grad in grads]
    dqkv, dbias, partials = unwritten(qkv), unwritten(bias), unwritten(qkv, 2, heads * 3 * size)
    call(library.rotary, qkv, bias, cos, sin, *results, *grads, dqkv, dbias, partials, rows, heads, size)
    for found, exact in zip(results, OPS.bias_rotary(*(v.double() for v in (qkv, bias, cos, sin))), strict=True):
        close(found, exact, torch.float32)
    exact = OPS.bias_rotary_backward(*(v.double() for v in (*grads, cos, sin)), True)
    close(dqkv, exact[0], torch.float32)
    close(dbias, exact[1], torch.float32)


def test_dropout_and_sum(library):
    x, residual, keys = torch.randn(20, 320), torch.randn(20, 320), torch.randint(0, 2**32, (20,))
    sums = unwritten(x)
    call(library.dropout_add, x, residual, keys, sums, 20, 320)
    close(sums, residual.double() + dropout(x.double(), keys, 0.3, 2), torch.float32)
