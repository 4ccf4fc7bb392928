"""A whole run over the proteins of an input: read, computed in groups, kept on the way, published at the end."""

import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_plm.errors import UserError
from megatron_plm.inference.flags import SPECIALS
from megatron_plm.inference.groups import Columns, Group, OtherInput, go_on, grouped
from megatron_plm.inference.names import NAME_DTYPES, name_columns, num_repeated_names
from megatron_plm.inference.progress import shown_residues
from megatron_plm.inference.proteins import Protein, ProteinReader, Survey
from megatron_plm.inference.resumable import Column, publish, resumable_work


@dataclass(frozen=True)
class Job:
    """What is computed of each protein, and what it depends on.

    Attributes:
        what: in a word, for the progress bar.
        identity: JSON; all that the values depend on but the proteins.
        dtypes: of the columns of values, by name.
        compute: the values of each group, in order.
        cost: of a protein; a group costs at most `budget`, or is one protein.
        budget: see above.
        write: makes the output file from the columns, those of names.py among them; where the output is a folder, looks
            whether all its files are there.
        max_tokens: of a protein with its specials, that the model takes at once.
    """

    what: str
    identity: Mapping[str, Any]
    dtypes: Mapping[str, np.dtype[Any]]
    compute: Callable[[Iterator[Group]], Iterator[tuple[Group, Columns]]]
    cost: Callable[[Protein], int]
    budget: int
    write: Callable[[Mapping[str, Column], Path], None]
    max_tokens: int


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        num_proteins: of the output.
        num_resumed: those that a stopped run had done.
        num_longer: those that the model does not take at once.
        num_repeated: those with the name of an earlier one.
        seconds: the time that computing the others took.
        survey: of the input; None where it came from a pipe.
    """

    num_proteins: int
    num_resumed: int
    num_longer: int
    num_repeated: int
    seconds: float
    survey: Survey | None


def run_job(job: Job, proteins: ProteinReader, output: Path, *, force: bool) -> Outcome:
    """Run it, or go on with it; `output` is complete in the end or absent. Raises UserError, see `resumable_work`."""
    survey = proteins.survey() if proteins.can_read_twice else None
    num_longer = 0
    with resumable_work(output, job.identity, {**NAME_DTYPES, **job.dtypes}, force=force) as work:
        num_resumed, started = work.records, time.monotonic()
        if num_resumed:
            print(f"going on behind {num_resumed:,} proteins that a stopped run has done", flush=True)

        def compute(groups: Iterator[Group]) -> Iterator[tuple[Group, Columns]]:
            for group, columns in job.compute(groups):
                yield group, {**name_columns(group.proteins), **columns}

        def worked_off() -> int:
            nonlocal num_longer
            num_longer = 0
            with shown_residues(survey.num_tokens if survey else None, job.what) as advance:

                def done(group: Group) -> None:
                    nonlocal num_longer
                    num_longer += sum(len(protein.tokens) + SPECIALS > job.max_tokens for protein in group.proteins)
                    advance(group.num_tokens)

                return go_on(work, grouped(proteins.read(), job.cost, job.budget), compute, done)

        try:
            num_proteins = worked_off()
        except OtherInput:
            if not force:
                raise
            if not proteins.can_read_twice:
                raise UserError(
                    f"{work.folder} holds the work of a run that was stopped, on another input than this, of which a "
                    f"pipe has brought a part by now; remove it with `rm -r {shlex.quote(str(work.folder))}`"
                ) from None
            print("that was another input than this, so it is begun anew", flush=True)
            work.begin_anew()
            num_resumed = 0
            num_proteins = worked_off()
        seconds = time.monotonic() - started
        columns = work.columns()
        num_repeated = num_repeated_names(columns, work.folder)
        publish(work, output, lambda path: job.write(columns, path), force=force)
    return Outcome(num_proteins, num_resumed, num_longer, num_repeated, seconds, survey)


def print_outcome(outcome: Outcome, did: str, longer: str) -> None:
    """Tell it; `did` is what was done with the proteins, `longer` than what others were, and what became of them."""
    computed = outcome.num_proteins - outcome.num_resumed
    print(f"{did} {computed:,} proteins in {outcome.seconds:,.1f} s")
    unknown = outcome.survey.unknown if outcome.survey else None
    if unknown:
        letters = ", ".join(f"{letter} {count:,}" for letter, count in sorted(unknown.items()))
        print(f"unknown letters: {unknown.total():,}, read as the unknown token: {letters}")
    if outcome.num_longer:
        print(f"longer proteins: {outcome.num_longer:,} {longer}")
    if outcome.num_repeated:
        print(f"repeated names: {outcome.num_repeated:,}; each protein has a row of its own")
