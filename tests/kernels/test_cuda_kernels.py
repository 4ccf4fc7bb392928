"""The CUDA kernels compile without warnings and register themselves; on a GPU they compute what their references do."""

import itertools
import re
import subprocess
import sys

import pytest
import torch
from fused_cases import CASES, outcome
from processes import REPOSITORY, environment

from megatron_plm.errors import UserError, run_command
from megatron_plm.kernels import build as module
from megatron_plm.kernels.build import ARCHITECTURES, build, find_nvcc, main
from megatron_plm.kernels.library import load_cuda_kernels

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc; the CUDA toolkit has it")

# What of torch's stable ABI a build without CUDA lacks; nothing here comes to call it.
STUB = """
int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }
int torch_c10_cuda_check_msg(int e, const char* a, const char* b, unsigned l, _Bool d, char** m) { return 1; }
void torch_c10_cuda_free_error_msg(char* message) {}
"""

# With the library loaded, and tensors of the CPU handed to its implementations for CUDA: they unpack all arguments, and
# refuse the first tensor.
CALL_ALL = """
import ctypes, sys, torch
if torch.version.cuda is None:
    ctypes.CDLL(sys.argv[2])
from test_fused_ops import samples
torch.ops.load_library(sys.argv[1])
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
names = set()
for op, given in samples():
    given = [value.detach() if isinstance(value, torch.Tensor) else value for value in given]
    try:
        op.default.redispatch(cuda, *given)
    except RuntimeError as error:
        assert "must be on a CUDA device" in str(error), (op, error)
        names.add(op.__name__)
print(len(names))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The library as `make kernels` builds it."""
    path = tmp_path_factory.mktemp("kernels") / "kernels.so"
    build(path, ARCHITECTURES)
    return path


@needs_nvcc
@pytest.mark.timeout(900)
def test_the_sources_compile_for_three_architectures_without_warnings(library):
    assert set(re.findall(rb"sm_\d+", library.read_bytes())) == {b"sm_80", b"sm_90", b"sm_100"}
    assert list(library.parent.iterdir()) == [library]


@needs_nvcc
@pytest.mark.timeout(900)
def test_every_op_has_an_implementation_with_its_arguments(library, tmp_path):
    (tmp_path / "stub.c").write_text(STUB)
    stub = tmp_path / "stub.so"
    flags = ["-w", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so"]
    subprocess.run(["gcc", *flags, tmp_path / "stub.c", "-o", stub], check=True)
    path = f"{REPOSITORY}:{REPOSITORY / 'tests'}:{REPOSITORY / 'tests' / 'kernels'}"
    done = subprocess.run(
        [sys.executable, "-c", CALL_ALL, library, stub],
        capture_output=True, text=True, timeout=300, env=environment(PYTHONPATH=path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "9\n"


def test_three_architectures_are_built_for():
    assert ARCHITECTURES == ("80", "90", "100")


def test_without_nvcc_or_sources_the_build_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(module, "find_nvcc", lambda: None)
    assert run_command(main, ["--output", str(tmp_path / "x.so")]) == 2
    assert "install the CUDA toolkit" in capsys.readouterr().err
    monkeypatch.setattr(module, "SOURCES", tmp_path / "none")
    with pytest.raises(UserError, match="from a clone of the repository"):
        build(tmp_path / "x.so", ["90"])
    with pytest.raises(UserError, match="compute capability"):
        main(["--arch", "70"])
    assert list(tmp_path.iterdir()) == []


@needs_nvcc
def test_a_build_that_fails_leaves_the_library_as_it_was(monkeypatch, tmp_path):
    sources, library = tmp_path / "sources", tmp_path / "kernels.so"
    sources.mkdir()
    (sources / "broken.cu").write_text("this is no C++\n")
    library.write_bytes(b"before")
    monkeypatch.setattr(module, "SOURCES", sources)
    with pytest.raises(UserError, match=r"broken\.cu"):
        build(library, ["90"])
    assert library.read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.so", "sources"]


# bf16: what is stored is rounded to 2^-9 of itself, the sum of a norm before it is read again. fp32: sums of thousands.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
SIZES = [(1, 1), (5, 320), (4097, 320), (130, 1280), (64, 2560), (33, 1001), (40, 5120)]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "shape", "dtype"), list(itertools.product(CASES, SIZES, TOLERANCE)))
def test_on_a_gpu_the_kernels_compute_what_their_references_do(name, shape, dtype):
    if not load_cuda_kernels():
        pytest.skip("the kernels are not built: make kernels")
    if name.startswith(("layer", "rms")) and shape == (1, 1):
        pytest.skip("the norm of one feature is 0, but for the rounding of the sum")
    torch.manual_seed(0)
    op, _, given = CASES[name](shape, dtype)
    torch.manual_seed(0)
    on_gpu, _, _ = CASES[name](shape, dtype, device="cuda")
    exact = outcome(op, [value.double() for value in given])
    found = outcome(on_gpu, [value.cuda() for value in given])
    again = outcome(on_gpu, [value.cuda() for value in given])
    for ours, same, theirs in zip(*([*results, *grads] for results, grads in (found, again, exact)), strict=True):
        assert torch.equal(ours, same), "sums in an order of their own each time"
        assert float((ours.cpu().double() - theirs).norm() / theirs.norm()) < TOLERANCE[dtype]
