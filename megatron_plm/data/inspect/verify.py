"""Whether a dataset is whole: every entry of the index, every token and the checksums, in one pass each."""

import hashlib
from bisect import bisect_right
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from megatron_plm.data.indexed import IndexedDataset, dataset_paths
from megatron_plm.data.inspect.contents import (
    CHUNK,
    Contents,
    LengthCounter,
    TokenCounter,
    contents,
    described,
)
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import Tokenizer

_AGAIN = "make the dataset again, or copy its files again"


def verify(
    dataset: IndexedDataset, tokenizer: Tokenizer | None, progress: Callable[[int], None]
) -> tuple[Contents, list[str]]:
    """Check the files of `dataset` from end to end; return what they hold and what was checked, in words.

    Memory is constant. Raises UserError at the first fault: an entry of the index out of order or out of range, bytes
    of no sequence, a token id outside the vocabulary, counts or checksums that differ from PREFIX.json. Without a
    tokenizer only negative ids are faults. `progress` is told how many bytes of tokens were read.
    """
    lengths, tokens = LengthCounter(), TokenCounter(tokenizer)
    _check_sequences(dataset, lengths)
    _check_documents(dataset)
    bin_sha256 = _check_tokens(dataset, tokenizer, tokens, progress)
    found = contents(lengths, tokens, tokenizer)
    done = [
        f"{len(dataset):,} sequences lie end to end in .bin",
        f"{dataset.num_documents:,} documents are in order",
        f"{dataset.num_tokens:,} token ids are "
        + (f"inside the vocabulary of {tokenizer.vocab_size}" if tokenizer else "not negative (tokenizer unknown)"),
    ]
    return found, [*done, _check_counts(dataset, tokenizer, found), _check_sums(dataset, bin_sha256)]


def _check_sequences(dataset: IndexedDataset, lengths_seen: LengthCounter) -> None:
    paths = dataset_paths(dataset.prefix)
    itemsize, bin_size = dataset.tokens.itemsize, paths.bin.stat().st_size
    begin = 0
    for first in range(0, len(dataset), CHUNK):
        lengths = np.array(dataset.lengths[first : first + CHUNK])
        pointers = np.array(dataset.pointers[first : first + CHUNK])
        sizes = lengths.astype(np.int64) * itemsize
        ends = begin + np.cumsum(sizes)
        begins = ends - sizes
        wrong = np.flatnonzero((lengths < 0) | (pointers != begins) | (ends > bin_size))
        if len(wrong):
            i = int(wrong[0])
            at = f"'{paths.idx}' is damaged: sequence {first + i}"
            if lengths[i] < 0:
                raise UserError(f"{at} has length {lengths[i]}; {_AGAIN}")
            if pointers[i] != begins[i]:
                raise UserError(
                    f"{at} begins at byte {pointers[i]:,} of '{paths.bin}', but the one before it ends at "
                    f"{begins[i]:,}; {_AGAIN}"
                )
            raise UserError(f"{at} ends at byte {ends[i]:,} of '{paths.bin}', which has {bin_size:,}; {_AGAIN}")
        lengths_seen.add(lengths)
        begin = int(ends[-1])
    if begin != bin_size:
        raise UserError(
            f"'{paths.bin}' has {bin_size:,} bytes, but the last sequence of '{paths.idx}' ends at {begin:,}; {_AGAIN}"
        )


def _check_documents(dataset: IndexedDataset) -> None:
    path = dataset_paths(dataset.prefix).idx
    before = 0
    for first in range(0, dataset.num_documents + 1, CHUNK):
        entries = np.array(dataset.document_indices[first : first + CHUNK])
        steps = np.diff(entries, prepend=before)
        outside = (entries < 0) | (entries > len(dataset)) | (steps < 0)
        if first == 0:
            outside[0] = entries[0] != 0
        wrong = np.flatnonzero(outside)
        if len(wrong):
            i = int(wrong[0])
            low = int(entries[i - 1]) if i else before
            allowed = "0" if first + i == 0 else f"{low} to {len(dataset)}"
            raise UserError(
                f"'{path}' is damaged: document {first + i} begins at sequence {entries[i]}, expected {allowed}; "
                f"{_AGAIN}"
            )
        before = int(entries[-1])


def _check_tokens(
    dataset: IndexedDataset, tokenizer: Tokenizer | None, tokens_seen: TokenCounter, progress: Callable[[int], None]
) -> str:
    """Check and count every token; returns the SHA-256 of the .bin."""
    path, dtype = dataset_paths(dataset.prefix).bin, dataset.tokens.dtype
    checksum = hashlib.sha256()
    num_read = 0
    with path.open("rb") as file:
        while data := file.read(CHUNK * dtype.itemsize):
            checksum.update(data)
            tokens = np.frombuffer(data, dtype=dtype)
            _check_ids(dataset, tokenizer, tokens, num_read)
            tokens_seen.add(tokens)
            num_read += len(tokens)
            progress(num_read * dtype.itemsize)
    return checksum.hexdigest()


def _check_ids(dataset: IndexedDataset, tokenizer: Tokenizer | None, tokens: npt.NDArray, first: int) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low >= 0 and (tokenizer is None or high < tokenizer.vocab_size):
        return
    limit = tokenizer.vocab_size if tokenizer else high + 1
    i = int(np.flatnonzero((tokens < 0) | (tokens >= limit))[0])
    # The last of those that begin at the token: empty ones before it begin there too.
    sequence = bisect_right(dataset.pointers, (first + i) * tokens.itemsize) - 1
    position = first + i - int(dataset.pointers[sequence]) // tokens.itemsize
    expected = f"{tokenizer.name}'s vocabulary ends at {limit - 1}" if tokenizer else "ids are 0 or more"
    raise UserError(
        f"'{dataset_paths(dataset.prefix).bin}': sequence {sequence} has token id {tokens[i]} at position "
        f"{position + 1}, but {expected}; {_AGAIN}"
    )


def _check_counts(dataset: IndexedDataset, tokenizer: Tokenizer | None, found: Contents) -> str:
    path = dataset_paths(dataset.prefix).json
    said = described(dataset)
    if said is None:
        return "counts of lengths and letters are unknown: no description (.json) holds them"
    if (said.shortest, said.longest, said.lengths) != (found.shortest, found.longest, found.lengths):
        raise UserError(f"'{path}' describes other lengths than the dataset has; {_AGAIN}")
    if tokenizer is None:
        return "counts of lengths are those of .json"
    for token in {**said.tokens, **found.tokens}:
        if said.tokens.get(token, 0) != found.tokens.get(token, 0):
            raise UserError(
                f"'{path}' counts {said.tokens.get(token, 0):,} times {token!r}, but the dataset holds "
                f"{found.tokens.get(token, 0):,}; {_AGAIN}"
            )
    return "counts of lengths and letters are those of .json"


def _check_sums(dataset: IndexedDataset, bin_sha256: str) -> str:
    if dataset.sha256 is None:
        return "checksums are unknown: no description (.json) holds them"
    paths, sums = dataset_paths(dataset.prefix), dataset.metadata["sha256"]
    with paths.idx.open("rb") as file:
        idx_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    for path, found, expected in [(paths.bin, bin_sha256, sums["bin"]), (paths.idx, idx_sha256, sums["idx"])]:
        if found != expected:
            raise UserError(f"'{path}' was changed: its SHA-256 is {found}, '{paths.json}' says {expected}; {_AGAIN}")
    return "checksums of .bin and .idx are those of .json"
