"""Plans as text and as JSON."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from megatron_plm.config.layout import num_micro_batches
from megatron_plm.config.options import Config, option_fields
from megatron_plm.plan.hardware import RESERVED
from megatron_plm.plan.parameters import parameter_count
from megatron_plm.plan.search import RECOMPUTE, Plan, Request

_GB = 1e9
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")

# The options that a plan chooses.
PLANNED = (
    "tensor_model_parallel_size",
    "sequence_parallel",
    "pipeline_model_parallel_size",
    "pipeline_schedule",
    "num_virtual_stages_per_pipeline_rank",
    "pipeline_layout",
    "context_parallel_size",
    "data_parallel_sharding",
    "data_parallel_replicate_size",
    "micro_batch_size",
    "recompute_granularity",
)
# Those that are told in any case, and all that are told.
_ALWAYS = ("micro_batch_size", "global_batch_size", "seq_length", "bf16")
SHOWN = (*PLANNED, *_ALWAYS[1:])


def flags(request: Request, config: Config) -> list[str]:
    """What to type after launch/pretrain.sh for `config`: what was typed, what was chosen, and the sizes."""
    words = list(request.shape_flags)
    for name in SHOWN:
        entry = option_fields()[name]
        value = getattr(getattr(config, entry.group), name)
        if name not in _ALWAYS and value == getattr(getattr(request.unplanned, entry.group), name):
            continue
        if entry.type is bool:
            words.append(entry.flag if value else f"--no-{entry.flag[2:]}")
        else:
            words += [entry.flag, str(value)]
    return words


def as_json(request: Request, plans: list[Plan]) -> dict[str, Any]:
    """Everything that is known of the plans; sizes in bytes, times in seconds."""
    return {
        "parameters": parameter_count(request.config.model, request.vocab_size),
        "num_gpus": request.num_gpus,
        "gpus_per_node": request.gpus_per_node,
        "gpu": asdict(request.gpu),
        "usable_memory": request.gpu.memory - RESERVED,
        "attention_length": request.attention_length,
        "plans": [
            {
                "layout": asdict(plan.layout),
                "flags": flags(request, plan.config),
                "micro_batches": num_micro_batches(plan.config.training, plan.layout.dp),
                "memory": {**asdict(plan.memory), "total": plan.memory.total, "pipeline_rank": plan.fullest},
                "activations": plan.activations,
                "speed": asdict(plan.speed),
            }
            for plan in plans
        ],
    }


def as_text(request: Request, plans: list[Plan]) -> Iterator[str]:
    """A table, and for each row its memory, what it sends and what to type."""
    training, row_tokens = request.config.training, request.config.data.seq_length
    parameters = parameter_count(request.config.model, request.vocab_size)
    usable = request.gpu.memory - RESERVED
    yield (
        f"{parameters / 1e6:,.1f} million parameters on {request.num_gpus} x {request.gpu_name}, "
        f"{request.gpus_per_node} a machine, {usable / _GB:.0f} GB usable on each"
    )
    number_format = "bf16" if training.bf16 else "fp32"
    yield f"{training.global_batch_size:,} rows of {row_tokens:,} tokens a step, {number_format}; figures are estimates"
    yield ""
    rows = [_HEADER, *[_row(rank, plan) for rank, plan in enumerate(plans, 1)]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    for rank, plan in enumerate(plans, 1):
        memory = plan.memory
        others = memory.gathered + memory.pipeline + memory.working
        kept = ", ".join(f"{_gb(plan.activations[recompute])} {recompute}" for recompute in RECOMPUTE)
        sent = ", ".join(f"{dim} {_size(value)}" for dim, value in plan.speed.sent.items() if value) or "nothing"
        yield ""
        yield (
            f"{rank}: weights {_gb(memory.weights)}, gradients {_gb(memory.gradients)}, optimizer "
            f"{_gb(memory.optimizer)}, activations {_gb(memory.activations)}, others {_gb(others)} GB"
        )
        yield f"   activations by recomputation: {kept} GB; sent a step by each GPU: {sent}"
        yield f"   launch/pretrain.sh {' '.join(flags(request, plan.config))}"


_HEADER = (
    "#", "tp", "pp", "cp", "dp", "schedule", "sharding", "rows", "recompute", "memory", "bubble", "step", "tokens/s",
    "MFU",
)  # fmt: skip


def _row(rank: int, plan: Plan) -> tuple[str, ...]:
    layout, parallel, training = plan.layout, plan.config.parallel, plan.config.training
    sharding = parallel.data_parallel_sharding if layout.dp * layout.cp > 1 else "-"
    if layout.dp_replicate > 1 and sharding != "none":
        sharding += f" x{layout.dp_replicate}"
    return (
        str(rank),
        f"{layout.tp}{'s' if parallel.sequence_parallel else ''}",
        str(layout.pp),
        str(layout.cp),
        str(layout.dp),
        parallel.pipeline_schedule if layout.pp > 1 else "-",
        sharding,
        str(training.micro_batch_size),
        training.recompute_granularity,
        f"{_gb(plan.memory.total)} GB",
        f"{plan.speed.bubble:.1%}",
        _seconds(plan.speed.step_seconds),
        f"{plan.speed.tokens_per_second:,.0f}",
        f"{plan.speed.mfu:.0%}",
    )


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 0.1 else f"{1e3 * value:.3g} ms"


def _gb(value: float) -> str:
    return f"{value / _GB:.1f}"


def _size(value: float) -> str:
    power = 0
    while value >= 1000 and power < len(_UNITS) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {_UNITS[power]}"
