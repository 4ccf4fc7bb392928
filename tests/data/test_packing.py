"""Rows: nothing lost, nothing overlapping, well filled, the same from any place."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows_reference import MemoryDataset, best_fit, fills

from megatron_plm.config.options import DataOptions
from megatron_plm.data._native import pack_best_fit
from megatron_plm.data.masking import Masking
from megatron_plm.data.packing import Place, RowStream, row_limits
from megatron_plm.errors import UserError

LENGTHS = np.clip(np.random.default_rng(0).lognormal(5.7, 0.7, 3000), 20, 4000).astype(np.int32)
OPTIONS = DataOptions(seq_length=1024, packing_window=2048)


def dataset(lengths=LENGTHS, clusters=None):
    return MemoryDataset([np.zeros(n, dtype=np.uint8) for n in lengths], clusters)


def stream(data=None, options=OPTIONS, *, seed=1, name="train"):
    masking = Masking.from_options(options, "mlm")
    return RowStream(data or dataset(), options, masking, seed=seed, name=name)


def flat(rows):
    """Rows as plain numbers."""
    return [[column.tolist() for column in row[2:]] for row in rows]


def segments(rows):
    return [(s, a, n) for row in flat(rows) for s, a, n in zip(*row, strict=True)]


def test_an_epoch_holds_every_protein_once():
    found = Counter(sequence for sequence, _, _ in segments(stream().epoch_rows(0)))
    assert found == Counter(range(len(LENGTHS)))


@pytest.mark.parametrize("seq_length", [64, 512, 1024])
@pytest.mark.parametrize("selection", ["exact", "bernoulli"])
def test_rows_keep_their_limits_and_segments_their_proteins(seq_length, selection):
    options = replace(OPTIONS, seq_length=seq_length, mask_selection=selection)
    masking = Masking.from_options(options, "mlm")
    limits = row_limits(options, masking)
    for row in stream(options=options).epoch_rows(0):
        assert row.length.sum() <= limits.tokens
        assert len(row.length) <= limits.segments
        assert masking.num_labels(row.length).sum() <= limits.labels
    for sequence, start, length in segments(stream(options=options).epoch_rows(0)):
        whole = int(LENGTHS[sequence]) + 2
        assert length == min(whole, seq_length)
        assert 0 <= start <= whole - length


@pytest.mark.parametrize("seq_length", [1024, 2176])
def test_rows_are_at_least_98_percent_full_on_swiss_prot_like_lengths(seq_length):
    lengths = np.clip(np.random.default_rng(1).lognormal(5.66, 0.73, 20000), 30, 5000).astype(np.int32)
    rows = stream(dataset(lengths), replace(OPTIONS, seq_length=seq_length)).epoch_rows(0)
    assert fills(list(rows), seq_length) > 0.98


def test_a_small_share_of_labels_leaves_rows_of_short_proteins_as_full():
    rows = stream(dataset(np.full(5000, 30)), replace(OPTIONS, mask_prob=0.01)).epoch_rows(0)
    assert fills(list(rows)[:-3], 1024) > 0.98


def test_the_stream_goes_on_from_any_place():
    rows = stream(options=replace(OPTIONS, packing_window=256))
    reference = list(itertools.islice(rows.rows_from(Place()), 2500))
    assert reference[-1][1].epoch >= 1, "the sample must cross an epoch"
    for start in (0, 1, 700, 1999):
        going_on = list(itertools.islice(rows.rows_from(reference[start][1]), 50))
        expected = reference[start + 1 : start + 51]
        assert [place for _, place in going_on] == [place for _, place in expected]
        assert flat(row for row, _ in going_on) == flat(row for row, _ in expected)


def test_epochs_seeds_and_names_have_orders_of_their_own():
    first = [flat(s.epoch_rows(e)) for s, e in [(stream(), 0), (stream(), 1), (stream(seed=2), 0)]]
    first.append(flat(stream(name="valid").epoch_rows(0)))
    for one, other in itertools.combinations(first, 2):
        assert one != other


def test_crops_start_anywhere():
    long = dataset(np.full(2000, 3000))
    starts = np.array([start for _, start, _ in segments(stream(long).epoch_rows(0))])
    assert starts.min() < 10
    assert starts.max() > 3002 - 1024 - 10
    assert abs(starts.mean() - (3002 - 1024) / 2) < 4 * (3002 - 1024) / np.sqrt(12 * 2000)


def test_chunks_cover_every_protein_from_end_to_end():
    options = replace(OPTIONS, long_sequences="chunk", seq_length=512)
    found = sorted(segments(stream(options=options).epoch_rows(3)))
    expected = [
        (sequence, start, min(512, int(length) + 2 - start))
        for sequence, length in enumerate(LENGTHS)
        for start in range(0, int(length) + 2, 512)
    ]
    assert found == expected


def test_dropping_leaves_out_the_long_and_nothing_else():
    options = replace(OPTIONS, long_sequences="drop", seq_length=512)
    found = sorted(sequence for sequence, _, _ in segments(stream(options=options).epoch_rows(0)))
    assert found == np.flatnonzero(LENGTHS + 2 <= 512).tolist()


def test_dropping_everything_is_an_error_not_an_endless_search():
    options = replace(OPTIONS, long_sequences="drop", packing_window=16)
    with pytest.raises(UserError, match="every protein is longer than a row of --seq-length 1024"):
        next(stream(dataset(np.full(40, 2000)), options).rows_from(Place()))


def test_a_long_protein_can_be_an_error_that_names_it():
    options = replace(OPTIONS, long_sequences="error")
    data = dataset([30, 1023, 1022])
    with pytest.raises(UserError, match="'memory': sequence 1 has 1023 residues, more than a row of --seq-length 1024"):
        next(stream(data, options).rows_from(Place()))


def test_without_packing_each_row_is_one_protein_among_others_of_its_length():
    options = replace(OPTIONS, row_layout="padded")
    rows = list(stream(options=options).epoch_rows(0))
    assert sorted(sequence for sequence, _, _ in segments(rows)) == list(range(len(LENGTHS)))
    assert {len(row.sequence) for row in rows} == {1}
    lengths = np.array([int(row.length[0]) for row in rows])
    batches = np.split(lengths[: 32 * (len(rows) // 32)], len(rows) // 32)
    padded = sum(batch.max() * len(batch) for batch in batches)
    assert sum(batch.sum() for batch in batches) / padded > 0.9


def test_each_epoch_draws_one_member_of_every_cluster():
    sizes = np.random.default_rng(3).integers(1, 6, 500)
    data = dataset(np.full(sizes.sum(), 50), sizes)
    cluster_of = np.repeat(np.arange(500), sizes)
    seen = Counter()
    for epoch in range(60):
        sequences = np.array([sequence for sequence, _, _ in segments(stream(data).epoch_rows(epoch))])
        assert sorted(cluster_of[sequences]) == list(range(500))
        seen.update(sequences.tolist())
    fives = np.flatnonzero(sizes == 5)
    members = np.array([[seen[member] for member in np.flatnonzero(cluster_of == cluster)] for cluster in fives])
    assert (members.sum(1) == 60).all()
    assert members.min() > 0, "with 60 draws of 5 a member is missed once in 650,000"
    assert abs(members[:, 0].mean() - 12) < 4 * np.sqrt(60 * 0.2 * 0.8 / len(fives))


numbers = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 8)), max_size=60)


@given(numbers, st.integers(1, 9))
def test_native_packing_is_best_fit_decreasing(items, segments):
    tokens, labels = (np.array([item[k] for item in items], dtype=np.int64) for k in (0, 1))
    found, offsets = pack_best_fit(tokens, labels, 40, 8, segments)
    rows = [found[a:b].tolist() for a, b in itertools.pairwise(offsets.tolist())]
    assert rows == best_fit(tokens.tolist(), labels.tolist(), (40, 8, segments))


def test_native_packing_refuses_what_fits_no_row():
    with pytest.raises(ValueError, match="does not fit"):
        pack_best_fit(np.array([41]), np.array([0]), 40, 8, 3)
