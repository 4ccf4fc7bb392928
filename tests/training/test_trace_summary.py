"""Sums over traces made by hand, whose answers can be read off them."""

import random

import pytest

from megatron_plm.training.trace_events import length, minus, parse_trace, union
from megatron_plm.training.trace_page import summary_page, summary_words
from megatron_plm.training.trace_summary import (
    COMMUNICATION,
    DATA,
    OPTIMIZER,
    PASSES,
    op_class,
    summarize,
)

MAIN, AUTOGRAD, MESSAGES = 1, 2, 3


def event(name, start, end, *, cat="cpu_op", tid=MAIN, **args):
    return {"ph": "X", "cat": cat, "name": name, "pid": 7, "tid": tid, "ts": start, "dur": end - start, "args": args}


def marked(name, start, end, **more):
    return event(name, start, end, cat="user_annotation", **more)


def kernel(name, start, end, *, launch, stream=7, cat="kernel"):
    return event(name, start, end, cat=cat, tid=stream, device=0, stream=stream, correlation=launch)


def launched(number, at, tid=MAIN):
    return event("cudaLaunchKernel", at, at + 1, cat="cuda_runtime", tid=tid, correlation=number)


@pytest.mark.parametrize("seed", range(20))
def test_interval_arithmetic_is_that_of_sets(seed):
    draw = random.Random(seed)
    one, other = ([(a, a + draw.randrange(6)) for a in (draw.randrange(40) for _ in range(8))] for _ in range(2))
    cells = [{n for a, b in part for n in range(a, b)} for part in (one, other)]
    assert length(union(one)) == len(cells[0])
    left = minus(union(one), union(other))
    assert {n for a, b in left for n in range(a, b)} == cells[0] - cells[1]
    assert left == union(left), "in order and apart"


HOST_STEP = [
    marked("ProfilerStep#4", 0, 100),
    marked(DATA, 0, 10),
    marked(PASSES, 10, 70),
    event("aten::linear", 12, 30, **{"Input Dims": [[4, 8], [], [16, 8]]}),
    event("aten::addmm", 14, 28),
    event("aten::empty", 15, 17),
    event("aten::gelu", 30, 36),
    event("autograd::engine::evaluate_function: AddmmBackward0", 40, 60),
    event("AddmmBackward0", 41, 59),
    event("aten::mm", 42, 50),
    event("aten::sum", 50, 56),
    marked(OPTIMIZER, 70, 90),
    event("aten::_fused_adamw_", 72, 88),
]


def test_every_moment_of_the_main_thread_counts_once_for_the_innermost_op():
    summary = summarize(parse_trace(HOST_STEP))
    assert not summary.on_gpu
    assert (summary.window, summary.steps) == (100, [100])
    # linear with all in it: 18, mm: 8; gelu: 6, sum: 6; what the autograd engine adds around them: 20 - 14.
    assert summary.classes == {
        "matrix products": 26, "attention": 0, "norms and elementwise": 12, "optimizer": 16, COMMUNICATION: 0,
        "copies and others": 6,
    }  # fmt: skip
    assert summary.phases == {
        "waiting for data": 10, "forward": 40, "backward": 20, "optimizer": 20, "the rest": 10,
    }  # fmt: skip
    assert sum(summary.classes.values()) + summary.idle == sum(summary.phases.values()) == summary.window
    assert summary.waiting == 10
    # 0-12, 36-40, 60-72, 88-100
    assert summary.idle == 40
    assert sorted(gap for gap, _ in summary.gaps) == [4, 12, 12, 12]
    assert (12, "aten::_fused_adamw_") in summary.gaps
    assert (12, "the end") in summary.gaps


def test_top_ops_are_by_own_time_with_calls_and_shapes():
    again = [{**entry, "ts": entry["ts"] + 200} for entry in HOST_STEP]
    summary = summarize(parse_trace(HOST_STEP + again))
    top = {op.name: op for op in summary.top}
    assert (top["aten::_fused_adamw_"].calls, top["aten::_fused_adamw_"].microseconds) == (2, 32)
    assert (top["aten::linear"].microseconds, top["aten::linear"].shapes) == (8, "[4, 8] [16, 8]")
    assert top["aten::addmm"].microseconds == 24, "without what stands in it"
    times = [op.microseconds for op in summary.top]
    assert times == sorted(times, reverse=True)


def test_events_outside_of_the_traced_steps_count_nothing():
    more = [event("aten::mm", -50, -10), event("aten::mm", 120, 180)]
    assert summarize(parse_trace(more + HOST_STEP)) == summarize(parse_trace(HOST_STEP))


def test_messages_in_other_threads_are_exposed_where_the_main_one_computes_nothing():
    step = [
        marked("ProfilerStep#1", 0, 100),
        event("aten::mm", 0, 40),
        marked("gloo:all_gather", 30, 60, tid=MESSAGES),
        event("aten::copy_", 31, 35, tid=MESSAGES),
        marked("gloo:all_reduce", 50, 70, tid=MESSAGES + 1),
        event("c10d::allreduce_", 45, 75),
        event("aten::mm", 75, 100),
    ]
    summary = summarize(parse_trace(step))
    assert summary.communication == 45, "30 to 75; what overlaps counts once"
    assert summary.exposed == 35, "40 to 75"
    assert summary.classes[COMMUNICATION] == 30, "of the main thread"
    assert summary.classes["matrix products"] == 65
    assert "35" in summary_page(summary, "P", []).split("Communication:")[1].split("exposed")[0]


