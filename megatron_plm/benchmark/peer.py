"""What benchmarks against transformers' ESM-2 share."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_plm.config.options import ModelOptions
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import Tokenizer

Step = Callable[[], int]  # some work; returns its useful tokens


def require_peer() -> None:
    """Raise UserError unless the peer's package is there."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the benchmark's peer needs {error.name}; install it with: pip install 'megatron-plm[huggingface]'"
        ) from None


def peer_config(options: ModelOptions, tokenizer: Tokenizer) -> Any:
    """The EsmConfig of the same shape, without dropout."""
    from transformers import EsmConfig

    return EsmConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_attention_heads,
        intermediate_size=options.ffn_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        position_embedding_type="rotary",
        token_dropout=options.token_dropout,
        mask_token_id=tokenizer.mask_id,
        pad_token_id=tokenizer.pad_id,
        layer_norm_eps=options.layernorm_epsilon,
    )


def fastest_size(
    label: str, sizes: Sequence[int], step_of: Callable[[int], Step], seconds: float, say: Callable[[str], None]
) -> tuple[int, Step]:
    """The batch size whose step is the fastest, each timed for so long, and that step; `say` is told of each.

    Slower ones go at once: their models need not stay in memory.
    """
    chosen: tuple[int, Step] | None = None
    fastest = 0.0
    for size in sizes:
        step = step_of(size)
        speed = _tokens_per_second(step, seconds)
        say(f"{label} of {size}: {speed:,.0f} tokens/s")
        if chosen is None or speed > fastest:
            fastest, chosen = speed, (size, step)
    assert chosen is not None, "no sizes"
    return chosen


def timed_in_turn(
    sides: Mapping[str, Step], num_rounds: int, seconds: float, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Tokens a second of each side in each round, after one step to warm up; `say` is told of each round."""
    for step in sides.values():
        step()
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(1, num_rounds + 1):
        for side, step in sides.items():
            speeds[side].append(_tokens_per_second(step, seconds))
        shown = ", ".join(f"{side} {each[-1]:,.0f}" for side, each in speeds.items())
        say(f"round {number} of {num_rounds}, tokens/s: {shown}")
    return speeds


def ratios(speeds: Mapping[str, Sequence[float]], bars: Mapping[str, float]) -> dict[str, dict[str, float | None]]:
    """How many times as fast as each other side `ours` is, round by round: median, extremes and the bar, if any."""
    found: dict[str, dict[str, float | None]] = {}
    for side in [name for name in speeds if name != "ours"]:
        each = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds[side], strict=True)]
        found[side] = {"median": statistics.median(each), "min": min(each), "max": max(each), "bar": bars.get(side)}
    return found


def _tokens_per_second(step: Step, seconds: float) -> float:
    """Repeat `step` for so long."""
    start = time.perf_counter()
    tokens = 0
    while (elapsed := time.perf_counter() - start) < seconds:
        tokens += step()
    return tokens / elapsed
