"""What mutations do to a protein, by the model's log odds of the new letters against those of the wild type."""

import argparse
import csv
import hashlib
from array import array
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_plm.data.readers import open_inputs
from megatron_plm.errors import UserError
from megatron_plm.inference.flags import (
    SPECIALS,
    add_model_flags,
    add_row_flags,
    check_output,
    likelihood_of,
    load_runner,
)
from megatron_plm.inference.likelihood import Likelihood, Question
from megatron_plm.inference.progress import shown_residues
from megatron_plm.inference.proteins import ProteinReader
from megatron_plm.inference.resumable import ResumableWork, publish, resumable_work
from megatron_plm.inference.runner import Runner
from megatron_plm.inference.variant_table import MUTATED_SEQUENCE, VariantTable, survey
from megatron_plm.inference.variants import Mutation, WildType, spearman, variant_scorer

STRATEGIES = ("masked-marginals", "wt-marginals")
_COLUMN = "log_p"  # of the work


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this subject."""
    add_model_flags(parser)
    add_row_flags(parser)
    parser.add_argument(
        "--variants", required=True, type=Path, metavar="FILE",
        help="CSV or TSV with a column of variants, such as A42G, A42G:L50P or WT; its other columns are kept",
    )  # fmt: skip
    parser.add_argument("--mutant-column", default="mutant", metavar="NAME", help="that column (default: mutant)")
    parser.add_argument(
        "--score-column", metavar="NAME",
        help="column of measured values, such as DMS_score: Spearman's correlation of the scores with it is printed",
    )  # fmt: skip
    wild_type = parser.add_mutually_exclusive_group()
    wild_type.add_argument(
        "--wild-type", metavar="FILE",
        help=f"sequence file with one protein, which they are of (default: told by the column {MUTATED_SEQUENCE} of "
        "ProteinGym's tables)",
    )  # fmt: skip
    wild_type.add_argument("--sequence", metavar="LETTERS", help="its letters, instead")
    parser.add_argument(
        "--first-position", type=int, default=1, metavar="N", help="the number of its first residue (default: 1)"
    )
    parser.add_argument(
        "--strategy", choices=STRATEGIES, default=STRATEGIES[0],
        help="masked-marginals: each mutated residue is hidden, one at a time; wt-marginals: none, in a single pass "
        "(default: masked-marginals)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Score the variants of a table and write it again with a column of scores."""
    check_output(options)
    table = VariantTable(options.variants, options.mutant_column, options.score_column)
    column = options.strategy.replace("-", "_")
    runner = load_runner(options)
    likelihood = likelihood_of(options, runner)
    wild_type, residues = _wild_type(options, runner, table)
    derived = options.wild_type is None and options.sequence is None
    positions, measured = survey(wild_type, table, column, derived=derived)
    question = Question(residues, positions)
    identity = {
        **runner.identity(),
        **likelihood.identity(),
        "values": column,
        "wild_type": hashlib.sha256(residues.tobytes()).hexdigest(),
        "positions": hashlib.sha256(positions.tobytes()).hexdigest(),
    }
    dtypes = {_COLUMN: np.dtype((np.float32, (runner.tokenizer.vocab_size,)))}
    with resumable_work(options.output, identity, dtypes, force=options.force) as work:
        log_p_PV = _log_probabilities(work, likelihood, question, masked=options.strategy == STRATEGIES[0])
        score = variant_scorer(positions, log_p_PV)
        scores = np.zeros(0)

        def write(path: Path) -> None:
            nonlocal scores
            scores = _write_scores(table, wild_type, score, column, path)

        publish(work, options.output, write, force=options.force)
    print(f"scored {len(scores):,} variants of {wild_type.name}, at {len(positions):,} positions")
    if options.score_column is not None:
        _print_correlation(scores, measured, options.score_column)
    print(f"wrote {options.output}: {column}")


def _log_probabilities(
    work: ResumableWork, likelihood: Likelihood, question: Question, *, masked: bool
) -> npt.NDArray[np.float32]:
    """log p of every token at each position asked for, [P, V]; goes on behind the positions that `work` holds.

    A full row of hidden positions is one step; with nothing hidden all of them are.
    """
    residues, positions = question
    tokens = min(len(residues) + SPECIALS, likelihood.max_tokens)
    at_a_time = max(1, likelihood.batch_tokens // tokens if masked else len(positions))
    answer = likelihood.masked if masked else likelihood.unmasked
    if work.records:
        print(f"going on behind {work.records:,} positions that a stopped run has done", flush=True)
    with shown_residues(len(positions), "scoring") as advance:
        advance(work.records)
        for begin in range(work.records, len(positions), at_a_time):
            some = positions[begin : begin + at_a_time]
            (log_p_PV,) = answer([Question(residues, some)])
            work.append(_COLUMN, log_p_PV)
            work.commit_now_and_then(begin + len(some), "")
            advance(len(some))
    work.commit(len(positions), "")
    with work.columns()[_COLUMN].reader() as reader:
        return reader.take(len(positions))


def _wild_type(
    options: argparse.Namespace, runner: Runner, table: VariantTable
) -> tuple[WildType, npt.NDArray[np.integer]]:
    """The protein and its token ids; raises UserError where there is not exactly one."""
    tokenizer = runner.tokenizer
    if not tokenizer.one_letter_a_token:
        raise UserError(
            f"{options.checkpoint}: its tokens are the pieces of {tokenizer.name}, and mutations are of residues; give "
            "a model that was pretrained with --tokenizer esm2"
        )
    if options.wild_type is not None:
        proteins = list(islice(ProteinReader(open_inputs([options.wild_type]), tokenizer, numbered=False).read(), 2))
        if len(proteins) != 1:
            raise UserError(f"--wild-type {options.wild_type} holds several proteins; give a file with one")
        ((name, residues),) = proteins
    elif options.sequence is not None:
        name, residues = "--sequence", tokenizer.encode("".join(options.sequence.split()))
        if not len(residues):
            raise UserError("--sequence has no letters; give those of the wild type")
    else:
        name, residues = "the protein of the first row", tokenizer.encode(table.wild_type(options.first_position))
    letters = [tokenizer.tokens[i] for i in residues.tolist()]
    return WildType(name, letters, options.first_position, tokenizer), residues


def _write_scores(
    table: VariantTable, wild_type: WildType, score: Callable[[Sequence[Mutation]], float], column: str, path: Path
) -> npt.NDArray[np.float64]:
    """Write the table with a column of scores; returns them."""
    scores = array("d")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer: Any = None
        for place, row in table.rows():
            if writer is None:
                writer = csv.DictWriter(file, [*row, column], lineterminator="\n")
                writer.writeheader()
            scores.append(score(wild_type.parse(row[table.column], place)))
            writer.writerow({**row, column: f"{scores[-1]:.6f}"})
    return np.array(scores)


def _print_correlation(scores: npt.NDArray[np.float64], measured: npt.NDArray[np.float64], column: str) -> None:
    known = ~np.isnan(measured)
    value = spearman(scores[known], measured[known]) if known.any() else float("nan")
    shown = "not defined: one side has no two values" if np.isnan(value) else f"{value:.4f}"
    left_out = "" if known.all() else f", {(~known).sum():,} without a value left out"
    print(f"Spearman correlation with {column}: {shown} ({known.sum():,} variants{left_out})")
