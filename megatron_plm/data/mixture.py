"""The datasets that a run reads, with their weights: Megatron's `0.7 A 0.3 B`."""

import hashlib
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import MODEL_SUFFIX, Tokenizer, open_tokenizer, recorded_tokenizer


@dataclass(frozen=True)
class Mixture:
    """Datasets of one tokenizer, and the share of the rows that each gives (any positive numbers)."""

    datasets: tuple[IndexedDataset, ...]
    weights: tuple[float, ...]

    @property
    def num_sequences(self) -> int:
        """Sequences of all datasets."""
        return sum(map(len, self.datasets))

    @property
    def num_tokens(self) -> int:
        """Tokens of all datasets, without special ones."""
        return sum(dataset.num_tokens for dataset in self.datasets)

    @property
    def sha256(self) -> str:
        """What identifies content, order and weights."""
        parts = [f"{weight!r} {data.sha256}" for weight, data in zip(self.weights, self.datasets, strict=True)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def as_typed(words: Sequence[str] | None) -> str:
    """The prefixes, or weights and prefixes, as they stand on a command line."""
    return " ".join(words or ())


def open_mixture(words: Sequence[str], tokenizer: Tokenizer, *, flag: str) -> Mixture:
    """Open the datasets that `flag` names: prefixes, or weights and prefixes in turn.

    Without weights each dataset counts by the tokens that an epoch of it reads, about, so that all are read about
    equally often. Raises UserError where the words are no such list, where a dataset cannot be opened, and where it was
    made with another tokenizer.
    """
    weights, prefixes = _weights_and_prefixes(words, flag)
    datasets = tuple(_open(prefix, tokenizer, flag) for prefix in prefixes)
    return Mixture(datasets, weights or tuple(map(_tokens_of_an_epoch, datasets)))


def model_tokenizer(word: str, words: Sequence[str], *, flag: str) -> Tokenizer:
    """The tokenizer that `word` means for a model trained on the datasets that `flag` names.

    A sentencepiece model that is not at its path, any more or on this machine, is taken from the first dataset, which
    holds it. Raises UserError where there is no such tokenizer.
    """
    path = Path(word)
    if word.endswith(MODEL_SUFFIX) and not path.exists():
        _, prefixes = _weights_and_prefixes(words, flag)
        made_with = IndexedDataset(prefixes[0]).tokenizer
        if made_with is not None and made_with["name"] == path.name and "model" in made_with:
            return recorded_tokenizer(made_with, f"'{prefixes[0]}.json'")
        of = "none" if made_with is None else repr(made_with["name"])
        raise UserError(
            f"--tokenizer {word}: there is no such file, and the tokenizer of {prefixes[0]} is {of}; give the name of "
            "the dataset's tokenizer"
        )
    return open_tokenizer(word)


def check_same_run(train: Mixture, valid: Mixture) -> None:
    """Raise UserError where two splits PREFIX_train and PREFIX_valid of one PREFIX are not of one input and selection.

    Then the same protein may be in both. Splits of different prefixes are whoever's choice it was to use them together.
    """
    for one, other in itertools.product(train.datasets, valid.datasets):
        made, other_made = _made_by_split(one), _made_by_split(other)
        if made and other_made and made[0] == other_made[0] and made[1] != other_made[1]:
            raise UserError(
                f"'{one.prefix}' and '{other.prefix}' are splits of different runs of tools/preprocess_data.py, so a "
                "protein may be in both: make all splits again, by one command with --split and --force"
            )


def _made_by_split(dataset: IndexedDataset) -> tuple[str, dict[str, object]] | None:
    """The PREFIX of a split PREFIX_NAME, and what all splits of its run have in common; None for other datasets."""
    selection = dataset.metadata.get("selection")
    split = selection.get("split") if isinstance(selection, dict) else None
    if not isinstance(selection, dict) or not isinstance(split, dict):
        return None
    name = split.get("name")
    if not isinstance(name, str) or not dataset.prefix.endswith(f"_{name}"):
        return None
    common = {**selection, "split": {**split, "name": ""}}
    common |= {name: dataset.metadata.get(name) for name in ("sources", "keep_case")}
    return os.path.abspath(dataset.prefix.removesuffix(name)), common


def _weights_and_prefixes(words: Sequence[str], flag: str) -> tuple[tuple[float, ...] | None, tuple[str, ...]]:
    numbers = [_number(word) for word in words]
    if numbers[0] is None or len(words) == 1:
        stray = next((word for word, number in zip(words, numbers, strict=True) if number is not None), None)
        if stray is not None and len(words) > 1:
            raise UserError(f"{flag}: {stray} stands where a dataset was expected; give a weight before each, or none")
        return None, tuple(words)
    if len(words) % 2 or None in numbers[::2]:
        raise UserError(f"{flag} {as_typed(words)}: expected weights and datasets in turn, as in 0.7 A 0.3 B")
    weights = tuple(number for number in numbers[::2] if number is not None)
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise UserError(f"{flag} {as_typed(words)}: a weight must be a number above 0")
    return weights, tuple(words[1::2])


def _tokens_of_an_epoch(dataset: IndexedDataset) -> float:
    """Of a cluster one member is read."""
    return dataset.num_tokens * dataset.num_documents / len(dataset)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _open(prefix: str, tokenizer: Tokenizer, flag: str) -> IndexedDataset:
    dataset = IndexedDataset(prefix)
    made_with = dataset.tokenizer
    if made_with is None:
        raise UserError(
            f"{flag} {prefix}: {prefix}.json is missing, which says what tokenizer the dataset was made with; "
            "make the dataset with tools/preprocess_data.py"
        )
    if made_with["sha256"] != tokenizer.sha256 and made_with["name"] == tokenizer.name:
        raise UserError(
            f"{flag} {prefix}: the dataset's tokenizer {tokenizer.name!r} has the name of the model's, but is another "
            "one; give the --tokenizer that the dataset was made with, or preprocess the FASTA file again"
        )
    if made_with["sha256"] != tokenizer.sha256:
        raise UserError(
            f"{flag} {prefix}: the dataset was made with tokenizer {made_with['name']!r} and the model has "
            f"{tokenizer.name!r}; give --tokenizer {made_with['name']} here, or preprocess the FASTA file again with "
            f"--tokenizer {tokenizer.name}"
        )
    return dataset
