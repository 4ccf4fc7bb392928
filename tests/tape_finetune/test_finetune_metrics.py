"""Metrics against scipy and scikit-learn, weights against repeated examples."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, matthews_corrcoef, roc_auc_score

from tape_finetune import metrics


def _weights(rng: np.random.Generator, n: int) -> np.ndarray:
    """All ones, and three bootstrap draws: [4, n]."""
    draws = [np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(3)]
    return np.stack([np.ones(n), *draws]).astype(np.float64)


def _repeated(row: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.repeat(values, row.astype(int), axis=0)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_values", [3, 1000])
def test_spearman_of_weighted_examples_is_scipys_of_repeated_ones_with_and_without_ties(seed, num_values):
    rng = np.random.default_rng(seed)
    a = rng.integers(num_values, size=40).astype(float)
    b = a + rng.integers(num_values, size=40)
    weights = _weights(rng, 40)
    expected = [spearmanr(_repeated(row, a), _repeated(row, b)).statistic for row in weights]
    np.testing.assert_allclose(metrics.spearman(weights, a, b), expected, rtol=1e-10)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_values", [3, 1000])
def test_area_under_roc_is_scikit_learns_with_and_without_ties(seed, num_values):
    rng = np.random.default_rng(seed)
    truth = rng.integers(2, size=40)
    scores = rng.integers(num_values, size=40) + truth * num_values / 3
    weights = _weights(rng, 40)
    expected = [roc_auc_score(_repeated(row, truth), _repeated(row, scores)) for row in weights]
    np.testing.assert_allclose(metrics.area_under_roc(weights, truth, scores), expected, rtol=1e-12)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_classification_metrics_are_scikit_learns(seed, num_classes):
    rng = np.random.default_rng(seed)
    truth = rng.integers(num_classes, size=20)
    predicted = np.where(rng.random(20) < 0.5, truth, rng.integers(num_classes, size=20))
    weights = _weights(rng, 20)

    def expected(function, **options):
        return [function(_repeated(row, truth), _repeated(row, predicted), **options) for row in weights]

    mcc = metrics.matthews_correlation(weights, truth, predicted, num_classes)
    f1 = metrics.macro_f1(weights, truth, predicted, num_classes)
    np.testing.assert_allclose(metrics.accuracy(weights, truth, predicted), expected(accuracy_score), rtol=1e-12)
    np.testing.assert_allclose(mcc, expected(matthews_corrcoef), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(f1, expected(f1_score, average="macro"), rtol=1e-12)


def test_undefined_metrics_are_nan_and_correlation_with_a_constant_prediction_is_zero():
    once = np.ones((1, 4))
    truth, constant = np.array([0, 1, 1, 0]), np.zeros(4, dtype=int)
    assert math.isnan(metrics.spearman(once, truth.astype(float), constant.astype(float))[0])
    assert math.isnan(metrics.area_under_roc(once, constant, truth.astype(float))[0])
    assert metrics.matthews_correlation(once, truth, constant, 2)[0] == 0
    assert math.isnan(metrics.mean(once, np.full(4, np.nan))[0])


def test_mean_leaves_out_examples_without_a_value():
    weights = np.array([[1.0, 1.0, 1.0], [0.0, 3.0, 1.0]])
    np.testing.assert_allclose(metrics.mean(weights, np.array([1.0, 2.0, np.nan])), [1.5, 2.0])


def _precision_over_all_orders(k: int, scores: np.ndarray, hits: np.ndarray) -> float:
    """The mean of the first k's share of hits over every order that sorts the scores."""
    orders = [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    return float(np.mean([hits[list(order[:k])].mean() for order in orders]))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_precision_with_ties_is_the_mean_over_all_ways_to_break_them(seed, k):
    rng = np.random.default_rng(seed)
    scores, hits = rng.integers(3, size=6).astype(float), rng.random(6) < 0.4
    assert metrics.precision_at(k, scores, hits) == pytest.approx(_precision_over_all_orders(k, scores, hits))


def test_precision_takes_all_pairs_where_there_are_fewer_and_is_nan_without_any():
    assert metrics.precision_at(9, np.array([0.1, 0.2]), np.array([True, False])) == 0.5
    assert math.isnan(metrics.precision_at(3, np.zeros(0), np.zeros(0, dtype=bool)))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_values", [3, 1000])
def test_average_precision_is_scikit_learns_with_and_without_ties(seed, num_values):
    rng = np.random.default_rng(seed)
    hits = rng.random(60) < 0.2
    scores = (rng.integers(num_values, size=60) + hits * num_values / 4).astype(np.float32)
    assert metrics.average_precision(scores, hits) == pytest.approx(average_precision_score(hits, scores))


def test_average_precision_needs_a_hit_and_of_a_constant_score_is_the_share_of_hits():
    assert math.isnan(metrics.average_precision(np.arange(3.0), np.zeros(3, dtype=bool)))
    assert math.isnan(metrics.average_precision(np.zeros(0), np.zeros(0, dtype=bool)))
    assert metrics.average_precision(np.zeros(4), np.array([True, False, False, False])) == 0.25


def test_metrics_within_a_part_are_those_of_the_part_alone():
    rng = np.random.default_rng(0)
    a, b, inside = rng.normal(size=30), rng.normal(size=30), rng.random(30) < 0.4
    weights = _weights(rng, 30)
    part = partial(metrics.spearman, truth_n=a[inside], predicted_n=b[inside])
    expected = [
        spearmanr(_repeated(row[inside], a[inside]), _repeated(row[inside], b[inside])).statistic for row in weights
    ]
    np.testing.assert_allclose(metrics.within(weights, part, inside), expected, rtol=1e-10)
    nothing = partial(metrics.mean, values_n=np.zeros(0))
    assert np.isnan(metrics.within(weights, nothing, np.zeros(30, dtype=bool))).all()


def test_counts_of_several_labels_an_example_are_scikit_learns_of_all_labels():
    rng = np.random.default_rng(0)
    truth, predicted = (rng.integers(4, size=(12, 9)) for _ in range(2))  # nine labels an example
    one_hot = np.eye(4, dtype=int)
    counts = ((one_hot[truth] * one_hot[predicted]).sum(1), one_hot[truth].sum(1), one_hot[predicted].sum(1))
    weights = _weights(rng, 12)
    pairs = [(_repeated(row, truth).ravel(), _repeated(row, predicted).ravel()) for row in weights]
    mcc = [matthews_corrcoef(*pair) for pair in pairs]
    np.testing.assert_allclose(metrics.matthews_of_counts(weights, *counts), mcc, rtol=1e-10, atol=1e-15)
    f1 = [f1_score(*pair, average="macro") for pair in pairs]
    np.testing.assert_allclose(metrics.macro_f1_of_counts(weights, *counts), f1, rtol=1e-12)
