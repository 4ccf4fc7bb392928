"""Parquet columns that are dictionaries: a few long texts stand for many rows, which are not decoded all at once."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet
import pytest
from reading import ESM2, hash_of

from megatron_plm.data.readers import SequenceReader, open_inputs, parquet
from megatron_plm.errors import UserError

SCRIPT = """
import sys
from megatron_plm.data.readers import SequenceReader, open_inputs
from megatron_plm.tokenizers import get_tokenizer
reader = SequenceReader(get_tokenizer("esm2"), names=True)
lengths, largest = [], 0
for batch in reader.read(open_inputs(sys.argv[1:])):
    lengths += batch.lengths.tolist()
    largest = max(largest, batch.tokens.nbytes)
status = open("/proc/self/status").read()
print(lengths, largest, 1024 * int(status.split("VmHWM:")[1].split()[0]), sep="\\n")
"""


@pytest.mark.parametrize("stored", [True, False], ids=["a column of dictionaries", "a column of strings"])
def test_long_sequences_in_many_rows_are_decoded_a_few_at_a_time(tmp_path: Path, stored: bool) -> None:
    """Five sequences of 10^6 letters in 3,000 rows: 3 GB of text from a file of a few MB."""
    source = np.random.default_rng(1)
    texts = ["".join(source.choice(list("ACDEFGHIKLMNPQRSTVWY"), 1_000_000 + i)) for i in range(5)]
    codes = source.integers(0, 5, 3000)
    table = arrow.table({"sequence": arrow.DictionaryArray.from_arrays(codes, texts), "id": np.arange(3000)})
    path = tmp_path / "long.parquet"
    arrow.parquet.write_table(table, path, store_schema=stored, dictionary_pagesize_limit=1 << 24)
    assert path.stat().st_size < 6_000_000
    done = subprocess.run([sys.executable, "-c", SCRIPT, path], capture_output=True, text=True, check=True)
    lengths, largest, peak = map(json.loads, done.stdout.splitlines())
    assert lengths == (1_000_000 + codes).tolist()
    assert largest <= 4 << 20
    assert peak < 250e6, "pyarrow alone takes 100 MB, the file's dictionary 15"


@pytest.mark.parametrize("kind", [arrow.string(), arrow.large_string(), arrow.binary(), arrow.string_view()])
@pytest.mark.parametrize("batch_bytes", [1, 50, 1 << 21])
def test_rows_of_a_dictionary_keep_their_order_and_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, batch_bytes: int
) -> None:
    monkeypatch.setattr(parquet, "_BATCH_BYTES", batch_bytes)
    monkeypatch.setattr(parquet, "_MOST_CODES", 700)
    texts = ["MKTAYIAKQR" * 9, "W", "ACDEF", "M" * 70]
    column = [texts[code] for code in np.random.default_rng(2).integers(0, 4, 3000)]
    names = [f"P{number}" for number in range(3000)]
    path = tmp_path / "a.parquet"
    table = arrow.table({"id": names, "sequence": arrow.array(column).cast(kind)})
    arrow.parquet.write_table(table, path, row_group_size=1300)
    batches = list(SequenceReader(ESM2, names=True).read(open_inputs([path])))
    letters = ESM2.decode(np.concatenate([batch.tokens for batch in batches]))
    assert letters == "".join(column)
    assert np.concatenate([batch.lengths for batch in batches]).tolist() == list(map(len, column))
    assert [name.tolist() for batch in batches for name in batch.names] == [hash_of(name.encode()) for name in names]
    if batch_bytes < 1 << 21:
        assert max(batch.tokens.nbytes for batch in batches) < batch_bytes + 90


def test_a_missing_sequence_in_a_dictionary_is_told_with_its_row(tmp_path: Path) -> None:
    column = arrow.DictionaryArray.from_arrays(arrow.array([0] * 500 + [None, 1]), ["MK", "LA"])
    arrow.parquet.write_table(arrow.table({"sequence": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="row 501: the sequence is empty"):
        list(SequenceReader(ESM2).read(open_inputs([tmp_path / "a.parquet"])))
