"""Packing changes nothing: a protein has the output and the gradient that it has alone."""

import pytest
import torch
from packing import SHAPE, TOKENIZER, Rows, build, pack, random_proteins
from transformers import EsmForMaskedLM
from transformers_peer import esm_config

from megatron_plm.config.load import load_config
from megatron_plm.config.options import ModelOptions
from megatron_plm.config.presets import PRESETS
from megatron_plm.model.transformer import MaskedLanguageModel

LENGTHS = [3, 17, 9, 30, 10, 24]
ROW = 40
# Float64 sums of some hundred terms of order 1: rounding of 1e-16 each, far below, while a leak would be of order 1.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def proteins():
    return random_proteins(LENGTHS)


def packed(proteins) -> Rows:
    """Rows with several proteins and padding; rows 0 and 2 end in padding, row 1 is full."""
    a, b, c, d, e, f = proteins
    return pack([[a, b, c], [d, e], [f]], ROW)


def alone(protein) -> Rows:
    return pack([[protein]], len(protein))


def places(rows: Rows):
    """Row and slice of each protein, in the order of the rows."""
    for r in range(rows.tokens.shape[0]):
        for number in range(1, int(rows.segment_ids[r].max()) + 1):
            where = (rows.segment_ids[r] == number).nonzero().flatten()
            yield r, slice(int(where[0]), int(where[-1]) + 1)


def test_a_packed_protein_is_encoded_as_if_alone(model, proteins):
    together = model.encoder(*packed(proteins))
    for protein, (row, where) in zip(proteins, places(packed(proteins)), strict=True):
        torch.testing.assert_close(together[row, where], model.encoder(*alone(protein))[0], **TOLERANCE)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def weighted(logits, seed):
    """A scalar in which every logit counts differently."""
    return (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=logits.dtype)).sum()


def test_packed_proteins_have_the_gradients_of_single_ones(model, proteins):
    logits = model(*packed(proteins))
    spots = list(places(packed(proteins)))
    together = gradients(model, sum(weighted(logits[row, where], i) for i, (row, where) in enumerate(spots)))
    single = gradients(model, sum(weighted(model(*alone(protein))[0], i) for i, protein in enumerate(proteins)))
    assert together.keys() == single.keys()
    for name, gradient in together.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, single[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_neighbours_rows_and_order_do_not_matter(model, proteins):
    a, b, c, d, e, f = proteins
    one, other = pack([[a, b], [d]], ROW), pack([[f], [e, c, b], [a]], ROW)
    torch.testing.assert_close(
        model.encoder(*one)[0, len(a) : len(a) + len(b)],
        model.encoder(*other)[1, len(e) + len(c) : len(e) + len(c) + len(b)],
        **TOLERANCE,
    )


def test_what_stands_in_the_padding_does_not_matter(model, proteins):
    rows = [[proteins[1], proteins[2]], [proteins[3]]]
    real = pack(rows, ROW).segment_ids > 0
    pads = [model(*pack(rows, ROW, pad=token))[real] for token in (TOKENIZER.pad_id, 5, TOKENIZER.mask_id)]
    for other in pads[1:]:
        torch.testing.assert_close(pads[0], other, rtol=0, atol=0)


def test_padding_has_no_gradient(model, proteins):
    rows = pack([[proteins[1]], [proteins[3]]], ROW, pad=TOKENIZER.unk_id)
    encoded = model.encoder(*rows)
    gradient = gradients(model.encoder, weighted(encoded[rows.segment_ids > 0], 0))["embedding.tokens.weight"]
    assert (gradient[TOKENIZER.unk_id] == 0).all()
    assert (gradient[TOKENIZER.cls_id] != 0).any()


def test_only_distances_count_not_where_positions_begin(model, proteins):
    rows = packed(proteins)
    moved = rows._replace(positions=rows.positions + 500)
    torch.testing.assert_close(model.encoder(*rows), model.encoder(*moved), **TOLERANCE)
    stretched = rows._replace(positions=rows.positions * 2)
    assert (model.encoder(*rows) - model.encoder(*stretched)).abs().max() > 0.1


def test_logits_at_labelled_positions_are_the_full_head_gathered(model, proteins):
    rows = packed(proteins)
    index = torch.tensor([[1, 2, 20, 0, 0], [5, 34, 7, 29, 0], [22, 1, 1, 3, 9]])
    full = model(*rows)
    labelled = model(*rows, label_index_BM=index)
    assert labelled.shape == (3, 5, TOKENIZER.vocab_size)
    for row in range(3):
        torch.testing.assert_close(labelled[row], full[row, index[row]], **TOLERANCE)


def test_output_matrix_is_the_token_embedding(proteins):
    """Equal vectors in, equal logits out: up to the bias, tokens with the same embedding cannot be told apart."""
    twin = build()
    with torch.no_grad():
        twin.encoder.embedding.tokens.weight[6] = twin.encoder.embedding.tokens.weight[5]
    logits = twin(*packed(proteins)) - twin.head.bias
    torch.testing.assert_close(logits[..., 6], logits[..., 5], **TOLERANCE)
    assert (logits[..., 7] - logits[..., 5]).abs().max() > 0.1


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("esm2")])
def test_presets_have_the_parameters_of_transformers_esm(preset):
    options = load_config(["--preset", preset])[0].model
    with torch.device("meta"):
        ours = MaskedLanguageModel(options, TOKENIZER)
        theirs = EsmForMaskedLM(esm_config(options))
    theirs.tie_weights()
    # Not trained by masking: the contact head, and an absolute position table that rotary models leave unused.
    used = {n: p for n, p in theirs.named_parameters() if "contact_head" not in n and "position_embeddings" not in n}
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in used.values())
    assert (
        sum(p.dim() == 1 for p in ours.parameters())
        == sum(p.dim() == 1 for p in used.values()) - 2 * options.num_layers
    ), "query, key and value have one bias here and three there"


def test_the_mlp_width_is_four_times_the_hidden_size_unless_given():
    assert build(SHAPE).encoder.blocks["0"].mlp.up.out_features == 4 * 48
    narrow = ModelOptions(num_layers=1, hidden_size=48, num_attention_heads=4, ffn_hidden_size=56)
    assert build(narrow).encoder.blocks["0"].mlp.up.out_features == 56
