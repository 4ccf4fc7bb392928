"""Sequence files to a sentencepiece model: the command `train_tokenizer`."""

import argparse
import contextlib
import heapq
import io
import itertools
import re
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_plm.arguments import ArgumentParser
from megatron_plm.data.input_flags import add_input_flags, inputs_of
from megatron_plm.data.progress import Progress, shown_progress
from megatron_plm.data.readers import Input, SequenceReader
from megatron_plm.data.rearrange import scrambled
from megatron_plm.data.records import RecordBatch
from megatron_plm.data.report import print_lines
from megatron_plm.errors import UserError
from megatron_plm.files import atomic_file, write_errors_told
from megatron_plm.invocation import typeable
from megatron_plm.philox import derive_key
from megatron_plm.tokenizers import MODEL_SUFFIX, PIECE_LETTERS, SPECIAL_TOKENS, PieceTokenizer, get_tokenizer

MODEL_TYPES = ("unigram", "bpe")
# Special tokens and letters are always there; a vocabulary without one more piece would be that of letters.
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + len(PIECE_LETTERS) + 1
_LARGEST_VOCABULARY = 1_000_000
_STRETCH = 4096  # letters: longer sequences are sampled, and trained on, in stretches of this length
_LONGEST_PIECE = 16  # letters; sentencepiece's default
# Unigram training begins with so many candidates for each piece wanted: quicker than with sentencepiece's million, and
# its pieces are longer (docs/LOG.md). They may not do for small input, which then begins with the million.
_CANDIDATES = 20
_MOST_CANDIDATES = 1_000_000
_HIGHEST_SEED = 2**63 - 1

_TRAINING: dict[str, Any] = {
    **dict(zip(("bos_piece", "pad_piece", "eos_piece", "unk_piece", "control_symbols"), SPECIAL_TOKENS, strict=True)),
    "bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3,
    "character_coverage": 1.0,
    # Text is letters and nothing else: none is changed, and none ends a word.
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "split_by_whitespace": False,
    "split_by_unicode_script": False,
    "split_by_number": False,
    "max_sentencepiece_length": _LONGEST_PIECE,
    "max_sentence_length": _STRETCH,
    "num_threads": 1,  # the sums of several come out otherwise
    "minloglevel": 3,  # what is wrong is told by exceptions
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """Stretches of proteins to train on, without unknown letters, in the order of the input."""

    texts: list[str]
    num_letters: int
    num_letters_read: int


def train_tokenizer(sample: Sample, *, vocab_size: int, model_type: str, name: str) -> PieceTokenizer:
    """Return a tokenizer of `vocab_size` tokens for the proteins of the sample; a pure function of its arguments.

    The first five are SPECIAL_TOKENS, and each of PIECE_LETTERS is one, whether the sample has it or not. Raises
    UserError where sentencepiece is missing or the sample too small for so many.
    """
    try:
        import sentencepiece
    except ImportError:
        raise UserError(
            "training a tokenizer needs the package sentencepiece: run `pip install 'megatron-plm[sentencepiece]'`"
        ) from None
    for candidates in (min(_CANDIDATES * vocab_size, _MOST_CANDIDATES), _MOST_CANDIDATES):
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=itertools.chain(sample.texts, PIECE_LETTERS),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                seed_sentencepiece_size=candidates,
                **_TRAINING,
            )
        except (RuntimeError, ValueError) as error:
            refusal = _refused(str(error), vocab_size)
            continue
        tokenizer = PieceTokenizer.from_model(model.getvalue(), name=name, place="the new model")
        assert tokenizer.vocab_size == vocab_size
        return tokenizer
    raise refusal


