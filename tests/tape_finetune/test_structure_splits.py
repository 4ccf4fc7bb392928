"""Splits of protein chains that keep similar sequences together."""

import random

import pytest

from megatron_plm.errors import UserError
from tape_finetune.structure_splits import assign_splits, parse_splits, similar_groups

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"


def mutated(sequence: str, share: float, generator: random.Random) -> str:
    places = set(generator.sample(range(len(sequence)), round(share * len(sequence))))
    return "".join(
        generator.choice(AMINO_ACIDS.replace(letter, "")) if place in places else letter
        for place, letter in enumerate(sequence)
    )


def random_proteins(number: int, generator: random.Random) -> list[str]:
    return ["".join(generator.choices(AMINO_ACIDS, k=generator.randint(60, 400))) for _ in range(number)]


def test_near_identical_sequences_and_fragments_are_grouped_and_unrelated_ones_are_not():
    generator = random.Random(1)
    proteins = random_proteins(60, generator)
    relatives = [mutated(protein, 0.2, generator) for protein in proteins]
    fragments = [protein[10:40] for protein in proteins]
    groups = similar_groups(proteins + relatives + fragments).tolist()
    assert groups[:60] == groups[60:120] == groups[120:]
    assert len(set(groups)) == 60


def test_splits_keep_groups_together_follow_the_shares_and_ignore_the_order():
    generator = random.Random(2)
    families = [[protein, mutated(protein, 0.1, generator)] for protein in random_proteins(100, generator)]
    sequences = [sequence for family in families for sequence in family]
    splits = parse_splits("train=0.7,valid=0.1,test=0.2")
    split_of = dict(zip(sequences, assign_splits(sequences, splits), strict=True))
    assert all(split_of[one] == split_of[other] for one, other in families)
    counts = [sum(split == name for split in split_of.values()) for name in splits]
    assert counts == pytest.approx([140, 20, 40], abs=2)
    generator.shuffle(sequences)
    assert dict(zip(sequences, assign_splits(sequences, splits), strict=True)) == split_of


@pytest.mark.parametrize(
    "text", ["train", "train=0", "train=0.5,train=0.5", "train=-1,test=2", "a b=1", "", "train=0.5"]
)
def test_bad_shares_are_refused_with_the_flag_named(text):
    with pytest.raises(UserError, match="--splits"):
        parse_splits(text)
