"""Softmax attention inside each of many packed sequences, all in one call, in float32 on the CPU (csrc/cpu).

torch's fused CPU kernel is made for large heads and long sequences: with the small heads of small protein models it
leaves most of the processor idle (docs/performance.md). The reference is that kernel, sequence by sequence, in
`model.attention`, which serves all that this op doesn't: other devices, other dtypes, dropout.

Ops, both with shapes for torch.compile, and the first one differentiable once:
    megatron_plm::packed_attention(q, k, v, cu_seqlens, causal) -> (out, statistics)
    megatron_plm::packed_attention_backward(dout, q, k, v, out, statistics, cu_seqlens, causal) -> (dq, dk, dv)

Shapes: T packed tokens, N heads, H head size; q, k, v, out [T, N, H]; cu_seqlens int32 [sequences + 1], from 0 to T;
statistics [2, N, T]: of the scores of each query, times log₂e, the largest, and Σ 2^(score - largest).
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_plm.kernels import cpu

if TYPE_CHECKING:
    from megatron_plm.kernels._cpu import Sizes

_library = torch.library.Library("megatron_plm", "FRAGMENT")
_library.define(
    "packed_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, bool causal) -> (Tensor out, Tensor statistics)"
)
_library.define(
    "packed_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor statistics, "
    "Tensor cu_seqlens, bool causal) -> (Tensor dq, Tensor dk, Tensor dv)"
)


def cpu_attention_path() -> str:
    """In words, what the op runs on."""
    if cpu.compiled is None:
        return "torch's kernel, protein by protein (slower: csrc/cpu was not built)"
    return f"all proteins at once on the CPU, in float32 ({cpu.compiled.instructions()})"


def cpu_attention(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, cu_seqlens: Tensor, *, causal: bool) -> Tensor:
    """Attention inside each sequence, scores scaled by H^-½; [T, N, H]. Bitwise the same for any number of threads.

    ValueError where `cu_seqlens` falls, or doesn't go from 0 to T.
    """
    out_TNH: Tensor = torch.ops.megatron_plm.packed_attention(q_TNH, k_TNH, v_TNH, cu_seqlens, causal)[0]
    return out_TNH


def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    q, k, v = (_with_whole_heads(x) for x in (q, k, v))
    cuts = cu_seqlens.to(torch.int32).contiguous()
    out, statistics = _forward_shapes(q, k, v, cu_seqlens, causal)
    cpu.compiled.attend(
        _sizes(q, cuts, causal),
        q=_address(q),
        k=_address(k),
        v=_address(v),
        out=_address(out),
        statistics=statistics.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out, statistics


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, cu_seqlens: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = (_with_whole_heads(x) for x in (dout, q, k, v, out))
    statistics = statistics.contiguous()
    cuts = cu_seqlens.to(torch.int32).contiguous()
    dq, dk, dv = _backward_shapes(dout, q)
    cpu.compiled.attend_backward(
        _sizes(q, cuts, causal),
        dout=_address(dout),
        q=_address(q),
        k=_address(k),
        v=_address(v),
        out=_address(out),
        statistics=statistics.data_ptr(),
        dq=_address(dq),
        dk=_address(dk),
        dv=_address(dv),
        threads=torch.get_num_threads(),
    )
    return dq, dk, dv


def _sizes(q: Tensor, cuts: Tensor, causal: bool) -> "Sizes":
    T, N, H = q.shape
    return cpu.compiled.Sizes(
        cuts=cuts.data_ptr(),
        sequences=len(cuts) - 1,
        tokens=T,
        heads=N,
        head_size=H,
        scale=H**-0.5,
        causal=causal,
    )


def _with_whole_heads(x_TNH: Tensor) -> Tensor:
    """With the numbers of a head side by side in memory, which they are already in every part of a joint matrix."""
    assert x_TNH.dtype == torch.float32, x_TNH.dtype
    return x_TNH if x_TNH.stride(2) == 1 else x_TNH.contiguous()


def _address(x_TNH: Tensor) -> tuple[int, int, int]:
    return x_TNH.data_ptr(), x_TNH.stride(0), x_TNH.stride(1)


def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    T, N = q.shape[:2]
    assert k.shape == v.shape == q.shape, "queries, keys and values of one shape"
    return q.new_empty(q.shape), q.new_empty((2, N, T))


def _backward_shapes(_dout: Tensor, q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, causal = inputs
    out, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, statistics, cu_seqlens)
    ctx.causal = causal


def _gradients(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None, None, None
    q, k, v, out, statistics, cu_seqlens = ctx.saved_tensors
    backward = torch.ops.megatron_plm.packed_attention_backward
    return *backward(dout, q, k, v, out, statistics, cu_seqlens, ctx.causal), None, None


def _no_gradients(*_: Any) -> tuple[Tensor | None, ...]:
    raise RuntimeError("packed_attention has no second derivative")  # torch would only warn, and leave it out


_library.impl("packed_attention", _forward, "CPU")
_library.impl("packed_attention_backward", _backward, "CPU")
torch.library.register_fake("megatron_plm::packed_attention", _forward_shapes, lib=_library)
torch.library.register_fake("megatron_plm::packed_attention_backward", _backward_shapes, lib=_library)
torch.library.register_autograd("megatron_plm::packed_attention", _gradients, setup_context=_keep, lib=_library)
torch.library.register_autograd("megatron_plm::packed_attention_backward", _no_gradients, lib=_library)
