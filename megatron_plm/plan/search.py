"""Which layouts of a number of GPUs fit a model, fastest first."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_plm.config.layout import Layout, layout_problems
from megatron_plm.config.options import Config
from megatron_plm.config.problems import problems
from megatron_plm.errors import UserError
from megatron_plm.plan.hardware import RESERVED, Gpu
from megatron_plm.plan.memory import Memory, largest_memory
from megatron_plm.plan.speed import Speed, estimate_speed

RECOMPUTE = ("none", "selective", "full")  # from fastest to smallest
_LARGEST_COUNT = 65536  # GPUs; no search for a number that would do goes further
_LARGEST_MICRO_BATCH = 256
_CONTEXT_SIZES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Request:
    """What is planned for.

    Attributes:
        config: the run; of its options on parallelism, micro-batch and recomputation, only those in `fixed` count.
        fixed: names of the options that must stay as they are in `config`.
        attention_length: tokens that a token attends to, on average.
        shape_flags: what was typed for training and is not planned.
        unplanned: what these flags alone give.
    """

    config: Config
    fixed: frozenset[str]
    gpu_name: str
    gpu: Gpu
    num_gpus: int
    gpus_per_node: int
    vocab_size: int
    attention_length: float
    shape_flags: tuple[str, ...]
    unplanned: Config


@dataclass(frozen=True)
class Plan:
    """One way to run, with what it is estimated to need."""

    config: Config
    layout: Layout
    memory: Memory  # of the GPU that holds most
    fullest: int  # its pipeline rank
    activations: dict[str, int]  # bytes of its activations, by --recompute-granularity
    speed: Speed


def fits(memory: Memory, gpu: Gpu) -> bool:
    """Whether a GPU has room for it, beside what it needs for itself."""
    return memory.total <= gpu.memory - RESERVED


def ranked_plans(request: Request) -> list[Plan]:
    """The best way to run for each (tp, pp, cp) that fits, fastest first; raises UserError where nothing fits."""
    best: dict[tuple[int, ...], tuple[float, Config, Speed]] = {}
    possible = False
    for candidates in _by_recomputation(request, request.num_gpus):
        for config, layout in candidates:
            possible = True
            if not fits(largest_memory(config, layout, request.vocab_size)[1], request.gpu):
                continue
            speed = _speed(request, config, layout)
            key = (layout.tp, layout.pp, layout.cp)
            if key not in best or speed.step_seconds < best[key][0]:
                best[key] = (speed.step_seconds, config, speed)
            break  # who recomputes more is slower
    if not best:
        raise _nothing_fits(request) if possible else _impossible(request)
    # Of two that are as fast to three digits, the simpler one.
    order = sorted(best.items(), key=lambda item: (float(f"{item[1][0]:.2e}"), item[0]))
    return [_plan(request, config, speed) for _, (_, config, speed) in order]


def _plan(request: Request, config: Config, speed: Speed) -> Plan:
    layout = Layout.of(config.parallel, request.num_gpus)
    fullest, memory = largest_memory(config, layout, request.vocab_size)
    activations = {}
    for recompute in RECOMPUTE:
        other = replace(config, training=replace(config.training, recompute_granularity=recompute))
        activations[recompute] = largest_memory(other, layout, request.vocab_size)[1].activations
    return Plan(config, layout, memory, fullest, activations, speed)


def _speed(request: Request, config: Config, layout: Layout) -> Speed:
    return estimate_speed(
        config, layout, request.gpu, request.gpus_per_node, request.vocab_size, request.attention_length
    )


def _by_recomputation(
    request: Request, num_gpus: int, *, smallest: bool = False
) -> Iterator[Iterator[tuple[Config, Layout]]]:
    """Every way to run that the options allow, those that differ in recomputation only together.

    With `smallest`, only one row in a micro-batch, and the recomputation that needs least.
    """
    base, fixed = request.config, request.fixed
    granularities = RECOMPUTE[-1:] if smallest else RECOMPUTE
    if "recompute_granularity" in fixed:
        granularities = (base.training.recompute_granularity,)
    for parallel in _parallel_options(request, num_gpus):
        dp = num_gpus // (
            parallel["tensor_model_parallel_size"]
            * parallel["pipeline_model_parallel_size"]
            * parallel["context_parallel_size"]
        )
        micro_batches: tuple[int, ...] = _micro_batch_sizes(base.training.global_batch_size // max(1, dp))
        if "micro_batch_size" in fixed:
            micro_batches = (base.training.micro_batch_size,)
        elif smallest:
            micro_batches = (1,)
        for rows in micro_batches:
            config = replace(
                base,
                parallel=replace(base.parallel, **parallel),
                training=replace(base.training, micro_batch_size=rows),
            )
            if not _possible(config, num_gpus):
                continue
            layout = Layout.of(config.parallel, num_gpus)
            yield (
                (replace(config, training=replace(config.training, recompute_granularity=name)), layout)
                for name in granularities
            )


def _possible(config: Config, num_gpus: int) -> bool:
    # For its sentences layout_problems lists the divisors of the feed-forward size, asked or not: thousands of times
    # that takes long, and a small number with the same remainder gets the same answer.
    tp = config.parallel.tensor_model_parallel_size
    same = replace(config.model, ffn_hidden_size=config.model.ffn_size % tp or tp)
    return not layout_problems(replace(config, model=same), num_gpus)


def _parallel_options(request: Request, num_gpus: int) -> Iterator[dict[str, Any]]:
    parallel, model = request.config.parallel, request.config.model

    def choices(name: str, found: list[Any]) -> list[Any]:
        return [getattr(parallel, name)] if name in request.fixed else found

    # Tensor parallelism across machines is slower than anything else; who wants it types it.
    tensor = [n for n in _divisors(num_gpus) if n <= request.gpus_per_node]
    for tp in choices("tensor_model_parallel_size", tensor):
        for pp in choices(
            "pipeline_model_parallel_size", [n for n in _divisors(num_gpus) if n <= min(model.num_layers, num_gpus)]
        ):
            for cp in choices("context_parallel_size", [n for n in _CONTEXT_SIZES if num_gpus % n == 0]):
                if min(tp, pp, cp) < 1 or num_gpus % (tp * pp * cp):
                    continue
                dp = num_gpus // (tp * pp * cp)
                even = request.config.data.seq_length % (tp * cp) == 0
                schedules = choices("pipeline_schedule", ["1f1b", "interleaved", "zbv"] if pp > 1 else ["1f1b"])
                for sharding, replicas in _shardings(request, dp, tp * cp):
                    for sequence in choices("sequence_parallel", [tp > 1 and even]):
                        for schedule in schedules:
                            yield {
                                "tensor_model_parallel_size": tp,
                                "pipeline_model_parallel_size": pp,
                                "context_parallel_size": cp,
                                "sequence_parallel": sequence,
                                "pipeline_schedule": schedule,
                                "data_parallel_sharding": sharding,
                                "data_parallel_replicate_size": replicas,
                            }


def _shardings(request: Request, dp: int, neighbours: int) -> Iterator[tuple[str, int]]:
    """Kinds of data parallelism: one copy of the model over all, or one a machine (HSDP)."""
    parallel, fixed = request.config.parallel, request.fixed
    kinds = ["none", "zero2", "zero3"] if dp > 1 else ["zero3"]
    if "data_parallel_sharding" in fixed:
        kinds = [parallel.data_parallel_sharding]
    for kind in kinds:
        replicas = {1}
        in_machine = request.gpus_per_node // neighbours
        if kind != "none" and 1 < in_machine < dp and dp % in_machine == 0:
            replicas.add(dp // in_machine)
        if "data_parallel_replicate_size" in fixed:
            replicas = {parallel.data_parallel_replicate_size}
        for count in sorted(replicas):
            yield kind, count


def _micro_batch_sizes(rows: int) -> tuple[int, ...]:
    """Powers of two up to what one data-parallel process computes in a step."""
    return tuple(1 << n for n in range(_LARGEST_MICRO_BATCH.bit_length()) if 1 << n <= rows)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _impossible(request: Request) -> UserError:
    """What is wrong with the simplest layout that the typed options allow."""
    if found := problems(request.config, world_size=request.num_gpus):
        return UserError(found[0])
    return UserError(f"--num-gpus {request.num_gpus}: no layout is possible; leave out some flags of parallelism")


def _nothing_fits(request: Request) -> UserError:
    """What would do: recomputation or a micro-batch that was typed, or more GPUs."""
    name = f"--num-gpus {request.num_gpus}"
    for free, told in (
        ("recompute_granularity", "--recompute-granularity full"),
        ("micro_batch_size", "--micro-batch-size 1"),
    ):
        other = replace(request, fixed=request.fixed - {free})
        if free in request.fixed and _fits_somehow(other, request.num_gpus):
            return UserError(f"{name}: nothing fits into their memory; with {told} the model would")
    if (count := _smallest_count(request)) is None:
        return UserError(f"{name}: nothing fits into their memory, nor would more GPUs help; choose a smaller model")
    return UserError(f"{name}: nothing fits into their memory, even recomputed; {count} GPUs would do")


def _fits_somehow(request: Request, num_gpus: int) -> bool:
    return any(
        fits(largest_memory(config, layout, request.vocab_size)[1], request.gpu)
        for candidates in _by_recomputation(request, num_gpus, smallest=True)
        for config, layout in candidates
    )


def _smallest_count(request: Request) -> int | None:
    """The smallest number of whole machines, or of GPUs in one, that would do, with the global batch as it is."""
    node = request.gpus_per_node
    counts = [n for n in range(request.num_gpus + 1, node) if node % n == 0]
    multiple = request.num_gpus // node + 1
    while multiple * node <= _LARGEST_COUNT:
        counts.append(multiple * node)
        multiple += 1 if multiple < 16 else multiple // 8
    return next((n for n in counts if _fits_somehow(request, n)), None)
