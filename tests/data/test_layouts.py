"""The first 1,000 global batches at every number of processes, and gone on with at another."""

import hashlib

import numpy as np
import pytest
from rows_reference import MemoryDataset

from megatron_plm.config.options import DataOptions
from megatron_plm.data.loader import Loader
from megatron_plm.tokenizers import get_tokenizer

TOKENIZER = get_tokenizer("esm2")
GLOBAL_BATCH_SIZE = 32


@pytest.fixture(scope="module")
def dataset():
    """20,000 proteins with lengths like Swiss-Prot's: an epoch is about 220 global batches."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.66, 0.73, 20_000), 30, 5000).astype(int)
    return MemoryDataset([rng.choice(TOKENIZER.residue_ids, length).astype(np.uint8) for length in lengths])


def digest(dataset, *layouts):
    """SHA-256 of 1,000 global batches; `layouts` are (first step, processes, micro-batch size)."""
    options, cursor, found = DataOptions(), None, hashlib.sha256()
    for (first, num_ranks, size), last in zip(layouts, [*(layout[0] for layout in layouts[1:]), 1000], strict=True):
        loaders = [
            Loader(
                [dataset], [1.0], options, TOKENIZER, micro_batch_size=size, global_batch_size=GLOBAL_BATCH_SIZE,
                seed=1, name="train", rank=rank, world_size=num_ranks,
            )
            for rank in range(num_ranks)
        ]  # fmt: skip
        streams = [loader.steps(cursor or loader.start()) for loader in loaders]
        for _ in range(first, last):
            shares = [next(stream) for stream in streams]
            cursor = shares[0].cursor
            for micro_batches in zip(*(share.micro_batches for share in shares), strict=True):
                for batch in micro_batches:
                    for row in zip(batch.tokens, batch.positions, batch.label_index, batch.label_id, strict=True):
                        for tensor in row:
                            found.update(tensor.numpy().tobytes())
        for stream in streams:
            stream.close()
    return found.hexdigest()


def test_a_thousand_global_batches_are_the_same_at_every_layout(dataset):
    expected = digest(dataset, (0, 1, 32))
    assert {digest(dataset, (0, num_ranks, 2)) for num_ranks in (2, 4, 8)} == {expected}
    assert digest(dataset, (0, 1, 8), (317, 4, 2), (640, 8, 4), (900, 2, 1)) == expected
