"""How long the passes of a block and of the head take on one GPU: a roofline for each kernel.

The assumptions below were not measured with this code; docs/parallelism.md tells what is not modelled.

Shapes: T tokens of a micro-batch on one GPU, D hidden size, F feed-forward size, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megatron_plm.config.options import Config, ModelOptions
from megatron_plm.plan.hardware import Gpu
from megatron_plm.plan.memory import FP32, labels_per_gpu, tokens_per_gpu
from megatron_plm.plan.parameters import up_size

# Assumptions.
ATTENTION_EFFICIENCY = 0.4  # share of the peak that attention over short sequences reaches
MEMORY_EFFICIENCY = 0.85  # share of the memory's bandwidth that elementwise kernels reach
LAUNCH = 6e-6  # seconds in which the host starts one kernel
KERNELS = (35, 70)  # kernels of a block, forward and backward
KERNELS_OF_DROPOUT = (28, 4)  # of a block in addition, to draw by row and place
KERNELS_OF_A_PROTEIN = (4, 8)  # of a block in addition, where attention goes protein by protein


@dataclass(frozen=True)
class Passes:
    """Seconds of the passes of one micro-batch: forward, gradients of the input, gradients of the weights."""

    forward: float
    inputs: float
    weights: float

    @property
    def total(self) -> float:
        return self.forward + self.inputs + self.weights

    def times(self, count: float) -> "Passes":
        return Passes(self.forward * count, self.inputs * count, self.weights * count)

    def plus(self, other: "Passes") -> "Passes":
        return Passes(self.forward + other.forward, self.inputs + other.inputs, self.weights + other.weights)


def attended_tokens(model: ModelOptions, attention_length: float) -> float:
    """Of `attention_length` tokens, those that a token attends to."""
    return attention_length / (2 if model.objective == "clm" else 1)


def _product_seconds(gpu: Gpu, bf16: bool, rows: float, inner: float, columns: float) -> float:
    """A matrix product, by its operations or by what it reads and writes, whichever takes longer."""
    c = 2 if bf16 else FP32
    computing = 2 * rows * inner * columns / (gpu.peak_flops(bf16) * gpu.matmul_efficiency)
    moving = c * (rows * inner + inner * columns + rows * columns) / (gpu.memory_bandwidth * MEMORY_EFFICIENCY)
    return max(computing, moving)


def block_passes(config: Config, gpu: Gpu, attention_length: float) -> Passes:
    """Of one block, without what it sends."""
    return _cached_block_passes(
        gpu, config.model, config.training.bf16, tokens_per_gpu(config), config.parallel.tensor_model_parallel_size,
        config.parallel.sequence_parallel, attention_length, config.training.recompute_granularity,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _cached_block_passes(
    gpu: Gpu, model: ModelOptions, bf16: bool, T: int, tp: int, sequence_parallel: bool, length: float, recompute: str
) -> Passes:
    D, F, up = model.hidden_size, model.ffn_size, up_size(model)
    c, between = (2 if bf16 else FP32), tp if sequence_parallel else 1
    products = sum(
        _product_seconds(gpu, bf16, T, inner, columns)
        for inner, columns in ((D, 3 * D / tp), (D / tp, D), (D, up / tp), (F / tp, D))
    )
    attention = 4 * T * attended_tokens(model, length) * D / tp / (gpu.peak_flops(bf16) * ATTENTION_EFFICIENCY)
    elementwise, elementwise_back = (
        T * (c * (moved.whole * D / between + (moved.inner * D + moved.wide * F) / tp) + moved.drawn * D / between)
        / (gpu.memory_bandwidth * MEMORY_EFFICIENCY)
        for moved in _traffic(model)
    )  # fmt: skip
    again = {"none": 0.0, "selective": elementwise, "full": products + attention + elementwise}[recompute]
    forward = products + attention + elementwise
    inputs = products + 2.5 * attention + elementwise_back + again  # the kernel computes the scores again
    # Where the GPU is faster than the host starts kernels, it waits.
    started, started_back = (count * LAUNCH for count in _kernels(model, bf16, T / length))
    if recompute != "none":
        started_back += started
    wait = max(1.0, started / forward, started_back / (inputs + products))
    return Passes(forward, inputs, products).times(wait)


class _Traffic(NamedTuple):
    """What elementwise kernels read and write for a token of a block.

    Numbers of the computing dtype, in multiples of D that tensor parallelism doesn't share out (`whole`), of D that it
    does (`inner`) and of F (`wide`); and bytes, in multiples of D, of integers and flags by which dropout draws
    (`drawn`).
    """

    whole: float
    inner: float
    wide: float
    drawn: float


def _traffic(model: ModelOptions) -> tuple[_Traffic, _Traffic]:
    """Forward and backward, each kernel by itself.

    Forward: norms 4, sums 6; rotation 20; GELU 2, or silu and the product 5. Backward: norms 10, sums 6, bias gradients
    2; joining the gradients of query, key and value 6, or 10 behind a rotation of 20, bias gradients 3 and one for each
    column of the first matrix; GELU 3, or silu, product and joining gate and value 13. Dropout, at two places: 4 there
    and back, and 202 bytes to draw, of which the way back reads one.
    """
    gated, biased = model.activation == "swiglu", model.add_bias_linear
    rotation, joined = (20, 10) if model.position_embedding_type == "rope" else (0, 6)
    dropped, drawn = (2 * 4, 2 * 202) if model.hidden_dropout else (0, 0)
    forward = _Traffic(10 + dropped, rotation, 5 if gated else 2, drawn)
    first_bias = up_size(model) / model.ffn_size if biased else 0
    backward = _Traffic(
        16 + (2 if biased else 0) + dropped,
        rotation + joined + (3 if biased else 0),
        (13 if gated else 3) + first_bias,
        2 if model.hidden_dropout else 0,
    )
    return forward, backward


def _kernels(model: ModelOptions, bf16: bool, proteins: float) -> Iterable[float]:
    """Kernels of a block that the host starts, forward and backward."""
    one_by_one = proteins if not bf16 or model.attention_dropout else 0.0
    for plain, dropout, protein in zip(KERNELS, KERNELS_OF_DROPOUT, KERNELS_OF_A_PROTEIN, strict=True):
        yield plain + (dropout if model.hidden_dropout else 0) + protein * one_by_one


def head_passes(config: Config, gpu: Gpu, vocab_size: int) -> Passes:
    """Of the head, at labelled positions."""
    D, labels = config.model.hidden_size, labels_per_gpu(config)
    sizes = (D, vocab_size) if config.model.head_transform else (vocab_size,)
    products = sum(_product_seconds(gpu, config.training.bf16, labels, D, n) for n in sizes)
    return Passes(products, products, products)
