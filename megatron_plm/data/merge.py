"""Several datasets to one, end to end: the command `merge_datasets`."""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_plm import __version__
from megatron_plm.arguments import ArgumentParser
from megatron_plm.data.indexed import METADATA_FORMAT, METADATA_VERSION, IndexedDataset, dataset_paths
from megatron_plm.data.indexed_writer import IndexedDatasetWriter
from megatron_plm.data.progress import Progress, shown_progress
from megatron_plm.data.statistics import LengthStatistics
from megatron_plm.errors import UserError
from megatron_plm.files import encodable
from megatron_plm.invocation import command_line, typeable

_SEQUENCES = 1 << 18  # handled at a time
_TOKENS = 1 << 22
_COUNTS = ("num_unknown_letters", "num_final_stops")  # what a description may hold, and the merged one adds up
_COUNTS_OF_LETTERS = ("token_counts", "unknown_letters")
_NO_LENGTHS = np.empty(0, dtype=np.int32)
_NO_STARTS = np.empty(0, dtype=bool)


def merge(
    inputs: Sequence[str | os.PathLike[str]],
    output_prefix: str | os.PathLike[str],
    *,
    force: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the sequences and documents of the datasets `inputs`, in order, as one; returns its description.

    Memory is constant. `progress` is told how many bytes of tokens have been copied. Raises UserError where a dataset
    cannot be read, is not described by its PREFIX.json, has another tokenizer or dtype than the first or is not what
    its checksums say, and leaves nothing behind then; see IndexedDatasetWriter for faults of the output.
    """
    datasets = [IndexedDataset(prefix) for prefix in inputs]
    _check_alike(datasets)
    _check_apart(inputs, output_prefix)
    lengths_seen = LengthStatistics()
    bytes_done = 0
    with IndexedDatasetWriter(output_prefix, dtype=datasets[0].tokens.dtype, documents=True, force=force) as writer:
        for dataset in datasets:
            for lengths, starts in _sequences(dataset):
                writer.append(dataset.tokens[:0], lengths, starts)
                lengths_seen.add(lengths)
            checksum = hashlib.sha256()
            for first in range(0, dataset.num_tokens, _TOKENS):
                tokens = dataset.tokens[first : first + _TOKENS]
                checksum.update(tokens.data)
                writer.append(tokens, _NO_LENGTHS, _NO_STARTS)
                bytes_done += tokens.nbytes
                if progress is not None:
                    progress.read(bytes_done)
            _check_sum(dataset, "bin", checksum.hexdigest())
            with dataset_paths(dataset.prefix).idx.open("rb") as file:
                _check_sum(dataset, "idx", hashlib.file_digest(file, "sha256").hexdigest())
        described = _description(datasets, lengths_seen, writer.num_documents)
        writer.commit({**described, **({} if command is None else {"command": encodable(command)})})
    return described


def main(argv: Sequence[str]) -> int | None:
    """The command line of `merge`; see `--help`."""
    parser = ArgumentParser(
        prog="merge_datasets",
        description="Write several datasets of one tokenizer, end to end, as one: PREFIX.bin, PREFIX.idx, PREFIX.json.",
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PREFIX", help="datasets, in the order in which they follow"
    )
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="where to write, without extension")
    parser.add_argument("--force", action="store_true", help="replace an existing dataset")
    options = parser.parse(argv)
    if options.output_prefix.endswith(os.sep) or Path(options.output_prefix).is_dir():
        raise UserError(f"--output-prefix '{options.output_prefix}' is a folder: expected FOLDER/NAME")
    started = time.perf_counter()
    total = sum(path.stat().st_size for path in map(_bin, options.input) if path.exists())
    with shown_progress(total, "merging") as progress:
        described = merge(
            options.input,
            options.output_prefix,
            force=options.force,
            command=command_line("merge-datasets", argv),
            progress=progress,
        )
    seconds = time.perf_counter() - started
    paths = dataset_paths(options.output_prefix)
    print(f"datasets         {len(options.input)}")
    print(f"sequences        {described['num_sequences']:,} in {described['num_documents']:,} documents")
    print(f"residues         {described['num_residues']:,}")
    print(f"time             {seconds:.2f} s, {total / seconds / 1e6:,.0f} MB/s")
    print(f"wrote            {paths.bin}, {paths.idx}, {paths.json}")
    tokenizer = described["tokenizer"]["name"]
    vocabulary = [] if tokenizer == "esm2" else ["--tokenizer", tokenizer]
    save = f"runs/{Path(options.output_prefix).name}"
    flags = ["--preset", "esm2-8m", *vocabulary, "--data-path", options.output_prefix, "--save", save]
    print(f"next:            {typeable('pretrain', flags)}")
    return None


def _bin(prefix: str) -> Path:
    return dataset_paths(prefix).bin


def _check_alike(datasets: Sequence[IndexedDataset]) -> None:
    """Every dataset says what made it, and it is the same as for the first."""
    first = datasets[0]
    for dataset in datasets:
        made_by, expected = dataset.tokenizer, first.tokenizer
        if made_by is None or expected is None or "token_counts" not in dataset.metadata:
            raise UserError(
                f"dataset '{dataset.prefix}' has no '{dataset.prefix}.json' that tells its tokenizer and letters: only "
                "datasets of tools/preprocess_data.py can be merged"
            )
        if made_by["sha256"] != expected["sha256"]:
            raise UserError(
                f"dataset '{dataset.prefix}' is of tokenizer {made_by['name']}, '{first.prefix}' of "
                f"{expected['name']}: their token ids differ; make them with the same --tokenizer"
            )
        if dataset.tokens.dtype != first.tokens.dtype:
            raise UserError(
                f"dataset '{dataset.prefix}' holds {dataset.tokens.dtype} tokens, '{first.prefix}' "
                f"{first.tokens.dtype}: make them with the same version of the tool"
            )
        _check_counts(dataset)


def _check_counts(dataset: IndexedDataset) -> None:
    """What is added up to describe the merged dataset is of the right kind, and tells of every token."""
    told, expected = dataset.metadata, ""
    for key in _COUNTS:
        if not _is_count(told.get(key, 0)):
            expected = f"{key} must be a number, 0 or more"
    for key in _COUNTS_OF_LETTERS:
        counts = told.get(key, {})
        if not isinstance(counts, dict) or not all(map(_is_count, counts.values())):
            expected = f"{key} must hold a number, 0 or more, for each letter"
        elif key == "token_counts" and sum(counts.values()) != dataset.num_tokens:
            expected = f"token_counts must add up to the dataset's {dataset.num_tokens:,} tokens"
    if not isinstance(told.get("sources", []), list):
        expected = "sources must be a list of files"
    if expected:
        raise UserError(f"'{dataset_paths(dataset.prefix).json}': {expected}; make the dataset again")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_apart(inputs: Sequence[str | os.PathLike[str]], output_prefix: str | os.PathLike[str]) -> None:
    output = dataset_paths(output_prefix).bin
    for prefix in inputs:
        path = dataset_paths(prefix).bin
        if output.exists() and os.path.samefile(path, output):
            raise UserError(f"--output-prefix '{output_prefix}' is also an --input: choose another one")


def _check_sum(dataset: IndexedDataset, end: str, found: str) -> None:
    if dataset.sha256 is not None and dataset.metadata["sha256"][end] != found:
        raise UserError(
            f"'{dataset.prefix}.{end}' is damaged: its SHA-256 is not the one in '{dataset.prefix}.json'; copy or make "
            "the dataset again"
        )


def _sequences(dataset: IndexedDataset) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]]:
    """Yield lengths, and whether each sequence begins a document; checks that all lie end to end, in order."""
    position = num_documents = 0
    for first in range(0, len(dataset), _SEQUENCES):
        lengths = np.array(dataset.lengths[first : first + _SEQUENCES])
        sizes = lengths.astype(np.int64) * dataset.tokens.itemsize
        ends = position + np.cumsum(sizes)
        documents = np.array(dataset.document_indices[num_documents : num_documents + len(lengths)])
        documents = documents[documents < first + len(lengths)]
        in_order = bool(np.all(np.diff(documents, prepend=first - 1) > 0)) and (first > 0 or not documents[:1].any())
        if lengths.min() < 1 or np.any(dataset.pointers[first : first + len(lengths)] != ends - sizes) or not in_order:
            raise _damaged(dataset, f"sequences from {first:,} on, or documents with them, don't lie end to end")
        starts = np.zeros(len(lengths), dtype=bool)
        starts[documents - first] = True
        num_documents += len(documents)
        position = int(ends[-1])
        yield lengths, starts
    if (position, num_documents) != (dataset.tokens.nbytes, dataset.num_documents):
        raise _damaged(dataset, f"it ends at byte {position:,} of '{dataset.prefix}.bin' ({dataset.tokens.nbytes:,})")


def _damaged(dataset: IndexedDataset, what: str) -> UserError:
    return UserError(f"'{dataset.prefix}.idx' is damaged: {what}; make the dataset again")


def _description(datasets: Sequence[IndexedDataset], lengths: LengthStatistics, num_documents: int) -> dict[str, Any]:
    described = [dataset.metadata for dataset in datasets]
    return {
        "format": METADATA_FORMAT,
        "version": METADATA_VERSION,
        "tokenizer": described[0]["tokenizer"],
        "num_sequences": lengths.count,
        "num_documents": num_documents,
        "num_residues": lengths.total,
        "num_unknown_letters": sum(one.get("num_unknown_letters", 0) for one in described),
        "unknown_letters": _added(described, "unknown_letters"),
        "length_histogram": lengths.histogram(),
        "token_counts": _added(described, "token_counts"),
        "num_final_stops": sum(one.get("num_final_stops", 0) for one in described),
        "sources": [source for one in described for source in one.get("sources", [])],
        "merged": [
            {
                "prefix": encodable(dataset.prefix),
                **{key: dataset.metadata[key] for key in ("sha256", "selection") if key in dataset.metadata},
            }
            for dataset, one in zip(datasets, described, strict=True)
        ],
        "tool_version": __version__,
    }


def _added(described: Sequence[dict[str, Any]], key: str) -> dict[str, int]:
    """Sums of counts that several descriptions hold under one key."""
    total: Counter[str] = Counter()
    for one in described:
        total.update(one.get(key, {}))
    return dict(total)
