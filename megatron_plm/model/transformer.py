"""The protein encoder, a Transformer, and the language model on top of it, as ordinary modules on one device.

One family by options (`config.options.ModelOptions`): by default ESM-2 (Lin et al. 2023,
doi:10.1126/science.ade2574); docs/models.md says what others choose.

Shapes: B rows, L tokens of a row, T = B·L packed tokens, D hidden size, N heads, H head size, M labelled positions
of a row, V vocabulary.
"""

from torch import Tensor, nn

from megatron_plm.config.options import ModelOptions
from megatron_plm.kernels.accelerators import VarlenAttention
from megatron_plm.kernels.linear import Linear
from megatron_plm.kernels.rotary import rotated
from megatron_plm.model.attention import PackedAttention, Sequences
from megatron_plm.model.heads import LabelledPositions, MaskedLanguageModelHead
from megatron_plm.model.layers import (
    MLP,
    DropoutKeys,
    HiddenDropout,
    RotaryEmbedding,
    TokenEmbedding,
    block_keys,
    build_norm,
)
from megatron_plm.tokenizers import Tokenizer


class Attention(nn.Module):
    """Multi-head self-attention inside each packed protein."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.head_dim = options.head_dim
        # Rows of the weight are ordered [head, (query, key, value), head size]: a cut between heads keeps them whole.
        self.qkv = Linear(options.hidden_size, 3 * options.hidden_size, bias=options.add_bias_linear)
        self.attend: nn.Module = PackedAttention(causal=options.objective == "clm", dropout=options.attention_dropout)
        self.out = Linear(options.hidden_size, options.hidden_size, bias=options.add_bias_linear)

    def forward(self, x_BLD: Tensor, rotary: tuple[Tensor, Tensor] | None, sequences: Sequences) -> Tensor:
        qkv = self.qkv(x_BLD)
        B, L, _ = qkv.shape
        qkv_TN3H = qkv.view(B * L, -1, 3, self.head_dim)
        q_TNH, k_TNH, v_TNH = qkv_TN3H.unbind(2) if rotary is None else rotated(qkv_TN3H, *rotary)
        out_TNH = self.attend(q_TNH, k_TNH, v_TNH, sequences)
        return self.out(out_TNH.reshape(B, L, -1))


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream; what each reads is normalized, or the sum behind it."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.pre_norm = options.norm_placement == "pre"
        self.attention_norm = build_norm(options)
        self.attention = Attention(options)
        self.attention_dropout = HiddenDropout(options.hidden_dropout, site=1)
        self.mlp_norm = build_norm(options)
        self.mlp = MLP(options)
        self.mlp_dropout = HiddenDropout(options.hidden_dropout, site=2)

    def forward(
        self,
        x_BLD: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        sequences: Sequences,
        keys_BL: Tensor | None = None,
    ) -> Tensor:
        if self.pre_norm:
            added_BLD = self.attention(self.attention_norm(x_BLD), rotary, sequences)
            x_BLD = x_BLD + self.attention_dropout(added_BLD, keys_BL)
            return x_BLD + self.mlp_dropout(self.mlp(self.mlp_norm(x_BLD)), keys_BL)
        added_BLD = self.attention(x_BLD, rotary, sequences)
        x_BLD = self.attention_norm(x_BLD + self.attention_dropout(added_BLD, keys_BL))
        return self.mlp_norm(x_BLD + self.mlp_dropout(self.mlp(x_BLD), keys_BL))


class Encoder(nn.Module):
    """Tokens to one vector each, normalized. `block`: the type of the blocks, all with the parameters of `Block`."""

    def __init__(self, options: ModelOptions, tokenizer: Tokenizer, block: type[Block] = Block) -> None:
        super().__init__()
        self.embedding = TokenEmbedding(options, tokenizer)
        self.rotary = RotaryEmbedding(options.head_dim) if options.position_embedding_type == "rope" else None
        self.hidden_dropout, self.attention_dropout = options.hidden_dropout, options.attention_dropout
        self.one_call_drops = False  # whether attention of all proteins at once has dropout
        self.dropout_keys = DropoutKeys()
        self.blocks = nn.ModuleDict({str(index): block(options) for index in range(options.num_layers)})
        # A post-LN block ends with a norm of its own.
        self.final_norm = build_norm(options) if options.norm_placement == "pre" else nn.Identity()

    def forward(
        self,
        tokens_BL: Tensor,
        positions_BL: Tensor,
        segment_ids_BL: Tensor,
        cu_seqlens: Tensor,
        row_keys_B: Tensor | None = None,
        max_length: int | None = None,
    ) -> Tensor:
        """Encode packed rows; the arguments are those of `data.loader.Batch`. Returns [B, L, D].

        `row_keys_B` is needed in training with dropout, which is keyed by it. `max_length` is that of the longest
        protein, where it is known: flash attention is faster for it in a row that is much longer.
        """
        x_BLD = self.embedding(tokens_BL, positions_BL, segment_ids_BL, row_keys_B)
        return self.final_norm(self.transform(x_BLD, positions_BL, cu_seqlens, row_keys_B, max_length))

    def attend_by(self, varlen: VarlenAttention) -> None:
        """Let all blocks attend by another package's function, whatever the device and the dtype."""
        self.one_call_drops = True
        for module in self.modules():
            if isinstance(module, PackedAttention):
                module.varlen = varlen

    def transform(
        self,
        x_BLD: Tensor,
        positions_BL: Tensor,
        cu_seqlens: Tensor,
        row_keys_B: Tensor | None = None,
        max_length: int | None = None,
    ) -> Tensor:
        """Take embedded rows through the blocks; [B, L, D]."""
        length = positions_BL.shape[1]
        rotary = None if self.rotary is None else self.rotary(positions_BL, x_BLD.dtype)
        drops_attention = self.training and self.attention_dropout > 0 and not self.one_call_drops
        sequences = Sequences.from_cu_seqlens(cu_seqlens, max_length or length, x_BLD.dtype, dropout=drops_attention)
        keys_BL = self.dropout_keys(row_keys_B, length) if self.training and self.hidden_dropout else None
        for index, block in self.blocks.items():
            own_keys_BL = None if keys_BL is None else block_keys(keys_BL, int(index))
            x_BLD = block(x_BLD, rotary, sequences, own_keys_BL)
        return x_BLD


class MaskedLanguageModel(nn.Module):
    """The encoder with a head that predicts tokens; the output matrix is the token embedding, or the head's own."""

    def __init__(self, options: ModelOptions, tokenizer: Tokenizer, block: type[Block] = Block) -> None:
        super().__init__()
        self.encoder = Encoder(options, tokenizer, block)
        self.select = LabelledPositions()
        self.head = MaskedLanguageModelHead(options, tokenizer.vocab_size)

    def forward(
        self,
        tokens_BL: Tensor,
        positions_BL: Tensor,
        segment_ids_BL: Tensor,
        cu_seqlens: Tensor,
        label_index_BM: Tensor | None = None,
        row_keys_B: Tensor | None = None,
        max_length: int | None = None,
    ) -> Tensor:
        """Logits at the labelled positions, [B, M, V]; at every position, [B, L, V], without `label_index_BM`."""
        x_BLD = self.encoder(tokens_BL, positions_BL, segment_ids_BL, cu_seqlens, row_keys_B, max_length)
        if label_index_BM is not None:
            x_BLD = self.select(x_BLD, label_index_BM)
        return self.head(x_BLD, self.encoder.embedding.tokens.weight)
