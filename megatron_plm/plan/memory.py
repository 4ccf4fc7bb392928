"""What one GPU holds at the fullest moment of a step, in bytes; docs/parallelism.md derives and sources the formulae.

Shapes: T tokens of a micro-batch on one GPU, D hidden size, F feed-forward size, N heads, H head size, M labelled
positions of a micro-batch on one GPU, V vocabulary.
"""

import math
from dataclasses import dataclass

from megatron_plm.config.layout import Layout, num_micro_batches
from megatron_plm.config.options import Config, ParallelOptions
from megatron_plm.plan.parameters import Part, held_of_block, held_of_rest, pipeline_parts, up_size

FP32 = 4
_ADAM_STATES = 2  # first and second moment, in fp32
_LABEL_ROOM = 4 / 3  # rows have room for a third more labels than the mean (data/masking.py)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by what they are for."""

    weights: int  # this process's shard, fp32
    gradients: int  # fp32: its shard, or, between micro-batches, all that its stage has
    optimizer: int  # AdamW's moments, fp32
    gathered: int  # weights as they are computed with, collected from the shards
    activations: int  # kept by the forward for the backward pass
    pipeline: int  # what the stages send each other, and rooms to receive into
    working: int  # of one block or of the head, while it is computed

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def compute_bytes(config: Config) -> int:
    """Bytes of a number in forward and backward passes."""
    return 2 if config.training.bf16 else FP32


def tokens_per_gpu(config: Config) -> int:
    """T: tokens of one micro-batch that one GPU computes."""
    return config.training.micro_batch_size * config.data.seq_length // config.parallel.context_parallel_size


