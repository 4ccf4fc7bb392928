"""Sides of the training benchmark that run our model by other packages' kernels, where these are installed."""

from collections.abc import Iterable
from typing import Any

import torch

from megatron_plm.errors import UserError
from megatron_plm.kernels.accelerators import are_usable, require_accelerators

PACKAGE_SIDES = {
    "apex": "megatron-plm, apex's norms and AdamW",
    "transformer_engine": "megatron-plm, TransformerEngine's norms",
    "flash_attn": "megatron-plm, flash-attn's attention",
}
_CHOSEN = {
    "apex": {"norm": "apex", "optimizer": "apex"},
    "transformer_engine": {"norm": "transformer_engine"},
    "flash_attn": {"attention": "flash_attn"},
}


def package_values(side: str) -> dict[str, Any]:
    """The options of a run of this side; of any other side, none."""
    return {f"{what}_implementation": package for what, package in _CHOSEN.get(side, {}).items()}


def is_here(side: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a side of PACKAGE_SIDES can run."""
    return dtype == torch.bfloat16 and are_usable(device, **_CHOSEN[side])


def require_packages(sides: Iterable[str], device: torch.device) -> None:
    """Raise UserError where a package that one of the sides needs cannot be used."""
    for side in sides:
        try:
            require_accelerators(device, **_CHOSEN.get(side, {}))
        except UserError as error:
            raise UserError(f"--sides {side}: {error}") from None
