"""The attention weights of pairs of residues as features, as ESM-2's contact head reads them."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_plm.inference.contacts import attention_taken
from megatron_plm.model.heads import corrected_attention
from megatron_plm.model.transformer import Encoder
from tape_finetune.batching import Packed


def attention_of_pairs(encoder: Encoder, packed: Packed, encode: Callable[[Packed], Tensor]) -> Tensor:
    """Of each pair of residues the weights of every layer and head, symmetrised and corrected: [Σ L², layers · heads],
    the pairs of a protein row by row. `<cls>` and `<eos>` are no residues. `encode` takes packed proteins through the
    encoder."""
    ends = packed.cu_seqlens.tolist()
    spans = zip(ends[:-1], ends[1:], packed.lengths, strict=True)
    return torch.cat([_of_protein(encoder, packed, begin, end, length, encode) for begin, end, length in spans])


def _of_protein(
    encoder: Encoder, packed: Packed, begin: int, end: int, length: int, encode: Callable[[Packed], Tensor]
) -> Tensor:
    maps: dict[int, Tensor] = {}

    def take(layer: int, weights_NTT: Tensor) -> None:
        maps.setdefault(layer, corrected_attention(weights_NTT[:, 1 : 1 + length, 1 : 1 + length]))

    own = slice(begin, end)
    device = packed.tokens.device
    alone = Packed(
        tokens=packed.tokens[:, own],
        positions=packed.positions[:, own],
        segment_ids=torch.ones_like(packed.segment_ids[:, own]),
        cu_seqlens=torch.tensor([0, end - begin], dtype=torch.int32, device=device),
        residue_index=torch.arange(1, length + 1, device=device),
        lengths=(length,),
    )
    with attention_taken(encoder, take):
        encode(alone)
    maps_KLL = torch.cat([maps[layer] for layer in range(len(maps))])
    return maps_KLL.flatten(1).T
