"""The loader: global batches do not depend on the layout, and batches hold what they say."""

import hashlib
import itertools
import threading
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from rows_reference import MemoryDataset, assert_batch_holds

from megatron_plm.config.options import DataOptions
from megatron_plm.data.blend import Cursor
from megatron_plm.data.loader import Loader, segment_room
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import get_tokenizer

TOKENIZER = get_tokenizer("esm2")
OPTIONS = DataOptions(seq_length=256, packing_window=64)
START = Cursor.start(2)


def dataset(seed, num_sequences=150, longest=600):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, num_sequences)
    return MemoryDataset([rng.choice(TOKENIZER.residue_ids, n).astype(np.uint8) for n in lengths])


DATASETS = [dataset(4), dataset(5, 60)]
WEIGHTS = [0.7, 0.3]


def loader(rank=0, world_size=1, micro_batch_size=2, global_batch_size=8, datasets=DATASETS, options=OPTIONS, **more):
    return Loader(
        datasets,
        WEIGHTS[: len(datasets)],
        options,
        TOKENIZER,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        seed=1,
        name="train",
        rank=rank,
        world_size=world_size,
        **more,
    )


def row_digests(step):
    """One digest a row of one process's share, keyed so that rows can be compared in any order."""
    digests = []
    for batch in step.micro_batches:
        for b in range(batch.tokens.shape[0]):
            parts = (
                batch.tokens[b], batch.positions[b], batch.segment_ids[b], batch.label_index[b], batch.label_id[b],
                batch.row_keys[b],
            )  # fmt: skip
            digests.append(hashlib.sha256(b"".join(p.numpy().tobytes() for p in parts)).hexdigest())
    return digests


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 8), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_global_batches_are_the_same_at_every_layout(world_size, micro_batch_size):
    reference = loader().steps(START)
    ranks = [loader(r, world_size, micro_batch_size).steps(START) for r in range(world_size)]
    for _ in range(6):
        expected = next(reference)
        shares = [next(rank) for rank in ranks]
        assert sorted(d for share in shares for d in row_digests(share)) == sorted(row_digests(expected))
        assert {share.cursor for share in shares} == {expected.cursor}


@pytest.mark.parametrize("long_sequences", ["crop", "chunk"])
def test_no_two_rows_have_the_same_key(long_sequences):
    steps = itertools.islice(loader(options=replace(OPTIONS, long_sequences=long_sequences)).steps(START), 60)
    batches = [batch for step in steps for batch in step.micro_batches]
    keys = torch.cat([batch.row_keys for batch in batches]).tolist()
    assert len(keys) == 480 == len(set(keys))  # several epochs of both datasets


def test_a_resumed_loader_goes_on_at_another_layout():
    reference = loader().steps(START)
    steps = [next(reference) for _ in range(24)]
    assert steps[-1].cursor.places[0].epoch >= 1, "the sample must cross an epoch"
    for done in (1, 12, 20):
        ranks = [loader(r, 2, 2).steps(steps[done - 1].cursor) for r in range(2)]
        for expected in steps[done : done + 2]:
            shares = [next(rank) for rank in ranks]
            assert sorted(d for share in shares for d in row_digests(share)) == sorted(row_digests(expected))


VARIANTS = {
    "exact": {},
    "chunk": {"long_sequences": "chunk"},
    "bernoulli": {"mask_selection": "bernoulli", "mask_prob": 0.3},
    "spans": {"mask_selection": "spans", "mask_span_length": 4.0, "mask_random_share": 0.2},
    "unpacked": {"row_layout": "padded"},
    "blocks": {"shuffle_block_size": 16, "shuffle_blocks_at_once": 2},
}


