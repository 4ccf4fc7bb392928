"""How the processes of a run are arranged: the size of each dim of the mesh, and what doesn't fit a model.

Ranks count through the dims (pp, dp_replicate, dp_shard, cp, tp), the last one fastest: neighbours, which sit in one
machine, share what talks most.
"""

from dataclasses import dataclass

from megatron_plm.config.options import Config, ParallelOptions, TrainingOptions

DIMS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh's dims; their product is the number of processes."""

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int

    @property
    def dp(self) -> int:
        """Data-parallel processes: each group of the others computes rows of its own."""
        return self.dp_replicate * self.dp_shard

    @property
    def shards(self) -> int:
        """Processes that share out one copy of a stage's optimizer state, and of what else is sharded."""
        return self.dp_shard * self.cp

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def sizes(self) -> tuple[int, ...]:
        """In the order of DIMS."""
        return self.pp, self.dp_replicate, self.dp_shard, self.cp, self.tp

    def __str__(self) -> str:
        names = {"tp": self.tp, "cp": self.cp, "pp": self.pp, "dp": self.dp}
        told = [f"{name} {size}" for name, size in names.items() if size > 1 or name == "dp"]
        counts = {"copies": self.dp_replicate, "shards": self.dp_shard}
        kinds = " of ".join(f"{count} {name}" for name, count in counts.items() if count > 1)
        return ", ".join(told) + (f" ({kinds})" if kinds else "")

    @staticmethod
    def of(options: ParallelOptions, world_size: int) -> "Layout":
        """The layout that `options` ask for on so many processes, which `layout_problems` has found possible."""
        tp, pp, cp = (
            options.tensor_model_parallel_size,
            options.pipeline_model_parallel_size,
            options.context_parallel_size,
        )
        dp = world_size // (tp * pp * cp)
        replicate = dp if options.data_parallel_sharding == "none" else options.data_parallel_replicate_size
        return Layout(pp, replicate, dp // replicate, cp, tp)


def layout_problems(config: Config, world_size: int) -> list[str]:
    """What keeps `config`, whose options are right by themselves, from running on so many processes, in sentences."""
    model, data, training, parallel = config.model, config.data, config.training, config.parallel
    sizes = {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "data_parallel_replicate_size": parallel.data_parallel_replicate_size,
        "num_virtual_stages_per_pipeline_rank": parallel.num_virtual_stages,
    }
    wrong = [f"{_flag(name)} must be above 0, not {size}" for name, size in sizes.items() if size < 1]
    if wrong:
        return wrong
    tp, pp, cp, replicate, _ = sizes.values()
    if world_size % (tp * pp * cp):
        return [
            f"{_product(tp, pp, cp)} = {tp * pp * cp} does not divide the {world_size} "
            f"process{'es' if world_size > 1 else ''}; start a multiple of {tp * pp * cp}, or choose smaller ones"
        ]
    found = []

    def require(holds: bool, sentence: str) -> None:
        if not holds:
            found.append(sentence)

    dp = world_size // (tp * pp * cp)
    no_copies = parallel.data_parallel_sharding == "none"
    require(
        dp % replicate == 0,
        f"--data-parallel-replicate-size {replicate} does not divide the {dp} data-parallel "
        f"process{'es' if dp > 1 else ''} ({world_size} over {_product(tp, pp, cp)}); sizes that do: {_divisors(dp)}",
    )
    require(
        not no_copies or replicate == 1,
        "--data-parallel-sharding none keeps a whole copy in every data-parallel process: leave out "
        "--data-parallel-replicate-size, or choose zero2 or zero3",
    )
    for name, value in (("num_attention_heads", model.num_attention_heads), ("ffn_hidden_size", model.ffn_size)):
        require(
            value % tp == 0,
            f"--tensor-model-parallel-size {tp} does not divide {_flag(name)} {value}; sizes that do: "
            f"{_divisors(value)}",
        )
    require(
        not parallel.sequence_parallel or tp > 1,
        "--sequence-parallel shares tokens among the processes of tensor parallelism: it needs "
        "--tensor-model-parallel-size above 1",
    )
    pieces = cp * (tp if parallel.sequence_parallel else 1)
    require(
        data.seq_length % pieces == 0,
        f"--seq-length {data.seq_length} cannot be cut into {pieces} equal pieces (--context-parallel-size {cp}"
        + (f", --sequence-parallel over {tp}" if parallel.sequence_parallel else "")
        + f"); the next multiple is {-(-data.seq_length // pieces) * pieces}",
    )
    require(
        data.row_layout == "packed" or (pieces == 1 and pp == 1),
        f"--row-layout {data.row_layout} has rows of changing length, and --pipeline-model-parallel-size, "
        "--context-parallel-size and --sequence-parallel need a fixed one: use packed rows",
    )
    rows = training.micro_batch_size * dp
    fits = training.global_batch_size % rows == 0
    require(
        fits,
        f"--global-batch-size {training.global_batch_size} is not a multiple of --micro-batch-size "
        f"{training.micro_batch_size} times {dp} data-parallel process{'es' if dp > 1 else ''}; the next one up is "
        f"{-(-training.global_batch_size // rows) * rows}",
    )
    if fits:
        found += _pipeline_problems(config, num_micro_batches(training, dp), dp)
    return found


def _pipeline_problems(config: Config, micro_batches: int, dp: int) -> list[str]:
    parallel, num_layers = config.parallel, config.model.num_layers
    pp, stages = parallel.pipeline_model_parallel_size, parallel.num_stages
    schedule, virtual = parallel.pipeline_schedule, parallel.num_virtual_stages
    if pp == 1:
        asked = [
            flag
            for flag, value in (
                (f"--pipeline-schedule {schedule}", None if schedule == "1f1b" else schedule),
                ("--pipeline-layout", parallel.pipeline_layout),
                ("--num-virtual-stages-per-pipeline-rank", parallel.num_virtual_stages_per_pipeline_rank),
            )
            if value is not None
        ]
        return (
            [f"{' and '.join(asked)}: there is no pipeline; give --pipeline-model-parallel-size too"] if asked else []
        )
    found = []
    if schedule in ("1f1b", "gpipe") and virtual != 1:
        found.append(
            f"--num-virtual-stages-per-pipeline-rank {virtual}: the schedule {schedule} has one stage a process; use "
            "--pipeline-schedule interleaved"
        )
    if schedule == "zbv" and virtual != 2:
        found.append(f"--num-virtual-stages-per-pipeline-rank {virtual}: the schedule zbv has two stages a process")
    if schedule == "zbv" and parallel.data_parallel_sharding == "zero3" and dp * parallel.context_parallel_size > 1:
        # It takes gradients of weights later than those of activations, when zero3 has given the weights back.
        found.append("--pipeline-schedule zbv needs --data-parallel-sharding zero2 or none")
    if schedule == "zbv" and config.training.recompute_granularity == "selective":
        # torch's selective recomputation stands one backward pass, and this schedule makes two of each.
        found.append("--pipeline-schedule zbv needs --recompute-granularity none or full")
    if schedule == "interleaved" and virtual == 1:
        found.append("--num-virtual-stages-per-pipeline-rank 1: the schedule interleaved needs several; use 1f1b")
    if micro_batches < pp:
        found.append(
            f"--global-batch-size gives each pipeline {micro_batches} micro-batch"
            f"{'es' if micro_batches > 1 else ''}, fewer than its {pp} processes, which would stand idle; raise "
            "it, or lower --micro-batch-size or --pipeline-model-parallel-size"
        )
    elif schedule == "interleaved" and micro_batches % pp:
        found.append(
            f"--pipeline-schedule interleaved needs a number of micro-batches that {pp} divides, and "
            f"--global-batch-size gives {micro_batches}"
        )
    if parallel.pipeline_layout is not None:
        found += _pipeline_layout_problems(parallel.pipeline_layout, num_layers, stages)
    elif num_layers < stages:
        found.append(f"--num-layers {num_layers} is fewer than the {stages} stages of the pipeline")
    return found


def _pipeline_layout_problems(text: str, num_layers: int, stages: int) -> list[str]:
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        return [
            f"--pipeline-layout {text}: expected the number of blocks of each stage with commas between, as in 7,8,8,7"
        ]
    counts = [int(word) for word in words]
    if len(counts) != stages:
        return [f"--pipeline-layout {text} has {len(counts)} stages, and the pipeline {stages}"]
    if sum(counts) != num_layers:
        return [f"--pipeline-layout {text} has {sum(counts)} blocks in all, and --num-layers is {num_layers}"]
    if min(counts[1:-1], default=1) < 1:
        return [f"--pipeline-layout {text}: only the first and the last stage may be without a block"]
    return []


def stage_layers(options: ParallelOptions, num_layers: int) -> list[range]:
    """The blocks of each stage, in order.

    Evenly unless --pipeline-layout says otherwise; what doesn't divide goes to the stages in the middle, since the
    first has the embedding and the last the head.
    """
    stages = options.num_stages
    if options.pipeline_layout is not None:
        counts = [int(word) for word in options.pipeline_layout.split(",")]
    else:
        counts = [num_layers // stages] * stages
        # From the middle to both ends, the last stage last: its head is the dearest extra.
        by_load = sorted(
            range(stages), key=lambda stage: (stage == stages - 1, stage == 0, abs(2 * stage - stages + 1))
        )
        for stage in by_load[: num_layers % stages]:
            counts[stage] += 1
    ends = [sum(counts[: stage + 1]) for stage in range(stages)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def stages_of(options: ParallelOptions, pp_rank: int) -> tuple[int, ...]:
    """The stages of one process of the pipeline: every pp-th, or for zbv one on the way there and one on the way
    back."""
    pp = options.pipeline_model_parallel_size
    if pp == 1:
        return (0,)
    if options.pipeline_schedule == "zbv":
        return pp_rank, 2 * pp - 1 - pp_rank
    return tuple(range(pp_rank, options.num_stages, pp))


def num_micro_batches(training: TrainingOptions, dp: int) -> int:
    """Micro-batches that each of `dp` data-parallel processes computes in a step."""
    return training.global_batch_size // (training.micro_batch_size * dp)


def pipeline_idle(
    options: ParallelOptions, micro_batches: int, *, forward: float = 1.0, inputs: float = 1.0, weights: float = 1.0
) -> float:
    """Time that a process of the pipeline waits for the others in a step, in the unit of its three passes of one
    micro-batch: forward, and back to the gradients of inputs and of weights.

    A micro-batch's time for each other process (Narayanan et al. 2021, arXiv:2104.04473, section 2.2), with v stages a
    process a v-th of it. The V of Qi et al. 2023 (arXiv:2401.10241), section 6, fills most of that with gradients of
    weights; what is left was found by replaying the order that torch computes in, and grows where there are fewer
    micro-batches than twice the processes.
    """
    pp = options.pipeline_model_parallel_size
    if pp == 1 or options.pipeline_schedule != "zbv":
        return (pp - 1) * (forward + inputs + weights) / options.num_virtual_stages
    missing = max(0, 2 * pp - 1 - micro_batches)
    return ((pp - 1) * (forward + inputs - weights) + missing * (inputs + weights - forward)) / 2


def bubble_fraction(options: ParallelOptions, micro_batches: int) -> float:
    """Share of a step's passes in which a process of the pipeline waits, were all passes of all stages equally long.

    The planner's differs: it weighs the passes by their time, and a step has more than passes.
    """
    idle = pipeline_idle(options, micro_batches)
    return idle / (3 * micro_batches + idle)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _product(tp: int, pp: int, cp: int) -> str:
    parts = {"--tensor-model-parallel-size": tp, "--pipeline-model-parallel-size": pp, "--context-parallel-size": cp}
    return " times ".join(f"{flag} {size}" for flag, size in parts.items() if size > 1) or "1"


def _divisors(number: int) -> str:
    found = [n for n in range(1, number + 1) if number % n == 0]
    return ", ".join(map(str, found[:12])) + (", ..." if len(found) > 12 else "")