def labels_per_gpu(config: Config) -> int:
    """M: positions of one micro-batch that one GPU predicts, unused ones too."""
    share = 1.0 if config.model.objective == "clm" else min(1.0, config.data.mask_prob * _LABEL_ROOM)
    row = min(config.data.seq_length, math.ceil(config.data.seq_length * share) + 1)
    return -(-config.training.micro_batch_size * row // config.parallel.context_parallel_size)


def in_flight(parallel: ParallelOptions, pp_rank: int, micro_batches: int) -> int:
    """Forward passes, each of one stage and micro-batch, that a process holds without their backward, at most.

    As torch.distributed.pipelining orders them; Narayanan et al. 2021, section 2.2, and Qi et al. 2023, section 6.
    """
    pp, stages = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages
    if pp == 1:
        return 1
    if parallel.pipeline_schedule == "gpipe":
        return micro_batches
    if parallel.pipeline_schedule == "1f1b":
        return min(micro_batches, pp - pp_rank)
    if parallel.pipeline_schedule == "zbv":
        return min(2 * micro_batches, 2 * pp)
    return min(micro_batches * stages, (stages - 1) * pp + 2 * (pp - 1 - pp_rank) + 1)


def block_activation_bytes(config: Config, recompute: str | None = None) -> float:
    """What the backward pass of one block needs of the forward pass, in bytes a token of T.

    Without recomputation: what goes into both norms and both first matrices, 4 D whatever the norms' placement; query,
    key and value, query and key again where they are rotated (value is a view of the first three), attention's output;
    the MLP before and after GELU, or gate and value, silu of the gate, and their product. Where attention goes protein
    by protein, its outputs are there twice: apart and joined. Dropout keeps one byte for each number it looks at.
    """
    model, parallel, c = config.model, config.parallel, compute_bytes(config)
    D, F, tp, between = model.hidden_size, model.ffn_size, parallel.tensor_model_parallel_size, _between(config)
    log_sum_exp = FP32 * model.num_attention_heads / tp
    recompute = recompute or config.training.recompute_granularity
    if recompute == "full":
        return c * D / between
    if (
        recompute == "selective"
    ):  # outputs of matrix products and of attention; those by row are whole before they add up
        return c * (D / between + (4 * D + up_size(model)) / tp + 2 * D) + log_sum_exp
    in_attention = 4 + (2 if model.position_embedding_type == "rope" else 0) + (0 if _is_flash(config) else 1)
    in_mlp = 4 * F if model.activation == "swiglu" else 2 * F
    dropped = 2 * D / between if model.hidden_dropout else 0.0
    # DTensor gathers a norm's output before the matrix and keeps it whole: sequence parallelism spares only sums.
    whole = c * (2 * D / between + 2 * D + (in_attention * D + in_mlp) / tp)
    return whole + 2 * _norm_bytes(config) / between + log_sum_exp + dropped


def embedding_activation_bytes(config: Config) -> float:
    """What the embedding keeps, in bytes a token of whole rows: the norm's input, a byte where dropout looks."""
    model = config.model
    norm = compute_bytes(config) * model.hidden_size + _norm_bytes(config) if model.embedding_layernorm else 0
    return norm + (model.hidden_size if model.hidden_dropout else 0)


def final_activation_bytes(config: Config) -> float:
    """What is kept behind the last block, in bytes a token of T: the final norm's input, and its output, from which
    the labelled positions are taken."""
    norm = compute_bytes(config) * config.model.hidden_size
    return norm + ((norm + _norm_bytes(config)) / _between(config) if config.model.norm_placement == "pre" else 0)


def head_activation_bytes(config: Config) -> int:
    """What the head and the loss keep, in bytes a labelled position: what goes into each of the head's layers, without
    the log-probabilities."""
    return (4 if config.model.head_transform else 1) * config.model.hidden_size * compute_bytes(config)


def _between(config: Config) -> int:
    """Processes that share the tokens between the matrices."""
    return config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1


def _is_flash(config: Config) -> bool:
    """Whether attention is one call for all proteins: model.attention's flash attention, on a GPU."""
    return config.training.bf16 and not config.model.attention_dropout


def _norm_bytes(config: Config) -> int:
    """A norm's statistics of a token: mean and scale, or the scale alone."""
    return (2 if config.model.normalization == "LayerNorm" else 1) * FP32


def gpu_memory(config: Config, layout: Layout, part: Part, pp_rank: int, vocab_size: int) -> Memory:
    """The memory of a GPU of pipeline rank `pp_rank`, which has `part` of the model."""
    model, parallel, c = config.model, config.parallel, compute_bytes(config)
    D, tp, shards = model.hidden_size, layout.tp, layout.shards
    T, micro_batches = tokens_per_gpu(config), num_micro_batches(config.training, layout.dp)
    block, rest = held_of_block(model, tp, shards), held_of_rest(part, model, vocab_size, tp, shards)
    blocks = sum(part.blocks)
    shard, whole = blocks * block.shard + rest.shard, blocks * block.whole + rest.whole

    # The rest is gathered once and stays; of blocks, what is computed and what is gathered ahead, and their source.
    units = blocks if parallel.data_parallel_sharding != "zero3" else min(blocks, 2)
    is_sharded = layout.world_size > 1 or config.training.bf16
    gathered = c * (rest.whole + units * block.whole + block.whole) if is_sharded else 0
    # FSDP2 adds up the gradients of several micro-batches unsharded; in the last backward pass shards replace them.
    gradients = FP32 * (max(whole, shard) if micro_batches > 1 else shard)
    reducing = (c + FP32) * block.whole if is_sharded else 0

    passes, stage_blocks = in_flight(parallel, pp_rank, micro_batches), max(part.blocks)
    kept = passes * stage_blocks * T * block_activation_bytes(config)
    batches = min(passes, micro_batches)
    if model.position_embedding_type == "rope":
        kept += batches * T * 2 * model.head_dim * c  # cosines and sines, shared by the blocks
    if part.first:
        kept += batches * T * layout.cp * embedding_activation_bytes(config)
    at_once = micro_batches if parallel.pipeline_schedule == "gpipe" and layout.pp > 1 else 1
    if part.last:
        of_labels = labels_per_gpu(config) * (head_activation_bytes(config) + FP32 * vocab_size)
        kept += at_once * (T * final_activation_bytes(config) + of_labels)

    stream = T * D * c // (tp if parallel.sequence_parallel else 1)  # what one stage hands to the next
    return Memory(
        weights=FP32 * shard,
        gradients=gradients,
        optimizer=_ADAM_STATES * FP32 * shard,
        gathered=gathered,
        activations=int(kept),
        pipeline=_pipeline_bytes(parallel, pp_rank, micro_batches, passes, stream),
        working=reducing + int(T * _working_bytes(config)),
    )


def largest_memory(config: Config, layout: Layout, vocab_size: int) -> tuple[int, Memory]:
    """The pipeline rank whose GPUs hold most, and what they hold."""
    parts = pipeline_parts(config.model, config.parallel)
    held = [gpu_memory(config, layout, part, rank, vocab_size) for rank, part in enumerate(parts)]
    fullest = max(range(len(held)), key=lambda rank: held[rank].total)
    return fullest, held[fullest]


def _pipeline_bytes(parallel: ParallelOptions, pp_rank: int, micro_batches: int, passes: int, stream: int) -> int:
    """torch.distributed.pipelining makes room for the input and the output's gradient of every micro-batch of a step
    at once, and keeps each output until its backward pass."""
    if parallel.pipeline_model_parallel_size == 1:
        return 0
    from_before, to_next = _neighbours(parallel, pp_rank)
    return stream * (micro_batches * (from_before + to_next) + (passes if to_next else 0))


def _neighbours(parallel: ParallelOptions, pp_rank: int) -> tuple[int, int]:
    """How many of a process's stages have one before them and one after them on another process."""
    stages_per_rank, pp = parallel.num_virtual_stages, parallel.pipeline_model_parallel_size
    first, last = pp_rank == 0, pp_rank == pp - 1
    if parallel.pipeline_schedule == "zbv":  # the V turns inside the last process, and ends where it began
        return 2 - first - last, 2 - first - last
    return stages_per_rank - first, stages_per_rank - last


def _working_bytes(config: Config) -> float:
    """Activations that come and go, in bytes a token: of a block that is recomputed, and gradients of the widest part,
    or the three 64-bit numbers by which dropout draws one."""
    model, c, tp = config.model, compute_bytes(config), config.parallel.tensor_model_parallel_size
    again = block_activation_bytes(config, "none") - block_activation_bytes(config)
    gradients = c * (2 * up_size(model) / tp + 2 * model.hidden_size)
    drawn = 3 * 8 * model.hidden_size / _between(config) if model.hidden_dropout else 0.0
    return max(again, 0.0) + max(gradients, drawn)
