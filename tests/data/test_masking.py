"""Masking: exact counts, the 80/10/10 rule, and no dependence on the row a protein lands in."""

import numpy as np
from scipy import stats

from megatron_plm.data.masking import choose_and_corrupt
from megatron_plm.data.packing import num_labels
from megatron_plm.tokenizers import get_tokenizer

TOKENIZER = get_tokenizer("esm2")


def protein(index, length):
    rng = np.random.default_rng(index)
    residues = rng.choice(TOKENIZER.standard_ids, length)
    return np.concatenate([[TOKENIZER.cls_id], residues, [TOKENIZER.eos_id]]).astype(np.uint8)


def mask(proteins, key=1):
    """Mask a row of {index: tokens}."""
    tokens = np.concatenate(list(proteins.values()))
    return choose_and_corrupt(
        tokens,
        sequences=np.repeat(list(proteins), [len(p) for p in proteins.values()]),
        positions=np.concatenate([np.arange(len(p)) for p in proteins.values()]),
        tokenizer=TOKENIZER,
        mask_prob=0.15,
        key=key,
    )


def test_each_protein_has_its_rounded_share_of_labels_and_no_special_token_is_chosen():
    proteins = {i: protein(i, length) for i, length in enumerate([1, 5, 37, 100, 411])}
    index, _ = mask(proteins)
    tokens = np.concatenate(list(proteins.values()))
    owner = np.repeat(list(proteins), [len(p) for p in proteins.values()])
    counts = np.bincount(owner[index], minlength=len(proteins))
    assert counts.tolist() == [int(num_labels(np.array([len(p) - 2]), 0.15)[0]) for p in proteins.values()]
    assert np.isin(tokens[index], TOKENIZER.residue_ids).all()


def test_a_protein_gets_the_same_mask_alone_and_among_others():
    alone_index, alone = mask({7: protein(7, 90)})
    together = {3: protein(3, 50), 7: protein(7, 90), 9: protein(9, 20)}
    index, corrupted = mask(together)
    inside = (index >= 52) & (index < 52 + 92)
    np.testing.assert_array_equal(index[inside] - 52, alone_index)
    np.testing.assert_array_equal(corrupted[52 : 52 + 92], alone)


def test_only_chosen_tokens_change_and_unknown_letters_are_never_chosen():
    tokens = protein(1, 400)
    tokens[50:150] = TOKENIZER.unk_id
    index, corrupted = mask({1: tokens})
    assert np.isin(np.flatnonzero(corrupted != tokens), index).all()
    assert not np.isin(index, np.arange(50, 150)).any()
    assert len(index) == 45  # 15 % of the 300 letters


def test_a_protein_of_unknown_letters_only_has_no_label():
    tokens = protein(1, 30)
    tokens[1:-1] = TOKENIZER.unk_id
    index, corrupted = mask({1: tokens})
    assert index.size == 0
    np.testing.assert_array_equal(corrupted, tokens)


def test_actions_follow_80_10_10_positions_are_uniform_and_replacements_too():
    original = {i: protein(i, 200) for i in range(3000)}
    index, corrupted = mask(original)
    tokens = np.concatenate(list(original.values()))
    masked = corrupted[index] == TOKENIZER.mask_id
    changed = ~masked & (corrupted[index] != tokens[index])
    n = len(index)
    # A random amino acid is the old one in 1 of 20 draws, so 9.5 % change and 10.5 % stay.
    observed = [masked.sum(), changed.sum(), n - masked.sum() - changed.sum()]
    assert stats.chisquare(observed, [0.8 * n, 0.095 * n, 0.105 * n]).pvalue > 1e-4
    places = np.bincount(index % 202, minlength=202)[1:-1]
    assert stats.chisquare(places).pvalue > 1e-4
    replacements = np.bincount(corrupted[index][changed], minlength=33)[TOKENIZER.standard_ids]
    assert stats.chisquare(replacements).pvalue > 1e-4


def test_another_key_gives_another_mask():
    assert mask({1: protein(1, 100)}, key=1)[0].tolist() != mask({1: protein(1, 100)}, key=2)[0].tolist()
