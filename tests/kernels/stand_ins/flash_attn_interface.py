"""Stands in for FlashAttention-3's package: the ops that torch looks for when it is told to run on it, never called."""

import torch

if not hasattr(torch.ops.flash_attn_3, "fwd"):  # an op is known to torch for good, whatever becomes of this module
    _LIBRARY = torch.library.Library("flash_attn_3", "DEF")
    for name in ("fwd", "bwd"):
        _LIBRARY.define(f"{name}(Tensor q) -> Tensor")
    torch._flash_attn_3_of_the_stand_in = _LIBRARY  # type: ignore[attr-defined]
