"""The parts of the model that have no attention in them.

Shapes: B rows, L tokens of a row, T = B·L packed tokens, D hidden size, F feed-forward size, N heads, H head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_plm.config.options import ModelOptions
from megatron_plm.kernels.dropout import LOW, dropout, mixed
from megatron_plm.kernels.linear import Linear
from megatron_plm.tokenizers import Tokenizer

# ESM-2 was trained with 15 % of the tokens chosen and 80 % of those replaced by <mask>.
_TRAINED_MASK_SHARE = 0.15 * 0.8


def build_norm(options: ModelOptions) -> nn.Module:
    """A norm over the hidden size, of the kind that `options` name."""
    kind = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}[options.normalization]
    return kind(options.hidden_size, eps=options.layernorm_epsilon)


class TokenEmbedding(nn.Module):
    """What goes into the first block: token vectors, learned positions added and normalized where there are such."""

    def __init__(self, options: ModelOptions, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokenizer.vocab_size, options.hidden_size)
        self.positions: nn.Module | None = None
        if options.position_embedding_type == "learned_absolute":
            assert options.max_position_embeddings is not None
            self.positions = nn.Embedding(options.max_position_embeddings, options.hidden_size)
        self.norm = build_norm(options) if options.embedding_layernorm else None
        self.dropout = HiddenDropout(options.hidden_dropout, site=0)
        self.token_dropout = options.token_dropout
        self.mask_id = tokenizer.mask_id

    def forward(
        self, tokens_BL: Tensor, positions_BL: Tensor, segment_ids_BL: Tensor, row_keys_B: Tensor | None = None
    ) -> Tensor:
        x_BLD = self._token_vectors(tokens_BL, segment_ids_BL)
        if self.positions is not None:
            x_BLD = x_BLD + self.positions(positions_BL)
        if self.norm is not None:
            x_BLD = self.norm(x_BLD)
        if self.dropout.is_active:
            # Of whole rows, which the embedding sees wherever rows are cut behind it.
            x_BLD = self.dropout(x_BLD, token_keys(row_keys_B, tokens_BL.shape[1]))
        return x_BLD

    def _token_vectors(self, tokens_BL: Tensor, segment_ids_BL: Tensor) -> Tensor:
        """With ESM-2's token dropout `<mask>` is zero, and the rest of its protein is scaled so that the sum of a
        protein does not depend on how much of it is masked."""
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


class MLP(nn.Module):
    """Two linear maps with a GELU between them, exact (erf) or by tanh, or with SwiGLU (Shazeer 2020,
    arXiv:2002.05202)."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.activation = options.activation
        # Rows of a gated map are ordered [feature, (gate, value)]: a cut between features keeps the pairs whole.
        width = (2 if self.activation == "swiglu" else 1) * options.ffn_size
        self.up = Linear(options.hidden_size, width, bias=options.add_bias_linear)
        self.down = Linear(options.ffn_size, options.hidden_size, bias=options.add_bias_linear)

    def forward(self, x_BLD: Tensor) -> Tensor:
        up_BLF = self.up(x_BLD)
        if self.activation == "swiglu":
            gate_BLF, value_BLF = up_BLF.unflatten(-1, (-1, 2)).unbind(-1)
            return self.down(F.silu(gate_BLF) * value_BLF)
        return self.down(F.gelu(up_BLF, approximate="tanh" if self.activation == "gelu_tanh" else "none"))


def token_keys(row_keys_B: Tensor | None, length: int) -> Tensor:
    """For each token a number below 2^32, by the key of its row and its place in it: int64 [B] to int64 [B, L]."""
    assert row_keys_B is not None, "dropout in training is keyed by the rows: it needs their keys"
    places_L = torch.arange(1, length + 1, device=row_keys_B.device)
    return mixed((row_keys_B & LOW)[:, None] ^ mixed(places_L ^ mixed(row_keys_B >> 32 & LOW)[:, None]))


def block_keys(keys_BL: Tensor, index: int) -> Tensor:
    """The tokens' keys of block `index`: each block has its own, so that no compiled block has to know which it is."""
    return mixed(keys_BL ^ mixed(torch.full((), index + 1, device=keys_BL.device)))


class DropoutKeys(nn.Module):
    """`token_keys` for the blocks as a module, the place where rows are cut among processes."""

    def forward(self, row_keys_B: Tensor | None, length: int) -> Tensor:
        return token_keys(row_keys_B, length)


class HiddenDropout(nn.Module):
    """`kernels.dropout.dropout` in training: a pure function of (row, place in the row, feature, site)."""

    def __init__(self, rate: float, *, site: int) -> None:
        super().__init__()
        self.rate, self.site = rate, site

    @property
    def is_active(self) -> bool:
        return self.training and self.rate > 0

    def forward(self, x_BLD: Tensor, keys_BL: Tensor | None) -> Tensor:
        """Drop values of `x_BLD` in training, by the tokens' keys, int64 [B, L]."""
        if not self.is_active:
            return x_BLD
        return dropout(x_BLD, keys_BL, self.rate, self.site)
