"""Ranked plans: all fit, all can be typed, none that can be found by trying everything is faster."""

import itertools
import shlex
from dataclasses import replace

import pytest

from megatron_plm.config.layout import Layout
from megatron_plm.config.load import load_config
from megatron_plm.config.options import Config, ModelOptions, ParallelOptions, TrainingOptions
from megatron_plm.config.problems import problems
from megatron_plm.errors import UserError
from megatron_plm.plan.hardware import GPUS, RESERVED
from megatron_plm.plan.memory import largest_memory
from megatron_plm.plan.search import Request, fits, ranked_plans
from megatron_plm.plan.speed import estimate_speed
from megatron_plm.plan.table import as_json, as_text, flags

VOCAB = 33
LARGE = ("--num-layers", "36", "--hidden-size", "2560", "--num-attention-heads", "40")


def request(
    num_gpus: int,
    *,
    rows: int = 64,
    gpu: str = "h100",
    shape=LARGE,
    fixed: dict | None = None,
    memory: float | None = None,
) -> Request:
    unplanned = load_config(list(shape))[0]
    chosen, device = fixed or {}, GPUS[gpu]
    training = TrainingOptions(
        **{"bf16": True, "global_batch_size": rows, "micro_batch_size": 1}
        | {name: value for name, value in chosen.items() if hasattr(TrainingOptions, name)}
    )
    parallel = ParallelOptions(**{name: value for name, value in chosen.items() if hasattr(ParallelOptions, name)})
    return Request(
        config=replace(unplanned, training=training, parallel=parallel),
        fixed=frozenset(chosen),
        gpu_name=gpu,
        gpu=replace(device, memory=memory) if memory else device,
        num_gpus=num_gpus,
        gpus_per_node=8,
        vocab_size=VOCAB,
        attention_length=512.0,
        shape_flags=tuple(shape),
        unplanned=unplanned,
    )


@pytest.mark.parametrize("num_gpus", [1, 2, 6, 8, 32])
def test_every_plan_fits_and_its_flags_give_it_back(num_gpus):
    wanted = request(num_gpus, rows=96)
    plans = ranked_plans(wanted)
    assert plans
    for plan in plans:
        typed = load_config(flags(wanted, plan.config))[0]
        assert problems(typed, world_size=num_gpus) == []
        assert typed == plan.config
        assert Layout.of(typed.parallel, num_gpus) == plan.layout
        assert plan.layout.world_size == num_gpus
        assert plan.memory.total <= wanted.gpu.memory - RESERVED
        assert 0 < plan.speed.mfu < 1
        assert 0 <= plan.speed.bubble < 1
    assert len({(p.layout.tp, p.layout.pp, p.layout.cp) for p in plans}) == len(plans)
    seconds = [plan.speed.step_seconds for plan in plans]
    assert all(later >= 0.99 * earlier for earlier, later in itertools.pairwise(seconds))


def test_none_is_faster_of_all_that_can_be_typed():
    shape = ("--num-layers", "8", "--hidden-size", "1024", "--num-attention-heads", "16")
    wanted = request(4, rows=16, shape=shape, memory=7e9)
    best = ranked_plans(wanted)[0]
    found = []
    for tp, pp, cp, schedule, sharding, replicas, rows, recompute, sequence in itertools.product(
        (1, 2, 4), (1, 2, 4), (1, 2, 4), ("gpipe", "1f1b", "interleaved", "zbv"), ("none", "zero2", "zero3"), (1, 2),
        (1, 2, 4, 8, 16), ("none", "selective", "full"), (False, True),
    ):  # fmt: skip
        parallel = ParallelOptions(
            tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp,
            pipeline_schedule=schedule, data_parallel_sharding=sharding, data_parallel_replicate_size=replicas,
            sequence_parallel=sequence,
        )  # fmt: skip
        training = replace(wanted.config.training, micro_batch_size=rows, recompute_granularity=recompute)
        config = replace(wanted.config, parallel=parallel, training=training)
        if problems(config, world_size=4):
            continue
        layout = Layout.of(parallel, 4)
        if fits(largest_memory(config, layout, VOCAB)[1], wanted.gpu):
            found.append(estimate_speed(config, layout, wanted.gpu, 8, VOCAB, 512.0).step_seconds)
    assert len(found) > 100
    assert best.speed.step_seconds == pytest.approx(min(found), rel=1e-6)


