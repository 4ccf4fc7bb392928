"""The tensor transforms of the key maps, each with its inverse.

Shapes: N heads, H head size, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_plm.convert.keymap import Transform
from megatron_plm.tokenizers import Tokenizer


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


def repeat(count: int) -> Transform:
    """One tensor ↔ `count` equal ones; reading raises ValueError if those that are present differ in any value."""

    def spread(tensors: list[Tensor]) -> list[Tensor]:
        (tensor,) = tensors
        return [tensor.clone() for _ in range(count)]  # safetensors stores no memory twice

    def collapse(tensors: list[Tensor]) -> list[Tensor]:
        if not tensors[0].is_meta and any(not torch.equal(tensors[0], other) for other in tensors[1:]):
            raise ValueError("they must be equal, since the model here has one tensor for them, but they differ")
        return tensors[:1]

    return Transform(forward=spread, backward=collapse)


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


def token_roles(tokenizer: Tokenizer) -> list[str]:
    """The tokens of a vocabulary with ESM-2's names for the five special roles, so that vocabularies can be matched.

    Vocabularies name the same role differently: `<eos>` of ESM-2 is `<sep>` of TAPE.
    """
    roles = {
        tokenizer.cls_id: "<cls>",
        tokenizer.eos_id: "<eos>",
        tokenizer.pad_id: "<pad>",
        tokenizer.unk_id: "<unk>",
        tokenizer.mask_id: "<mask>",
    }
    return [roles.get(i, token) for i, token in enumerate(tokenizer.tokens)]
