"""What a run tells of its kernels is what runs: layouts change which tensors the kernels are given."""

import contextlib

import pytest
import torch

import megatron_plm.kernels.linear as module
from megatron_plm.config.options import Config, ModelOptions, ParallelOptions, TrainingOptions
from megatron_plm.kernels.linear import linear_path
from megatron_plm.parallel.apply import build_model
from megatron_plm.parallel.mesh import arranged_world, joined_world
from megatron_plm.plan.check import pretended_rank
from megatron_plm.tokenizers import get_tokenizer

SHAPE = ModelOptions(num_layers=2, hidden_size=32, num_attention_heads=2)
MAPS_OF_BLOCKS, MAPS_OF_HEAD = 2 * 4, 2


@contextlib.contextmanager
def world_of(processes: int, parallel: ParallelOptions, *, bf16: bool):
    if processes == 1:
        with joined_world(force_group=bf16) as world:
            yield world
    else:
        with pretended_rank(0, processes):
            yield arranged_world(parallel, torch.device("cpu"))


@pytest.mark.skipif(not module._HAS_ONEDNN, reason="this torch was built without oneDNN")
@pytest.mark.parametrize(
    ("processes", "parallel", "bf16", "taken"),
    [
        (1, {}, False, MAPS_OF_BLOCKS + MAPS_OF_HEAD),
        (2, {}, False, MAPS_OF_BLOCKS + MAPS_OF_HEAD),
        (2, {"data_parallel_sharding": "none"}, False, MAPS_OF_BLOCKS + MAPS_OF_HEAD),
        (2, {"tensor_model_parallel_size": 2}, False, MAPS_OF_HEAD),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, False, MAPS_OF_HEAD),
        (4, {"tensor_model_parallel_size": 2}, False, MAPS_OF_HEAD),
        (1, {}, True, 0),
    ],
)
def test_the_path_of_linear_maps_that_is_told_is_taken(processes, parallel, bf16, taken, monkeypatch):
    calls = []
    apply = module._OneDnnLinear.apply
    monkeypatch.setattr(module._OneDnnLinear, "apply", lambda *given: calls.append(given) or apply(*given))
    options = ParallelOptions(**parallel)
    config = Config(model=SHAPE, parallel=options, training=TrainingOptions(bf16=bf16))
    with world_of(processes, options, bf16=bf16) as world:
        (model,) = build_model(config, get_tokenizer("esm2"), world).parts
        tokens = torch.full((1, 8), 5)
        cuts = torch.tensor([0, 8], dtype=torch.int32)
        model(tokens, torch.arange(8)[None], torch.ones_like(tokens), cuts, torch.tensor([[1, 2]]))
        told = linear_path(world.device, torch.bfloat16 if bf16 else torch.float32, cut=world.layout.tp > 1)
    assert len(calls) == taken
    assert told.startswith({0: "torch", MAPS_OF_HEAD: "torch in the blocks"}.get(taken, "oneDNN"))
    assert ("oneDNN in the head" in told) == (taken == MAPS_OF_HEAD)
