"""TAPE's baselines beside the Transformer: an LSTM and a ResNet (Rao et al. 2019, arXiv:1906.08230), in the shapes of
tape-proteins 0.5.

Without a checkpoint they have TAPE's sizes and initial weights that a seed decides; with a directory that TAPE wrote
(config.json and pytorch_model.bin) its sizes and weights.

Shapes: T tokens of packed proteins, D hidden size, L tokens of one protein.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from megatron_plm.convert.config_json import ForeignConfig
from megatron_plm.convert.tensor_files import read_tensors
from megatron_plm.errors import UserError
from megatron_plm.philox import derive_key, normal
from megatron_plm.tokenizers import get_tokenizer
from tape_finetune.base_model import BaseModel
from tape_finetune.batching import Packed
from tape_finetune.heads import in_one_row

_TOKENIZER = "tape-iupac"
_INITIAL_DEVIATION = 0.02


@dataclass(frozen=True)
class LstmOptions:
    """Sizes of the LSTM; the defaults are TAPE's."""

    input_size: int = 128
    hidden_size: int = 1024
    num_hidden_layers: int = 3
    hidden_dropout_prob: float = 0.1


@dataclass(frozen=True)
class ResNetOptions:
    """Sizes of the ResNet; the defaults are TAPE's."""

    hidden_size: int = 512
    num_hidden_layers: int = 30
    hidden_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12


class LstmModel(BaseModel):
    """Two stacks of LSTMs, one reading each protein from the left and one from the right, that know nothing of each
    other; a token's features are what both say of it, [T, 2 D]."""

    foreign_prefix: ClassVar[str] = "lstm."

    def __init__(self, options: LstmOptions) -> None:
        tokenizer = get_tokenizer(_TOKENIZER)
        super().__init__(tokenizer, 2 * options.hidden_size)
        self.options = options
        self.tokens = nn.Embedding(tokenizer.vocab_size, options.input_size)
        widths = [options.input_size, *[options.hidden_size] * (options.num_hidden_layers - 1)]
        self.forwards, self.backwards = (
            nn.ModuleList(nn.LSTM(width, options.hidden_size) for width in widths) for _ in range(2)
        )

    def forward(self, packed: Packed) -> Tensor:
        proteins = list(self.tokens(packed.tokens[0]).split(packed.cu_seqlens.diff().tolist()))
        forwards = self._stack(self.forwards, proteins)
        backwards = self._stack(self.backwards, [x_LD.flip(0) for x_LD in proteins])
        return torch.cat([torch.cat(forwards), torch.cat([x_LD.flip(0) for x_LD in backwards])], dim=1)

    def _stack(self, layers: nn.ModuleList, proteins: list[Tensor]) -> list[Tensor]:
        packed = pack_sequence(proteins, enforce_sorted=False)
        for number, layer in enumerate(layers):
            if number:
                dropped = F.dropout(packed.data, self.options.hidden_dropout_prob, self.training)
                packed = PackedSequence(dropped, *packed[1:])
            packed, _ = layer(packed)
        return unpack_sequence(packed)

    @staticmethod
    def our_name(theirs: str) -> str | None:
        """The name here of one of TAPE's tensors; None for those that have no place here."""
        if theirs == "embed_matrix.weight":
            return "tokens.weight"
        for stack, ours in (("forward_lstm", "forwards"), ("reverse_lstm", "backwards")):
            if theirs.startswith(f"encoder.{stack}."):
                layer, _, name = theirs.removeprefix(f"encoder.{stack}.").split(".", 2)
                return f"{ours}.{layer}.{name}"
        return None


