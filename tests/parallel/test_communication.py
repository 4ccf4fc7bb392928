"""What the processes of a data-parallel group send in a step, counted: no more than the kind of sharding needs."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_plm.config.options import Config, ModelOptions, ParallelOptions, TrainingOptions
from megatron_plm.data.loader import Batch
from megatron_plm.parallel.apply import build_model
from megatron_plm.parallel.mesh import arranged_world
from megatron_plm.plan.check import pretended_rank
from megatron_plm.tokenizers import get_tokenizer
from megatron_plm.training.pretrain import _layout_told

BLOCKS = 3
UNITS = BLOCKS + 1  # of gathering and of summation: each block, and the rest


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called, by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "c10d":
            self.calls[op._opname] += 1
        return op(*args, **(kwargs or {}))


def batch() -> Batch:
    tokens = torch.full((1, 8), 5)
    return Batch(
        tokens=tokens,
        positions=torch.arange(8)[None],
        segment_ids=torch.ones_like(tokens),
        cu_seqlens=torch.tensor([0, 8], dtype=torch.int32),
        label_index=torch.tensor([[1, 2]]),
        label_id=torch.tensor([[6, 7]]),
        row_keys=torch.zeros(1, 2, dtype=torch.int64),
        num_tokens=8,
        num_labels=2,
        num_cropped=0,
    )


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(
    ("parallel", "gathered_a_step", "gathered_a_micro_batch", "summed"),
    [
        ({"data_parallel_sharding": "none"}, 0, 0, {"allreduce_": UNITS}),
        ({"data_parallel_sharding": "zero2"}, UNITS, 0, {"_reduce_scatter_base_": UNITS}),
        # Blocks for their forward and their backward pass; the rest, which is needed again at once, stays.
        ({"data_parallel_sharding": "zero3"}, 1, 2 * BLOCKS, {"_reduce_scatter_base_": UNITS}),
        (
            {"data_parallel_sharding": "zero2", "data_parallel_replicate_size": 2},
            UNITS,
            0,
            {"_reduce_scatter_base_": UNITS, "allreduce_": UNITS},
        ),
        ({"data_parallel_replicate_size": 4}, 0, 0, {"allreduce_": UNITS}),
    ],
)
def test_several_micro_batches_gather_and_sum_no_more_than_the_sharding_needs(
    parallel, gathered_a_step, gathered_a_micro_batch, summed, micro_batches
):
    options = ParallelOptions(**parallel)
    shape = ModelOptions(num_layers=BLOCKS, hidden_size=32, num_attention_heads=2)
    with pretended_rank(0, 4):
        world = arranged_world(options, torch.device("cpu"))
        model = build_model(Config(model=shape, parallel=options), get_tokenizer("esm2"), world)
        for _ in range(2):  # in the second step nothing is set up any more
            with Collectives() as collectives:
                model.passes.train([batch()] * micro_batches, lambda logits, _: logits.sum())
    gathered = gathered_a_step + gathered_a_micro_batch * micro_batches
    assert collectives.calls == {**summed, **({"_allgather_base_": gathered} if gathered else {})}


@pytest.mark.parametrize(
    ("parallel", "warned"),
    [
        ({"data_parallel_sharding": "zero3"}, True),
        ({"data_parallel_sharding": "zero3", "data_parallel_replicate_size": 2}, False),  # a whole copy in each
        ({"data_parallel_sharding": "zero3", "data_parallel_replicate_size": 2, "context_parallel_size": 2}, True),
        ({"data_parallel_sharding": "zero2"}, False),
        ({"data_parallel_sharding": "zero3", "pipeline_model_parallel_size": 1}, False),
    ],
)
def test_zero3_in_a_pipeline_is_warned_of_at_the_start(parallel, warned):
    options = ParallelOptions(**{"pipeline_model_parallel_size": 2, **parallel})
    config = Config(parallel=options, training=TrainingOptions(micro_batch_size=1))
    size = 4 * options.context_parallel_size
    with pretended_rank(0, size):
        told = _layout_told(config, arranged_world(options, torch.device("cpu")))
    assert ("zero3 gathers the weights for every micro-batch" in told) == warned
