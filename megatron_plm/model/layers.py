"""The parts of a block that have no attention in them.

Shapes: B rows, L tokens of a row, T = B·L packed tokens, D hidden size, F feed-forward size, N heads, H head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_plm.config.options import ModelOptions
from megatron_plm.kernels.linear import Linear
from megatron_plm.tokenizers import Tokenizer

# ESM-2 was trained with 15 % of the tokens chosen and 80 % of those replaced by <mask>.
_TRAINED_MASK_SHARE = 0.15 * 0.8


class TokenEmbedding(nn.Module):
    """Token vectors, with ESM-2's token dropout: `<mask>` is zero, and the rest of its protein is scaled so that the
    sum of a protein does not depend on how much of it is masked."""

    def __init__(self, options: ModelOptions, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokenizer.vocab_size, options.hidden_size)
        self.token_dropout = options.token_dropout
        self.mask_id = tokenizer.mask_id

    def forward(self, tokens_BL: Tensor, segment_ids_BL: Tensor) -> Tensor:
        x_BLD = self.tokens(tokens_BL)
        if not self.token_dropout:
            return x_BLD * (segment_ids_BL > 0).unsqueeze(-1)
        is_mask_BL = tokens_BL == self.mask_id
        scale_BL = (1 - _TRAINED_MASK_SHARE) / (1 - _share_in_segment(is_mask_BL, segment_ids_BL))
        # Filled, not multiplied: the scale is infinite in a crop that is masked from end to end.
        scale_BL = scale_BL.masked_fill(is_mask_BL | (segment_ids_BL == 0), 0.0)
        return x_BLD * scale_BL.unsqueeze(-1).to(x_BLD.dtype)


def _share_in_segment(flags_BL: Tensor, segment_ids_BL: Tensor) -> Tensor:
    """For each token the share of the tokens of its segment that are flagged, float32 [B, L]."""
    B, L = segment_ids_BL.shape
    flags_BL = flags_BL.float()
    totals = torch.zeros(B, L + 1, device=flags_BL.device)  # a row has at most L segments, and padding
    flagged = totals.scatter_add(1, segment_ids_BL, flags_BL)
    counts = totals.scatter_add(1, segment_ids_BL, torch.ones_like(flags_BL))
    return flagged.gather(1, segment_ids_BL) / counts.gather(1, segment_ids_BL)


class RotaryEmbedding(nn.Module):
    """Angles of rotary positions (Su et al. 2021, arXiv:2104.09864), base 10,000."""

    inverse_frequencies: Tensor

    def __init__(self, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        self.base = base
        # Saved with the weights: published ESM-2 checkpoints carry values rounded through fp16.
        self.register_buffer("inverse_frequencies", torch.empty(head_dim // 2))
        self.fill()

    def fill(self) -> None:
        """Give the buffer its values, also where it was made without storage."""
        size = len(self.inverse_frequencies)
        exponents = torch.arange(size, dtype=torch.float32, device=self.inverse_frequencies.device) / size
        self.inverse_frequencies.copy_(self.base**-exponents)

    def forward(self, positions_BL: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines for each token, both [T, 1, 1, H] in `dtype`, to broadcast over heads."""
        angles = positions_BL.reshape(-1, 1).float() * self.inverse_frequencies
        angles_T11H = torch.cat([angles, angles], dim=-1)[:, None, None, :]
        return angles_T11H.cos().to(dtype), angles_T11H.sin().to(dtype)


def rotate(x_TNKH: Tensor, cos_T11H: Tensor, sin_T11H: Tensor) -> Tensor:
    """Rotate the pairs (i, i + H/2) of each head by its token's angles; K runs over query and key."""
    first, second = x_TNKH.chunk(2, dim=-1)
    return x_TNKH * cos_T11H + torch.cat([-second, first], dim=-1) * sin_T11H


class MLP(nn.Module):
    """Two linear maps with an exact (erf) GELU between them."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.up = Linear(options.hidden_size, options.ffn_size)
        self.down = Linear(options.ffn_size, options.hidden_size)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BLD)))
