"""Rows: nothing lost, nothing overlapping, well filled, the same from any cursor."""

import itertools
from collections import Counter

import numpy as np
import pytest

from megatron_plm.data.packing import Cursor, RowStream, Segment, best_fit, num_labels, row_limits

LENGTHS = np.clip(np.random.default_rng(0).lognormal(5.7, 0.7, 3000), 20, 4000).astype(np.int32)


def stream(lengths=LENGTHS, *, seq_length=1024, window=2048, seed=1, dataset_id="train"):
    return RowStream(lengths, seq_length=seq_length, mask_prob=0.15, window=window, seed=seed, dataset_id=dataset_id)


def epoch_rows(rows, epoch=0):
    cursor = Cursor(epoch)
    for row, after in rows.rows_from(cursor):
        yield row
        if after.epoch > epoch:
            return


def test_an_epoch_holds_every_protein_once():
    sequences = Counter(segment.sequence for row in epoch_rows(stream()) for segment in row)
    assert sequences == Counter(range(len(LENGTHS)))


@pytest.mark.parametrize("seq_length", [64, 512, 1024])
def test_rows_keep_their_limits_and_segments_their_proteins(seq_length):
    limits = row_limits(seq_length, 0.15)
    for row in epoch_rows(stream(seq_length=seq_length)):
        assert sum(segment.length for segment in row) <= limits.tokens
        assert len(row) <= limits.segments
        assert num_labels(np.array([s.length for s in row]), 0.15).sum() <= limits.labels
        for segment in row:
            whole = int(LENGTHS[segment.sequence]) + 2
            assert segment.length == min(whole, seq_length)
            assert 0 <= segment.start <= whole - segment.length


def test_rows_are_at_least_98_percent_full_on_swiss_prot_like_lengths():
    lengths = np.clip(np.random.default_rng(1).lognormal(5.66, 0.73, 20000), 30, 5000).astype(np.int32)
    rows = list(epoch_rows(stream(lengths)))
    fill = sum(segment.length for row in rows for segment in row) / (1024 * len(rows))
    assert fill > 0.98


def test_the_stream_goes_on_from_any_cursor():
    rows = stream(window=256)
    reference = list(itertools.islice(rows.rows_from(Cursor()), 2500))
    assert reference[-1][1].epoch >= 1, "the sample must cross an epoch"
    for start in (0, 1, 700, 1999):
        going_on = itertools.islice(rows.rows_from(reference[start][1]), 50)
        assert list(going_on) == reference[start + 1 : start + 51]


def test_epochs_seeds_and_datasets_have_orders_of_their_own():
    first = [list(epoch_rows(s, e)) for s, e in [(stream(), 0), (stream(), 1), (stream(seed=2), 0)]]
    first.append(list(epoch_rows(stream(dataset_id="valid"))))
    for one, other in itertools.combinations(first, 2):
        assert one != other


def test_crops_start_anywhere():
    long = np.full(2000, 3000, dtype=np.int32)
    starts = np.array([segment.start for row in epoch_rows(stream(long)) for segment in row])
    assert starts.min() < 10
    assert starts.max() > 3002 - 1024 - 10
    assert abs(starts.mean() - (3002 - 1024) / 2) < 4 * (3002 - 1024) / np.sqrt(12 * 2000)


def test_best_fit_takes_the_fullest_row_that_holds_the_segment():
    segments = [Segment(i, 0, length) for i, length in enumerate([600, 700, 300, 400, 24])]
    rows = best_fit(segments, row_limits(1024, 0.15), 0.15)
    # 700 and 600 open rows; 400 fits only beside 600 (424 left), 300 beside 700 (324 left); then 24 are left in both,
    # and the earlier row, that of 700, takes them.
    assert [[s.length for s in row] for row in rows] == [[700, 300, 24], [600, 400]]


def test_short_peptides_fill_rows_without_breaking_the_label_limit():
    lengths = np.full(5000, 10, dtype=np.int32)
    rows = list(epoch_rows(stream(lengths)))
    fill = sum(segment.length for row in rows for segment in row) / (1024 * len(rows))
    assert fill > 0.95


@pytest.mark.parametrize(
    ("tokens", "labels"), [(0, 0), (1, 1), (3, 1), (9, 1), (10, 2), (100, 15), (103, 15), (104, 16)]
)
def test_num_labels_is_the_rounded_share_and_at_least_one(tokens, labels):
    assert int(num_labels(np.array([tokens]), 0.15)[0]) == labels
