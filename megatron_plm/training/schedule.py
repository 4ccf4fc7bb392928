"""The learning rate as a pure function of the step."""

import math


def learning_rate(step: int, *, peak: float, minimum: float, warmup: int, total: int, style: str) -> float:
    """The learning rate of optimizer step `step` (from 0): linear warm-up over `warmup` steps, then a decay that would
    reach `minimum` at step `total`; `style` is linear, cosine or constant."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if style == "constant":
        return peak
    if style == "cosine":
        return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))
    assert style == "linear", style
    return peak + (minimum - peak) * progress
