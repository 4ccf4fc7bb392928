"""Length and letter counts against counting by hand."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_plm.data.statistics import LengthStatistics, count_tokens, count_unknown_letters
from megatron_plm.tokenizers import get_tokenizer

LENGTHS = st.integers(1, 2**31 - 1) | st.integers(1, 2000)


@given(st.lists(st.lists(LENGTHS, max_size=20), min_size=1, max_size=4))
def test_lengths_added_in_any_portions_are_counted_as_by_hand(portions: list[list[int]]) -> None:
    statistics = LengthStatistics()
    for portion in portions:
        statistics.add(np.array(portion, dtype=np.int32))
    lengths = sum(portions, [])  # noqa: RUF017 (short)
    assert (statistics.count, statistics.total) == (len(lengths), sum(lengths))
    assert (statistics.minimum, statistics.maximum) == (min(lengths, default=0), max(lengths, default=0))
    assert statistics.mean == (sum(lengths) / len(lengths) if lengths else 0)
    bins = statistics.histogram()["bins"]
    assert [count for _, _, count in bins] == [sum(low <= n < high for n in lengths) for low, high, _ in bins]
    assert sum(count for *_, count in bins) == len(lengths)
    assert [high for _, high, _ in bins][:-1] == [low for low, _, _ in bins][1:]
    assert all(high - low <= max(1, low / 4 + 1) for low, high, _ in bins), "bins too wide to show a distribution"


@given(st.text("ALGMXJ*1alj-.", max_size=50), st.booleans())
def test_letters_are_counted_as_by_hand(text: str, fold_case: bool) -> None:
    tokenizer = get_tokenizer("esm2")
    byte_counts = np.bincount(np.frombuffer(text.encode(), dtype=np.uint8), minlength=256).astype(np.uint64)
    folded = text.upper() if fold_case else text
    unknown = Counter(letter for letter in folded if letter not in tokenizer.tokens)
    assert count_unknown_letters(byte_counts, tokenizer, fold_case=fold_case) == unknown
    tokens = count_tokens(byte_counts, tokenizer, fold_case=fold_case)
    assert tokens.pop("<unk>") == unknown.total()
    assert {token: count for token, count in tokens.items() if count} == Counter(folded) - unknown
