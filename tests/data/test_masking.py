"""Masking: counts, shares, and no dependence on the row a protein lands in."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from rows_reference import MemoryDataset
from scipy import stats

from megatron_plm.config.options import DataOptions
from megatron_plm.data._native import build_rows
from megatron_plm.data.masking import Masking, native_vocabulary
from megatron_plm.tokenizers import get_tokenizer

TOKENIZER = get_tokenizer("esm2")
OPTIONS = DataOptions()


def protein(index, length):
    return np.random.default_rng(index).choice(TOKENIZER.standard_ids, length)


def mask(proteins, options=OPTIONS, key=1, numbers=None, objective="mlm"):
    """Mask proteins in one row; returns (tokens shown, index of labels, labels) of the row."""
    data = MemoryDataset(proteins)
    length = data.lengths.astype(np.int64) + 2
    total = int(length.sum())
    tokens, _, _, _, index, label, _, num_labels, _ = build_rows(
        files=[data.tokens], file=np.zeros(len(proteins), np.int64), pointer=data.pointers,
        residues=data.lengths.astype(np.int64), sequence=np.array(numbers or range(len(proteins)), dtype=np.int64),
        start=np.zeros(len(proteins), np.int64), length=length, key=np.full(len(proteins), key, np.uint64),
        row_offsets=np.array([0, len(proteins)]), vocabulary=native_vocabulary(TOKENIZER),
        corruption=Masking.from_options(options, objective).native(),
        row_tokens=total, row_labels=total, row_segments=len(proteins),
    )  # fmt: skip
    return tokens[0], index[0, :num_labels], label[0, :num_labels]


def whole(proteins):
    return np.concatenate([[TOKENIZER.cls_id, *p, TOKENIZER.eos_id] for p in proteins])


@pytest.mark.parametrize(
    ("letters", "labels"), [(0, 0), (1, 1), (3, 1), (9, 1), (10, 2), (100, 15), (103, 15), (104, 16)]
)
def test_the_number_of_labels_is_the_rounded_share_and_at_least_one(letters, labels):
    assert Masking.from_options(OPTIONS, "mlm").num_labels(np.array([letters]))[0] == labels


@pytest.mark.parametrize("selection", ["exact", "spans"])
def test_each_protein_has_its_share_of_labels_and_no_special_token_is_chosen(selection):
    proteins = [protein(i, length) for i, length in enumerate([1, 5, 37, 100, 411])]
    _, index, label = mask(proteins, replace(OPTIONS, mask_selection=selection))
    owner = np.repeat(np.arange(5), [len(p) + 2 for p in proteins])
    expected = Masking.from_options(OPTIONS, "mlm").num_labels(np.array([len(p) for p in proteins]))
    assert np.bincount(owner[index], minlength=5).tolist() == expected.tolist()
    assert np.isin(label, TOKENIZER.residue_ids).all()
    assert (whole(proteins)[index] == label).all()
    assert (np.diff(index) > 0).all()


@pytest.mark.parametrize("selection", ["exact", "bernoulli", "spans"])
def test_a_protein_gets_the_same_mask_alone_and_among_others(selection):
    options = replace(OPTIONS, mask_selection=selection)
    alone, alone_index, alone_label = mask([protein(7, 90)], options, numbers=[7])
    shown, index, label = mask([protein(3, 50), protein(7, 90), protein(9, 20)], options, numbers=[3, 7, 9])
    inside = (index >= 52) & (index < 52 + 92)
    np.testing.assert_array_equal(index[inside] - 52, alone_index)
    np.testing.assert_array_equal(label[inside], alone_label)
    np.testing.assert_array_equal(shown[52 : 52 + 92], alone)


def test_only_chosen_tokens_change_and_unknown_letters_are_never_chosen():
    tokens = protein(1, 400)
    tokens[50:150] = TOKENIZER.unk_id
    shown, index, _ = mask([tokens])
    assert np.isin(np.flatnonzero(shown != whole([tokens])), index).all()
    assert not np.isin(index, np.arange(51, 151)).any()
    assert len(index) == 45  # 15 % of the 300 letters


def test_a_protein_of_unknown_letters_only_has_no_label():
    tokens = np.full(30, TOKENIZER.unk_id, dtype=np.uint8)
    shown, index, _ = mask([tokens])
    assert index.size == 0
    np.testing.assert_array_equal(shown, whole([tokens]))


@pytest.mark.parametrize("selection", ["exact", "bernoulli"])
@pytest.mark.parametrize(("as_mask", "as_random"), [(0.8, 0.1), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_actions_follow_their_shares_positions_are_uniform_and_replacements_too(selection, as_mask, as_random):
    options = replace(OPTIONS, mask_selection=selection, mask_token_share=as_mask, mask_random_share=as_random)
    proteins = [protein(i, 200) for i in range(1500)]
    shown, index, label = mask(proteins, options)
    n = len(index)
    masked = shown[index] == TOKENIZER.mask_id
    changed = ~masked & (shown[index] != label)
    # A random amino acid is the old one in 1 of 20 draws.
    expected = np.array([as_mask, 0.95 * as_random, 1 - as_mask - 0.95 * as_random])
    observed = np.array([masked.sum(), changed.sum(), n - masked.sum() - changed.sum()])
    possible = expected > 1e-9
    assert observed[~possible].sum() == 0
    if possible.sum() > 1:
        assert stats.chisquare(observed[possible], expected[possible] * n).pvalue > 1e-4
    places = np.bincount(index % 202, minlength=202)[1:-1]
    assert stats.chisquare(places).pvalue > 1e-4
    if as_random:
        replacements = np.bincount(shown[index][changed], minlength=33)[TOKENIZER.standard_ids]
        assert stats.chisquare(replacements).pvalue > 1e-4


def test_bernoulli_chooses_each_letter_by_itself():
    proteins = [protein(i, 40) for i in range(4000)]
    _, index, _ = mask(proteins, replace(OPTIONS, mask_selection="bernoulli", mask_prob=0.25))
    counts = np.bincount(np.bincount(index // 42, minlength=4000), minlength=41)
    expected = stats.binom.pmf(np.arange(41), 40, 0.25) * 4000
    common = expected > 10
    observed = np.append(counts[common], counts[~common].sum())
    assert stats.chisquare(observed, np.append(expected[common], expected[~common].sum())).pvalue > 1e-4


def test_a_row_has_room_for_any_number_of_bernoulli_labels():
    masking = Masking.from_options(replace(OPTIONS, mask_selection="bernoulli"), "mlm")
    assert stats.binom.sf(masking.label_limit(1024, 128), 1024, 0.15) < 1e-20


def test_spans_are_stretches_of_the_mean_length_and_share_their_action():
    """Few spans in long proteins, so that they seldom meet."""
    options = replace(OPTIONS, mask_selection="spans", mask_prob=0.02, mask_span_length=3.0)
    proteins = [protein(i, 1000) for i in range(600)]
    shown, index, label = mask(proteins, options)
    runs = np.split(index, np.flatnonzero(np.diff(index) > 1) + 1)
    lengths = np.array([len(run) for run in runs])
    # Geometric, 1 to 10. The last of a protein's seven spans is cut where its share is reached, about in the middle.
    mean = float(((2 / 3) ** np.arange(10)).sum())
    assert mean * (1 - 1 / 7) < lengths.mean() < mean
    assert lengths.max() <= 14
    masked = shown == TOKENIZER.mask_id
    assert np.mean([masked[run].all() or not masked[run].any() for run in runs]) > 0.97
    assert len(index) == 600 * 20
    assert len(label) == len(index)


def test_a_causal_model_predicts_each_next_token_of_the_same_protein():
    proteins = [protein(1, 5), protein(2, 3)]
    shown, index, label = mask(proteins, objective="clm")
    np.testing.assert_array_equal(shown, whole(proteins))
    assert index.tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]
    np.testing.assert_array_equal(label, whole(proteins)[index + 1])


def test_another_key_or_number_gives_another_mask():
    masks = [
        mask([protein(1, 100)], key=key, numbers=[n])[1].tolist() for key, n in [(1, 0), (2, 0), (1, 1), (1, 2**40)]
    ]
    for one, other in itertools.combinations(masks, 2):
        assert one != other
