"""The block of `--fused-kernels`: the same parameters and the same result, with the fused ops of `kernels`.

What is fused stays inside one block. Each op is a module without parameters, to which the block hands those of its
norms and linear maps: the place where tensor parallelism turns what is cut into what this process holds.

Shapes: B rows, L tokens of a row, T = B·L packed tokens, D hidden size, F feed-forward size, N heads, H head size.
"""

from torch import Tensor, nn

from megatron_plm.config.options import ModelOptions
from megatron_plm.kernels.activation import bias_gelu, bias_swiglu
from megatron_plm.kernels.dropout import dropout_add
from megatron_plm.kernels.linear import Linear, linear
from megatron_plm.kernels.norm import dropout_add_norm
from megatron_plm.kernels.rotary import bias_rotary
from megatron_plm.model.attention import Sequences
from megatron_plm.model.layers import MLP, HiddenDropout
from megatron_plm.model.transformer import Attention, Block


class FusedBlock(Block):
    """`Block` by the fused ops."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__(options)
        self.attention, self.mlp = FusedAttention(options), FusedMLP(options)
        self.add_norm = AddNorm(options)

    def forward(
        self,
        x_BLD: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        sequences: Sequences,
        keys_BL: Tensor | None = None,
    ) -> Tensor:
        if self.pre_norm:
            added_BLD = self.attention(self.attention_norm(x_BLD), rotary, sequences)
            x_BLD, normed_BLD = self._sum_and_norm(added_BLD, x_BLD, self.mlp_norm, self.attention_dropout, keys_BL)
            rate = _active_rate(self.mlp_dropout)
            return dropout_add(self.mlp(normed_BLD), x_BLD, keys_BL, rate=rate, site=self.mlp_dropout.site)
        added_BLD = self.attention(x_BLD, rotary, sequences)
        _, x_BLD = self._sum_and_norm(added_BLD, x_BLD, self.attention_norm, self.attention_dropout, keys_BL)
        return self._sum_and_norm(self.mlp(x_BLD), x_BLD, self.mlp_norm, self.mlp_dropout, keys_BL)[1]

    def _sum_and_norm(
        self, added_BLD: Tensor, x_BLD: Tensor, norm: nn.Module, dropout: HiddenDropout, keys_BL: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        bias = getattr(norm, "bias", None)  # an RMSNorm has none
        total_BLD, normed_BLD = self.add_norm(
            added_BLD, x_BLD, norm.weight, bias, keys_BL, _active_rate(dropout), dropout.site
        )
        return total_BLD, normed_BLD


def _active_rate(dropout: HiddenDropout) -> float:
    return dropout.rate if dropout.is_active else 0.0


class FusedAttention(Attention):
    """`Attention` whose rotation also adds the bias of the joint map; without rotary positions there is nothing to
    fuse."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__(options)
        if options.position_embedding_type == "rope":
            self.qkv = LinearBiasLater(options.hidden_size, 3 * options.hidden_size, bias=options.add_bias_linear)
        self.bias_rotary = BiasRotary()

    def forward(self, x_BLD: Tensor, rotary: tuple[Tensor, Tensor] | None, sequences: Sequences) -> Tensor:
        if rotary is None:
            return super().forward(x_BLD, rotary, sequences)
        qkv = self.qkv(x_BLD)
        B, L, _ = qkv.shape
        q_TNH, k_TNH, v_TNH = self.bias_rotary(qkv.view(B * L, -1, 3, self.head_dim), self.qkv.bias, *rotary)
        out_TNH = self.attend(q_TNH, k_TNH, v_TNH, sequences)
        return self.out(out_TNH.reshape(B, L, -1))


class FusedMLP(MLP):
    """`MLP` whose activation also adds the bias of the first map."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__(options)
        self.up = LinearBiasLater(options.hidden_size, self.up.out_features, bias=options.add_bias_linear)
        self.bias_activation = BiasActivation(options.activation)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down(self.bias_activation(self.up(x_BLD), self.up.bias))


class LinearBiasLater(Linear):
    """A linear map that leaves its bias to whoever reads the result."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, None)


class FusedOp(nn.Module):
    """An op on what this process holds; it has no parameters of its own."""


class AddNorm(FusedOp):
    """`dropout_add_norm` with the norm of the options."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.kind, self.eps = options.normalization, options.layernorm_epsilon

    def forward(
        self,
        x_BLD: Tensor,
        residual_BLD: Tensor,
        weight_D: Tensor,
        bias_D: Tensor | None,
        keys_BL: Tensor | None,
        rate: float,
        site: int,
    ) -> tuple[Tensor, Tensor]:
        return dropout_add_norm(
            x_BLD, residual_BLD, weight_D, bias_D, keys_BL, rate=rate, site=site, eps=self.eps, kind=self.kind
        )


class BiasRotary(FusedOp):
    """`bias_rotary` with the cosines and sines of `RotaryEmbedding`."""

    def forward(
        self, qkv_TN3H: Tensor, bias: Tensor | None, cos_T11H: Tensor, sin_T11H: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return bias_rotary(qkv_TN3H, bias, cos_T11H.flatten(0, 2), sin_T11H.flatten(0, 2))


class BiasActivation(FusedOp):
    """The activation of the options."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x_BLF: Tensor, bias_F: Tensor | None) -> Tensor:
        if self.activation == "swiglu":
            return bias_swiglu(x_BLF, bias_F)
        return bias_gelu(x_BLF, bias_F, approximate="tanh" if self.activation == "gelu_tanh" else "none")
