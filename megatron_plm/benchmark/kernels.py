"""Each fused op against eager PyTorch and torch.compile, forward and backward, at the widths of the presets.

On a GPU the fused side is the compiled kernels, and the verdict is whether they beat torch.compile; on a CPU it is the
ops' references, and the table only shows that all works. The peers are what the plain blocks run: their bias is added
inside the matrix product, so it costs them nothing forward, and a pass of its own in the backward. One thing they do
that the blocks don't: beside the rotation they copy the values, as the fused op does.

GB/s counts what has to move: what goes in and comes out; with the backward pass also the gradients, and what it reads
again.

Of norms there are also those of apex and TransformerEngine, on a GPU where they are installed, behind the plain blocks'
sum and dropout.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_plm.benchmark.device import chosen_device
from megatron_plm.benchmark.flags import Size, add_size, count
from megatron_plm.benchmark.kernels_cases import Case, cases_of
from megatron_plm.config.load import config_from_values
from megatron_plm.config.presets import PRESETS
from megatron_plm.errors import UserError
from megatron_plm.kernels.library import load_cuda_kernels

# Bytes written between two calls, so that no cache keeps what a call reads and that the host, which takes up to a third
# of a millisecond for one, gets ahead: at 2 TB/s they take two.
_FLUSHED = 2**32
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Relative. Results in bf16 are rounded a few times (2^-9 each); sums over the tokens, in fp32, have the errors of 128
# numbers (2^-23 each), the square root of 16,384.
LARGEST_ERROR = {"bf16": 2**-6, "fp32": 2**-16}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this subject."""
    text = "shapes, by the preset that has them"
    sizes = Size(["esm2-8m", "esm2-650m", "esm2-3b"], ["tiny"])
    add_size(parser, "--presets", str, sizes, text, nargs="+")
    parser.add_argument("--dtypes", nargs="+", choices=_DTYPES, default=["bf16", "fp32"], help="(default: both)")
    add_size(parser, "--tokens", count, Size(16384, 64), "tokens of a call")
    add_size(parser, "--repeats", count, Size(30, 2), "calls that are timed")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="(default: cuda, where there is one)")