@pytest.mark.parametrize("objective", ["mlm", "clm"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_batches_are_those_of_the_plain_reference(variant, objective, dtype):
    options = replace(OPTIONS, **VARIANTS[variant])
    datasets = [MemoryDataset([protein.astype(dtype) for protein in data._proteins]) for data in DATASETS]
    made = loader(datasets=datasets, options=options, objective=objective, micro_batch_size=4)
    rows = made._blend.rows_from(START)
    for step in itertools.islice(made.steps(START), 3):
        for batch in step.micro_batches:
            assert_batch_holds(
                batch, [row for row, _ in itertools.islice(rows, 4)], datasets, options, TOKENIZER,
                objective=objective, seed=1, names=["train", "train/1"],
            )  # fmt: skip


def test_threads_change_nothing_and_are_gone_when_the_loop_ends():
    alone = [
        row_digests(step) for step in itertools.islice(loader(options=replace(OPTIONS, num_workers=0)).steps(START), 9)
    ]
    threaded = loader(options=replace(OPTIONS, num_workers=3)).steps(START)
    assert [row_digests(step) for step in itertools.islice(threaded, 9)] == alone
    assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    threaded.close()
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


def test_unpacked_batches_are_as_long_as_their_longest_protein():
    options = replace(OPTIONS, row_layout="padded", seq_length=1024)
    lengths = set()
    for step in itertools.islice(loader(options=options).steps(START), 10):
        for batch in step.micro_batches:
            longest = int((batch.segment_ids > 0).sum(1).max())
            assert batch.tokens.shape[1] % 8 == 0
            assert batch.tokens.shape[1] >= longest
            assert batch.segment_ids.max() == 1
            lengths.add(batch.tokens.shape[1])
        assert len({batch.tokens.shape for batch in step.micro_batches}) == 1, "one shape a global batch"
    assert len(lengths) > 3


def test_each_dataset_gives_its_share_of_the_rows_at_every_point():
    cursors = [step.cursor for step in itertools.islice(loader().steps(START), 60)]
    for cursor in cursors:
        total = sum(cursor.taken)
        assert abs(cursor.taken[0] - 0.7 * total) < 1
    assert cursors[-1].places[1].epoch > cursors[-1].places[0].epoch / 2
    epochs = loader().epochs(cursors[-1])
    assert epochs[0] >= cursors[-1].places[0].epoch
    assert Cursor.from_dict(asdict(cursors[-1])) == cursors[-1]


def test_a_token_outside_the_vocabulary_names_the_dataset():
    broken = MemoryDataset([np.full(20, 33, dtype=np.uint8)] * 5)
    with pytest.raises(
        UserError, match=r"dataset 'memory' is damaged: sequence [0-4] holds token id 33 of a vocabulary of 33"
    ):
        next(loader(datasets=[broken]).steps(Cursor.start(1)))


def test_a_pointer_outside_the_file_names_the_dataset():
    broken = MemoryDataset([np.full(20, 5, dtype=np.uint8)] * 5)
    broken.pointers = broken.pointers + 50
    with pytest.raises(UserError, match=r"dataset 'memory' is damaged: sequence [0-4] lies outside its file"):
        next(loader(datasets=[broken]).steps(Cursor.start(1)))


def test_a_hundred_global_batches_have_the_same_digest_for_one_and_eight_processes():
    def digest(world_size, micro_batch_size, restart_after):
        made = [loader(rank, world_size, micro_batch_size, 16) for rank in range(world_size)]
        streams, found = [m.steps(START) for m in made], hashlib.sha256()
        for number in range(100):
            shares = [next(stream) for stream in streams]
            found.update("".join(sorted(d for share in shares for d in row_digests(share))).encode())
            if number == restart_after:
                streams = [m.steps(shares[0].cursor) for m in made]
        return found.hexdigest()

    assert digest(1, 16, 17) == digest(8, 1, 63) == digest(4, 2, 99)


def test_the_first_epoch_covers_the_dataset_once_and_pads_the_last_batch_alike_on_every_rank():
    single = list(loader().first_epoch(10**6))
    tokens = sum(batch.num_tokens for step in single for batch in step.micro_batches)
    assert tokens == sum(int(np.minimum(data.lengths + 2, OPTIONS.seq_length).sum()) for data in DATASETS)
    ranks = [list(loader(r, 4, 1).first_epoch(10**6)) for r in range(4)]
    assert {len(rank) for rank in ranks} == {len(single)}
    assert sum(b.num_labels for rank in ranks for step in rank for b in step.micro_batches) == sum(
        b.num_labels for step in single for b in step.micro_batches
    )
    assert len(list(loader().first_epoch(2))) == 2


def test_batches_move_to_a_device_as_a_whole():
    batch = next(loader().steps(START)).micro_batches[0].to(torch.device("meta"))
    assert {t.device.type for t in vars(batch).values() if isinstance(t, torch.Tensor)} == {"meta"}
    assert batch.num_tokens > 0


def test_the_first_epoch_of_several_datasets_is_read_in_their_shares():
    few = [step.micro_batches for step in loader().first_epoch(3)]
    everything = [step.micro_batches for step in loader().first_epoch(10**6)]
    assert len(few) == 3
    made = loader()
    rows = list(made._blend.first_epoch())
    for count in (10, 20, 40):
        assert abs(sum(row.dataset == 0 for row in rows[:count]) - 0.7 * count) <= 1
    for index, data in enumerate(DATASETS):
        assert sorted(s for row in rows if row.dataset == index for s in row.sequence) == list(range(len(data)))
    assert len(everything) == -(-len(rows) // 8)


def test_a_damaged_index_names_the_dataset_wherever_it_is_found():
    negative = MemoryDataset([np.full(20, 5, dtype=np.uint8)] * 5)
    negative.lengths[3] = -7
    with pytest.raises(UserError, match="dataset 'memory' is damaged: sequence 3 has a negative length"):
        next(loader(datasets=[negative]).steps(Cursor.start(1)))
    for entries in ([0, 2, 9], [0, 4, 2, 5], [0, -1, 5]):
        clusters = MemoryDataset([np.full(20, 5, dtype=np.uint8)] * 5)
        clusters.document_indices = np.array(entries)
        with pytest.raises(UserError, match=r"dataset 'memory' is damaged: document [012] is said to be sequences"):
            next(loader(datasets=[clusters]).steps(Cursor.start(1)))


@pytest.mark.parametrize("rows", [1, 3, 32])
def test_the_room_for_segments_is_a_power_of_two_and_little_more_than_needed(rows):
    for used in range(rows, 12 * rows):
        room = segment_room(rows, used)
        assert room & (room - 1) == 0
        assert max(used, 4 * rows) <= room < 2 * max(used, 4 * rows)
