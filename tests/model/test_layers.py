"""Rotary positions and token dropout, against their definitions and against transformers."""

import cmath

import pytest
import torch
from packing import SHAPE, TOKENIZER, pack, random_proteins
from transformers.models.esm.modeling_esm import EsmEmbeddings
from transformers_peer import esm_config

from megatron_plm.config.options import ModelOptions
from megatron_plm.kernels.rotary import rotate
from megatron_plm.model.layers import RotaryEmbedding, TokenEmbedding

HEAD_SIZE = 12


def rotated(x_H, position):
    """One query or key vector, rotated to `position`; float64."""
    cos, sin = RotaryEmbedding(HEAD_SIZE).double()(torch.tensor([[position]]), torch.float64)
    return rotate(x_H.view(1, 1, 1, HEAD_SIZE), cos, sin).flatten()


def test_pairs_turn_as_complex_numbers_by_their_frequency():
    x = torch.randn(HEAD_SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for position in (0, 1, 37):
        turned = rotated(x, position)
        for i in range(HEAD_SIZE // 2):
            angle = position * 10000.0 ** (-2 * i / HEAD_SIZE)
            z = complex(x[i], x[i + HEAD_SIZE // 2]) * cmath.exp(1j * angle)
            # The frequencies are float32.
            assert cmath.isclose(z, complex(turned[i], turned[i + HEAD_SIZE // 2]), rel_tol=1e-5, abs_tol=1e-5)


def test_products_depend_on_the_distance_only():
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(HEAD_SIZE, generator=generator, dtype=torch.float64) for _ in range(2))
    for distance in (-5, 0, 3, 40):
        products = torch.stack([rotated(q, place) @ rotated(k, place + distance) for place in (40, 47, 200)])
        torch.testing.assert_close(products, products[:1].expand(3), rtol=1e-9, atol=1e-9)
    assert (rotated(q, 0) @ rotated(k, 1) - rotated(q, 0) @ rotated(k, 2)).abs() > 1e-3


def test_rotation_keeps_lengths_and_position_zero_is_the_identity():
    x = torch.randn(HEAD_SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(rotated(x, 0), x, rtol=0, atol=0)
    torch.testing.assert_close(rotated(x, 123).norm(), x.norm(), rtol=1e-9, atol=0)


@pytest.fixture(scope="module")
def embedding():
    torch.manual_seed(0)
    return TokenEmbedding(SHAPE, TOKENIZER)


def test_token_dropout_is_transformers_of_each_protein_alone(embedding):
    proteins = [
        *random_proteins([12, 30, 7], masked=0.3),
        *random_proteins([9], masked=0),
        *random_proteins([11], masked=1),
    ]
    theirs = EsmEmbeddings(esm_config(SHAPE)).eval()
    theirs.word_embeddings.weight.data.copy_(embedding.tokens.weight.data)
    rows = pack([proteins[:3], proteins[3:]], 60)
    ours = embedding(rows.tokens, rows.positions, rows.segment_ids)
    at = [(0, 0), (0, 12), (0, 42), (1, 0), (1, 9)]
    for protein, (row, start) in zip(proteins, at, strict=True):
        ids = torch.tensor([protein])
        expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        torch.testing.assert_close(ours[row, start : start + len(protein)], expected)
    assert (ours[rows.segment_ids == 0] == 0).all()


def test_an_unmasked_protein_is_scaled_by_the_trained_share(embedding):
    rows = pack([random_proteins([20], masked=0)], 20)
    vectors = embedding.tokens(rows.tokens)
    torch.testing.assert_close(embedding(rows.tokens, rows.positions, rows.segment_ids), 0.88 * vectors)


def test_a_protein_of_masks_alone_stays_finite(embedding):
    """A crop has no <cls> and <eos>; masked from end to end it has nothing left to scale."""
    rows = pack([[[TOKENIZER.mask_id] * 5, random_proteins([9])[0]]], 16)
    output = embedding(rows.tokens, rows.positions, rows.segment_ids)
    assert (output[0, :5] == 0).all()
    assert torch.isfinite(output).all()


def test_without_token_dropout_only_padding_is_zero():
    plain = TokenEmbedding(ModelOptions(hidden_size=48, num_attention_heads=4, token_dropout=False), TOKENIZER)
    rows = pack([random_proteins([12, 5])], 20)
    output = plain(rows.tokens, rows.positions, rows.segment_ids)
    torch.testing.assert_close(output[:, :17], plain.tokens(rows.tokens)[:, :17], rtol=0, atol=0)
    assert (output[:, 17:] == 0).all()
