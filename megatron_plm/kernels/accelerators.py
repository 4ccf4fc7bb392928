"""Kernels of other packages, each found where it is installed and used where a flag names it: none is needed.

apex (NVIDIA's) has norms and a kernel of AdamW, TransformerEngine norms, flash-attn attention over packed sequences,
and FlashAttention-3, a package of its own, kernels for Hopper that torch's variable-length attention can run on. They
compute what torch's own do, on CUDA tensors only, and know no DTensor. A package is imported here, inside a function,
when it was chosen.
"""

import importlib
from collections.abc import Callable, Sequence
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
)

from megatron_plm.errors import UserError

TORCH = "torch"  # the choice that needs no package
_NORM, _ATTENTION, _OPTIMIZER = (f"--{what}-implementation" for what in ("norm", "attention", "optimizer"))
_TITLES = {
    "apex": "NVIDIA's apex",
    "transformer_engine": "TransformerEngine",
    "flash_attn": "flash-attn",
    "flash_attn_3": "FlashAttention-3",
}
_INSTALL = {
    "apex": "build https://github.com/NVIDIA/apex with --cpp_ext and --cuda_ext",
    "transformer_engine": "pip install --no-build-isolation 'transformer_engine[pytorch]>=2'",
    "flash_attn": "pip install --no-build-isolation flash-attn",
    "flash_attn_3": "build https://github.com/Dao-AILab/flash-attention in its folder hopper",
}
_COMPILED = ("fused_layer_norm_cuda", "amp_C")  # modules of an apex that was built with its CUDA extensions
_FA3 = "FA3"  # torch's name of it
_activated: set[str] = set()  # by this module: another's choice is left alone
_HOPPER = 9  # the compute capability that FlashAttention-3 is written for

# Attention inside each sequence, of q, k, v [T, N, H], cu_seqlens, the longest length, causal, dropout; [T, N, H].
VarlenAttention = Callable[[Tensor, Tensor, Tensor, Tensor, int, bool, float], Tensor]

# One step of AdamW, in place: lists of gradients, parameters, first and second moments, all fp32; learning rate, the
# two betas, epsilon, the number of the step, from 1, and weight decay.
AdamKernel = Callable[[list[list[Tensor]], float, float, float, float, int, float], None]


def require_accelerators(
    device: torch.device, *, norm: str = TORCH, attention: str = TORCH, optimizer: str = TORCH
) -> None:
    """Raise UserError where a package that was chosen for one of these cannot be used on `device`."""
    chosen: dict[str, tuple[str, Callable[[str], object]]] = {
        _NORM: (norm, norm_types),
        _ATTENTION: (attention, _find_attention),
        _OPTIMIZER: (optimizer, adam_kernel),
    }
    for flag, (package, find) in chosen.items():
        if package == TORCH:
            continue
        if device.type != "cuda":
            raise UserError(
                f"{flag} {package}: {_TITLES[package]} runs on a GPU only, and torch sees none here; leave the flag out"
            )
        find(package)
        if package == "flash_attn_3" and torch.cuda.get_device_capability(device)[0] != _HOPPER:
            raise UserError(
                f"{flag} {package}: {_TITLES[package]} runs on Hopper GPUs (H100, H200) only, not on "
                f"{torch.cuda.get_device_name(device)}; leave the flag out"
            )


def are_usable(device: torch.device, **chosen: str) -> bool:
    """Whether `require_accelerators` finds nothing against what is chosen."""
    try:
        require_accelerators(device, **chosen)
    except UserError:
        return False
    return True


def norm_types(package: str) -> tuple[type[nn.Module], type[nn.Module]]:
    """The package's LayerNorm and RMSNorm. Raises UserError where it can't be imported."""
    if package == "apex":
        types = _imported(_NORM, package, "apex.normalization", ("FusedLayerNorm", "FusedRMSNorm"), _COMPILED[0])
    else:
        types = _imported(_NORM, package, "transformer_engine.pytorch", ("LayerNorm", "RMSNorm"))
        version = str(importlib.import_module(package).__version__)
        # The norms of older ones compute in the dtype that they were made with, not in that of FSDP2's weights.
        if int(version.split(".")[0]) < 2:
            raise UserError(
                f"{_NORM} {package}: {_TITLES[package]} {version} is too old; {_INSTALL[package]}, or leave the flag "
                "out"
            )
    return types[0], types[1]


