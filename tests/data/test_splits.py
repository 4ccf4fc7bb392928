"""Splits by hash: the text of the flag, and the shares."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_plm.data.splits import parse_splits
from megatron_plm.errors import UserError

HASHES = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not NAME=FRACTION; give for example train=0.98,valid=0.01,test=0.01"),
        ("train", "'train' is not NAME=FRACTION"),
        ("train=0.9,", "'' is not NAME=FRACTION"),
        ("train=0.9,vaild=0.1", "unknown split 'vaild'; did you mean 'valid'?; expected train, valid, test"),
        ("train=0.5,train=0.5", "train is given twice"),
        ("train=0.9,valid=0.2", "the fractions 'train=0.9,valid=0.2' add up to 1.1, not to 1"),
        ("train=0.9,valid=0.01", "add up to 0.91, not to 1"),
        ("train=1,valid=0", "the fraction of valid is '0', expected a number above 0"),
        ("train=1.5,valid=-0.5", "the fraction of train is '1.5'"),
        ("train=nan,valid=0.1", "the fraction of train is 'nan'"),
        ("train=0.9x,valid=0.1", "the fraction of train is '0.9x'"),
        ("train=0.9999999999999,valid=0.0000000000001", "at most 12 decimals"),
    ],
)
def test_what_is_no_split_is_told(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_splits(text)
    assert message in str(error.value)
    assert str(error.value).startswith("--split: ")


@given(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=3), st.lists(HASHES, max_size=20),
)  # fmt: skip
def test_a_hash_falls_into_the_split_whose_share_of_the_line_it_is_in(parts: list[int], hashes: list[int]) -> None:
    parts[-1] = 3 * 10**6 - sum(parts[:-1])
    fractions = [Fraction(part, 3 * 10**6) for part in parts]
    # Only fractions with a finite number of decimals can be written.
    texts = [f"{int(fraction * 10**12) / 10**12:.12f}" for fraction in fractions[:-1]]
    texts.append(f"{float(1 - sum(map(Fraction, texts))):.12f}")
    splits = parse_splits(
        ",".join(f"{name}={text}" for name, text in zip(("train", "valid", "test"), texts, strict=False))
    )
    bounds = [sum(map(Fraction, texts[:i])) * 2**64 for i in range(len(texts) + 1)]
    hashes += [int(bound) - step for bound in bounds[1:-1] for step in (0, 1)]
    expected = [
        next(
            i
            for i in range(len(texts))
            if int(bounds[i]) <= value < (int(bounds[i + 1]) if i + 1 < len(texts) else 2**64)
        )
        for value in hashes
    ]
    assert splits.of_hashes(np.array(hashes, dtype=np.uint64)).tolist() == expected


def test_names_are_in_the_order_given_and_blanks_are_no_matter() -> None:
    splits = parse_splits("valid=0.25, train=0.75")
    assert splits.names == ("valid", "train")
    assert splits.described() == {"valid": 0.25, "train": 0.75}
    assert splits.of_hashes(np.array([0, 2**62 - 1, 2**62, 2**64 - 1], dtype=np.uint64)).tolist() == [0, 0, 1, 1]
