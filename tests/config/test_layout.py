"""Layouts: what cannot be is told by its flag and the sizes that would do; what can be gives every block a stage."""

import pytest

from megatron_plm.config.layout import Layout, stage_layers, stages_of
from megatron_plm.config.load import load_config
from megatron_plm.config.options import ParallelOptions
from megatron_plm.config.problems import problems

TP, PP, CP, COPIES = (
    f"--{name}-size" for name in ("tensor-model-parallel", "pipeline-model-parallel", "context-parallel",
                                  "data-parallel-replicate")
)  # fmt: skip
# 6 blocks, 20 heads, an MLP of 1,280; 8 micro-batches of one row.
SIZES = ["--preset=esm2-8m", "--micro-batch-size=1", "--global-batch-size=8"]

IMPOSSIBLE = [
    # world size
    (8, [f"{TP}=3"], [f"{TP} 3 = 3 does not divide the 8 processes", "a multiple of 3"]),
    (8, [f"{TP}=4", f"{PP}=4"], [f"{TP} 4 times {PP} 4 = 16 does not divide the 8 processes"]),
    (1, [f"{CP}=2"], [f"{CP} 2 = 2 does not divide the 1 process;"]),
    *((8, [f"{flag}=0"], [f"{flag} must be above 0, not 0"]) for flag in (TP, PP, CP, COPIES)),
    (8, [f"{COPIES}=3"], [f"{COPIES} 3 does not divide the 8 data-parallel processes", "1, 2, 4, 8"]),
    (8, [f"{COPIES}=2", "--data-parallel-sharding=none"], ["--data-parallel-sharding none", f"leave out {COPIES}"]),
    # heads, the MLP's width, tokens of a row
    (8, [f"{TP}=8"], [f"{TP} 8 does not divide --num-attention-heads 20; sizes that do: 1, 2, 4, 5, 10, 20"]),
    (4, [f"{TP}=4", "--ffn-hidden-size=1278"], [f"{TP} 4 does not divide --ffn-hidden-size 1278", "1, 2, 3, 6"]),
    (2, ["--sequence-parallel"], ["--sequence-parallel", f"needs {TP} above 1"]),
    (2, [f"{CP}=2", "--seq-length=129"], ["--seq-length 129 cannot be cut into 2", "130"]),
    (4, [f"{CP}=2", f"{TP}=2", "--sequence-parallel", "--seq-length=130"], ["into 4 equal pieces", "132"]),
    (2, [f"{CP}=2", "--row-layout=padded"], ["--row-layout padded", "use packed rows"]),
    # batch
    (3, [], ["--global-batch-size 8 is not a multiple of --micro-batch-size 1 times 3", "next one up is 9"]),
    (4, [f"{PP}=4", "--global-batch-size=3"], ["gives each pipeline 3 micro-batches, fewer than its 4 processes"]),
    (4, [f"{PP}=4", "--pipeline-schedule=interleaved", "--global-batch-size=6",
         "--num-layers=8"], ["interleaved needs a number of micro-batches that 4 divides", "gives 6"]),
    # layers
    (8, [f"{PP}=8"], ["--num-layers 6 is fewer than the 8 stages"]),
    (4, [f"{PP}=4", "--pipeline-schedule=zbv"], ["--num-layers 6 is fewer than the 8 stages"]),
    (2, [f"{PP}=2", "--pipeline-layout=2,3"], ["--pipeline-layout 2,3 has 5 blocks in all, and --num-layers is 6"]),
    (2, [f"{PP}=2", "--pipeline-layout=2,2,2"], ["--pipeline-layout 2,2,2 has 3 stages, and the pipeline 2"]),
    (2, [f"{PP}=2", "--pipeline-layout=3;3"], ["--pipeline-layout 3;3", "commas between"]),
    (2, [f"{PP}=2", "--pipeline-layout=-1,7"], ["--pipeline-layout -1,7", "expected the number of blocks"]),
    (3, [f"{PP}=3", "--pipeline-layout=3,0,3", "--global-batch-size=3"], ["only the first and the last stage"]),
    # schedules
    (2, ["--pipeline-schedule=zbv"], ["--pipeline-schedule zbv: there is no pipeline", PP]),
    (2, ["--pipeline-layout=3,3"], ["--pipeline-layout: there is no pipeline"]),
    (2, [f"{PP}=2", "--num-virtual-stages-per-pipeline-rank=2"], ["1f1b has one stage a process", "interleaved"]),
    (2, [f"{PP}=2", "--pipeline-schedule=zbv", "--num-virtual-stages-per-pipeline-rank=3"], ["zbv has two stages"]),
    (2, [f"{PP}=2", "--pipeline-schedule=interleaved", "--num-virtual-stages-per-pipeline-rank=1"], ["use 1f1b"]),
    (4, [f"{PP}=2", "--pipeline-schedule=zbv"], ["zbv needs --data-parallel-sharding zero2 or none"]),
    (2, [f"{PP}=2", "--pipeline-schedule=zbv", "--recompute-granularity=selective"], ["zbv needs", "none or full"]),
]  # fmt: skip