def replace_norms(model: nn.Module, package: str) -> None:
    """Let the package's norms stand for torch's in `model`, in place, with the same parameters."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, norm_like(module, package))


def norm_like(norm: nn.LayerNorm | nn.RMSNorm, package: str) -> nn.Module:
    """The package's norm that stands for torch's, with its parameters."""
    layer_norm, rms_norm = norm_types(package)
    kind = rms_norm if isinstance(norm, nn.RMSNorm) else layer_norm
    # apex has no argument for the device, and TransformerEngine without one takes the GPU.
    arguments: dict[str, Any] = {"device": "meta"} if package == "transformer_engine" else {}
    with torch.device("meta"):
        made = kind(norm.normalized_shape[0], eps=norm.eps, **arguments)
    for name, parameter in norm.named_parameters():
        setattr(made, name, parameter)
    return made


def attention_by(package: str) -> VarlenAttention | None:
    """Let `package` attend over packed sequences of 16-bit numbers, from now on: flash-attn's function for it, or none
    where torch's own is to be called, be it with FlashAttention-3 behind it. That is then so for all of this process.

    Raises UserError where the package can't be imported.
    """
    if current_flash_attention_impl() == _FA3 and _activated:
        restore_flash_attention_impl()
        _activated.clear()
    if package == "flash_attn":
        return _flash_varlen(package)
    if package == "flash_attn_3":
        _find_attention(package)
        activate_flash_attention_impl(_FA3)
        _activated.add(package)
    return None


def _find_attention(package: str) -> None:
    if package == "flash_attn":
        _flash_varlen(package)
        return
    _imported(_ATTENTION, package, "flash_attn_interface", ())
    if not all(hasattr(torch.ops.flash_attn_3, name) for name in ("fwd", "bwd")):
        raise UserError(
            f"{_ATTENTION} {package}: the flash_attn_interface that is installed has no ops torch.ops.flash_attn_3.fwd "
            f"and bwd, which torch calls; {_INSTALL[package]}, or leave the flag out"
        )


def _flash_varlen(package: str) -> VarlenAttention:
    (function,) = _imported(_ATTENTION, package, package, ("flash_attn_varlen_func",))

    def attend(
        q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, cuts: Tensor, longest: int, causal: bool, dropout: float
    ) -> Tensor:
        out_TNH: Tensor = function(q_TNH, k_TNH, v_TNH, cuts, cuts, longest, longest, dropout_p=dropout, causal=causal)
        return out_TNH

    return attend


def adam_kernel(package: str = "apex") -> AdamKernel:
    """The kernel of apex's FusedAdam. Raises UserError where it can't be imported."""
    (apply,) = _imported(_OPTIMIZER, package, "apex.multi_tensor_apply", ("multi_tensor_applier",), _COMPILED[1])
    kernel = importlib.import_module(_COMPILED[1]).multi_tensor_adam

    def step(
        lists: list[list[Tensor]],
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        count: int,
        weight_decay: float,
    ) -> None:
        no_overflow = torch.zeros(1, dtype=torch.int32, device=lists[0][0].device)
        decoupled = bias_corrected = 1
        apply(kernel, no_overflow, lists, lr, beta1, beta2, eps, count, decoupled, bias_corrected, weight_decay)

    return step


def _imported(flag: str, package: str, module: str, names: Sequence[str], compiled: str | None = None) -> list[Any]:
    """The objects of these names in `module`, whose kernels are in `compiled`."""
    try:
        found = importlib.import_module(module)
        if compiled:
            importlib.import_module(compiled)
        return [getattr(found, name) for name in names]
    except Exception as error:  # what was compiled for another torch fails in many ways
        raise UserError(
            f"{flag} {package}: {_reason(package, module, error)}; {_INSTALL[package]}, or leave the flag out"
        ) from None


def _reason(package: str, module: str, error: Exception) -> str:
    spec = find_spec(module.partition(".")[0])
    if spec is None:
        return f"{_TITLES[package]} is not installed"
    if package == "apex" and not PathFinder.find_spec("apex.normalization", spec.submodule_search_locations):
        return (
            "the apex that is installed is not NVIDIA's, which has apex.normalization.FusedLayerNorm, but another "
            "package of that name, as PyPI's is"
        )
    if isinstance(error, ModuleNotFoundError) and error.name in _COMPILED:
        return f"{_TITLES[package]} was installed without its CUDA extensions (no module {error.name})"
    return f"{_TITLES[package]} cannot be imported ({' '.join(str(error).split())})"