class ResNetModel(BaseModel):
    """Residual blocks of convolutions over 3 tokens of a protein, [T, D].

    Positions are sines and cosines, counted from each protein's last token. (TAPE counts them from the last column of
    the padded batch, so that its features of a protein depend on the others beside it.)
    """

    foreign_prefix: ClassVar[str] = "resnet."

    def __init__(self, options: ResNetOptions) -> None:
        tokenizer = get_tokenizer(_TOKENIZER)
        super().__init__(tokenizer, options.hidden_size)
        self.options = options
        self.tokens = nn.Embedding(tokenizer.vocab_size, options.hidden_size)
        self.embedding_norm = nn.LayerNorm(options.hidden_size, eps=options.layer_norm_eps)
        self.blocks = nn.ModuleList(_ResNetBlock(options) for _ in range(options.num_hidden_layers))

    def forward(self, packed: Packed) -> Tensor:
        lengths = packed.cu_seqlens.diff().tolist()
        x_TD = self.embedding_norm(self.tokens(packed.tokens[0]) + self._positions(packed))
        x_TD = F.dropout(x_TD, self.options.hidden_dropout_prob, self.training)
        row, index_T, is_token = in_one_row(x_TD, lengths, gap=1)
        x_1DS, is_token_S1 = row.T[None], is_token[:, None]
        for block in self.blocks:
            x_1DS = block(x_1DS, is_token_S1)
        return x_1DS[0].T[index_T]

    def _positions(self, packed: Packed) -> Tensor:
        lengths = packed.cu_seqlens.diff().long()
        from_end_T = torch.repeat_interleave(lengths, lengths) - 1 - packed.positions[0]
        size = self.options.hidden_size
        exponents = torch.arange(0, size, 2, dtype=torch.float32, device=from_end_T.device) / size
        angles = from_end_T[:, None] * (1 / 10000**exponents)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    @staticmethod
    def our_name(theirs: str) -> str | None:
        """The name here of one of TAPE's tensors; None for those that have no place here."""
        table = {
            "embeddings.word_embeddings.weight": "tokens.weight",
            "embeddings.layer_norm.weight": "embedding_norm.weight",
            "embeddings.layer_norm.bias": "embedding_norm.bias",
        }
        if theirs in table or not theirs.startswith("encoder.layer."):
            return table.get(theirs)
        layer, module, *rest = theirs.removeprefix("encoder.layer.").split(".")
        names = {"conv1": "first", "conv2": "second", "bn1": "first_norm", "bn2": "second_norm"}
        return ".".join(["blocks", layer, names[module], rest[-1]])


class _ResNetBlock(nn.Module):
    """Convolution, norm of each token, GELU, convolution, norm; added to what goes in; GELU."""

    def __init__(self, options: ResNetOptions) -> None:
        super().__init__()
        size = options.hidden_size
        self.first, self.second = (nn.Conv1d(size, size, kernel_size=3, padding=1, bias=False) for _ in range(2))
        self.first_norm, self.second_norm = (nn.LayerNorm(size, eps=1e-12) for _ in range(2))

    def forward(self, x_1DS: Tensor, is_token_S1: Tensor) -> Tensor:
        inner_1SD = F.gelu(self.first_norm(self.first(x_1DS).transpose(1, 2))) * is_token_S1
        inner_1SD = self.second_norm(self.second(inner_1SD.transpose(1, 2)).transpose(1, 2))
        return (F.gelu(inner_1SD + x_1DS.transpose(1, 2)) * is_token_S1).transpose(1, 2)


BASELINES: dict[str, tuple[type[Any], type[Any]]] = {
    "lstm": (LstmModel, LstmOptions),
    "resnet": (ResNetModel, ResNetOptions),
}


def build_baseline(name: str, path: Path | None, seed: int) -> BaseModel:
    """The baseline with initial weights that `seed` decides, or TAPE's in the directory `path`; raises UserError."""
    kind, options_kind = BASELINES[name]
    if path is None:
        model = kind(options_kind())
        _initialize(model, seed)
        return model
    config = ForeignConfig.read(path)
    vocabulary = config.get("vocab_size", int, 30)
    if vocabulary != get_tokenizer(_TOKENIZER).vocab_size:
        raise UserError(f"{path}: has {vocabulary} tokens; expected the 30 of TAPE's IUPAC vocabulary")
    sizes = {field.name: config.get(field.name, type(field.default), field.default) for field in fields(options_kind)}
    model = kind(options_kind(**sizes))
    tensors = read_tensors(path)
    expected = model.state_dict()
    found = {
        ours: key
        for key in tensors
        if key.startswith(kind.foreign_prefix) and (ours := kind.our_name(key.removeprefix(kind.foreign_prefix)))
    }
    for ours in sorted(expected.keys() | found.keys()):
        if ours not in found or ours not in expected or tensors[found[ours]].shape != expected[ours].shape:
            raise UserError(
                f"{path}: {found.get(ours, ours)} is missing or not of the shape that config.json says; give a "
                f"directory with TAPE's {name}"
            )
    model.load_state_dict({ours: tensors[key].float() for ours, key in found.items()})
    return model


@torch.no_grad()
def _initialize(model: nn.Module, seed: int) -> None:
    """Embeddings and biases as TAPE: normal with deviation 0.02, and 0. Other matrices normal with deviation
    fan-in^-½ (LSTM) or by He's rule (convolutions); a norm begins as none."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            continue
        deviation = _INITIAL_DEVIATION
        if name != "tokens.weight":
            fan = parameter[0].numel()
            deviation = (2 / fan) ** 0.5 if parameter.dim() == 3 else fan**-0.5
        values = torch.from_numpy(normal(derive_key("init", seed, name), 0, parameter.numel()))
        parameter.copy_(values.view(parameter.shape) * deviation)
