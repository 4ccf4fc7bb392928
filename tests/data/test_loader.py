"""The loader: global batches do not depend on the layout, and batches hold what they say."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch

from megatron_plm.config.options import DataOptions
from megatron_plm.data.loader import IGNORED_LABEL, Loader
from megatron_plm.data.packing import Cursor
from megatron_plm.tokenizers import get_tokenizer

TOKENIZER = get_tokenizer("esm2")
OPTIONS = DataOptions(seq_length=256, packing_window=64)


class MemoryDataset:
    """Proteins in memory, with the interface of IndexedDataset that the loader uses."""

    prefix = "memory"

    def __init__(self, num_sequences=150):
        rng = np.random.default_rng(4)
        self.lengths = rng.integers(1, 600, num_sequences).astype(np.int32)
        self._proteins = [rng.choice(TOKENIZER.residue_ids, n).astype(np.uint8) for n in self.lengths]

    def __len__(self):
        return len(self._proteins)

    def __getitem__(self, index):
        return self._proteins[index]


DATASET = MemoryDataset()


def loader(rank=0, world_size=1, micro_batch_size=2, global_batch_size=8, dataset=DATASET):
    return Loader(
        dataset,
        OPTIONS,
        TOKENIZER,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        seed=1,
        dataset_id="train",
        rank=rank,
        world_size=world_size,
    )


def row_digests(step):
    """One digest a row of one process's share, keyed so that rows can be compared in any order."""
    digests = []
    for batch in step.micro_batches:
        for b in range(batch.tokens.shape[0]):
            parts = (batch.tokens[b], batch.positions[b], batch.segment_ids[b], batch.label_index[b], batch.label_id[b])
            digests.append(hashlib.sha256(b"".join(p.numpy().tobytes() for p in parts)).hexdigest())
    return digests


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 8), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_global_batches_are_the_same_at_every_layout(world_size, micro_batch_size):
    reference = loader().steps(Cursor())
    ranks = [loader(r, world_size, micro_batch_size).steps(Cursor()) for r in range(world_size)]
    for _ in range(6):
        expected = next(reference)
        shares = [next(rank) for rank in ranks]
        assert sorted(d for share in shares for d in row_digests(share)) == sorted(row_digests(expected))
        assert {share.cursor for share in shares} == {expected.cursor}


def test_a_resumed_loader_goes_on_at_another_layout():
    reference = loader().steps(Cursor())
    steps = [next(reference) for _ in range(24)]
    assert steps[-1].cursor.epoch >= 1, "the sample must cross an epoch"
    for done in (1, 12, 20):
        ranks = [loader(r, 2, 2).steps(steps[done - 1].cursor) for r in range(2)]
        for expected in steps[done : done + 2]:
            shares = [next(rank) for rank in ranks]
            assert sorted(d for share in shares for d in row_digests(share)) == sorted(row_digests(expected))


def test_batches_are_proteins_with_labels_in_place():
    seen = 0
    for step, _ in zip(loader().steps(Cursor()), range(5), strict=False):
        for batch in step.micro_batches:
            B, L = batch.tokens.shape
            assert batch.num_tokens == int((batch.segment_ids > 0).sum())
            assert batch.num_labels == int((batch.label_id != IGNORED_LABEL).sum())
            restored = batch.tokens.clone()
            for b in range(B):
                real = batch.label_id[b] != IGNORED_LABEL
                restored[b, batch.label_index[b, real]] = batch.label_id[b, real]
            cuts = batch.cu_seqlens.unique().tolist()
            assert cuts[0] == 0
            assert cuts[-1] == B * L
            for start, stop in pairwise(cuts):
                segment = batch.segment_ids.view(-1)[start:stop]
                assert segment.unique().numel() == 1
                tokens = restored.view(-1)[start:stop].numpy()
                if segment[0] == 0:
                    assert (tokens == TOKENIZER.pad_id).all()
                    continue
                assert batch.positions.view(-1)[start:stop].tolist() == list(range(stop - start))
                assert any(_is_part(tokens, protein) for protein in DATASET._proteins)
                seen += 1
    assert seen >= 40


def _is_part(tokens, protein):
    """Whether tokens are `<cls> protein <eos>` or a full row cut out of it."""
    whole = np.concatenate([[TOKENIZER.cls_id], protein, [TOKENIZER.eos_id]])
    if len(tokens) == len(whole):
        return (tokens == whole).all()
    if len(tokens) != OPTIONS.seq_length or len(whole) < len(tokens):
        return False
    windows = np.lib.stride_tricks.sliding_window_view(whole, len(tokens))
    return bool((windows == tokens).all(axis=1).any())


def test_cut_ends_have_no_special_tokens():
    dataset = MemoryDataset(1)
    dataset.lengths[:] = 5000
    dataset._proteins = [np.full(5000, 5, dtype=np.uint8)]
    for step, _ in zip(loader(dataset=dataset).steps(Cursor()), range(20), strict=False):
        for batch in step.micro_batches:
            inner = batch.tokens[:, 1:-1]
            assert not ((inner == TOKENIZER.cls_id) | (inner == TOKENIZER.eos_id)).any()


def test_the_first_epoch_covers_the_dataset_once_and_pads_the_last_batch_alike_on_every_rank():
    single = list(loader().first_epoch(10**6))
    tokens = sum(batch.num_tokens for step in single for batch in step.micro_batches)
    assert tokens == int(np.minimum(DATASET.lengths + 2, OPTIONS.seq_length).sum())
    ranks = [list(loader(r, 4, 1).first_epoch(10**6)) for r in range(4)]
    assert {len(rank) for rank in ranks} == {len(single)}
    assert sum(b.num_labels for rank in ranks for step in rank for b in step.micro_batches) == sum(
        b.num_labels for step in single for b in step.micro_batches
    )
    assert len(list(loader().first_epoch(2))) == 2


def test_batches_move_to_a_device_as_a_whole():
    batch = next(loader().steps(Cursor())).micro_batches[0].to(torch.device("meta"))
    assert {t.device.type for t in vars(batch).values() if isinstance(t, torch.Tensor)} == {"meta"}
    assert batch.num_tokens > 0
