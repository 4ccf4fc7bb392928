"""The table of the training benchmark."""

from collections.abc import Sequence
from typing import Any

from megatron_plm.benchmark.rounds import machine_line, speed_lines
from megatron_plm.benchmark.train_sides import OURS, PADDED, SIDES


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = []
    for preset, figures in result["presets"].items():
        labels = {side: _label(side, size, figures["micro_batches"]) for side, size in figures["batch_sizes"].items()}
        more = {side: _more(figures, side) for side in figures["tokens_per_second"]}
        lines += [f"{preset}, {result['dtype']}"]
        lines += speed_lines(figures["tokens_per_second"], figures["ratios"], labels, more)
        tried, chosen = figures["tried_sizes"], figures["batch_sizes"]
        lines += [
            _edge_note(side, chosen[side], tried) for side in PADDED if side in chosen and _at_edge(chosen[side], tried)
        ]
        lines += [f"FAILED: {SIDES[side]}: {error}" for side, error in figures["failed"].items()]
        if "packed_attention" in figures:
            name = figures["packed_attention"]
            lines.append(f"EsmForMaskedLM's packed rows: attention by {_ATTENTIONS.get(name, name)}")
        lines.append("")
    return "\n".join([*lines, machine_line(result)])


_ATTENTIONS = {
    "megatron_plm_packed": "a function of ours, through transformers' AttentionInterface",
    "flash_attention_2": "flash-attn, through transformers' own flash_attention_2",
}


def _label(side: str, size: int, micro_batches: int) -> str:
    if side in PADDED:
        return f"{SIDES[side]} of {size}"
    rows = size * (micro_batches if side in OURS else 1)
    return f"{SIDES[side]}, {rows} a step"


def _more(figures: dict[str, Any], side: str) -> str:
    mfu, memory = figures["mfu"][side], figures["peak_memory"][side]
    words = [f"MFU {100 * mfu:.1f} %"] if mfu is not None else []
    return ", ".join(words + ([f"peak memory {memory / 1e9:,.2f} GB"] if memory is not None else []))


def _at_edge(size: int, tried: Sequence[int]) -> bool:
    """Whether a batch size that was not tried could be faster than the fastest tried."""
    return size == max(tried) or 1 < size == min(tried)


def _edge_note(side: str, size: int, tried: Sequence[int]) -> str:
    end = "largest" if size == max(tried) else "smallest"
    return f"note: {SIDES[side]} were fastest at {size}, the {end} size tried; --peer-batch-sizes names others"
