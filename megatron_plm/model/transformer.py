"""The protein encoder: a pre-LN Transformer with rotary positions, and the masked language model on top of it.

The ESM-2 architecture (Lin et al. 2023, doi:10.1126/science.ade2574), as ordinary modules on one device.

Shapes: B rows, L tokens of a row, T = B·L packed tokens, D hidden size, N heads, H head size, M labelled positions
of a row, V vocabulary.
"""

from torch import Tensor, nn

from megatron_plm.config.options import ModelOptions
from megatron_plm.kernels.linear import Linear
from megatron_plm.model.attention import PackedAttention, Sequences
from megatron_plm.model.heads import LabelledPositions, MaskedLanguageModelHead
from megatron_plm.model.layers import MLP, RotaryEmbedding, TokenEmbedding, rotate
from megatron_plm.tokenizers import Tokenizer


class Attention(nn.Module):
    """Multi-head self-attention inside each packed protein."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.head_dim = options.head_dim
        # Rows of the weight are ordered [head, (query, key, value), head size]: a cut between heads keeps them whole.
        self.qkv = Linear(options.hidden_size, 3 * options.hidden_size)
        self.attend: nn.Module = PackedAttention(causal=options.objective == "clm")
        self.out = Linear(options.hidden_size, options.hidden_size)

    def forward(self, x_BLD: Tensor, rotary: tuple[Tensor, Tensor], sequences: Sequences) -> Tensor:
        qkv = self.qkv(x_BLD)
        B, L, _ = qkv.shape
        qkv_TN3H = qkv.view(B * L, -1, 3, self.head_dim)
        q_TNH, k_TNH = rotate(qkv_TN3H[:, :, :2], *rotary).unbind(2)
        out_TNH = self.attend(q_TNH, k_TNH, qkv_TN3H[:, :, 2], sequences)
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
        self.blocks = nn.ModuleDict({str(index): Block(options) for index in range(options.num_layers)})
        self.final_norm = nn.LayerNorm(options.hidden_size, eps=options.layernorm_epsilon)

    def forward(self, tokens_BL: Tensor, positions_BL: Tensor, segment_ids_BL: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Encode packed rows; the arguments are those of `data.loader.Batch`. Returns [B, L, D]."""
        x_BLD = self.embedding(tokens_BL, segment_ids_BL)
        return self.final_norm(self.transform(x_BLD, positions_BL, cu_seqlens))

    def transform(self, x_BLD: Tensor, positions_BL: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Take embedded rows through the blocks; [B, L, D]."""
        rotary = self.rotary(positions_BL, x_BLD.dtype)
        sequences = Sequences.from_cu_seqlens(cu_seqlens, positions_BL.shape[1], x_BLD.dtype)
        for block in self.blocks.values():
            x_BLD = block(x_BLD, rotary, sequences)
        return x_BLD


class MaskedLanguageModel(nn.Module):
    """The encoder with a head that predicts tokens; the output matrix is the token embedding."""

    def __init__(self, options: ModelOptions, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.encoder = Encoder(options, tokenizer)
        self.select = LabelledPositions()
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
            x_BLD = self.select(x_BLD, label_index_BM)
        return self.head(x_BLD, self.encoder.embedding.tokens.weight)
