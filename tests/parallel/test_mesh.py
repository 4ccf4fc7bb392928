"""One process alone: no group unless the precision policy needs one."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from megatron_plm.config.options import ModelOptions
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.parallel.apply import parallelize, synchronize_gradients
from megatron_plm.parallel.mesh import joined_world, world_size
from megatron_plm.tokenizers import get_tokenizer

SHAPE = ModelOptions(num_layers=2, hidden_size=32, num_attention_heads=2)


def build():
    return MaskedLanguageModel(SHAPE, get_tokenizer("esm2"))


def test_the_world_size_is_torchruns(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert world_size() == 6


def test_a_single_process_has_no_group_and_sums_to_itself():
    with joined_world() as world:
        assert not dist.is_initialized()
        assert (world.rank, world.size, world.mesh, world.is_main) == (0, 1, None, True)
        assert world.sum(1.5, 2) == [1.5, 2]
        assert (world.any(True), world.any(False)) == (True, False)
        world.barrier()


def test_a_forced_group_of_one_is_left_again_even_after_an_error():
    for _ in range(2):
        with pytest.raises(KeyError), joined_world(force_group=True) as world:  # noqa: PT012
            assert dist.is_initialized()
            assert world.mesh.size() == world.size == 1
            assert world.sum(3, 4) == [3, 4]
            raise KeyError
        assert not dist.is_initialized()


def test_without_a_mesh_the_model_stays_as_it_is():
    model = build()
    with joined_world() as world:
        parallelize(model, world, bf16=False, recompute=False)
    assert not any(isinstance(module, FSDPModule) for module in model.modules())
    assert {type(block).__name__ for block in model.encoder.blocks} == {"Block"}
    synchronize_gradients(model, enabled=False)  # nothing to turn off, and no error


def test_recomputation_wraps_each_block_and_renames_nothing_that_is_saved():
    model, plain = build(), build()
    with joined_world() as world:
        parallelize(model, world, bf16=False, recompute=True)
    assert {type(block).__name__ for block in model.encoder.blocks} == {"CheckpointWrapper"}
    assert list(model.state_dict()) == list(plain.state_dict())


def test_bfloat16_computes_in_bfloat16_and_keeps_weights_and_gradients_in_float32():
    model, seen = build(), []
    model.encoder.blocks[1].mlp.register_forward_hook(lambda *found: seen.append(found[-1].dtype))
    with joined_world(force_group=True) as world:
        parallelize(model, world, bf16=True, recompute=False)
        assert isinstance(model, FSDPModule)
        tokens = torch.full((1, 8), 5)
        logits = model(tokens, torch.arange(8)[None], torch.ones_like(tokens), torch.tensor([0, 8], dtype=torch.int32))
        logits.float().sum().backward()
        assert (seen, logits.dtype) == ([torch.bfloat16], torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
