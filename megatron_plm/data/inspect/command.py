"""The command `inspect_data`: what a dataset holds, as text and as a picture, and whether it is whole."""

import argparse
import random
import sys
import textwrap
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_plm.arguments import ArgumentParser
from megatron_plm.data.indexed import IndexedDataset, dataset_paths
from megatron_plm.data.inspect.contents import Contents, counted, described, most_frequent, tokenizer_of
from megatron_plm.data.inspect.plot import draw, require_matplotlib
from megatron_plm.data.inspect.text import WIDTH, bars, length_rows
from megatron_plm.data.inspect.verify import verify
from megatron_plm.data.progress import shown_progress
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import Tokenizer

_MOST_LETTERS = 40  # lines of the letter histogram
_SAMPLE_LINES = 5  # of one decoded sequence


def main(argv: Sequence[str]) -> int | None:
    """Print what the dataset holds; with --verify check it first. Raises UserError at the first fault."""
    options = _parse(argv)
    dataset = IndexedDataset(options.prefix)
    tokenizer, tokenizer_text = tokenizer_of(dataset)
    checks: list[str] = []
    with shown_progress(dataset.tokens.nbytes, "reading") as progress:
        if options.verify:
            contents, checks = verify(dataset, tokenizer, progress.read)
            origin = "the files, from end to end"
        elif (said := described(dataset)) is not None:
            contents, origin = said, f"{dataset_paths(options.prefix).json}; --verify counts again"
        else:
            contents, origin = counted(dataset, tokenizer, progress.read), "the files, from end to end"
    for line in _report(dataset, tokenizer, tokenizer_text, contents, origin, options):
        print(line)
    if options.plot:
        draw(options.plot, f"{Path(options.prefix).name}: {len(dataset):,} sequences", contents)
        print(f"wrote {options.plot}")
    for check in checks:
        print(f"verified: {check}")
    return None


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="inspect_data",
        description="Show what a dataset (PREFIX.bin, PREFIX.idx and, if there is one, PREFIX.json) holds.",
    )
    parser.add_argument("prefix", metavar="PREFIX", help="the dataset: the common path of its files, no extension")
    parser.add_argument(
        "--samples", type=int, default=3, metavar="N", help="sequences to decode and show (default: the first 3)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="choose the samples at random, the same for the same S")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw lengths and letters into a picture")
    parser.add_argument("--verify", action="store_true", help="read everything: index, token ids, counts and checksums")
    options = parser.parse(argv)
    if options.samples < 0:
        raise UserError(f"--samples must be 0 or more, not {options.samples}")
    if options.plot:
        if options.plot.suffix.lower() != ".png" or options.plot.is_dir():
            raise UserError(f"--plot {options.plot}: expected the name of a file that ends in .png")
        if not options.plot.parent.is_dir():
            raise UserError(f"--plot {options.plot}: there is no folder {options.plot.parent}; make it first")
        require_matplotlib()
    return options


def _report(
    dataset: IndexedDataset,
    tokenizer: Tokenizer | None,
    tokenizer_text: str,
    contents: Contents,
    origin: str,
    options: argparse.Namespace,
) -> Iterator[str]:
    unicode = _prints("█…", sys.stdout.encoding)
    dtype = dataset.tokens.dtype
    yield f"dataset     {options.prefix}"
    yield f"tokenizer   {tokenizer_text}"
    yield f"token type  {dtype.name}, {dtype.itemsize} byte{'s' * (dtype.itemsize > 1)} a token"
    yield f"sequences   {len(dataset):,}"
    yield f"documents   {dataset.num_documents:,}"
    mean = dataset.num_tokens / len(dataset)
    yield f"tokens      {dataset.num_tokens:,}"
    yield f"lengths     {contents.shortest:,} to {contents.longest:,}, mean {mean:,.1f}"
    if not dataset.metadata:
        yield f"checksums   unknown ({options.prefix}.json, which holds them, is missing)"
    command = dataset.metadata.get("command")
    if isinstance(command, str) and command.isprintable():  # not what would move the terminal's cursor
        yield f"made by     {command}"
    yield f"counted     {origin}"
    yield from ["", "lengths", *bars(length_rows(contents.lengths), unicode=unicode)]
    letters = list(most_frequent(contents.tokens))
    yield from ["", "letters" if tokenizer else "token ids", *bars(letters[:_MOST_LETTERS], unicode=unicode)]
    if len(letters) > _MOST_LETTERS:
        yield f"and {len(letters) - _MOST_LETTERS:,} rarer ones"
    for index in _sample_indices(len(dataset), options.samples, options.seed):
        yield from ["", *_sample(dataset, index, tokenizer, "…" if unicode else "...")]


def _sample_indices(size: int, count: int, seed: int | None) -> Sequence[int]:
    count = min(count, size)
    return range(count) if seed is None else sorted(random.Random(seed).sample(range(size), count))


def _sample(dataset: IndexedDataset, index: int, tokenizer: Tokenizer | None, dots: str) -> Iterator[str]:
    tokens = dataset[index]
    title = f"sequence {index}, {len(tokens):,} tokens"
    if dataset.num_documents != len(dataset):
        title += f", document {bisect_right(dataset.document_indices, index) - 1}"
    yield title
    few = tokens[: _SAMPLE_LINES * WIDTH]  # a token has at least one letter
    try:
        text = tokenizer.decode(few) if tokenizer else " ".join(map(str, few.tolist()))
    except ValueError as error:
        raise UserError(f"dataset '{dataset.prefix}': sequence {index}: {error}; make the dataset again") from None
    lines = textwrap.wrap(text, WIDTH)
    cut = len(few) < len(tokens) or len(lines) > _SAMPLE_LINES
    yield from lines[:_SAMPLE_LINES]
    if cut:
        yield dots


def _prints(text: str, encoding: str | None) -> bool:
    try:
        text.encode(encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True
