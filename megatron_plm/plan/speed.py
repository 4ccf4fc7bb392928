"""How long a step takes, estimated: the passes of all blocks, what the links carry, the pipeline's idle time.

The assumptions below were not measured with this code; docs/parallelism.md tells what is not modelled, and how near
public figures the estimate comes.

Shapes: T tokens of a micro-batch on one GPU, D hidden size, F feed-forward size, V vocabulary.
"""

from dataclasses import dataclass

from megatron_plm.config.layout import DIMS, Layout, num_micro_batches, pipeline_idle
from megatron_plm.config.options import Config
from megatron_plm.plan.hardware import Gpu
from megatron_plm.plan.memory import FP32, compute_bytes, tokens_per_gpu
from megatron_plm.plan.parameters import Part, held_of_block, held_of_rest, pipeline_parts, up_size
from megatron_plm.plan.passes import MEMORY_EFFICIENCY, Passes, attended_tokens, block_passes, head_passes

# Assumptions.
LINK_EFFICIENCY = 0.75  # share of a link's bandwidth that collectives reach
LATENCY = 20e-6  # seconds of a collective that carries nothing
OVERLAP = 0.7  # share of the computing time behind which gathering and reducing hides
OPTIMIZER_BYTES = 40  # read and written for a weight: weight and two moments both ways, gradient twice and back


@dataclass(frozen=True)
class Speed:
    """One step, estimated.

    Attributes:
        bubble: idle time of the pipeline as a share of the step.
        sent: bytes that one GPU sends in a step, by dim of parallelism (tp, cp, pp, dp).
        mfu: floating-point operations that the model needs, over those that the GPUs could do in the time.
    """

    step_seconds: float
    bubble: float
    sent: dict[str, float]
    mfu: float
    tokens_per_second: float


def model_flops(config: Config, vocab_size: int, attention_length: float) -> float:
    """Operations that the model needs for one step of full rows: what is recomputed doesn't count."""
    tokens = config.training.global_batch_size * config.data.seq_length
    return tokens * token_flops(config, vocab_size, attention_length)


def token_flops(config: Config, vocab_size: int, attention_length: float) -> float:
    """Operations that the model needs to learn from one token: forward pass and both gradients.

    Twice the multiplications of each matrix, three times for forward pass and both gradients, and attention over
    `attention_length` tokens (Narayanan et al. 2021, appendix); the head at labelled positions only.
    """
    model = config.model
    D, F = model.hidden_size, model.ffn_size
    block = 6 * (4 * D * D + D * (up_size(model) + F)) + 12 * D * attended_tokens(config.model, attention_length)
    labels = 1.0 if model.objective == "clm" else config.data.mask_prob
    head = 6 * D * ((D if model.head_transform else 0) + vocab_size)
    return model.num_layers * block + labels * head


def estimate_speed(
    config: Config, layout: Layout, gpu: Gpu, gpus_per_node: int, vocab_size: int, attention_length: float
) -> Speed:
    """The estimated speed of `config` in `layout` on machines of `gpus_per_node` GPUs.

    `attention_length` is how many tokens a token attends to, on average.
    """
    parallel, c, micro_batches = config.parallel, compute_bytes(config), num_micro_batches(config.training, layout.dp)
    links = _Links(layout, gpu, gpus_per_node)
    block = block_passes(config, gpu, attention_length)
    exchange, block_sent = _block_exchange(config, links)
    parts = pipeline_parts(config.model, parallel)
    head = head_passes(config, gpu, vocab_size)
    # A forward pass exchanges as much as a backward pass; who recomputes all exchanges again.
    again = 2 if config.training.recompute_granularity == "full" else 1
    block = block.plus(Passes(exchange, exchange * again, 0.0))

    def slot(part: Part) -> Passes:
        own = block.times(sum(part.blocks))
        return own.plus(head) if part.last else own

    slowest = max((slot(part) for part in parts), key=lambda passes: passes.total)
    fullest = max(parts, key=lambda part: sum(part.blocks))
    blocks = sum(fullest.blocks)

    stream = tokens_per_gpu(config) * config.model.hidden_size * c / (layout.tp if parallel.sequence_parallel else 1)
    handed = 2 * parallel.num_virtual_stages * stream if layout.pp > 1 else 0.0
    hand_over = handed / links.bandwidth("pp") + (2 * LATENCY * parallel.num_virtual_stages if layout.pp > 1 else 0.0)
    idle = pipeline_idle(
        parallel, micro_batches, forward=slowest.forward, inputs=slowest.inputs, weights=slowest.weights
    )
    data_parallel = _data_parallel(config, layout, links, fullest, vocab_size, slowest, micro_batches)

    busy = micro_batches * (slowest.total + hand_over)
    optimizer = OPTIMIZER_BYTES * data_parallel.shard / (gpu.memory_bandwidth * MEMORY_EFFICIENCY)
    step = busy + idle + data_parallel.exposed + optimizer
    peak = layout.world_size * gpu.peak_flops(config.training.bf16)
    sent = {dim: micro_batches * blocks * (1 + again) * value for dim, value in block_sent.items()}
    return Speed(
        step_seconds=step,
        bubble=idle / step,
        sent={**sent, "pp": micro_batches * handed, "dp": data_parallel.sent},
        mfu=model_flops(config, vocab_size, attention_length) / (step * peak),
        tokens_per_second=config.training.global_batch_size * config.data.seq_length / step,
    )


