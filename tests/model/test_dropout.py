"""Dropout drops at its rate without a pattern, and the same whatever the layout."""

import itertools
from dataclasses import replace

import pytest
import torch
from packing import SHAPE, build, pack, random_proteins
from scipy.stats import chi2

from megatron_plm.model.attention import Sequences, packed_attention
from megatron_plm.model.layers import HiddenDropout, block_keys, token_keys

RATE = 0.1
ROWS, LENGTH, WIDTH = 16, 256, 128
# Chances of a statistic this large where all is well.
SURE = 1e-6


def kept(site=1, *, row_keys=None, rate=RATE, width=WIDTH, length=LENGTH):
    """1 where a value is kept, 0 where it is dropped; [B, L, D]."""
    keys = token_keys(torch.arange(ROWS) * 7919 if row_keys is None else row_keys, length)
    dropped = HiddenDropout(rate, site=site)(torch.ones(*keys.shape, width), keys)
    return (dropped > 0).double()


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_is_the_rate_along_every_dim(rate):
    drops = 1 - kept(rate=rate)
    for dim in range(3):
        others = [d for d in range(3) if d != dim]
        count, n = drops.sum(others), drops[0].numel() * ROWS / drops.shape[dim]
        statistic = ((count - n * rate) ** 2 / (n * rate * (1 - rate))).sum()
        assert chi2.sf(float(statistic), len(count)) > SURE
        assert chi2.cdf(float(statistic), len(count)) > SURE  # nor is it more even than chance


def test_no_two_tokens_rows_or_blocks_share_keys():
    row_keys = torch.tensor([7, 7 + 2**32, 8, 7 + 2**33])
    keys = token_keys(row_keys, 64)
    blocks = torch.stack([block_keys(keys, index) for index in range(12)])
    assert len(set(keys.flatten().tolist()) | set(blocks.flatten().tolist())) == 13 * keys.numel()


def test_what_is_kept_is_scaled_so_that_the_mean_stays():
    keys = token_keys(torch.arange(ROWS), LENGTH)
    x = torch.rand(ROWS, LENGTH, WIDTH)
    dropped = HiddenDropout(RATE, site=0)(x, keys)
    is_kept = dropped != 0
    torch.testing.assert_close(dropped[is_kept], x[is_kept] / 0.9)


def test_neighbouring_tokens_features_rows_and_sites_are_not_alike():
    one = kept() - (1 - RATE)
    pairs = {
        "tokens": (one[:, 1:], one[:, :-1]),
        "far tokens": (one[:, 64:], one[:, :-64]),
        "features": (one[..., 1:], one[..., :-1]),
        "rows": (one[1:], one[:-1]),
        "sites": (one, kept(2) - (1 - RATE)),
        "rows of keys that differ in high bits": (one, kept(row_keys=torch.arange(ROWS) * 7919 + 2**40) - (1 - RATE)),
    }
    for name, (a, b) in pairs.items():
        correlation = (a * b).mean() / (RATE * (1 - RATE))
        assert abs(correlation) * a.numel() ** 0.5 < 5, name  # standard deviations


def test_a_stretch_of_the_tokens_drops_what_the_whole_row_does():
    row_keys = torch.tensor([3, 2**62 + 5])
    whole, layer = token_keys(row_keys, 40), HiddenDropout(0.3, site=4)
    x = torch.randn(2, 40, 8)
    stretches = [layer(x[:, i : i + 10], whole[:, i : i + 10]) for i in range(0, 40, 10)]
    torch.testing.assert_close(torch.cat(stretches, dim=1), layer(x, whole), rtol=0, atol=0)


def test_it_is_off_in_evaluation():
    x = torch.randn(2, 3, 4)
    assert HiddenDropout(0.5, site=0).eval()(x, None) is x


def test_a_model_drops_by_its_row_keys_alone():
    model = build(replace(SHAPE, hidden_dropout=0.2))
    rows = pack([[p] for p in random_proteins([20, 20])], 20)
    keys = torch.tensor([11, 12])
    first, again, other = (model.encoder(*rows, k) for k in (keys, keys, keys + 5))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert (first - other).abs().max() > 0.1
    model.eval()
    assert (first - model.encoder(*rows)).abs().max() > 0.1
    # Rows may come in any order, as they do where they are dealt to processes.
    swapped = pack([[p] for p in random_proteins([20, 20])][::-1], 20)
    model.train()
    torch.testing.assert_close(model.encoder(*swapped, keys.flip(0)).flip(0), first)


