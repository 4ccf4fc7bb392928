"""Counted parameters are those of models without values, whole, cut by tensor parallelism, and sharded by FSDP2."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from megatron_plm.config.layout import stages_of
from megatron_plm.config.options import ModelOptions, ParallelOptions
from megatron_plm.config.presets import PRESETS
from megatron_plm.model.transformer import Block, MaskedLanguageModel
from megatron_plm.plan.check import held_parameters, pretended_rank
from megatron_plm.plan.parameters import (
    block_weights,
    embedding_weights,
    held_of_block,
    parameter_count,
    pipeline_parts,
)
from megatron_plm.tokenizers import get_tokenizer

VOCAB = 33
WIDE = ModelOptions(num_layers=7, hidden_size=96, num_attention_heads=6, ffn_hidden_size=192)


def small(preset: str) -> ModelOptions:
    """A preset's kind of model in WIDE's shape."""
    shape = {"num_layers": 7, "hidden_size": 96, "num_attention_heads": 6, "ffn_hidden_size": 192, "tokenizer": "esm2"}
    return ModelOptions(**{**PRESETS[preset], **shape})


FAMILY = {"esm2": WIDE, **{name: small(name) for name in ("proteinlm-200m", "tape-transformer", "amplify-120m")}}
SHAPES = [WIDE, *(ModelOptions(**preset) for preset in PRESETS.values())]
# ESM-2's larger shapes: Lin et al. 2023 (doi:10.1126/science.ade2574), table S1.
LARGE = {"650m": (33, 1280, 20), "3b": (36, 2560, 40), "15b": (48, 5120, 40)}


def large(name: str) -> ModelOptions:
    layers, hidden, heads = LARGE[name]
    return ModelOptions(num_layers=layers, hidden_size=hidden, num_attention_heads=heads)


def on_meta(model: ModelOptions) -> nn.Module:
    with torch.device("meta"):
        return MaskedLanguageModel(model, get_tokenizer(model.tokenizer))


@pytest.mark.parametrize("model", [*SHAPES, *map(large, LARGE)], ids=lambda m: f"{m.num_layers}x{m.hidden_size}")
def test_the_count_is_that_of_the_model(model):
    built = on_meta(model)
    vocab_size = get_tokenizer(model.tokenizer).vocab_size
    assert parameter_count(model, vocab_size) == sum(p.numel() for p in built.parameters())
    shapes = Counter(tuple(p.shape) for p in built.encoder.blocks["0"].parameters())
    assert shapes == Counter(weight.shape for weight in block_weights(model))


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("tp", [1, 2, 3, 6])
def test_what_tensor_parallelism_leaves_of_a_block_is_what_dtensor_leaves(tp, name):
    model = FAMILY[name]
    with pretended_rank(tp - 1, tp):
        mesh = init_device_mesh("cpu", (tp,))
        with torch.device("meta"):
            block = Block(model)
        column, row = ColwiseParallel(), RowwiseParallel()
        parallelize_module(
            block, mesh, {"attention.qkv": column, "attention.out": row, "mlp.up": column, "mlp.down": row}
        )
        assert held_parameters([block]) == held_of_block(model, tp, 1).whole


def test_doubling_tensor_parallelism_halves_what_it_cuts():
    cut = [weight for weight in block_weights(WIDE) if weight.cut is not None]
    for weight in cut:
        assert weight.numel(2) * 2 == weight.numel()
    kept = sum(weight.numel() for weight in block_weights(WIDE) if weight.cut is None)
    assert kept == 6 * WIDE.hidden_size  # two LayerNorms, and biases that are added after the sum
    assert 2 * held_of_block(WIDE, 2, 1).whole == held_of_block(WIDE, 1, 1).whole + kept


@pytest.mark.parametrize("shards", [1, 2, 5, 40, 200])
def test_every_shard_is_what_fsdp_leaves(shards):
    weights = block_weights(WIDE)
    for rank in {0, 1, shards // 2, shards - 1} & set(range(shards)):
        with pretended_rank(rank, shards):
            with torch.device("meta"):
                block = Block(WIDE)
            fully_shard(block, mesh=init_device_mesh("cpu", (shards,)))
            assert held_parameters([block]) == sum(weight.shard(1, shards, rank) for weight in weights)
    total = sum(weight.shard(1, shards, rank) for weight in weights for rank in range(shards))
    assert total == sum(weight.numel() for weight in weights)
    room = held_of_block(WIDE, 1, shards).shard
    assert room == sum(weight.shard(1, shards, 0) for weight in weights) >= total / shards


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zbv"])
@pytest.mark.parametrize("pp", [1, 2, 3])
@pytest.mark.parametrize("name", FAMILY)
def test_the_parts_of_a_pipeline_are_the_model_and_a_copy_of_a_tied_embedding(schedule, pp, name):
    model = FAMILY[name]
    parallel = ParallelOptions(pipeline_model_parallel_size=pp, pipeline_schedule=schedule)
    parts = pipeline_parts(model, parallel)
    held = sum(weight.numel() for part in parts for unit in part.weights(model, VOCAB) for weight in unit)
    tokens, *_ = embedding_weights(model, VOCAB)
    copied = pp > 1 and name != "amplify-120m"
    assert held == parameter_count(model, VOCAB) + (tokens.numel() if copied else 0)
    assert sum(sum(part.blocks) for part in parts) == model.num_layers
    assert [part.first for part in parts].count(True) == [part.last for part in parts].count(True) == 1
    stages = sorted(stage for rank in range(pp) for stage in stages_of(parallel, rank))
    assert stages == list(range(1 if pp == 1 else parallel.num_stages))


def test_a_typed_layout_of_the_pipeline_counts():
    parallel = ParallelOptions(pipeline_model_parallel_size=2, pipeline_layout="1,6")
    first, last = pipeline_parts(WIDE, parallel)
    assert (first.blocks, last.blocks) == ((1,), (6,))
    turned = pipeline_parts(WIDE, replace(parallel, pipeline_schedule="zbv", pipeline_layout="1,2,3,1"))
    assert [part.blocks for part in turned] == [(1, 1), (2, 3)]
    assert (turned[0].first, turned[0].last, turned[0].copies) == (True, True, 1)
