"""How well a masked language model predicts each protein: exact pseudo-perplexity, or an approximation in one pass.

Pseudo-perplexity (Salazar et al. 2020, arXiv:1910.14659) is exp of the mean of −log p of a protein's residues, each
hidden in turn, and so takes as many passes as there are residues.
"""

import argparse
import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from megatron_plm.data.input_flags import add_input_flags, inputs_of
from megatron_plm.inference.flags import (
    SPECIALS,
    add_model_flags,
    add_reading_flags,
    add_row_flags,
    check_output,
    likelihood_of,
    load_runner,
)
from megatron_plm.inference.groups import Columns, Group
from megatron_plm.inference.job import Job, print_outcome, run_job
from megatron_plm.inference.likelihood import Question
from megatron_plm.inference.names import LENGTHS, PROTEINS_AT_A_TIME, names_of
from megatron_plm.inference.proteins import ProteinReader
from megatron_plm.inference.resumable import Column

_GROUP_ROWS = 8  # full rows of the proteins that are scored together


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this subject."""
    add_model_flags(parser)
    add_row_flags(parser)
    add_reading_flags(add_input_flags(parser, names=True))
    parser.add_argument(
        "--one-pass", action="store_true",
        help="an approximation, as many times as fast as a protein has residues: none is hidden, so each is predicted "
        "from itself too; the column is one_pass_perplexity",
    )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Score the proteins of the input and write a table, row by row in their order."""
    check_output(options)
    inputs = inputs_of(options)
    runner = load_runner(options)
    likelihood = likelihood_of(options, runner)
    letters = runner.tokenizer.residue_ids
    column = "one_pass_perplexity" if options.one_pass else "pseudo_perplexity"

    def compute(groups: Iterator[Group]) -> Iterator[tuple[Group, Columns]]:
        for group in groups:
            # As in training, gaps and unknown letters are seen but not predicted.
            questions = [Question(p.tokens, np.flatnonzero(np.isin(p.tokens, letters))) for p in group.proteins]
            answers = likelihood.unmasked(questions) if options.one_pass else likelihood.masked(questions)
            sums = [
                log_p_PV[np.arange(len(log_p_PV)), residues[positions]].sum(dtype=np.float64)
                for log_p_PV, (residues, positions) in zip(answers, questions, strict=True)
            ]
            counts = np.array([len(question.positions) for question in questions], dtype=np.int32)
            yield group, {"scored": counts, "log_likelihood": np.array(sums, dtype=np.float64)}

    def cost(length: int) -> int:
        return length + SPECIALS if options.one_pass else length * min(length + SPECIALS, likelihood.max_tokens)

    job = Job(
        what="scoring",
        identity={**runner.identity(), **likelihood.identity(), "values": column},
        dtypes={"scored": np.dtype(np.int32), "log_likelihood": np.dtype(np.float64)},
        compute=compute,
        cost=lambda protein: cost(len(protein.tokens)),
        budget=_GROUP_ROWS * likelihood.batch_tokens,
        write=lambda columns, path: _write_perplexities(columns, column, path),
        max_tokens=likelihood.max_tokens,
    )
    proteins = ProteinReader(inputs, runner.tokenizer, numbered=options.numbered, strict=options.strict)
    outcome = run_job(job, proteins, options.output, force=options.force)
    longer = f"of more than {likelihood.max_tokens:,} tokens, each residue in the window that surrounds it best"
    print_outcome(outcome, "scored", longer)
    print(f"wrote {options.output}: {outcome.num_proteins:,} proteins, {column}")


def _write_perplexities(columns: Mapping[str, Column], name: str, path: Path) -> None:
    """A row for each protein; the perplexity of one without any letter to predict is empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "length", "scored", "log_likelihood", name])
        blocks = [columns[key].blocks(PROTEINS_AT_A_TIME) for key in (LENGTHS, "scored", "log_likelihood")]
        for names, *block in zip(names_of(columns), *blocks, strict=True):
            for identifier, length, count, total in zip(names, *(values.tolist() for values in block), strict=True):
                perplexity = f"{np.exp(-total / count):.6g}" if count else ""
                writer.writerow([identifier, length, count, f"{total:.6f}", perplexity])