GPU_STEP = [
    marked("ProfilerStep#9", 0, 50),
    marked(DATA, 0, 4),
    marked(PASSES, 4, 30),
    event("aten::linear", 5, 10, **{"Input Dims": [[4, 8]]}),
    launched(1, 6),
    launched(2, 8),
    event("torch_attn::_varlen_attn", 11, 14),
    launched(3, 12),
    event("c10d::allgather_", 15, 18),
    launched(4, 16),
    event("autograd::engine::evaluate_function: AddmmBackward0", 18, 26, tid=AUTOGRAD),
    event("aten::mm", 19, 24, tid=AUTOGRAD),
    launched(5, 20, tid=AUTOGRAD),
    marked(OPTIMIZER, 30, 45),
    event("aten::_foreach_norm", 31, 34),
    launched(6, 32),
    event("aten::_fused_adamw_", 35, 40),
    launched(7, 36),
    launched(8, 47),
    kernel("splitK_reduce", 100, 105, launch=1),
    kernel("nvjet_tst_128x64", 105, 125, launch=2),
    kernel("void cutlass::device_kernel<flash::FlashAttnFwd>", 130, 150, launch=3),
    kernel("ncclDevKernel_AllGather_RING", 120, 160, launch=4, stream=20),
    kernel("nvjet_tst_64x64", 165, 195, launch=5),
    kernel("multi_tensor_apply_kernel", 195, 199, launch=6),
    kernel("multi_tensor_apply_kernel", 200, 210, launch=7),
    kernel("Memcpy DtoD", 210, 212, launch=8, cat="gpu_memcpy"),
]


def test_on_a_gpu_its_kernels_count_by_the_ops_that_began_them():
    summary = summarize(parse_trace(GPU_STEP))
    assert summary.on_gpu
    assert (summary.window, summary.steps) == (112, [50])
    assert summary.classes == {
        "matrix products": 55, "attention": 20, "norms and elementwise": 0, "optimizer": 14, COMMUNICATION: 40,
        "copies and others": 2,
    }  # fmt: skip
    assert summary.phases == {"waiting for data": 0, "forward": 85, "backward": 30, "optimizer": 14, "the rest": 2}
    assert summary.communication == 40
    assert summary.exposed == 15, "125 to 130 and 150 to 160"
    assert summary.idle == 6, "160 to 165 and 199 to 200"
    assert summary.gaps == [(5, "aten::mm"), (1, "aten::_fused_adamw_")]
    assert summary.waiting == 4
    top = {op.name: op for op in summary.top}
    assert (top["aten::linear"].calls, top["aten::linear"].microseconds) == (1, 25), "one op with two kernels"
    assert "GPU idle" in summary_words(summary)


def test_an_op_of_our_own_has_its_own_name():
    """As torch writes it: the op, in it the function that keeps what its gradient needs, and nothing inside."""
    entries = [
        marked("ProfilerStep#1", 0, 20),
        event("megatron_plm::packed_attention", 1, 19),
        event("GeneratedBackwardFor_megatron_plm_packed_attention_default", 3, 18),
    ]
    (op,) = summarize(parse_trace(entries)).top
    assert (op.name, op.microseconds) == ("megatron_plm::packed_attention", 18)


def test_kernels_begun_outside_of_the_traced_steps_count_nothing():
    more = [launched(99, 60), kernel("nvjet", 300, 400, launch=99), kernel("nvjet", 20, 90, launch=None)]
    assert summarize(parse_trace(GPU_STEP + more)) == summarize(parse_trace(GPU_STEP))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aten::addmm", "matrix products"),
        ("mkldnn::_linear_pointwise", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("torch_attn::_varlen_attn_backward", "attention"),
        ("megatron_plm::packed_attention_backward", "attention"),
        ("megatron_plm::dropout_add", "norms and elementwise"),
        ("megatron_plm::dropout_add_norm_backward", "norms and elementwise"),
        ("megatron_plm::bias_gelu", "norms and elementwise"),
        ("megatron_plm::bias_swiglu_backward", "norms and elementwise"),
        ("megatron_plm::bias_rotary", "norms and elementwise"),
        ("aten::native_layer_norm_backward", "norms and elementwise"),
        ("aten::_fused_rms_norm", "norms and elementwise"),
        ("aten::gelu_backward", "norms and elementwise"),
        ("aten::add_", "norms and elementwise"),
        ("triton_poi_fused_add_gelu_2", "norms and elementwise"),
        ("aten::_fused_adamw_", "optimizer"),
        ("ncclDevKernel_ReduceScatter_Sum_f32", COMMUNICATION),
        ("_c10d_functional::all_to_all_single", COMMUNICATION),
        ("aten::copy_", "copies and others"),
        ("aten::embedding_dense_backward", "copies and others"),
        ("aten::address_of_something", "copies and others"),
    ],
)
def test_ops_have_the_class_that_their_names_say(name, expected):
    (found,) = parse_trace([event(name, 0, 1)]).host
    assert op_class(found) == expected


def test_a_trace_without_steps_is_refused():
    with pytest.raises(ValueError, match="no step"):
        summarize(parse_trace([event("aten::mm", 0, 1)]))
