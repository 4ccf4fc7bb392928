"""The tensor transforms of the key maps, each with its inverse.

Shapes: N heads, H head size, D hidden size, F feed-forward size, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_plm.convert.keymap import IDENTITY, Transform


def chain(first: Transform, second: Transform) -> Transform:
    """`first`, then `second`."""
    return Transform(
        forward=lambda tensors: second.forward(first.forward(tensors)),
        backward=lambda tensors: first.backward(second.backward(tensors)),
    )


def split_qkv(num_heads: int) -> Transform:
    """One tensor with rows [head, (query, key, value), head size] ↔ query, key and value with rows [head, head size].

    Weights [N·3·H, D] ↔ 3 × [N·H, D]; biases [N·3·H] ↔ 3 × [N·H].
    """

    def split(tensors: list[Tensor]) -> list[Tensor]:
        (qkv,) = tensors
        rows = qkv.unflatten(0, (num_heads, 3, -1))
        return [part.flatten(0, 1).contiguous() for part in rows.unbind(1)]

    def merge(tensors: list[Tensor]) -> list[Tensor]:
        heads = [part.unflatten(0, (num_heads, -1)) for part in tensors]
        return [torch.stack(heads, dim=1).flatten(0, 2)]

    return Transform(forward=split, backward=merge)


def neighbour_pairs(num_heads: int) -> Transform:
    """Query, key and value for rotary positions that turn the pairs (i, i + H/2) of a head ↔ the pairs (2i, 2i + 1).

    Weights 3 × [N·H, D]; the rows of the value, which is not turned, stay.
    """

    def move(tensors: list[Tensor], shape: tuple[int, int]) -> list[Tensor]:
        query, key, value = tensors
        halves = (part.unflatten(0, (num_heads, *shape)) for part in (query, key))
        return [*(part.transpose(1, 2).flatten(0, 2).contiguous() for part in halves), value]

    return Transform(forward=lambda tensors: move(tensors, (2, -1)), backward=lambda tensors: move(tensors, (-1, 2)))


def gate_rows() -> Transform:
    """The map into a SwiGLU with rows [feature, (gate, value)] ↔ [(gate, value), feature]: [2·F, D]."""

    def move(tensors: list[Tensor], shape: tuple[int, int]) -> list[Tensor]:
        (rows,) = tensors
        return [rows.unflatten(0, shape).transpose(0, 1).flatten(0, 1).contiguous()]

    return Transform(forward=lambda tensors: move(tensors, (-1, 2)), backward=lambda tensors: move(tensors, (2, -1)))


def repeat(count: int) -> Transform:
    """One tensor ↔ `count` equal ones; reading raises ValueError if those that are present differ in any value."""

    def spread(tensors: list[Tensor]) -> list[Tensor]:
        (tensor,) = tensors
        return [tensor.clone() for _ in range(count)]  # safetensors stores no memory twice

    def collapse(tensors: list[Tensor]) -> list[Tensor]:
        if not tensors[0].is_meta and not all(same_values(tensors[0], other) for other in tensors[1:]):
            raise ValueError("they must be equal, since the model here has one tensor for them, but they differ")
        return tensors[:1]

    return Transform(forward=spread, backward=collapse)


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape are equal, NaN where the other has NaN."""
    return one is other or torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def vocabulary_rows(ours: Sequence[str], theirs: Sequence[str]) -> Transform:
    """Rows by token of our vocabulary ↔ rows by token of theirs: [V, D] or [V].

    Raises ValueError when a direction is run for which a token has no row to come from.
    """

    return Transform(forward=_select_rows(ours, theirs), backward=_select_rows(theirs, ours))


def _select_rows(sources: Sequence[str], targets: Sequence[str]) -> Callable[[list[Tensor]], list[Tensor]]:
    row = {token: i for i, token in enumerate(sources)}
    lacking = [token for token in targets if token not in row]

    def select(tensors: list[Tensor]) -> list[Tensor]:
        if lacking:
            raise ValueError(f"the vocabulary has no row for {', '.join(lacking)}")
        (tensor,) = tensors
        return [tensor[torch.tensor([row[token] for token in targets], device=tensor.device)]]

    return select


def with_token_types(num_types: int) -> Transform:
    """Position vectors [P, D] ↔ those and token-type vectors [num_types, D], written as zeros.

    Every token here is of type 0, whose vector is added to each position's.
    """

    def merge(tensors: list[Tensor]) -> list[Tensor]:
        positions, types = tensors
        if types.is_meta or not types[0].any():
            return [positions]
        return [positions + types[0]]

    def split(tensors: list[Tensor]) -> list[Tensor]:
        (positions,) = tensors
        return [positions, positions.new_zeros(num_types, positions.shape[1])]

    return Transform(forward=split, backward=merge)


def qkv_rows(version: float, tensor_parallel_size: int, num_heads: int) -> Transform:
    """Rows [head, (query, key, value), head size] ↔ those of Megatron-LM's checkpoint `version`, the ranks' in turn.

    Within a rank: version 0 [(query, key, value), head, head size], 1 [head, head size, (query, key, value)], from 2 on
    as here. Weights [N·3·H, D], biases [N·3·H].
    """
    ranks, heads = tensor_parallel_size, num_heads // tensor_parallel_size

    def permuted(ours: tuple[int, ...], order: tuple[int, ...]) -> Transform:
        """Rows as the axes `ours` say ↔ rows with these axes in another order, which is its own inverse."""
        theirs = tuple(ours[axis] for axis in order)

        def move(tensors: list[Tensor], shape: tuple[int, ...]) -> list[Tensor]:
            (rows,) = tensors
            parts = rows.unflatten(0, shape)
            rest = range(len(shape), parts.dim())
            return [parts.permute(*order, *rest).flatten(0, len(shape) - 1)]

        return Transform(forward=lambda tensors: move(tensors, ours), backward=lambda tensors: move(tensors, theirs))

    if version >= 2:
        return IDENTITY
    if version == 1:
        return permuted((num_heads, 3, -1), (0, 2, 1))
    return permuted((ranks, heads, 3, -1), (0, 2, 1, 3))


def padded_rows(num_rows: int, padded: int) -> Transform:
    """A tensor of `num_rows` rows ↔ one of `padded` rows, whose last ones mean nothing and are written as zeros."""

    def pad(tensors: list[Tensor]) -> list[Tensor]:
        (tensor,) = tensors
        return [torch.cat([tensor, tensor.new_zeros(padded - num_rows, *tensor.shape[1:])])]

    return Transform(forward=pad, backward=lambda tensors: [tensors[0][:num_rows]])
