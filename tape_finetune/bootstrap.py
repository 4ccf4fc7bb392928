"""95 % bootstrap intervals over the examples of a split.

The percentile method of Efron & Tibshirani 1993, "An introduction to the bootstrap", chapter 13. Examples (proteins)
are drawn, not residues or pairs: those of one protein are not independent.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from tape_finetune.metrics import Floats, Metric

NUM_REPLICATES = 1000
PERCENTILES = (2.5, 97.5)
_WEIGHTS_AT_A_TIME = 1_000_000  # 8 MB of float64


@dataclass(frozen=True)
class Interval:
    """A metric's value on a split, and the ends of its interval."""

    value: float
    low: float
    high: float


def intervals(metrics: Mapping[str, Metric], num_examples: int, key: int) -> dict[str, Interval]:
    """Value and interval of each metric, all from the same draws of `num_examples` examples with replacement.

    `key` alone decides the draws. Replicates in which a metric is undefined (one class only, say) are left out of its
    interval; a metric that is undefined on the split itself is NaN throughout.
    """
    values: dict[str, list[Floats]] = {name: [] for name in metrics}
    for weights_Bn in _draws(num_examples, key):
        for name, metric in metrics.items():
            values[name].append(metric(weights_Bn))
    return {name: _interval(metric, np.concatenate(values[name]), num_examples) for name, metric in metrics.items()}


def point_value(metric: Metric, num_examples: int) -> float:
    """The metric with every example counted once."""
    return float(metric(np.ones((1, num_examples)))[0])


def _draws(num_examples: int, key: int) -> Iterator[Floats]:
    generator = np.random.default_rng(key)
    rows = max(1, _WEIGHTS_AT_A_TIME // num_examples)
    for start in range(0, NUM_REPLICATES, rows):
        num_rows = min(rows, NUM_REPLICATES - start)
        drawn = generator.integers(num_examples, size=(num_rows, num_examples))
        drawn += num_examples * np.arange(num_rows)[:, None]
        counts = np.bincount(drawn.reshape(-1), minlength=num_rows * num_examples)
        yield counts.reshape(num_rows, num_examples).astype(np.float64)


def _interval(metric: Metric, replicates: Floats, num_examples: int) -> Interval:
    value = point_value(metric, num_examples)
    defined = replicates[~np.isnan(replicates)]
    if np.isnan(value) or not len(defined):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.percentile(defined, PERCENTILES)
    return Interval(value, float(low), float(high))