@pytest.mark.parametrize(("processes", "flags", "words"), IMPOSSIBLE)
def test_an_impossible_layout_is_one_sentence_with_its_flag(processes, flags, words):
    (sentence,) = problems(load_config([*SIZES, *flags])[0], world_size=processes)
    assert all(part in sentence for part in words), sentence


@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        (8, []),
        (8, [f"{COPIES}=8"]),
        (8, [f"{TP}=4", "--sequence-parallel", f"{CP}=2"]),
        (3, [f"{CP}=3", "--seq-length=129"]),  # heads that don't divide are filled up
        (8, [f"{PP}=4", "--pipeline-layout=0,3,3,0"]),
        (4, [f"{PP}=2", "--pipeline-schedule=zbv", "--data-parallel-sharding=zero2"]),
    ],
)
def test_a_possible_layout_is_let_pass(processes, flags):
    assert problems(load_config([*SIZES, *flags])[0], world_size=processes) == []


def test_the_dims_of_a_layout_make_up_all_processes():
    kinds = [("none", 1, (4, 1)), ("zero2", 1, (1, 4)), ("zero3", 2, (2, 2))]
    for sharding, copies, expected in kinds:
        options = ParallelOptions(
            tensor_model_parallel_size=2, pipeline_model_parallel_size=3, context_parallel_size=5,
            data_parallel_sharding=sharding, data_parallel_replicate_size=copies,
        )  # fmt: skip
        layout = Layout.of(options, 120)
        assert layout.sizes == (3, *expected, 5, 2)
        assert layout.world_size == 120
        assert layout.shards == expected[1] * 5


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv"])
@pytest.mark.parametrize("pp", [2, 3, 4])
@pytest.mark.parametrize("num_layers", [8, 9, 10, 33, 48])
def test_every_block_has_one_stage_and_the_ends_have_no_more_than_the_middle(schedule, pp, num_layers):
    options = ParallelOptions(pipeline_model_parallel_size=pp, pipeline_schedule=schedule)
    stages = stage_layers(options, num_layers)
    assert [block for stage in stages for block in stage] == list(range(num_layers))
    counts = [len(stage) for stage in stages]
    assert max(counts) - min(counts) <= 1
    assert counts[-1] <= counts[0] <= min(counts[1:-1] or counts[:1])
    owned = [stages_of(options, rank) for rank in range(pp)]
    assert sorted(stage for mine in owned for stage in mine) == list(range(options.num_stages))


def test_a_typed_layout_is_taken_as_typed():
    options = ParallelOptions(pipeline_model_parallel_size=4, pipeline_layout="0,2,3,1")
    assert stage_layers(options, 6) == [range(0), range(0, 2), range(2, 5), range(5, 6)]