def require_peer() -> None:
    """The peers are torch's own."""


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Time every op at every shape and dtype, telling `say` of each. Raises UserError where a preset or, on a GPU, the
    compiled library is missing."""
    device = chosen_device(options)
    if device.type == "cuda" and not load_cuda_kernels():
        raise UserError("--device cuda: the kernels are not built; run `make kernels` first")
    unknown = [name for name in options.presets if name not in PRESETS]
    if unknown:
        raise UserError(f"--presets {unknown[0]}: no such preset; there are {', '.join(PRESETS)}")
    found = []
    for preset in options.presets:
        shape = config_from_values(dict(PRESETS[preset])).model
        for dtype in options.dtypes:
            for case in cases_of(shape, options.tokens, _DTYPES[dtype], device):
                figures = _figures(case, options.repeats, device)
                found.append({"preset": preset, "dtype": dtype, "op": case.name, **figures})
                say(_line(found[-1]))
    return {"device": device.type, "fused_is": "kernels" if device.type == "cuda" else "references", "cases": found}


def missed(result: dict[str, Any]) -> list[str]:
    """What does not beat torch.compile, which is not asked of references, and what computes something else."""
    found = []
    for case in result["cases"]:
        name, error = f"{case['op']}, {case['preset']}, {case['dtype']}", case["error"]["fused"]
        found += [name] if case["beats_compile"] is False else []
        found += [] if error <= LARGEST_ERROR[case["dtype"]] else [f"{name}: error {error:.1e}"]  # so is no number
    return found


def table(result: dict[str, Any]) -> str:
    """The result for people; times are medians, forward and with the backward pass."""
    lines = [
        f"{'op':<28}{'preset':<11}{'dtype':<6}{'fused ms':>16}{'GB/s':>7}{'eager ms':>16}{'compiled ms':>16}"
        f"{'error fused':>13}{'eager':>9}  beats torch.compile"
    ]
    lines += [_line(case) for case in result["cases"]]
    if result["fused_is"] == "references":
        lines.append(
            "on this device the fused side is the references in PyTorch: these times say nothing of the kernels"
        )
    machine = result["machine"]
    lines.append(f"{machine['gpu'] or machine['processor']}, {machine['versions']}, commit {machine['commit']}")
    return "\n".join(lines)


def _line(case: dict[str, Any]) -> str:
    shown = {side: _times(case["seconds"].get(side)) for side in ("fused", "eager", "compiled")}
    verdict = {True: "yes", False: "no", None: "not measured"}[case["beats_compile"]]
    error = case["error"]
    packages = [f"{side} {_times(case['seconds'][side])}, error {error[side]:.1e}" for side in case["packages"]]
    return (
        f"{case['op']:<28}{case['preset']:<11}{case['dtype']:<6}{shown['fused']:>16}{case['gigabytes_per_second']:>7.0f}"
        f"{shown['eager']:>16}{shown['compiled']:>16}{error['fused']:>13.1e}{error['eager']:>9.1e}  {verdict}"
        + "".join(f"; {each}" for each in packages)
    )


def _times(seconds: dict[str, float] | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds['forward']:.3f} {1e3 * seconds['both']:.3f}"


def _figures(case: Case, repeats: int, device: torch.device) -> dict[str, Any]:
    sides = {"fused": (case.fused, case.given), "eager": (case.peer, case.peer_given)}
    if device.type == "cuda":
        torch.compiler.reset()
        sides["compiled"] = (torch.compile(case.peer, fullgraph=True), case.peer_given)
    # Gradients as matrix products leave them, each number in memory.
    grads = [torch.ones(result.shape, device=device, dtype=result.dtype) for result in case.fused(*case.given)]
    sides |= {package: (function, case.peer_given) for package, function in case.packages.items()}
    seconds = {
        side: {
            "forward": _median_seconds(functools.partial(function, *given), repeats, device),
            "both": _median_seconds(functools.partial(_both, function, given, grads), repeats, device),
        }
        for side, (function, given) in sides.items()
    }
    error = {
        side: _error(function, given, case.exact if side == "fused" else case.peer)
        for side, (function, given) in sides.items()
    }
    beats = seconds["fused"]["both"] < seconds["compiled"]["both"] if "compiled" in seconds else None
    forward_bytes, backward_bytes = case.traffic()
    return {
        "seconds": seconds,
        "gigabytes_per_second": (forward_bytes + backward_bytes) / seconds["fused"]["both"] / 1e9,
        "error": error,
        "beats_compile": beats,
        "packages": list(case.packages),
    }


def _both(
    function: Callable[..., Sequence[Tensor]], given: Sequence[Tensor], grads: Sequence[Tensor]
) -> Sequence[Tensor]:
    return torch.autograd.grad(function(*given), given, grads)


def _error(
    function: Callable[..., Sequence[Tensor]], given: Sequence[Tensor], exact: Callable[..., Sequence[Tensor]]
) -> float:
    """‖a − b‖ / ‖b‖ of results and gradients against float64 on the same stored values, the largest."""
    outcomes = []
    for side, tensors in ((function, given), (exact, [t.detach().double().requires_grad_() for t in given])):
        results = side(*tensors)
        generator = torch.Generator().manual_seed(0)
        # Numbers that bf16 holds, the same for both sides.
        grads = [torch.randn(r.shape, generator=generator).bfloat16().to(r.device, r.dtype) for r in results]
        gradients = torch.autograd.grad(results, tensors, grads)
        outcomes.append([*(result.detach() for result in results), *gradients])
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(*outcomes, strict=True)]
    return float(np.max(errors))  # what is no number stays none


def _median_seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    for _ in range(3):
        call()
    times = []
    if device.type == "cpu":
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    flushed = torch.empty(_FLUSHED, dtype=torch.uint8, device=device)
    for _ in range(repeats):
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        start_event.record()
        call()
        end_event.record()
        end_event.synchronize()
        times.append(start_event.elapsed_time(end_event) / 1e3)
    return statistics.median(times)