class _Links:
    """Bandwidth of the groups of a layout, whose ranks count through the dims, the last one fastest."""

    def __init__(self, layout: Layout, gpu: Gpu, gpus_per_node: int) -> None:
        self.layout, self.gpu, self.gpus_per_node = layout, gpu, gpus_per_node

    def bandwidth(self, first: str, last: str | None = None) -> float:
        """Bytes a second that a GPU sends in collectives over the dims from `first` to `last`.

        Across machines all members of the group in one machine send, each through its own share of the network, so
        that a ring of collectives is as fast as these together.
        """
        begin, end = DIMS.index(first), DIMS.index(last or first)
        stride, size = 1, 1
        for dim in DIMS[end + 1 :]:
            stride *= getattr(self.layout, dim)
        for dim in DIMS[begin : end + 1]:
            size *= getattr(self.layout, dim)
        if stride * size <= self.gpus_per_node:
            return self.gpu.link * LINK_EFFICIENCY
        members = max(1, self.gpus_per_node // stride)
        return min(self.gpu.link, members * self.gpu.network) * LINK_EFFICIENCY


def _block_exchange(config: Config, links: _Links) -> tuple[float, dict[str, float]]:
    """Seconds that the collectives inside a block take in one pass, and the bytes that a GPU sends.

    Tensor parallelism: two sums of the residual stream, or as much gathered and scattered (Korthikanti et al. 2022,
    section 4.2.2). Context parallelism: query, key, value and the output change from tokens to heads and back (Jacobs
    et al. 2023, section 3.2). Nothing is computed meanwhile.
    """
    parallel, stream = config.parallel, tokens_per_gpu(config) * config.model.hidden_size * compute_bytes(config)
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    sent = {"tp": 2 * 2 * stream * (tp - 1) / tp, "cp": 4 * stream / tp * (cp - 1) / cp}
    seconds = sum(sent[dim] / links.bandwidth(dim) for dim in sent)
    return seconds + (2 * LATENCY if tp > 1 else 0.0) + (4 * LATENCY if cp > 1 else 0.0), sent


@dataclass(frozen=True)
class _DataParallel:
    shard: int  # weights that this process updates
    sent: float
    exposed: float  # seconds that nothing hides


def _data_parallel(
    config: Config,
    layout: Layout,
    links: _Links,
    part: Part,
    vocab_size: int,
    slot: Passes,
    micro_batches: int,
) -> _DataParallel:
    """Gathering of weights and reducing of gradients (Rajbhandari et al. 2020, section 7): of weights once a step, with
    zero3 twice a micro-batch; of gradients once a step, in fp32."""
    shards = layout.shards
    block = held_of_block(config.model, layout.tp, shards)
    rest = held_of_rest(part, config.model, vocab_size, layout.tp, shards)
    blocks = sum(part.blocks)
    shard, whole = blocks * block.shard + rest.shard, blocks * block.whole + rest.whole
    others = (shards - 1) / shards
    gathered = whole * compute_bytes(config) * others
    reduced = whole * FP32 * others
    copied = 2 * FP32 * shard * (layout.dp_replicate - 1) / layout.dp_replicate

    bandwidth, latency = links.bandwidth("dp_shard", "cp"), LATENCY * (blocks + 1) * (shards > 1)
    gathering, reducing = gathered / bandwidth + latency, reduced / bandwidth + latency
    copying = copied / links.bandwidth("dp_replicate") + LATENCY * (blocks + 1) * (layout.dp_replicate > 1)
    back = slot.inputs + slot.weights
    if config.parallel.data_parallel_sharding == "zero3":
        times, gatherings = (slot.forward, back), 2 * micro_batches
        hidden = sum(max(0.0, gathering - OVERLAP * seconds) for seconds in times) * micro_batches
    else:
        gatherings, hidden = 1, max(0.0, gathering - OVERLAP * slot.forward)
    exposed = hidden + max(0.0, reducing + copying - OVERLAP * back)
    return _DataParallel(shard, gatherings * gathered + reduced + copied, exposed)
