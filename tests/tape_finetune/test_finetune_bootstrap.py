"""Bootstrap intervals."""

from functools import partial

import numpy as np
import pytest
from scipy.stats import bootstrap as scipy_bootstrap

from tape_finetune import bootstrap, metrics


def _mean_of(values: np.ndarray) -> dict[str, metrics.Metric]:
    return {"mean": partial(metrics.mean, values_n=values)}


def test_interval_agrees_with_scipys_percentile_bootstrap():
    values = np.random.default_rng(0).exponential(size=300)
    ours = bootstrap.intervals(_mean_of(values), 300, key=1)["mean"]
    theirs = scipy_bootstrap(
        (values,), np.mean, method="percentile", n_resamples=5000, rng=np.random.default_rng(2)
    ).confidence_interval
    # The ends of 1,000 replicates scatter by about a twentieth of the interval's width.
    tolerance = 0.15 * (theirs.high - theirs.low)
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=tolerance)
    assert ours.high == pytest.approx(theirs.high, abs=tolerance)


def test_key_alone_decides_the_interval_however_many_replicates_are_held_at_once(monkeypatch):
    values = np.random.default_rng(0).normal(size=101)
    first, again, other = (bootstrap.intervals(_mean_of(values), 101, key=key)["mean"] for key in (5, 5, 6))
    assert again == first
    assert other.low != first.low
    monkeypatch.setattr(bootstrap, "_WEIGHTS_AT_A_TIME", 7 * 101)
    in_pieces = bootstrap.intervals(_mean_of(values), 101, key=5)["mean"]
    # Sums of other shapes are rounded in another order.
    assert (in_pieces.low, in_pieces.high) == pytest.approx((first.low, first.high), rel=1e-12)


def test_every_replicate_draws_as_many_examples_as_there_are_all_alike():
    seen = []

    def count(weights: np.ndarray) -> np.ndarray:
        seen.append(weights)
        return weights.sum(1)

    bootstrap.intervals({"n": count}, 13, key=0)
    rows = np.concatenate(seen)
    assert len(rows) == bootstrap.NUM_REPLICATES + 1  # and the value itself
    assert (rows.sum(1) == 13).all()
    # A count is binomial with mean 1 and deviation 0.96; 0.2 is six deviations of the mean of 1,000.
    np.testing.assert_allclose(rows[:-1].mean(0), 1, atol=0.2)
    np.testing.assert_allclose(rows[:-1].var(0), 12 / 13, atol=0.4)


def test_replicates_without_a_value_are_left_out_and_an_undefined_metric_is_nan():
    truth, scores = np.array([1, 0, 0, 0]), np.array([0.9, 0.1, 0.2, 0.3])
    auroc = bootstrap.intervals({"auroc": partial(metrics.area_under_roc, truth_n=truth, scores_n=scores)}, 4, key=0)
    assert auroc["auroc"] == bootstrap.Interval(1.0, 1.0, 1.0)
    undefined = bootstrap.intervals(_mean_of(np.full(3, np.nan)), 3, key=0)["mean"]
    assert np.isnan([undefined.value, undefined.low, undefined.high]).all()