@pytest.mark.parametrize("norm_placement", ["pre", "post"])
def test_every_branch_of_every_block_drops_by_itself_before_it_is_added(norm_placement):
    learned = {
        "position_embedding_type": "learned_absolute",
        "max_position_embeddings": 60,
        "embedding_layernorm": True,
    }
    model = build(replace(SHAPE, **learned, hidden_dropout=0.2, norm_placement=norm_placement, token_dropout=False))
    seen, outputs = {}, {}
    for name, module in model.encoder.named_modules():
        if isinstance(module, HiddenDropout):
            module.register_forward_hook(lambda _, given, out, name=name: seen.update({name: (given[0], out)}))
        elif name.endswith((".attention", ".mlp", "embedding.norm")):
            module.register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out}))
    inputs = []
    for block in model.encoder.blocks.values():
        block.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    encoded = model.encoder(*pack([random_proteins([60]), random_proteins([60], seed=1)], 60), torch.tensor([5, 6]))
    assert len(seen) == 2 * SHAPE.num_layers + 1
    masks = [(out == 0) & (x != 0) for x, out in seen.values()]
    for x, out in seen.values():
        kept = out != 0
        torch.testing.assert_close(out[kept], x[kept] / 0.8)
    for one, other in itertools.combinations(masks, 2):
        # However features are paired: no feature of one site drops as some feature of another does.
        a, b = (mask.double().flatten(0, 1) - 0.2 for mask in (one, other))
        correlations = (a.T @ b) / len(a) / (0.2 * 0.8)
        assert correlations.abs().max() < 6 / len(a) ** 0.5
    given = {name: x for name, (x, _) in seen.items()}
    added = {name: out for name, (_, out) in seen.items()}
    assert given["embedding.dropout"] is outputs["embedding.norm"]
    assert inputs[0] is added["embedding.dropout"]
    stream = [*inputs, encoded]
    for i, block in model.encoder.blocks.items():
        assert given[f"blocks.{i}.attention_dropout"] is outputs[f"blocks.{i}.attention"]
        assert given[f"blocks.{i}.mlp_dropout"] is outputs[f"blocks.{i}.mlp"]
        x, attention, mlp = stream[int(i)], added[f"blocks.{i}.attention_dropout"], added[f"blocks.{i}.mlp_dropout"]
        if norm_placement == "pre":
            expected = x + attention + mlp
            if int(i) + 1 == SHAPE.num_layers:
                expected = model.encoder.final_norm(expected)
        else:
            expected = block.mlp_norm(block.attention_norm(x + attention) + mlp)
        torch.testing.assert_close(stream[int(i) + 1], expected)


def test_attention_dropout_drops_at_its_rate():
    """With equal queries and keys each of L tokens weighs 1/L; of ones as values the share that is kept comes out."""
    L, N, p = 64, 200, 0.3
    torch.manual_seed(0)
    sequences = Sequences.from_cu_seqlens(torch.tensor([0, L], dtype=torch.int32), L, torch.float64)
    flat, ones = torch.zeros(L, N, 1, dtype=torch.float64), torch.ones(L, N, 1, dtype=torch.float64)
    kept = packed_attention(flat, flat, ones, sequences, dropout=p)
    count = kept.numel()
    assert abs(kept.mean() - 1) < 5 * (p / (1 - p) / L / count) ** 0.5
    assert kept.var() == pytest.approx(p / (1 - p) / L, rel=5 * (2 / count) ** 0.5)


def test_attention_dropout_drops_in_training_and_keeps_the_mean():
    model = build(replace(SHAPE, num_layers=1, attention_dropout=0.3))
    block = model.encoder.blocks["0"].attention
    rows = pack([random_proteins([30])], 30)
    model.encoder.embedding.eval()
    outputs = []
    block.register_forward_hook(lambda _, __, output: outputs.append(output.detach()))
    torch.manual_seed(0)
    for _ in range(400):
        model.encoder(*rows)
    mean, spread = torch.stack(outputs).mean(0), torch.stack(outputs).std(0)
    model.eval()
    model.encoder(*rows)
    assert spread.min() > 0
    assert ((mean - outputs[-1]) / (spread / 400**0.5)).abs().max() < 5.5