def sample_letters(inputs: Sequence[Input], *, max_letters: int, seed: int, progress: Progress | None = None) -> Sample:
    """Draw stretches of the inputs' proteins at random, up to `max_letters` in all, in one pass and bounded memory.

    Each has a random number, keyed by the seed and its place in the input; those with the lowest stay. Raises UserError
    at the first fault of an input.
    """
    # Letters as ids of ESM-2's tokens, so that what pieces are made of is known, and the rest is '<unk>'.
    reader = SequenceReader(get_tokenizer("esm2"))
    key = derive_key("tokenizer-sample", seed)
    kept: list[tuple[int, int, str]] = []  # (minus the random number, place in the input, text): a heap
    total = count = 0
    limit = 2**64  # of the random numbers
    for texts in _stretches(reader.read(inputs, None if progress is None else progress.read)):
        places = np.arange(count, count + len(texts), dtype=np.uint64)
        count += len(texts)
        draws = scrambled(places, key)
        for i in np.flatnonzero(draws <= np.uint64(limit - 1)).tolist():
            if draws[i] >= limit:  # which went down meanwhile
                continue
            heapq.heappush(kept, (-int(draws[i]), int(places[i]), texts[i]))
            total += _weight(texts[i])
            while total > max_letters and len(kept) > 1:
                draw, _, text = heapq.heappop(kept)
                total -= _weight(text)
                limit = -draw
    if not kept:
        raise UserError(f"the input holds no letter that a token could stand for: expected {''.join(PIECE_LETTERS)}")
    in_order = [text for _, _, text in sorted(kept, key=lambda entry: entry[1])]
    if progress is not None:
        progress.then("everything is read: training")
    return Sample(in_order, sum(map(len, in_order)), int(reader.byte_counts.sum()))


def main(argv: Sequence[str]) -> int | None:
    """The command line of `train_tokenizer`; see `--help`."""
    options = _parse(argv)
    output = _output(options)
    inputs = inputs_of(options)
    started = time.perf_counter()
    with shown_progress(sum(source.size for source in inputs), "reading") as progress:
        sample = sample_letters(inputs, max_letters=options.max_letters, seed=options.seed, progress=progress)
        with _ended_by_interrupts():
            tokenizer = train_tokenizer(
                sample, vocab_size=options.vocab_size, model_type=options.model_type, name=output.name
            )
    _check_free(output, force=options.force)
    with write_errors_told(output):
        output.parent.mkdir(exist_ok=True)
    with atomic_file(output) as aside:
        aside.write_bytes(tokenizer.model)
    print_lines(_report(sample, tokenizer, time.perf_counter() - started))
    print(f"wrote            {output}")
    prefix = output.with_suffix("")
    flags = ["--input", *options.input, "--tokenizer", output, "--output-prefix", prefix]
    print(f"next:            {typeable('preprocess-data', flags)}")
    return None


@contextlib.contextmanager
def _ended_by_interrupts() -> Iterator[None]:
    """Let Ctrl-C end the process at once: sentencepiece gives Python no chance to, and nothing is written yet."""
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _stretches(batches: Iterable[RecordBatch]) -> Iterator[list[str]]:
    """Yield the texts of records, cut at unknown letters and where they are too long."""
    tokenizer = get_tokenizer("esm2")
    letters = np.array([ord(token) if token in PIECE_LETTERS else ord(" ") for token in tokenizer.tokens], np.uint8)
    pattern = re.compile(rf"[^ ]{{1,{_STRETCH}}}")
    for batch in batches:
        text = letters[batch.tokens].tobytes().decode("ascii")
        ends = np.cumsum(batch.lengths, dtype=np.int64).tolist()
        begins = [0, *ends[:-1]]
        yield [part for begin, end in zip(begins, ends, strict=True) for part in pattern.findall(text, begin, end)]


def _weight(text: str) -> int:
    """What a stretch counts in a sample: its letters, and at least so many that many short ones take no more memory."""
    return max(len(text), _LONGEST_PIECE)


def _refused(message: str, vocab_size: int) -> UserError:
    highest = re.search(r"<= (\d+)", message)
    if "ocabulary size" in message or highest:
        return _too_large(vocab_size, highest[1] if highest else "fewer")
    return UserError(f"sentencepiece cannot train on this input ({message.strip()}); give more or other sequences")


