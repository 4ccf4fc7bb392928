"""A training step never makes the host wait for the GPU, and gives it the same shapes every time.

Without a GPU the forward and backward passes run on tensors without values: what would read one raises there.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_plm.config.load import config_from_values
from megatron_plm.model import attention
from megatron_plm.model.attention import Sequences
from megatron_plm.model.heads import summed_cross_entropy
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.parallel.mesh import World, joined_world
from megatron_plm.training.device import DeviceValues, on_device
from megatron_plm.training.loop import train_step
from megatron_plm.training.optimizer import clip_gradients
from megatron_plm.training.state import build_run, open_datasets

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture
def run(pair_data):
    config = config_from_values(
        {
            "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 64, "packing_window": 64,
            "micro_batch_size": 2, "global_batch_size": 4, "data_path": (str(pair_data.train),), "num_workers": 0,
        }
    )  # fmt: skip
    return build_run(config, World(0, 1, CPU, None), open_datasets(config))


def first_steps(run, count):
    steps = run.train_loader.steps(run.progress.cursor)
    return [next(steps) for _ in range(count)]


class Names(TorchDispatchMode):
    """Notes which ops are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.names.add(str(function))
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_op_of_a_step_reads_a_value(run, dropout, monkeypatch):
    """Without values: on the meta device, taken for one with flash attention, whatever would read one raises."""
    monkeypatch.setattr(attention, "_has_flash_attention", lambda *_: True)
    config = config_from_values({**vars(run.config.model), "hidden_dropout": dropout})
    (step,) = first_steps(run, 1)
    with META:
        model = MaskedLanguageModel(config.model, run.datasets.tokenizer).bfloat16().train()
    with Names() as seen:
        for cpu_batch in step.micro_batches:
            batch = cpu_batch.to(META)
            logits = model(
                batch.tokens, batch.positions, batch.segment_ids, batch.cu_seqlens, batch.label_index, batch.row_keys
            )
            (summed_cross_entropy(logits, batch.label_id) / batch.num_labels).backward()
        norm = clip_gradients(model.parameters(), 1.0)
    assert {"torch_attn._varlen_attn.default", "torch_attn._varlen_attn_backward.default"} <= seen.names
    assert all(parameter.grad is not None for parameter in model.parameters())
    for read in (norm.item, norm.cpu, batch.cu_seqlens.tolist, batch.tokens.nonzero, lambda: bool(norm > 0)):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()


def test_every_batch_has_the_same_shapes_and_the_same_longest_length(run):
    """These batches also agree on the room for segments, which others may not: tests/model/test_compile.py."""
    shapes = set()
    for step in first_steps(run, 6):
        for batch in step.micro_batches:
            sequences = Sequences.from_cu_seqlens(batch.cu_seqlens, batch.tokens.shape[1], torch.bfloat16)
            values = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
            shapes.add((*(tuple(value.shape) for value in values), sequences.max_length))
    assert len(shapes) == 1
    cuts = [batch.cu_seqlens for step in first_steps(run, 6) for batch in step.micro_batches]
    assert not all(torch.equal(cut, cuts[0]) for cut in cuts), "of other lengths"


def test_on_a_cpu_steps_pass_as_they_are_and_values_come_back(run):
    steps = first_steps(run, 3)
    assert list(on_device(iter(steps), CPU)) == steps
    assert DeviceValues([torch.tensor(0.1), torch.tensor(2.0)]).read() == [torch.tensor(0.1).item(), 2.0]


def test_with_bf16_one_process_computes_in_bfloat16_and_keeps_float32(run):
    """The policy of docs/performance.md: the same for one GPU as for many."""
    config = config_from_values(
        {**vars(run.config.data), **vars(run.config.model), "micro_batch_size": 2, "global_batch_size": 4, "bf16": True}
    )
    seen = {}

    def note(module, given, out):
        seen.setdefault(type(module).__name__, set()).add((given[0].dtype, out.dtype, module.weight.dtype))

    with joined_world(config.parallel, use_gpu=False, force_group=True) as world:
        bf16_run = build_run(config, world, run.datasets)
        for part in bf16_run.model.parts:
            for module in part.modules():
                if isinstance(module, nn.Linear | nn.LayerNorm):
                    module.register_forward_hook(note)
        zero_grad, gradients = bf16_run.optimizer.zero_grad, set()
        bf16_run.optimizer.zero_grad = lambda: (
            gradients.update(p.grad.dtype for p in bf16_run.model.parameters), zero_grad()
        )  # fmt: skip
        train_step(bf16_run, first_steps(run, 1)[0])
        kept = {p.dtype for p in bf16_run.model.parameters}
        moments = {v.dtype for state in bf16_run.optimizer.state.values() for v in state.values()}
    assert seen == {name: {(torch.bfloat16,) * 3} for name in ("Linear", "LayerNorm")}
    assert kept == gradients == moments == {torch.float32}


@pytest.mark.gpu
def test_a_step_on_a_gpu_synchronises_nowhere(run):
    config = config_from_values(
        {**vars(run.config.data), **vars(run.config.model), "micro_batch_size": 2, "global_batch_size": 4, "bf16": True}
    )
    with joined_world(config.parallel, force_group=True) as world:
        gpu_run = build_run(config, world, open_datasets(config))
        steps = on_device(gpu_run.train_loader.steps(gpu_run.progress.cursor), world.device)
        for _ in range(2):
            train_step(gpu_run, next(steps))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            metrics = [train_step(gpu_run, next(steps)) for _ in range(3)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        values = DeviceValues([metrics[-1].loss_sum])
        assert values.read() == [metrics[-1].loss_sum.item()]
