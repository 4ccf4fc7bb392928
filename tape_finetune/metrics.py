"""Scores of predictions, each as a function of how often every example counts.

A metric takes weights, float64 [B, n]: B ways to count the n examples (all ones is the score itself, the counts of a
draw with replacement are a bootstrap replicate), and returns float64 [B]. A value that is undefined is NaN.

Shapes: n examples, B ways to weight them, C classes.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.integer]
Metric = Callable[[Floats], Floats]


def ratio(weights_Bn: Floats, numerator_n: NDArray, denominator_n: NDArray) -> Floats:
    """Σ w·numerator / Σ w·denominator: with one row an example and its counts, the micro average."""
    return _divide(weights_Bn @ numerator_n.astype(np.float64), weights_Bn @ denominator_n.astype(np.float64))


def mean(weights_Bn: Floats, values_n: NDArray) -> Floats:
    """The mean of `values_n` over the examples where it is defined; NaN where it is for none."""
    defined = ~np.isnan(values_n)
    return ratio(weights_Bn, np.where(defined, values_n, 0.0), defined)


def within(weights_Bn: Floats, metric: Metric, index_n: NDArray[np.bool_]) -> Floats:
    """A metric of the examples that `index_n` chooses, which are those that `metric` takes weights for; NaN of none."""
    if not index_n.any():
        return undefined(weights_Bn)
    return metric(weights_Bn[:, index_n])


def mean_of(weights_Bn: Floats, of: Sequence[Metric]) -> Floats:
    """The mean of several metrics."""
    return np.mean([metric(weights_Bn) for metric in of], axis=0)


def undefined(weights_Bn: Floats) -> Floats:
    """A metric that means nothing on these examples: NaN."""
    return np.full(len(weights_Bn), np.nan)


def mean_squared_error(weights_Bn: Floats, truth_n: Floats, predicted_n: Floats) -> Floats:
    """The mean of (truth − predicted)², in the square of the labels' unit."""
    return mean(weights_Bn, (truth_n - predicted_n) ** 2)


def accuracy(weights_Bn: Floats, truth_n: Ints, predicted_n: Ints) -> Floats:
    """The share of examples whose predicted class is the true one."""
    return mean(weights_Bn, (truth_n == predicted_n).astype(np.float64))


def matthews_correlation(weights_Bn: Floats, truth_n: Ints, predicted_n: Ints, num_classes: int) -> Floats:
    """The correlation of true and predicted class, from −1 to 1, for any number of classes."""
    return matthews_of_counts(weights_Bn, *_class_counts(truth_n, predicted_n, num_classes))


def matthews_of_counts(weights_Bn: Floats, hits_nC: NDArray, true_nC: NDArray, predicted_nC: NDArray) -> Floats:
    """The same where an example has several labels, from its right, true and predicted ones of each class.

    R_K of Gorodkin 2004 (doi:10.1016/j.compbiolchem.2004.09.006). It is 0 where truth or prediction is all one class,
    as in scikit-learn.
    """
    hits_BC, true_BC, predicted_BC = (
        weights_Bn @ counts.astype(np.float64) for counts in (hits_nC, true_nC, predicted_nC)
    )
    total_B = true_BC.sum(1)
    covariance = hits_BC.sum(1) * total_B - (true_BC * predicted_BC).sum(1)
    spread = (total_B**2 - (true_BC**2).sum(1)) * (total_B**2 - (predicted_BC**2).sum(1))
    return np.where(spread > 0, _divide(covariance, np.sqrt(spread)), 0.0)


def macro_f1(weights_Bn: Floats, truth_n: Ints, predicted_n: Ints, num_classes: int) -> Floats:
    """The mean over classes of F1 = 2·hits / (true + predicted)."""
    return macro_f1_of_counts(weights_Bn, *_class_counts(truth_n, predicted_n, num_classes))


def macro_f1_of_counts(weights_Bn: Floats, hits_nC: NDArray, true_nC: NDArray, predicted_nC: NDArray) -> Floats:
    """The same where an example has several labels, from its right, true and predicted ones of each class.

    Classes that are neither true nor predicted anywhere are left out, as in scikit-learn.
    """
    hits_BC = weights_Bn @ hits_nC.astype(np.float64)
    either_BC = weights_Bn @ (true_nC + predicted_nC).astype(np.float64)
    present_BC = either_BC > 0
    f1_BC = np.where(present_BC, _divide(2 * hits_BC, either_BC), 0.0)
    return _divide(f1_BC.sum(1), present_BC.sum(1).astype(np.float64))