def _too_large(vocab_size: int, highest: str) -> UserError:
    return UserError(
        f"--vocab-size {vocab_size:,} is too large for this input, which has pieces for {highest} only; give a smaller "
        "one, or more sequences"
    )


def _report(sample: Sample, tokenizer: PieceTokenizer, seconds: float) -> Iterator[tuple[str, str]]:
    share = f", {100 * sample.num_letters / sample.num_letters_read:.3g} % of the input" if sample.num_letters else ""
    yield "trained on", f"{sample.num_letters:,} letters{share}"
    longest = max((tokenizer.tokens[i] for i in tokenizer.residue_ids), key=len)
    yield "tokens", f"{tokenizer.vocab_size:,}, the longest {longest}"
    some = sample.texts[:: max(1, len(sample.texts) // 1000)]
    num_tokens = sum(len(tokenizer.encode(text)) for text in some)
    yield "letters a token", f"{sum(map(len, some)) / num_tokens:.2f}, about"
    yield "time", f"{seconds:.2f} s"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="train_tokenizer",
        description="Train a sentencepiece model on sequence files: a tokenizer whose tokens are pieces of proteins.",
    )
    add_input_flags(parser, names=False)
    training = parser.add_argument_group("training")
    training.add_argument(
        "--vocab-size",
        type=int,
        required=True,
        metavar="N",
        help=f"tokens in all, of which {len(SPECIAL_TOKENS)} are special and {len(PIECE_LETTERS)} letters",
    )
    training.add_argument(
        "--model-type", choices=MODEL_TYPES, default="unigram", help="how pieces are found (default: unigram)"
    )
    training.add_argument(
        "--max-letters",
        type=int,
        default=10_000_000,
        metavar="N",
        help="train on a random sample of about so many letters at most (default: 10000000)",
    )
    training.add_argument("--seed", type=int, default=1, metavar="N", help="of that sample (default: 1)")
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, metavar=f"FILE{MODEL_SUFFIX}", help="where to write the model")
    output.add_argument("--output-prefix", metavar="PREFIX", help=f"the same without {MODEL_SUFFIX}")
    output.add_argument("--force", action="store_true", help="replace an existing file")
    options = parser.parse(argv)
    if not SMALLEST_VOCABULARY <= options.vocab_size <= _LARGEST_VOCABULARY:
        raise UserError(
            f"--vocab-size must be {SMALLEST_VOCABULARY} to {_LARGEST_VOCABULARY:,}, not {options.vocab_size}: special "
            f"tokens and letters take {SMALLEST_VOCABULARY - 1}"
        )
    if options.max_letters < 1:
        raise UserError(f"--max-letters must be 1 or more, not {options.max_letters}")
    if not 0 <= options.seed <= _HIGHEST_SEED:
        raise UserError(f"--seed must be 0 to {_HIGHEST_SEED}, not {options.seed}")
    return options


def _output(options: argparse.Namespace) -> Path:
    """The file to write; raises UserError where it is not named, cannot be, or is there already."""
    if (options.output is None) == (options.output_prefix is None):
        raise UserError(f"give either --output FILE{MODEL_SUFFIX} or --output-prefix PREFIX")
    output = options.output or Path(f"{options.output_prefix}{MODEL_SUFFIX}")
    if output.suffix != MODEL_SUFFIX or not output.stem:
        raise UserError(f"--output {output}: the name must end in {MODEL_SUFFIX}, by which a tokenizer is known")
    # As for datasets, the last part of the folder is made: more is likely a slip.
    if not output.parent.parent.is_dir() or (output.parent.exists() and not output.parent.is_dir()):
        raise UserError(f"--output {output}: there is no folder {output.parent}; make it first")
    _check_free(output, force=options.force)
    return output


def _check_free(output: Path, *, force: bool) -> None:
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: give the name of a file")
    if output.exists() and not force:
        raise UserError(f"{output} exists already; give another output, or --force to replace it")
