"""Memory and speed of conversions: a checkpoint in shards to other formats, each in a process of its own."""

import argparse
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_plm.benchmark.flags import Size, add_size, count
from megatron_plm.benchmark.processes import run_side

_MODULE = "megatron_plm.benchmark.convert_side"
BAR = 0.6  # of the checkpoint's bytes: 1.2 GB for 2 GB
_LEAST_FOR_BAR = 10**9  # bytes; of a smaller one torch alone takes too large a share

# What is shown: source, format of the output, flags, and whether the bar holds for it. The last format is one pickle,
# for which all weights have to be in memory.
_SHARDS = ("--shard-size", "500MB")
CASES: dict[str, tuple[str, str, tuple[str, ...], bool]] = {
    "huggingface to native": ("huggingface", "native", (), True),
    "native to huggingface": ("native", "huggingface", _SHARDS, True),
    "native to huggingface, bfloat16": ("native", "huggingface", (*_SHARDS, "--dtype", "bfloat16"), True),
    "native to proteinlm-tape": ("native", "proteinlm-tape", (), False),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this subject."""
    add_size(parser, "--megabytes", count, Size(2000, 100), "weights of the checkpoint, MB")
    add_size(parser, "--hidden-size", count, Size(1280, 256), "of its model, a multiple of 64")


def require_peer() -> None:
    """This subject compares with nothing."""


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Make the checkpoint and convert it, telling `say` of each.

    Scratch files, up to three times `options.megabytes`, go to the folder for temporary files (TMPDIR).
    """
    num_bytes = options.megabytes * 10**6
    found = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-convert-") as scratch:
        folder = Path(scratch)
        made = run_side(
            _MODULE, ["make", folder / "huggingface", num_bytes, options.hidden_size, num_bytes // 4], cores=2
        )
        say(f"made a checkpoint of {made['bytes'] / 1e6:,.0f} MB")
        for name, (source, target, flags, has_bar) in CASES.items():
            keep = folder / target if target == "native" else None
            output = keep or folder / "out"
            words: Sequence[object] = [
                "convert", "--from", source, "--to", target, "--input", folder / source, "--output", output, *flags,
            ]  # fmt: skip
            found[name] = {**run_side(_MODULE, words, cores=2), "has_bar": has_bar}
            if keep is None:
                shutil.rmtree(output)
            say(f"{name}: {found[name]['seconds']:.1f} s")
    return {"bytes": made["bytes"], "largest_tensor": made["largest_tensor"], "conversions": found}


def missed(result: dict[str, Any]) -> list[str]:
    """The conversions that took more memory than the bar."""
    return [name for name, figures in result["conversions"].items() if _verdict(result, figures) == "missed"]


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    size, largest = result["bytes"] / 1e6, result["largest_tensor"] / 1e6
    lines = [
        f"a checkpoint of {size:,.0f} MB, its largest tensor of {largest:,.0f} MB; bar {BAR * size:,.0f} MB",
        f"{'conversion':<34}{'time':>9}{'peak memory':>14}{'before':>11}   bar",
    ]
    for name, figures in result["conversions"].items():
        peak, before = (
            "unknown" if figures[key] is None else f"{figures[key] / 1e6:,.0f} MB"
            for key in ("peak_memory", "memory_before")
        )
        lines.append(f"{name:<34}{figures['seconds']:>7.1f} s{peak:>14}{before:>11}   {_verdict(result, figures)}")
    machine = result["machine"]
    lines.append(f"{machine['processor']}, {machine['cores']} cores, {machine['versions']}")
    return "\n".join(lines)


def _verdict(result: dict[str, Any], figures: dict[str, Any]) -> str:
    if not figures["has_bar"] or figures["peak_memory"] is None or result["bytes"] < _LEAST_FOR_BAR:
        return "none"
    return "missed" if figures["peak_memory"] > BAR * result["bytes"] else "reached"