def area_under_roc(weights_Bn: Floats, truth_n: Ints, scores_n: Floats) -> Floats:
    """The chance that a positive example (truth 1) has a higher score than a negative one (0), ties counting half."""
    positive_n = (truth_n == 1).astype(np.float64)
    groups = _Groups(scores_n)
    positives_BG, negatives_BG = groups.totals(weights_Bn * positive_n), groups.totals(weights_Bn * (1 - positive_n))
    wins_B = (positives_BG * (_before(negatives_BG) + negatives_BG / 2)).sum(1)
    return _divide(wins_B, positives_BG.sum(1) * negatives_BG.sum(1))


def spearman(weights_Bn: Floats, truth_n: Floats, predicted_n: Floats) -> Floats:
    """Spearman's rank correlation, tied values sharing the mean of their ranks; NaN where one side is constant."""
    ranks = [_Groups(values).mean_ranks(weights_Bn) for values in (truth_n, predicted_n)]
    total_B1 = weights_Bn.sum(1, keepdims=True)
    a_Bn, b_Bn = (rank - _divide((weights_Bn * rank).sum(1, keepdims=True), total_B1) for rank in ranks)
    covariance = (weights_Bn * a_Bn * b_Bn).sum(1)
    spread = (weights_Bn * a_Bn**2).sum(1) * (weights_Bn * b_Bn**2).sum(1)
    return _divide(covariance, np.sqrt(spread))


def average_precision(scores_P: Floats, is_hit_P: NDArray[np.bool_]) -> float:
    """The area under the steps of precision over recall, as the threshold falls from score to score; NaN without hits.

    Σ (R_t − R_{t−1})·P_t over the distinct scores t, as in scikit-learn: equal scores are one step, so their order has
    no influence. No line is drawn between the steps, which would be too good (Davis & Goadrich 2006,
    doi:10.1145/1143844.1143874).
    """
    num_hits = np.count_nonzero(is_hit_P)
    if num_hits == 0:
        return float("nan")
    order = np.argsort(-scores_P, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores_P[order]) != 0, True))
    hits_t = np.cumsum(is_hit_P[order])[ends]
    return float((np.diff(hits_t, prepend=0) * hits_t / (ends + 1)).sum() / num_hits)


def precision_at(k: int, scores_P: Floats, is_hit_P: NDArray[np.bool_]) -> float:
    """The share of hits among the k highest of P scores (all of them if P < k); NaN if there are none.

    Where the k-th place is tied, the value is the mean over all ways to break the tie, so the order of the pairs has
    no influence and a constant score gets the share of hits.
    """
    k = min(k, len(scores_P))
    if k == 0:
        return float("nan")
    last = np.partition(scores_P, len(scores_P) - k)[len(scores_P) - k]
    above, tied = scores_P > last, scores_P == last
    share_of_tied = (k - np.count_nonzero(above)) / np.count_nonzero(tied)
    return float((np.count_nonzero(is_hit_P & above) + share_of_tied * np.count_nonzero(is_hit_P & tied)) / k)


class _Groups:
    """Examples grouped by equal value, the groups in ascending order; G groups."""

    def __init__(self, values_n: NDArray) -> None:
        _, self._group_n = np.unique(values_n, return_inverse=True)
        self._order_n = np.argsort(self._group_n, kind="stable")
        self._starts_G = np.flatnonzero(np.diff(self._group_n[self._order_n], prepend=-1))

    def totals(self, weights_Bn: Floats) -> Floats:
        """The weight of each group, [B, G]."""
        return np.add.reduceat(weights_Bn[:, self._order_n], self._starts_G, axis=1)

    def mean_ranks(self, weights_Bn: Floats) -> Floats:
        """The mean rank, from 1, that an example's copies have among all copies, [B, n]."""
        totals_BG = self.totals(weights_Bn)
        return (_before(totals_BG) + (totals_BG + 1) / 2)[:, self._group_n]


def _before(totals_BG: Floats) -> Floats:
    """The total of the groups before each group."""
    return np.cumsum(totals_BG, axis=1) - totals_BG


def _class_counts(truth_n: Ints, predicted_n: Ints, num_classes: int) -> tuple[NDArray, NDArray, NDArray]:
    """Right, true and predicted labels of each class, each [n, C], of examples with one label."""
    classes = np.arange(num_classes)
    true_nC, predicted_nC = ((values[:, None] == classes).astype(np.int64) for values in (truth_n, predicted_n))
    return true_nC * predicted_nC, true_nC, predicted_nC


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    """Quotient that is NaN, without a warning, where the denominator is 0."""
    result = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    return np.divide(numerator, denominator, out=result, where=denominator != 0)
