"""Proteins that are computed together, and going on where a run was stopped.

A group is some neighbours of the input: which ones depends on nothing but the input and the flags, so that a resumed
run computes what an uninterrupted one would, in the same rows.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from megatron_plm.errors import UserError
from megatron_plm.inference.proteins import Protein
from megatron_plm.inference.resumable import ResumableWork


@dataclass(frozen=True)
class Group:
    """Attributes: proteins, first (its number in the input, from 0), digest (of the input up to the group's end)."""

    proteins: Sequence[Protein]
    first: int
    digest: str

    @property
    def end(self) -> int:
        """The number of the protein behind it."""
        return self.first + len(self.proteins)

    @property
    def num_tokens(self) -> int:
        """Of all proteins, without specials."""
        return sum(len(protein.tokens) for protein in self.proteins)


def grouped(proteins: Iterator[Protein], cost: Callable[[Protein], int], budget: int) -> Iterator[Group]:
    """The proteins in order, each time as many as cost at most `budget` together, but at least one."""
    digest = hashlib.sha256()
    first = used = 0
    group: list[Protein] = []
    for protein in proteins:
        price = cost(protein)
        if group and used + price > budget:
            yield Group(group, first, digest.hexdigest())
            first, used, group = first + len(group), 0, []
        group.append(protein)
        used += price
        digest.update(f"{protein.identifier}\0{len(protein.tokens)}\0".encode())
        digest.update(protein.tokens.tobytes())
    if group:
        yield Group(group, first, digest.hexdigest())


Columns = Mapping[str, npt.NDArray[Any]]  # by name, what is appended to a column


class OtherInput(UserError):
    """The work was begun with another input."""


def go_on(
    work: ResumableWork,
    groups: Iterator[Group],
    compute: Callable[[Iterator[Group]], Iterator[tuple[Group, Columns]]],
    done: Callable[[Group], None],
) -> int:
    """Compute the groups that `work` does not hold yet, in order; returns the number of proteins of the input.

    `compute` yields the values of each group it is given; `done` is told of each group. Raises OtherInput where the
    input is not the one that the work was begun with.
    """
    resumed_at, resumed_digest = work.records, work.digest

    def left() -> Iterator[Group]:
        found = resumed_at == 0
        for group in groups:
            if not found:
                if group.end > resumed_at or (group.end == resumed_at and group.digest != resumed_digest):
                    break
                found = group.end == resumed_at
                done(group)
            else:
                yield group
        if not found:
            raise OtherInput(
                f"{work.folder} holds the work of a run that was stopped, on another input than this; give the same "
                "--input to go on with it, or --force to begin anew"
            )

    end, digest = resumed_at, resumed_digest
    for group, columns in compute(left()):
        for name, values in columns.items():
            work.append(name, values)
        end, digest = group.end, group.digest
        done(group)
        work.commit_now_and_then(end, digest)
    if end > work.records:
        work.commit(end, digest)
    return end
