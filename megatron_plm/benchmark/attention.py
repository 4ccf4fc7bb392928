"""The model's packed attention against other ways to attend inside each of the same proteins.

Sides, on the same random queries, keys and values: ours (`model/attention.py`); one call of torch's fused attention a
protein; proteins padded to the longest one, with a mask; whole packed rows with a dense mask; on a GPU also padded
without a mask, which flash attention takes (it computes the padding, and lets proteins see theirs), and flash-attn's
own variable-length function where that package is installed. Each starts from its own layout, as a model that uses it
would hold its tokens. Times are those of one layer's forward and backward pass; errors are those of ours and of the
other exact sides against the same in float64, relative by norm. Shapes: T tokens, P proteins, N heads, H head size.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_plm.benchmark.checks import Checks, check
from megatron_plm.benchmark.checks import missed_checks as missed
from megatron_plm.benchmark.device import add_device_flags, chosen_device, chosen_dtype, waiting_for
from megatron_plm.benchmark.flags import Size, add_size, count, seconds
from megatron_plm.benchmark.rounds import Wait, machine_line
from megatron_plm.config.load import config_from_values
from megatron_plm.config.presets import PRESETS
from megatron_plm.data.loader import segment_room
from megatron_plm.data.readers import open_inputs
from megatron_plm.inference.proteins import ProteinReader
from megatron_plm.kernels.accelerators import are_usable, attention_by
from megatron_plm.model.attention import Sequences, packed_attention
from megatron_plm.tokenizers import get_tokenizer

__all__ = ["add_flags", "measure", "missed", "require_peer", "table"]

_SPECIALS = 2
_MOST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # a few roundings of the dtype
_EXACT_TOKENS = 16384  # of which float64 is computed: on a CPU that takes a while
_LABELS = {
    "ours": "packed (ours)",
    "one_by_one": "one call a protein",
    "padded": "padded, with a mask",
    "dense": "packed rows, dense mask",
    "padded_flash": "padded, no mask, flash (inexact)",
    "flash_attn": "packed, the package flash-attn",
}


class Side(NamedTuple):
    """One way to attend: its inputs, what it does with them, and its result for each token, if that is exact."""

    inputs: tuple[Tensor, Tensor, Tensor]
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    by_token: Callable[[Tensor], Tensor] | None  # its output, or a gradient, as [T, N, H]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this subject."""
    parser.add_argument("--input", required=True, metavar="FILE", help="sequence file whose proteins' lengths are used")
    sizes = Size(["esm2-8m", "esm2-35m", "esm2-650m"], ["esm2-8m"])
    add_size(parser, "--presets", str, sizes, "shapes whose heads are used", nargs="+", choices=list(PRESETS))
    parser.add_argument("--seq-length", type=count, default=1024, help="tokens of a row; proteins are cropped to it")
    parser.add_argument("--rows", type=count, default=None, help="packed rows of a batch (default: 4, on a GPU 32)")
    add_size(parser, "--rounds", count, Size(5, 2), "rounds; each measures every side once, in turn")
    add_size(parser, "--seconds", seconds, Size(1.0, 0.05), "time of each side in one round")
    add_device_flags(parser)
    parser.add_argument("--seed", type=int, default=1)


def require_peer() -> None:
    """The peers are torch's own attention."""


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Time forward and backward passes of all sides in turn; returns seconds and errors by preset and side."""
    device = chosen_device(options)
    dtype = chosen_dtype(options, device)
    rows = packed_lengths(protein_lengths(options), options.rows or (32 if device.type == "cuda" else 4), options)
    found: dict[str, Any] = {}
    for preset in options.presets:
        model = config_from_values(dict(PRESETS[preset])).model
        shape = (model.num_attention_heads, model.head_dim)
        sides = build_sides(rows, shape, options.seq_length, device, dtype, options.seed)
        errors = errors_of(sides, [n for row in rows for n in row])
        times = _times(sides, options.rounds, options.seconds, waiting_for(device))
        found[preset] = {
            "heads": shape[0],
            "head_size": shape[1],
            "sides": {side: {**times[side], "errors": errors.get(side)} for side in sides},
        }
        shown = ", ".join(f"{side} {1e3 * _total(found[preset], side):.2f} ms" for side in sides)
        say(f"{preset}, forward and backward: {shown}")
    lengths = [n for row in rows for n in row]
    result = {"device": device.type, "dtype": str(dtype).removeprefix("torch."), "presets": found}
    return {
        **result,
        "num_tokens": sum(lengths),
        "num_proteins": len(lengths),
        "padded_tokens": len(lengths) * max(lengths),
        "checks": _checks(found, dtype),
    }


def _checks(found: dict[str, Any], dtype: torch.dtype) -> Checks:
    checks = {}
    for preset, figures in found.items():
        worst = float(np.max(list(figures["sides"]["ours"]["errors"].values())))  # what is no number stays none
        what = f"attention, {preset}: error of ours against float64"
        checks[preset] = check(what, worst, _MOST_ERROR[dtype], at_least=False)
    return checks


def protein_lengths(options: argparse.Namespace) -> list[int]:
    """Tokens of each protein of the file, cropped to a row, in an order by the seed."""
    reader = ProteinReader(open_inputs([options.input]), get_tokenizer("esm2"), numbered=True)
    lengths = [min(len(protein.tokens) + _SPECIALS, options.seq_length) for protein in reader.read()]
    return [lengths[i] for i in np.random.default_rng(options.seed).permutation(len(lengths))]


def packed_lengths(lengths: Sequence[int], num_rows: int, options: argparse.Namespace) -> list[list[int]]:
    """So many rows of proteins' lengths: each goes to the fullest row that has room, until none has (again from the
    first where the file ends)."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    misses = index = 0
    while misses < 32 or not all(rows):  # by then little room is left
        length = lengths[index % len(lengths)]
        index += 1
        fitting = [row for row in rows if sum(row) + length <= options.seq_length]
        misses = 0 if fitting else misses + 1
        if fitting:
            max(fitting, key=sum).append(length)
    return rows


