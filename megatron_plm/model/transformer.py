"""The protein encoder: a pre-LN Transformer with rotary positions, and the masked language model on top of it.

The ESM-2 architecture (Lin et al. 2023, doi:10.1126/science.ade2574), as ordinary modules on one device.

Shapes: B rows, L tokens of a row, T = B·L packed tokens, D hidden size, N heads, H head size, M labelled positions
of a row, V vocabulary.
"""

import torch
from torch import Tensor, nn

from megatron_plm.config.options import ModelOptions
from megatron_plm.kernels.linear import Linear
from megatron_plm.model.attention import Sequences, packed_attention
from megatron_plm.model.heads import MaskedLanguageModelHead
from megatron_plm.model.layers import MLP, RotaryEmbedding, TokenEmbedding, rotate
from megatron_plm.tokenizers import Tokenizer


class Attention(nn.Module):
    """Multi-head self-attention inside each packed protein."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.head_dim = options.head_dim
        self.causal = options.objective == "clm"
        # Rows of the weight are ordered [head, (query, key, value), head size]: a cut between heads keeps them whole.
        self.qkv = Linear(options.hidden_size, 3 * options.hidden_size)
        self.out = Linear(options.hidden_size, options.hidden_size)

    def forward(self, x_BLD: Tensor, rotary: tuple[Tensor, Tensor], sequences: Sequences) -> Tensor:
        B, L, _ = x_BLD.shape
        qkv_TN3H = self.qkv(x_BLD).view(B * L, -1, 3, self.head_dim)
        q_TNH, k_TNH = rotate(qkv_TN3H[:, :, :2], *rotary).unbind(2)
        out_TNH = packed_attention(q_TNH, k_TNH, qkv_TN3H[:, :, 2], sequences, causal=self.causal)
        return self.out(out_TNH.reshape(B, L, -1))


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(options.hidden_size, eps=options.layernorm_epsilon)
        self.attention = Attention(options)
        self.mlp_norm = nn.LayerNorm(options.hidden_size, eps=options.layernorm_epsilon)
        self.mlp = MLP(options)

    def forward(self, x_BLD: Tensor, rotary: tuple[Tensor, Tensor], sequences: Sequences) -> Tensor:
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), rotary, sequences)
        return x_BLD + self.mlp(self.mlp_norm(x_BLD))


class Encoder(nn.Module):
    """Tokens to one vector each, after the final LayerNorm."""

    def __init__(self, options: ModelOptions, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.embedding = TokenEmbedding(options, tokenizer)
        self.rotary = RotaryEmbedding(options.head_dim)
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.num_layers))
        self.final_norm = nn.LayerNorm(options.hidden_size, eps=options.layernorm_epsilon)

    def forward(self, tokens_BL: Tensor, positions_BL: Tensor, segment_ids_BL: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Encode packed rows; the arguments are those of `data.loader.Batch`. Returns [B, L, D]."""
        x_BLD = self.embedding(tokens_BL, segment_ids_BL)
        rotary = self.rotary(positions_BL, x_BLD.dtype)
        sequences = Sequences.from_cu_seqlens(cu_seqlens, tokens_BL.shape[1], x_BLD.dtype)
        for block in self.blocks:
            x_BLD = block(x_BLD, rotary, sequences)
        return self.final_norm(x_BLD)


class MaskedLanguageModel(nn.Module):
    """The encoder with a head that predicts tokens; the output matrix is the token embedding."""

    def __init__(self, options: ModelOptions, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.encoder = Encoder(options, tokenizer)
        self.head = MaskedLanguageModelHead(options, tokenizer.vocab_size)

    def forward(
        self,
        tokens_BL: Tensor,
        positions_BL: Tensor,
        segment_ids_BL: Tensor,
        cu_seqlens: Tensor,
        label_index_BM: Tensor | None = None,
    ) -> Tensor:
        """Logits at the labelled positions, [B, M, V]; at every position, [B, L, V], without `label_index_BM`."""
        x_BLD = self.encoder(tokens_BL, positions_BL, segment_ids_BL, cu_seqlens)
        if label_index_BM is not None:
            index_BMD = label_index_BM.unsqueeze(-1).expand(-1, -1, x_BLD.shape[-1])
            x_BLD = torch.gather(x_BLD, 1, index_BMD)
        return self.head(x_BLD, self.encoder.embedding.tokens.weight)
