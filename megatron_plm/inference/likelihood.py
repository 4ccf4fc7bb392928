"""How likely a masked language model finds the residues of proteins, each of them hidden in turn or none.

Shapes: L residues of a protein, P positions asked for, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_plm.errors import UserError
from megatron_plm.inference.rows import filled, pack
from megatron_plm.inference.runner import Runner
from megatron_plm.inference.windows import Window, most_central, windows


class Question(NamedTuple):
    """Attributes: residues (token ids without specials, [L]), positions (of them, from 0, int64 [P])."""

    residues: npt.NDArray[np.integer]
    positions: npt.NDArray[np.int64]


class _Query(NamedTuple):
    """One sequence for the model: the places in it that are asked for, and which protein's which answers they are."""

    tokens: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    protein: int
    answers: npt.NDArray[np.int64]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Likelihood:
    """log p by a model. A residue of a protein that is longer than the model takes is looked at in the window in which
    it is farthest from a cut end.

    Attributes:
        max_tokens: of a protein with its specials, that the model takes at once.
        overlap: tokens that windows of longer ones share.
        batch_tokens: of one packed row, at most.
    """

    runner: Runner
    max_tokens: int
    overlap: int
    batch_tokens: int

    def __post_init__(self) -> None:
        objective = self.runner.options.objective
        if objective != "mlm":
            raise UserError(
                f"--checkpoint: the model's objective is {objective}, and these are scores of masked language models; "
                "give one that was trained with --objective mlm"
            )

    def identity(self) -> dict[str, int]:
        """What answers depend on beside the model, as JSON."""
        return {"max_length": self.max_tokens, "overlap": self.overlap, "batch_tokens": self.batch_tokens}

    def masked(self, questions: Sequence[Question]) -> list[npt.NDArray[np.float32]]:
        """log p of every token at each position with that residue alone hidden, in nats; [P, V] for each protein."""
        return self._answered(questions, self._hidden_in_turn)

    def unmasked(self, questions: Sequence[Question]) -> list[npt.NDArray[np.float32]]:
        """The same with nothing hidden."""
        return self._answered(questions, self._seen)

    def _answered(
        self, questions: Sequence[Question], queries_of: Callable[[int, Question], Iterator[_Query]]
    ) -> list[npt.NDArray[np.float32]]:
        """Run the queries of all proteins in rows that they share."""
        vocab_size = self.runner.tokenizer.vocab_size
        answers = [np.zeros((len(question.positions), vocab_size), dtype=np.float32) for question in questions]
        queries = (query for number, question in enumerate(questions) for query in queries_of(number, question))
        for together in filled(queries, self.batch_tokens):
            row = pack([query.tokens for query in together])
            pairs = zip(row.starts, together, strict=True)
            found = self.runner.log_probabilities(row, np.concatenate([start + query.places for start, query in pairs]))
            ends = np.cumsum([len(query.places) for query in together])
            for query, rows in zip(together, np.split(found, ends[:-1]), strict=True):
                answers[query.protein][query.answers] = rows
        return answers

    def _hidden_in_turn(self, protein: int, question: Question) -> Iterator[_Query]:
        tokens, parts = self._laid_out(question.residues)
        chosen = most_central(parts)
        for number, token in enumerate((question.positions + 1).tolist()):
            part = parts[chosen[token]]
            place = token - part.start
            hidden = tokens[part.start : part.end].copy()
            hidden[place] = self.runner.tokenizer.mask_id
            yield _Query(hidden, np.array([place]), protein, np.array([number]))

    def _seen(self, protein: int, question: Question) -> Iterator[_Query]:
        tokens, parts = self._laid_out(question.residues)
        chosen = most_central(parts)[question.positions + 1]
        used, begins = np.unique(np.sort(chosen), return_index=True)
        by_window = np.split(np.argsort(chosen, kind="stable"), begins[1:])
        for part, numbers in zip((parts[number] for number in used.tolist()), by_window, strict=False):
            places = question.positions[numbers] + 1 - part.start
            yield _Query(tokens[part.start : part.end], places, protein, numbers)

    def _laid_out(self, residues: npt.NDArray[np.integer]) -> tuple[npt.NDArray[np.int64], Sequence[Window]]:
        tokenizer = self.runner.tokenizer
        tokens = np.concatenate([[tokenizer.cls_id], residues, [tokenizer.eos_id]]).astype(np.int64)
        return tokens, windows(len(tokens), self.max_tokens, self.overlap)