def build_sides(
    rows: Sequence[Sequence[int]],
    shape: tuple[int, int],
    seq_length: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> dict[str, Side]:
    """All sides that this device has, on the same values."""
    lengths = [n for row in rows for n in row]
    T, P, longest = sum(lengths), len(lengths), max(lengths)
    generator = torch.Generator().manual_seed(seed)
    packed = tuple(torch.randn(T, *shape, generator=generator).to(device, dtype) for _ in range(3))
    # As the loader's: room for more proteins than there are, and the length of a row as that of the longest.
    unused = [T] * (segment_room(len(rows), P) - P)
    cuts = torch.tensor([0, *np.cumsum(lengths), *unused], dtype=torch.int32, device=device)
    sequences = Sequences.from_cu_seqlens(cuts, seq_length, dtype)
    # Where each of the T tokens is in P padded proteins, and in the rows.
    in_padded = torch.cat([p * longest + torch.arange(n) for p, n in enumerate(lengths)]).to(device)
    in_rows = torch.cat([b * seq_length + torch.arange(sum(row)) for b, row in enumerate(rows)]).to(device)
    ids = torch.zeros(len(rows) * seq_length, dtype=torch.int64, device=device)
    ids[in_rows] = torch.repeat_interleave(torch.arange(1, P + 1), torch.tensor(lengths)).to(device)
    ids_BL = ids.view(len(rows), seq_length)
    dense_B1LL = (ids_BL[:, None, :, None] == ids_BL[:, None, None, :]).to(device)
    is_token_P11L = (torch.arange(longest) < torch.tensor(lengths)[:, None])[:, None, None].to(device)

    def spread(where: Tensor, count: int, length: int) -> tuple[Tensor, ...]:
        """The packed values at their places in [count, N, length, H], zero elsewhere."""
        out = (each.new_zeros(count * length, *shape).index_copy(0, where, each) for each in packed)
        return tuple(each.view(count, length, *shape).transpose(1, 2) for each in out)

    def gathered(where: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda out: out.transpose(1, 2).reshape(-1, *shape)[where]

    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(each.split(lengths) for each in (q, k, v)), strict=True)
        four_dims = ((each.transpose(0, 1)[None] for each in part) for part in parts)
        return torch.cat([F.scaled_dot_product_attention(*part)[0].transpose(0, 1) for part in four_dims])

    def flash_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)

    padded, in_row = spread(in_padded, P, longest), spread(in_rows, len(rows), seq_length)
    found: dict[str, tuple[Any, Any, Any]] = {
        "ours": (packed, lambda q, k, v: packed_attention(q, k, v, sequences), lambda out: out),
        "one_by_one": (packed, one_by_one, lambda out: out),
        "padded": (
            padded, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_token_P11L), gathered(in_padded)
        ),
        "dense": (in_row, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dense_B1LL), gathered(in_rows)),
    }  # fmt: skip
    if device.type == "cuda" and dtype == torch.bfloat16:
        found["padded_flash"] = (padded, flash_only, None)
        if are_usable(device, attention="flash_attn") and (varlen := attention_by("flash_attn")):
            found["flash_attn"] = (
                packed, lambda q, k, v: varlen(q, k, v, cuts, seq_length, False, 0.0), lambda out: out
            )  # fmt: skip
    return {
        name: Side(tuple(each.detach().clone().requires_grad_() for each in inputs), attend, by_token)
        for name, (inputs, attend, by_token) in found.items()
    }


