"""Packing without padding, and batches."""

import numpy as np
import torch
from finetune_sample import OPTIONS, sequence

from megatron_plm.model.initialize import initialize
from megatron_plm.model.transformer import Encoder
from megatron_plm.tokenizers import get_tokenizer
from tape_finetune.batching import length_batches, pack, shuffled_batches
from tape_finetune.data import Example
from tape_finetune.model import EncoderModel

TOKENIZER = get_tokenizer("esm2")


def _example(letters: str, *, cropped: bool = False) -> Example:
    return Example("record", letters, np.asarray(0), cropped)


def _encoder() -> EncoderModel:
    encoder = Encoder(OPTIONS, TOKENIZER)
    initialize(encoder, OPTIONS, seed=0)
    return EncoderModel(encoder, OPTIONS, TOKENIZER)


def test_packed_features_equal_those_of_each_protein_alone():
    rng = np.random.default_rng(0)
    examples = [_example(sequence(rng, n), cropped=n == 7) for n in (12, 1, 7, 30, 2)]
    model = _encoder()
    with torch.no_grad():
        packed = pack(examples, TOKENIZER)
        together = model(packed).split(packed.cu_seqlens.diff().tolist())
        for example, features in zip(examples, together, strict=True):
            # Matrix products of another number of rows are summed in another order.
            torch.testing.assert_close(features, model(pack([example], TOKENIZER)), rtol=1e-5, atol=1e-5)


def test_row_holds_nothing_but_the_proteins_with_their_ends_and_a_cut_end_has_none():
    packed = pack([_example("MKV"), _example("AC", cropped=True), _example("g")], TOKENIZER)
    text = TOKENIZER.decode(packed.tokens[0].tolist())
    assert text == "<cls>MKV<eos><cls>AC<cls>G<eos>"
    assert packed.positions[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2]
    assert packed.segment_ids[0].tolist() == [1] * 5 + [2] * 3 + [3] * 3
    assert packed.cu_seqlens.tolist() == [0, 5, 8, 11]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.lengths == (3, 2, 1)
    assert TOKENIZER.decode(packed.tokens[0, packed.residue_index].tolist()) == "MKVACG"


def test_a_protein_in_windows_has_one_row_for_each_residue_from_where_it_is_farthest_from_a_cut():
    rng = np.random.default_rng(0)
    proteins = [_example(sequence(rng, n)).fit(12, windows=True) for n in (30, 12, 5, 71)]
    assert [protein.window for protein in proteins] == [12, None, None, 12]
    packed = pack(proteins, TOKENIZER)
    assert packed.lengths == (30, 12, 5, 71)
    whole = "".join(protein.sequence for protein in proteins)
    assert TOKENIZER.decode(packed.tokens[0, packed.residue_index].tolist()) == whole
    assert packed.cu_seqlens.diff().max() == 14  # as many tokens as a protein of 12 residues has
    stretches = packed.tokens[0].split(packed.cu_seqlens.diff().tolist())
    model = _encoder()
    with torch.no_grad():
        alone = [_of_stretch(model, stretch) for stretch in stretches]
        together = model(packed)[packed.residue_index]
    # By brute force: every token of a protein in every stretch that has it, and the one with the most on either side.
    stretch = 0
    for protein, features in zip(proteins, together.split(list(packed.lengths)), strict=True):
        tokens = [TOKENIZER.cls_id, *TOKENIZER.encode(protein.sequence).tolist(), TOKENIZER.eos_id]
        found: dict[int, list[tuple[float, int, int]]] = {}
        start = -1
        while True:
            held = stretches[stretch].tolist()
            start = next(at for at in range(start + 1, len(tokens)) if tokens[at : at + len(held)] == held)
            for at in range(start, start + len(held)):
                before = at - start if start else np.inf
                after = start + len(held) - 1 - at if start + len(held) < len(tokens) else np.inf
                found.setdefault(at, []).append((min(before, after), -stretch, at - start))
            stretch += 1
            if start + len(held) == len(tokens):
                break
        for residue, row in enumerate(features, start=1):
            _, number, at = max(found[residue])
            torch.testing.assert_close(row, alone[-number][at], rtol=1e-5, atol=1e-5)
    assert stretch == len(stretches)


def _of_stretch(model: EncoderModel, tokens: torch.Tensor) -> torch.Tensor:
    size = len(tokens)
    ends = torch.tensor([0, size], dtype=torch.int32)
    return model.encoder(tokens[None], torch.arange(size)[None], torch.ones(1, size, dtype=torch.int64), ends, None)[0]


def test_an_epoch_holds_every_example_once_in_an_order_of_its_own():
    def order(seed: int, epoch: int) -> list[int]:
        batches = list(shuffled_batches(53, 8, seed=seed, epoch=epoch))
        assert [len(batch) for batch in batches] == [8] * 6 + [5]
        return np.concatenate(batches).tolist()

    first = order(1, 1)
    assert sorted(first) == list(range(53))
    assert order(1, 1) == first
    assert first not in (order(1, 2), order(2, 1), list(range(53)))


def test_length_batches_hold_every_protein_once_shortest_first_within_the_limit():
    lengths = [*np.random.default_rng(0).integers(1, 200, size=100).tolist(), 900]
    batches = list(length_batches(lengths, 500))
    assert sorted(np.concatenate(batches).tolist()) == list(range(101))
    sizes = [[lengths[index] for index in batch] for batch in batches]
    assert [length for batch in sizes for length in batch] == sorted(lengths)
    assert all(sum(batch) <= 500 or len(batch) == 1 for batch in sizes)
    assert max(len(batch) for batch in batches) > 5
    few = list(length_batches(lengths, 500, 3))
    assert sorted(np.concatenate(few).tolist()) == list(range(101))
    assert max(len(batch) for batch in few) == 3
