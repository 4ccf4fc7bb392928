"""The sides of the training benchmark: our model, by our kernels or by other packages', and transformers'."""

from collections.abc import Iterable
from typing import Any

import torch

from megatron_plm.errors import UserError
from megatron_plm.kernels.accelerators import are_usable, require_accelerators
from megatron_plm.kernels.library import load_cuda_kernels, require_kernels

OWN = {
    "ours": "megatron-plm, packed rows",
    "compiled": "megatron-plm, packed rows, compiled",
    "fused": "megatron-plm, packed rows, --fused-kernels",
    "fused_compiled": "megatron-plm, --fused-kernels, compiled",
}
_PEERS = {
    "padded": "EsmForMaskedLM, random batches",
    "bucketed": "EsmForMaskedLM, length-bucketed",
    "packed": "EsmForMaskedLM, packed rows",
}
_PACKAGES = {
    "apex": "megatron-plm, apex's norms and AdamW",
    "transformer_engine": "megatron-plm, TransformerEngine's norms",
    "flash_attn": "megatron-plm, flash-attn's attention",
    "flash_attn_3": "megatron-plm, FlashAttention-3",
}
SIDES = {**OWN, **_PEERS, **_PACKAGES}
OURS = (*OWN, *_PACKAGES)
PADDED = ("padded", "bucketed")
_CHOSEN = {
    "apex": {"norm": "apex", "optimizer": "apex"},
    "transformer_engine": {"norm": "transformer_engine"},
    "flash_attn": {"attention": "flash_attn"},
    "flash_attn_3": {"attention": "flash_attn_3"},
}


def values_of(side: str) -> dict[str, Any]:
    """The options of a run of this side, one of OURS; the peers take those of none."""
    packages = {f"{what}_implementation": package for what, package in _CHOSEN.get(side, {}).items()}
    return {"compile": side.endswith("compiled"), "fused_kernels": side.startswith("fused"), **packages}


def is_default(side: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the side runs where none are named: what there is for the device, on a CPU by its fastest way."""
    if side in _PACKAGES:
        return dtype == torch.bfloat16 and are_usable(device, **_CHOSEN[side])
    if side.startswith("fused"):
        return device.type == "cuda" and load_cuda_kernels()
    return side != "compiled" or device.type == "cuda"


def require_sides(sides: Iterable[str], device: torch.device) -> None:
    """Raise UserError where what one of the sides computes with cannot be used."""
    for side in sides:
        try:
            if side.startswith("fused"):
                require_kernels(device)
            require_accelerators(device, **_CHOSEN.get(side, {}))
        except UserError as error:
            raise UserError(f"--sides {side}: {error}") from None
