"""How many weights each part of the model has, and who holds which share of them; from the options, without torch.

Shapes: D hidden size, F feed-forward size, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from megatron_plm.config.layout import stage_layers, stages_of
from megatron_plm.config.options import ModelOptions, ParallelOptions


@dataclass(frozen=True)
class Weight:
    """One parameter: its whole shape, and the dim that tensor parallelism cuts, if it does."""

    shape: tuple[int, ...]
    cut: int | None = None

    def numel(self, tp: int = 1) -> int:
        """Numbers that one process of tensor parallelism has."""
        return prod(self.shape) // (tp if self.cut is not None else 1)

    def shard(self, tp: int, shards: int, index: int | None = None) -> int:
        """Numbers that FSDP2 leaves to shard `index`, or makes room for in every shard where `index` is None.

        It cuts the first dim, what is left by tensor parallelism, into chunks of one size; the last ones get less, or
        nothing.
        """
        rows = self.shape[0] // (tp if self.cut == 0 else 1)
        chunk = -(-rows // shards)
        held = chunk if index is None else max(0, min(chunk, rows - index * chunk))
        return held * (self.numel(tp) // rows)


def block_weights(model: ModelOptions) -> tuple[Weight, ...]:
    """Of one Transformer block (`model.transformer.Block`): first matrices by column, second ones by row."""
    D, F = model.hidden_size, model.ffn_size
    qkv, out = (Weight((3 * D, D), 0), Weight((3 * D,), 0)), (Weight((D, D), 1), Weight((D,)))
    up, down = (Weight((F, D), 0), Weight((F,), 0)), (Weight((D, F), 1), Weight((D,)))
    return *_norm(D), *qkv, *out, *_norm(D), *up, *down


def embedding_weights(model: ModelOptions, vocab_size: int) -> tuple[Weight, ...]:
    """Of the token embedding, which every process of tensor parallelism has whole: the vocabulary is small."""
    return (Weight((vocab_size, model.hidden_size)),)


def head_weights(model: ModelOptions, vocab_size: int) -> tuple[Weight, ...]:
    """Of the final LayerNorm and the head, without its output matrix, which is the token embedding."""
    D = model.hidden_size
    return *_norm(D), Weight((D, D)), Weight((D,)), *_norm(D), Weight((vocab_size,))


def _norm(size: int) -> tuple[Weight, Weight]:
    return Weight((size,)), Weight((size,))


@dataclass(frozen=True)
class Part:
    """What one process of the pipeline has of the model: blocks of each of its stages, copies of the embedding."""

    blocks: tuple[int, ...]
    embeddings: int
    first: bool  # it has the first stage
    last: bool  # and the last, with the head

    def weights(self, model: ModelOptions, vocab_size: int) -> list[tuple[Weight, ...]]:
        """The weights as FSDP2 gathers them: unit by unit, each block, then the rest."""
        return [*[block_weights(model)] * sum(self.blocks), self.rest(model, vocab_size)]

    def rest(self, model: ModelOptions, vocab_size: int) -> tuple[Weight, ...]:
        """The weights that are in no block."""
        copies = embedding_weights(model, vocab_size) * self.embeddings
        return copies + (head_weights(model, vocab_size) if self.last else ())


@dataclass(frozen=True)
class Held:
    """Numbers that one process has of some weights.

    Attributes:
        shard: of its shard, with the room that FSDP2 leaves unused in the last ones.
        whole: of what its data-parallel group has together.
    """

    shard: int
    whole: int

    @staticmethod
    def of(weights: Iterable[Weight], tp: int, shards: int) -> "Held":
        weights = tuple(weights)
        return Held(sum(w.shard(tp, shards) for w in weights), sum(w.numel(tp) for w in weights))


@lru_cache(maxsize=1024)
def held_of_block(model: ModelOptions, tp: int, shards: int) -> Held:
    """What a process has of one block."""
    return Held.of(block_weights(model), tp, shards)


@lru_cache(maxsize=4096)
def held_of_rest(part: Part, model: ModelOptions, vocab_size: int, tp: int, shards: int) -> Held:
    """What a process with `part` has outside of blocks."""
    return Held.of(part.rest(model, vocab_size), tp, shards)


@lru_cache(maxsize=4096)
def pipeline_parts(model: ModelOptions, parallel: ParallelOptions) -> tuple[Part, ...]:
    """What each process of the pipeline has, in order.

    The last stage needs the embedding as its output matrix. It shares the first stage's only where both are one stage.
    """
    pp = parallel.pipeline_model_parallel_size
    layers = [range(model.num_layers)] if pp == 1 else stage_layers(parallel, model.num_layers)
    last_stage = len(layers) - 1
    parts = []
    for rank in range(pp):
        stages = stages_of(parallel, rank)
        parts.append(
            Part(
                blocks=tuple(len(layers[stage]) for stage in stages),
                embeddings=len({0, last_stage} & set(stages)),
                first=0 in stages,
                last=last_stage in stages,
            )
        )
    return tuple(parts)


def parameter_count(model: ModelOptions, vocab_size: int) -> int:
    """Weights of the whole model, the tied embedding once."""
    (part,) = pipeline_parts(model, ParallelOptions())
    return sum(weight.numel() for unit in part.weights(model, vocab_size) for weight in unit)
