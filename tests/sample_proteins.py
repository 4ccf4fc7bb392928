"""Small datasets for the tests, written with the project's own writer."""

from pathlib import Path

import numpy as np

from megatron_plm.data.indexed import METADATA_FORMAT, METADATA_VERSION
from megatron_plm.data.indexed_writer import IndexedDatasetWriter
from megatron_plm.tokenizers import get_tokenizer


def pair_proteins(count: int, *, seed: int, longest: int = 90) -> list[np.ndarray]:
    """Proteins (uint8 token ids of `esm2`) that their context tells, and nothing else.

    Each draws from one pair of the 20 amino acids: all letters are equally frequent, so the best guess without context
    has a perplexity of 20, and the best guess with it one of 2.
    """
    rng = np.random.default_rng(seed)
    letters = get_tokenizer("esm2").standard_ids
    lengths = rng.integers(5, longest, count)
    return [letters[2 * rng.integers(10) + rng.integers(0, 2, length)] for length in lengths]


def write_dataset(prefix: Path, proteins: list[np.ndarray], *, tokenizer: str = "esm2") -> Path:
    """Write `proteins` as the dataset `prefix`; returns `prefix`."""
    with IndexedDatasetWriter(prefix) as writer:
        for protein in proteins:
            writer.append(np.ascontiguousarray(protein), np.array([len(protein)], dtype=np.int32))
        writer.commit(
            {
                "format": METADATA_FORMAT,
                "version": METADATA_VERSION,
                "tokenizer": {"name": tokenizer, "sha256": get_tokenizer(tokenizer).sha256},
                "num_sequences": len(proteins),
                "num_residues": sum(len(protein) for protein in proteins),
            }
        )
    return prefix
