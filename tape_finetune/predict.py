"""The command tape_predict: what a fine-tuned model says of the proteins of any sequence file, no labels needed."""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_plm.arguments import ArgumentParser
from megatron_plm.data.input_flags import add_input_flags, inputs_of
from megatron_plm.errors import UserError
from megatron_plm.files import atomic_file
from megatron_plm.inference.flags import add_reading_flags, check_output
from megatron_plm.inference.progress import shown_residues
from megatron_plm.inference.proteins import Protein, ProteinReader
from megatron_plm.memory import keep_freed_memory
from megatron_plm.parallel.mesh import device
from megatron_plm.tokenizers import Tokenizer
from tape_finetune import runs
from tape_finetune.data import Example
from tape_finetune.flags import TAPE_ONLY, add_flag, refuse, whole_number
from tape_finetune.prediction_files import Row, check_name, writing
from tape_finetune.predictions import predict
from tape_finetune.progress import say
from tape_finetune.source import Source

_PROGRAM = "tape_finetune/tape_predict.py"
# Of proteins that are read, batched by length, and written together: enough for full batches, little in memory.
_BLOCK_PROTEINS = 512
_BLOCK_RESIDUES = 100_000
# No letter of any vocabulary here: what it is encoded as is what an unknown letter was read as.
_UNKNOWN = "*"


def main(argv: Sequence[str]) -> int:
    """Predict as the flags say and write a row a protein, in the order of the input; raises UserError."""
    keep_freed_memory()
    refuse(argv, TAPE_ONLY)
    arguments = _parse(argv)
    check_name(arguments.output)
    check_output(arguments)
    _refuse_run_file(arguments)
    run = _load(arguments.run_dir)
    run.model.to(device(use_gpu=not arguments.no_cuda))
    max_length = _max_length(arguments.max_length, run)
    arguments.column = arguments.column or getattr(run.task, "sequence_column", "sequence")
    reader = ProteinReader(
        inputs_of(arguments), run.model.base.tokenizer, numbered=arguments.numbered, strict=arguments.strict
    )
    survey = reader.survey() if reader.can_read_twice else None
    num_proteins = num_cropped = num_windowed = 0
    with (
        atomic_file(arguments.output) as aside,
        writing(aside, arguments.output) as write,
        shown_residues(survey.num_tokens if survey else None, "predicting") as advance,
    ):
        for block in _blocks(reader.read()):
            rows = _rows(block, run, max_length, arguments.batch_size)
            write(rows)
            num_proteins += len(rows)
            num_cropped += sum(row["cropped"] for row in rows)
            num_windowed += sum(run.windows and max_length is not None and row["length"] > max_length for row in rows)
            advance(sum(len(protein.tokens) for protein in block))
        if not num_proteins:
            raise UserError(f"{arguments.input[0]}: holds no protein; give a file with sequences")
    if survey and survey.unknown:
        letters = ", ".join(f"{letter} {count:,}" for letter, count in sorted(survey.unknown.items()))
        say(f"unknown letters: {survey.unknown.total():,}, read as the unknown token: {letters}")
    if num_cropped:
        say(f"longer proteins: {num_cropped:,} of more than {max_length:,} residues; theirs are of the first ones")
    if num_windowed:
        say(f"longer proteins: {num_windowed:,} of more than {max_length:,} residues, read in windows of as many")
    say(f"wrote {arguments.output}: {num_proteins:,} proteins, {run.task.name} by {arguments.run_dir}")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    # The flags of input are written with hyphens; here, as in all of TAPE's commands, an underscore does as well.
    words = [_hyphenated(word) if word.startswith("--") else word for word in argv]
    parser = ArgumentParser(
        prog=_PROGRAM, description="Predict with a fine-tuned model, one row a protein, in the order of the input."
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory that tape_train wrote")
    source = add_input_flags(parser, names=True)
    source.set_defaults(column=None)  # what the run was trained on, where that was a table
    add_reading_flags(source)
    text = "file to write: .csv, .jsonl (both also .gz) or .parquet"
    add_flag(parser, "output", type=Path, required=True, metavar="FILE", help=text)
    add_flag(parser, "batch_size", type=whole_number(1), metavar="N", help="most proteins a pass (default: no limit)")
    text = "crop longer proteins to N residues, or read them in windows of N (default: as in training)"
    add_flag(parser, "max_length", type=whole_number(1), metavar="N", help=text)
    add_flag(parser, "force", action="store_true", help="replace an existing file")
    add_flag(parser, "no_cuda", action="store_true", help="predict on the CPU, also where there is a GPU")
    return parser.parse(words)


def _hyphenated(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _refuse_run_file(arguments: argparse.Namespace) -> None:
    """Raise UserError where --force would replace a part of the run."""
    for name in (runs.RUN_FILE, runs.RESULTS_FILE, runs.WEIGHTS_FILE):
        path = arguments.run_dir / name
        if path.exists() and arguments.output.exists() and arguments.output.samefile(path):
            raise UserError(f"--output {arguments.output}: is a part of the run; name another")


def _load(directory: Path) -> runs.Run:
    """The run, of whatever model and task it is; raises UserError."""
    document = runs.read_json(directory / runs.RUN_FILE)
    task = document.get("task")
    names = document.get("base_model"), task.get("name") if isinstance(task, dict) else None
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{directory / runs.RUN_FILE}: not the description of a fine-tuned model; train again")
    return runs.load_run(directory, base_model=str(names[0]), task=str(names[1]))


def _max_length(given: int | None, run: runs.Run) -> int | None:
    longest = run.model.base.max_residues
    if given is not None and longest is not None and given > longest:
        raise UserError(f"--max_length {given}: the model has learned positions for {longest} residues; give no more")
    return run.max_length if given is None else given


def _blocks(proteins: Iterator[Protein]) -> Iterator[list[Protein]]:
    """Neighbours of the input."""
    block: list[Protein] = []
    size = 0
    for protein in proteins:
        if block and (len(block) == _BLOCK_PROTEINS or size + len(protein.tokens) > _BLOCK_RESIDUES):
            yield block
            block, size = [], 0
        block.append(protein)
        size += len(protein.tokens)
    if block:
        yield block


def _rows(
    block: Sequence[Protein], run: runs.Run, max_length: int | None, batch_size: int | None
) -> list[dict[str, Any]]:
    """A row of each protein of a block, in order."""
    tokenizer = run.model.base.tokenizer
    examples = [_example(protein, tokenizer).fit(max_length, windows=run.windows) for protein in block]
    found = predict(Source(run.model, examples, batch_size=batch_size), run.task)
    about: list[Row] = [
        {"id": protein.identifier, "length": len(protein.tokens), "cropped": example.cropped}
        for protein, example in zip(block, examples, strict=True)
    ]
    return [{**row, **prediction} for row, prediction in zip(about, found, strict=True)]


def _example(protein: Protein, tokenizer: Tokenizer) -> Example:
    letters = [token if len(token) == 1 else _UNKNOWN for token in tokenizer.tokens]
    sequence = "".join(letters[token] for token in protein.tokens.tolist())
    return Example(protein.identifier, sequence, np.asarray(math.nan))