def test_what_is_typed_stays():
    fixed = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 4,
        "pipeline_schedule": "gpipe",
        "micro_batch_size": 2,
        "recompute_granularity": "full",
        "data_parallel_sharding": "none",
        "sequence_parallel": False,
    }
    for plan in ranked_plans(request(32, rows=128, fixed=fixed)):
        values = {**vars(plan.config.parallel), **vars(plan.config.training)}
        assert {name: values[name] for name in fixed} == fixed


def test_less_memory_brings_recomputation_before_it_brings_nothing():
    fixed = {"micro_batch_size": 4, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    needed = []
    for recompute in ("none", "selective", "full"):
        (plan,) = ranked_plans(request(1, rows=4, fixed={**fixed, "recompute_granularity": recompute}))
        needed.append(plan.memory.total)
    chosen = []
    for memory in needed:
        plans = ranked_plans(request(1, rows=4, fixed=fixed, memory=memory + RESERVED))
        chosen.append(plans[0].config.training.recompute_granularity)
    assert chosen == ["none", "selective", "full"]
    activations = plans[0].activations
    assert activations["full"] < activations["selective"] < activations["none"]


def test_where_nothing_fits_the_recomputation_that_would_is_told():
    fixed = {"micro_batch_size": 4, "recompute_granularity": "none"}
    with pytest.raises(UserError, match="--recompute-granularity full the model would"):
        ranked_plans(request(1, rows=4, fixed=fixed, memory=56e9))
    with pytest.raises(UserError, match="--micro-batch-size 1 the model would"):
        ranked_plans(request(1, rows=64, fixed={"micro_batch_size": 64}, memory=56e9))


def test_where_nothing_fits_the_smallest_count_that_would_is_told():
    with pytest.raises(UserError, match="; 2 GPUs would do") as told:
        ranked_plans(request(1, gpu="a100-40gb", rows=64))
    assert str(told.value).startswith("--num-gpus 1: ")
    assert ranked_plans(request(2, gpu="a100-40gb", rows=64))
    whole = {"data_parallel_sharding": "none", "tensor_model_parallel_size": 1, "context_parallel_size": 1}
    with pytest.raises(UserError, match="; 2 GPUs would do"):  # in a pipeline
        ranked_plans(request(1, gpu="a100-40gb", rows=64, fixed=whole))
    huge = ("--num-layers", "2", "--hidden-size", "65536", "--num-attention-heads", "64")
    with pytest.raises(UserError, match="choose a smaller model"):
        ranked_plans(request(8, gpu="l4", shape=huge, fixed={"tensor_model_parallel_size": 1}))


def test_a_batch_that_no_layout_divides_is_told_in_the_words_of_training():
    fixed = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1}
    with pytest.raises(UserError, match="--global-batch-size 10 is not a multiple"):
        ranked_plans(request(64, rows=10, fixed=fixed))


def test_text_and_json_tell_the_same():
    wanted = request(8)
    plans = ranked_plans(wanted)[:3]
    told, text = as_json(wanted, plans), list(as_text(wanted, plans))
    assert [row["flags"] for row in told["plans"]] == [
        shlex.split(line.split("launch/pretrain.sh ")[1]) for line in text if "launch/pretrain.sh" in line
    ]
    assert told["parameters"] == 2_839_004_193
    for row, plan in zip(told["plans"], plans, strict=True):
        parts = {name: value for name, value in row["memory"].items() if name not in ("total", "pipeline_rank")}
        assert sum(parts.values()) == row["memory"]["total"] == plan.memory.total
    assert max(map(len, text[:7])) <= 120


def test_a_plan_of_a_default_model_is_one_of_data_parallelism():
    wanted = request(8, rows=256, shape=())
    assert wanted.config.model == ModelOptions()
    assert isinstance(wanted.config, Config)
    best = ranked_plans(wanted)[0].layout
    assert (best.tp, best.pp, best.cp, best.dp) == (1, 1, 1, 8)
