"""One process alone: no group unless the precision policy needs one."""

from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch._inductor.compile_fx
import torch.distributed as dist
from pretraining_runs import same_bits
from torch.distributed.fsdp import FSDPModule

from megatron_plm.benchmark.parity import train_case
from megatron_plm.config.options import Config, ModelOptions, ParallelOptions, TrainingOptions
from megatron_plm.model.initialize import initialize
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.parallel import mesh
from megatron_plm.parallel.apply import build_model
from megatron_plm.parallel.mesh import joined_world, set_timeout, world_size
from megatron_plm.tokenizers import get_tokenizer

SHAPE = ModelOptions(num_layers=2, hidden_size=32, num_attention_heads=2)
CONFIG = Config(model=SHAPE)
TOKENIZER = get_tokenizer("esm2")


def inputs():
    tokens = torch.full((1, 8), 5)
    return tokens, torch.arange(8)[None], torch.ones_like(tokens), torch.tensor([0, 8], dtype=torch.int32)


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


def test_without_a_mesh_the_model_is_the_plain_one():
    with joined_world() as world:
        (model,) = build_model(CONFIG, TOKENIZER, world).parts
    assert not any(isinstance(module, FSDPModule) for module in model.modules())
    plain = MaskedLanguageModel(SHAPE, TOKENIZER)
    initialize(plain, SHAPE, CONFIG.training.seed)
    assert same_bits(dict(model.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_recomputation_renames_nothing_and_changes_no_bit(granularity):
    training = TrainingOptions(recompute_granularity=granularity)
    with joined_world() as world:
        (model,) = build_model(replace(CONFIG, training=training), TOKENIZER, world).parts
        (plain,) = build_model(CONFIG, TOKENIZER, world).parts
    assert list(model.state_dict()) == list(plain.state_dict())
    kept = []
    for one in (plain, model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            logits = one(*inputs())
        kept.append(sum(sizes))
        logits.sum().backward()
    assert kept[1] < 0.7 * kept[0]
    gradients = ({name: p.grad for name, p in one.named_parameters()} for one in (plain, model))
    assert same_bits(*gradients)


def test_bfloat16_computes_in_bfloat16_and_keeps_weights_and_gradients_in_float32():
    seen = []
    with joined_world(force_group=True) as world:
        (model,) = build_model(replace(CONFIG, training=TrainingOptions(bf16=True)), TOKENIZER, world).parts
        model.encoder.blocks["1"].mlp.register_forward_hook(lambda *found: seen.append(found[-1].dtype))
        assert isinstance(model, FSDPModule)
        logits = model(*inputs())
        logits.float().sum().backward()
        assert (seen, logits.dtype) == ([torch.bfloat16], torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_every_group_has_the_timeout_that_was_asked_for():
    with joined_world(ParallelOptions(), force_group=True, timeout_minutes=0.5) as world:
        groups = [world.mesh.get_group(name) for name in world.mesh.mesh_dim_names]
        backends = [group._get_backend(torch.device("cpu")) for group in (dist.group.WORLD, *groups)]
        assert {backend.options._timeout for backend in backends} == {timedelta(seconds=30)}


def test_groups_of_gpus_wait_a_minute_longer_so_that_who_is_to_blame_is_known_first():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        # gloo stands in for NCCL: what counts is whose tensors it is for.
        backend = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(minutes=30))
        dist.group.WORLD._register_backend(torch.device("cuda"), dist.ProcessGroup.BackendType.CUSTOM, backend)
        set_timeout(dist.group.WORLD, timedelta(minutes=3))
        waits = {
            device: dist.group.WORLD._get_backend(torch.device(device)).options._timeout for device in ("cpu", "cuda")
        }
    finally:
        dist.destroy_process_group()
    assert waits == {"cpu": timedelta(minutes=3), "cuda": timedelta(minutes=4)}


@pytest.mark.parametrize("failed", [False, True])
def test_groups_of_gpus_are_aborted_where_the_run_has_failed(monkeypatch, failed):
    left = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, module in (("_abort_process_group", mesh), ("destroy_process_group", dist)):
        leave = getattr(module, name)
        monkeypatch.setattr(module, name, lambda name=name, leave=leave: (left.append(name), leave()))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh._leave_groups(failed=failed)
    assert left == ["_abort_process_group" if failed else "destroy_process_group"]
    assert not dist.is_initialized()


def test_compiled_blocks_train_as_plain_ones_and_are_compiled_once(pair_data, monkeypatch):
    compiled = []
    inductor = torch._inductor.compile_fx.compile_fx

    def counted(graph, *rest, **how):
        compiled.append(graph)
        return inductor(graph, *rest, **how)

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", counted)
    # Four blocks, so that one compiled for each would show.
    flags = [*pair_data.flags, "--train-iters=6", "--num-layers=4", "--hidden-dropout=0.1"]
    (plain, _), (fast, _) = (train_case([*flags, *more], 6) for more in ([], ["--compile"]))
    assert fast["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert compiled
    assert len(compiled) <= 4, "what lies before and behind attention, which the blocks share"
