"""The compiled CUDA kernels: where `make kernels` puts them, and how torch comes to know them.

Each op of this package is defined in Python, with a reference that runs everywhere. The library, built from
csrc/kernels, adds an implementation for CUDA tensors of float32 and bfloat16 to the same ops; torch takes that of the
device a tensor is on.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor

from megatron_plm.errors import UserError

LIBRARY = Path(__file__).with_name("_cuda_kernels.so")


@functools.cache
def load_cuda_kernels() -> bool:
    """Let the ops use the compiled kernels on CUDA tensors; returns whether they do.

    False where torch has no CUDA, or where `make kernels` has not been run. Raises UserError where the library is there
    and this torch cannot load it.
    """
    if torch.version.cuda is None or not LIBRARY.is_file():
        return False
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise UserError(
            f"{LIBRARY}: torch {torch.__version__} cannot load it ({error}); build it with this torch: make kernels"
        ) from None
    return True


def require_kernels(device: torch.device) -> None:
    """Raise UserError where `device` would run the references instead of the kernels, though it could have these."""
    if device.type == "cuda" and not load_cuda_kernels():
        raise UserError(
            f"--fused-kernels: no compiled kernels in {LIBRARY}, and on a GPU their references are slower than the "
            "blocks without; run `make kernels`, or leave the flag out"
        )


def fused_path(device: torch.device) -> str:
    """In words, what computes the fused ops on `device`."""
    if device.type == "cuda" and load_cuda_kernels():
        return "CUDA kernels"
    return "their references in PyTorch, but for the rotation (slower than none: the kernels are for CUDA)"


def wide(x: Tensor) -> Tensor:
    """`x` in the type that the ops compute in: float64 stays, all else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over all dims but the last, in the type of `x`, as `dtype`."""
    return x.reshape(-1, x.shape[-1]).sum(0).to(dtype)