def errors_of(sides: dict[str, Side], lengths: Sequence[int]) -> dict[str, dict[str, float]]:
    """Of each exact side the error of its output and gradients, over the first proteins, against explicit softmax in
    float64: the norm of the difference over that of the exact values."""
    some: list[int] = []
    for length in lengths:
        if sum(some) + length > _EXACT_TOKENS:
            break
        some.append(length)
    T = sum(some)
    first = sides["ours"].inputs
    torch.manual_seed(0)
    into_T = torch.randn(first[0].shape, dtype=torch.float32).to(first[0])
    exact = _exact([each[:T].detach().cpu() for each in first], into_T[:T].cpu(), some)
    found = {}
    for name, side in sides.items():
        if side.by_token is None:
            continue
        out = side.attend(*side.inputs)
        gradients = torch.autograd.grad(side.by_token(out), side.inputs, into_T)
        values = [side.by_token(each)[:T].detach().cpu().double() for each in (out, *gradients)]
        names = ("output", "d query", "d key", "d value")
        found[name] = {
            key: float((mine - right).norm() / right.norm())
            for key, mine, right in zip(names, values, exact, strict=True)
        }
    return found


def _exact(inputs: Sequence[Tensor], into_TNH: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Output and gradients of all proteins, float64 [T, N, H] each."""
    parts: list[list[Tensor]] = [[], [], [], []]
    for *qkv, into in zip(*(each.double().split(list(lengths)) for each in (*inputs, into_TNH)), strict=True):
        q, k, v = (each.detach().requires_grad_() for each in qkv)
        weights = (torch.einsum("qnh,knh->nqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        out = torch.einsum("nqk,knh->qnh", weights, v)
        for part, value in zip(parts, (out.detach(), *torch.autograd.grad(out, (q, k, v), into)), strict=True):
            part.append(value)
    return [torch.cat(part) for part in parts]


def _times(sides: dict[str, Side], num_rounds: int, seconds: float, wait: Wait) -> dict[str, dict[str, list[float]]]:
    """Seconds of a forward pass, and of a forward and backward pass, each the mean of one round."""
    found: dict[str, dict[str, list[float]]] = {side: {"forward": [], "both": []} for side in sides}
    for number in range(num_rounds + 1):  # the first one warms up
        for name, side in sides.items():
            into = torch.ones_like(side.attend(*side.inputs))
            for key, run in (("forward", _forward), ("both", _both)):
                mean = _mean_seconds(functools.partial(run, side, into), seconds / 2 if number else 0.0, wait)
                if number:
                    found[name][key].append(mean)
    return found


def _forward(side: Side, _: Tensor) -> None:
    side.attend(*side.inputs)


def _both(side: Side, into: Tensor) -> None:
    torch.autograd.grad(side.attend(*side.inputs), side.inputs, into)


def _mean_seconds(run: Callable[[], object], seconds: float, wait: Wait) -> float:
    """Of one call, of as many as fit in `seconds`: a GPU is waited for once, behind all of them."""
    wait()
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < seconds:
        run()
        calls += 1
    wait()
    return (time.perf_counter() - start) / calls


def _total(figures: dict[str, Any], side: str) -> float:
    """Median seconds of both passes."""
    return statistics.median(figures["sides"][side]["both"])


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    padding = 1 - result["num_tokens"] / result["padded_tokens"]
    lines = [
        f"{result['num_tokens']:,} tokens of {result['num_proteins']:,} proteins, {result['dtype']}; padded to the "
        f"longest, {padding:.0%} would be padding",
    ]
    for preset, figures in result["presets"].items():
        lines += [
            "",
            f"{preset + ', ' + str(figures['heads']) + ' heads of ' + str(figures['head_size']):<36}"
            f"{'forward':>11}{'and backward':>14}{'ours is':>10}{'error':>10}{'of gradients':>14}",
        ]
        for side, each in figures["sides"].items():
            forward, both = (1e3 * statistics.median(each[key]) for key in ("forward", "both"))
            ratio = "" if side == "ours" else f"{_total(figures, side) / _total(figures, 'ours'):.2f} x"
            errors = dict(each["errors"] or {})
            output = errors.pop("output", None)
            told = ("", "") if output is None else (f"{output:.1e}", f"{max(errors.values()):.1e}")
            lines.append(f"{_LABELS[side]:<36}{forward:>8.2f} ms{both:>11.2f} ms{ratio:>10}{told[0]:>10}{told[1]:>14}")
    return "\n".join([*lines, "", machine_line(result)])
