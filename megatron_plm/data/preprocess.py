"""FASTA files to an indexed dataset: the command `preprocess_data`."""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_plm import __version__
from megatron_plm.arguments import ArgumentParser
from megatron_plm.data.fasta import FastaTokenizer
from megatron_plm.data.formats import BlockReader
from megatron_plm.data.indexed import METADATA_FORMAT, METADATA_VERSION, DatasetPaths
from megatron_plm.data.indexed_writer import IndexedDatasetWriter
from megatron_plm.data.statistics import LengthStatistics, count_tokens, count_unknown_letters
from megatron_plm.errors import UserError
from megatron_plm.invocation import command_line
from megatron_plm.tokenizers import TOKENIZER_NAMES, Tokenizer, get_tokenizer

_LOG_SECONDS = 10.0  # between two lines of progress where there is no terminal


@dataclass(frozen=True)
class Summary:
    """What `preprocess` did. Lengths are in residues; `num_bytes` is FASTA text after decompression."""

    paths: DatasetPaths
    num_sequences: int
    num_residues: int
    min_length: int
    mean_length: float
    max_length: int
    unknown_letters: dict[str, int]
    num_bytes: int
    seconds: float


def preprocess(
    inputs: Sequence[str | os.PathLike[str]],
    output_prefix: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    fold_case: bool = True,
    strict: bool = False,
    workers: int = 1,
    force: bool = False,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Summary:
    """Write the sequences of FASTA files (plain, .gz, .zst, .bz2, .xz), in order, as one indexed dataset.

    Memory is constant, and the files are the same for every number of `workers` (tokenizing threads). `command`, the
    command line that asks for this if one does, is kept in PREFIX.json. `progress` is told, again and again, how many
    bytes of the input files have been read. Raises UserError at the first fault of
    an input, and leaves nothing behind then; see BlockReader, FastaTokenizer and IndexedDatasetWriter for which.
    """
    started = time.perf_counter()
    lengths_seen = LengthStatistics()
    fasta = FastaTokenizer(tokenizer, fold_case=fold_case, strict=strict, workers=workers)
    sources: list[dict[str, Any]] = []
    bytes_done = 0
    with IndexedDatasetWriter(output_prefix, force=force, workers=workers) as writer:
        for path in inputs:
            reader = BlockReader(path)
            for tokens, lengths in fasta.read(reader):
                writer.append(tokens, lengths)
                lengths_seen.add(lengths)
                if progress is not None:
                    progress(bytes_done + reader.position)
            bytes_done += reader.position
            sources.append({"path": os.fspath(path), "bytes": reader.position})
        unknown = count_unknown_letters(fasta.byte_counts, tokenizer, fold_case=fold_case)
        writer.commit(
            {
                "format": METADATA_FORMAT,
                "version": METADATA_VERSION,
                "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256},
                "num_sequences": lengths_seen.count,
                "num_residues": lengths_seen.total,
                "num_unknown_letters": sum(unknown.values()),
                "unknown_letters": unknown,
                "length_histogram": lengths_seen.histogram(),
                "token_counts": count_tokens(fasta.byte_counts, tokenizer, fold_case=fold_case),
                "sources": sources,
                "tool_version": __version__,
                **({} if command is None else {"command": command}),
            }
        )
    return Summary(
        paths=writer.paths,
        num_sequences=lengths_seen.count,
        num_residues=lengths_seen.total,
        min_length=lengths_seen.minimum,
        mean_length=lengths_seen.mean,
        max_length=lengths_seen.maximum,
        unknown_letters=unknown,
        num_bytes=fasta.num_bytes,
        seconds=time.perf_counter() - started,
    )


def main(argv: Sequence[str]) -> int | None:
    """The command line of `preprocess`; see `--help`."""
    options = _parse(argv)
    tokenizer = get_tokenizer(options.tokenizer)
    if options.output_prefix.endswith(os.sep) or Path(options.output_prefix).is_dir():
        raise UserError(
            f"--output-prefix '{options.output_prefix}' is a folder: expected FOLDER/NAME, to write NAME.bin, "
            "NAME.idx and NAME.json in it"
        )
    total = sum(_check_input(path) for path in options.input)
    with _shown_progress(total) as progress:
        summary = preprocess(
            options.input,
            options.output_prefix,
            tokenizer,
            fold_case=not options.keep_case,
            strict=options.strict,
            workers=options.workers,
            force=options.force,
            command=command_line("preprocess-data", argv),
            progress=progress,
        )
    _report(summary, options.output_prefix, tokenizer)
    return None


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="preprocess_data",
        description="Turn FASTA files into a dataset for pretraining: PREFIX.bin, PREFIX.idx and PREFIX.json.",
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help="FASTA files: plain, .gz, .zst, .bz2 or .xz"
    )
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="where to write, without extension")
    parser.add_argument(
        "--tokenizer", default="esm2", metavar="NAME", help=f"one of {', '.join(TOKENIZER_NAMES)} (default: esm2)"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="tokenizing threads (default: 1)")
    parser.add_argument("--strict", action="store_true", help="stop at a letter that the tokenizer doesn't know")
    parser.add_argument(
        "--keep-case", action="store_true", help="don't read lower-case letters as upper-case: they are unknown"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing dataset")
    options = parser.parse(argv)
    if options.workers < 1:
        raise UserError(f"--workers must be 1 or more, not {options.workers}")
    return options


def _check_input(path: str) -> int:
    """Return the file's size, 0 for a pipe; a missing or empty file is found here, before anything is written."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        return 0  # looking into a pipe would take from it
    reader = BlockReader(path)
    reader.close()
    if reader.note:
        print(f"note: {reader.note}", file=sys.stderr)
    return reader.size


@contextlib.contextmanager
def _shown_progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line every ten seconds elsewhere; `total` and what is told are bytes of input."""
    if not sys.stderr.isatty():
        last = time.monotonic()

        def log(num_bytes: int) -> None:
            nonlocal last
            if time.monotonic() - last >= _LOG_SECONDS:
                last = time.monotonic()
                share = f" ({num_bytes / total:.0%})" if total else ""
                print(f"read {num_bytes / 1e6:,.0f} MB{share}", file=sys.stderr, flush=True)

        yield log
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tokenizing", total=total or None)
        yield lambda num_bytes: bar.update(task, completed=num_bytes)


def _report(summary: Summary, prefix: str, tokenizer: Tokenizer) -> None:
    unknown = "none"
    if summary.unknown_letters:
        count = sum(summary.unknown_letters.values())
        letters = ", ".join(f"{letter} {n:,}" for letter, n in summary.unknown_letters.items())
        share = f"{100 * count / summary.num_residues:.2g} %"
        unknown = f"{count:,} ({share}), written as {tokenizer.tokens[tokenizer.unk_id]}: {letters}"
    megabytes = summary.num_bytes / 1e6
    speed = f"{megabytes / summary.seconds:,.0f} MB/s of {megabytes:,.1f} MB FASTA"
    print(f"sequences        {summary.num_sequences:,}")
    print(f"residues         {summary.num_residues:,}")
    print(f"lengths          {summary.min_length:,} to {summary.max_length:,}, mean {summary.mean_length:,.1f}")
    print(f"unknown letters  {unknown}")
    print(f"time             {summary.seconds:.2f} s, {speed}")
    print(f"wrote            {summary.paths.bin}, {summary.paths.idx}, {summary.paths.json}")
    vocabulary = [] if tokenizer.name == "esm2" else ["--tokenizer", tokenizer.name]
    flags = ["--preset", "esm2-8m", *vocabulary, "--data-path", prefix, "--save", f"runs/{Path(prefix).name}"]
    print(f"next:            {command_line('pretrain', flags)}")
