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
    maps = []
    for columns, rows, inner in ((3 * D, D, D), (up_size(model), D, F)):
        first, second = (Weight((columns, D), 0), Weight((columns,), 0)), (Weight((rows, inner), 1), Weight((rows,)))
        maps.append((*first, *second) if model.add_bias_linear else (first[0], second[0]))
    return *_norm(model), *maps[0], *_norm(model), *maps[1]


def up_size(model: ModelOptions) -> int:
    """Output features of the first matrix of the MLP: with SwiGLU a gate and a value for each of F."""
    return (2 if model.activation == "swiglu" else 1) * model.ffn_size


def embedding_weights(model: ModelOptions, vocab_size: int) -> tuple[Weight, ...]:
    """Of what goes into the first block, which every process of tensor parallelism has whole: the vocabulary is small.
    The token embedding comes first."""
    D = model.hidden_size
    positions = () if model.max_position_embeddings is None else (Weight((model.max_position_embeddings, D)),)
    return Weight((vocab_size, D)), *positions, *(_norm(model) if model.embedding_layernorm else ())


def head_weights(model: ModelOptions, vocab_size: int) -> tuple[Weight, ...]:
    """Of the final norm and the head, without an output matrix that is the token embedding."""
    D = model.hidden_size
    final = _norm(model) if model.norm_placement == "pre" else ()
    transform = (Weight((D, D)), Weight((D,)), *_norm(model)) if model.head_transform else ()
    own = (Weight((vocab_size, D)),) if model.untie_embeddings_and_output_weights else ()
    return *final, *transform, *own, Weight((vocab_size,))


def _norm(model: ModelOptions) -> tuple[Weight, ...]:
    size = (model.hidden_size,)
    return (Weight(size), Weight(size)) if model.normalization == "LayerNorm" else (Weight(size),)


@dataclass(frozen=True)
class Part:
    """What one process of the pipeline has of the model: blocks of each of its stages, embedding and head."""

    blocks: tuple[int, ...]
    copies: int  # of the token embedding, which is the output matrix of a last stage that isn't the first too
    first: bool  # it has the first stage
    last: bool  # and the last, with the head

    def weights(self, model: ModelOptions, vocab_size: int) -> list[tuple[Weight, ...]]:
        """The weights as FSDP2 gathers them: unit by unit, each block, then the rest."""
        return [*[block_weights(model)] * sum(self.blocks), self.rest(model, vocab_size)]

    def rest(self, model: ModelOptions, vocab_size: int) -> tuple[Weight, ...]:
        """The weights that are in no block."""
        embedding = embedding_weights(model, vocab_size)
        return (
            *(embedding if self.first else ()),
            *(embedding[:1] * self.copies),
            *(head_weights(model, vocab_size) if self.last else ()),
        )


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

    The last stage of a tied model needs the token embedding as its output matrix. It shares the first stage's only
    where both are one stage.
    """
    pp = parallel.pipeline_model_parallel_size
    layers = [range(model.num_layers)] if pp == 1 else stage_layers(parallel, model.num_layers)
    last_stage, tied = len(layers) - 1, not model.untie_embeddings_and_output_weights
    parts = []
    for rank in range(pp):
        stages = stages_of(parallel, rank)
        parts.append(
            Part(
                blocks=tuple(len(layers[stage]) for stage in stages),
                copies=int(last_stage in stages and last_stage != 0 and tied),
                first=0 in stages,
                last=last_stage in stages,
            )
        )
    return tuple(parts)


def parameter_count(model: ModelOptions, vocab_size: int) -> int:
    """Weights of the whole model, the tied embedding once."""
    (part,) = pipeline_parts(model, ParallelOptions())
    return sum(weight.numel() for unit in part.weights(model, vocab_size) for weight in unit)
