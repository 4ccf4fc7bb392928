"""A base model that turns proteins into feature vectors, with a task's head on top.

Shapes: R residues of packed proteins, n proteins, D width of a feature vector.
"""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_plm.config.options import ModelOptions
from megatron_plm.convert.native import write_native
from megatron_plm.convert.pretrained import Pretrained, load_pretrained
from megatron_plm.convert.weights import Weights
from megatron_plm.data.packing import NUM_SPECIAL_TOKENS
from megatron_plm.errors import UserError
from megatron_plm.model.initialize import initialize
from megatron_plm.model.transformer import Encoder, MaskedLanguageModel
from megatron_plm.tokenizers import Tokenizer, get_tokenizer
from tape_finetune.batching import Packed
from tape_finetune.heads import Head, Level, mean_over_residues

_ONEHOT_TOKENIZER = "esm2"
ENCODER = "encoder"  # folder of a run directory


class BaseModel(nn.Module, ABC):
    """From packed proteins to a feature vector a residue, [R, D]."""

    def __init__(self, tokenizer: Tokenizer, num_features: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.num_features = num_features

    @property
    def max_residues(self) -> int | None:
        """Residues of the longest protein that it can take; None if there is no limit."""
        return None

    @abstractmethod
    def forward(self, packed: Packed) -> Tensor:
        """The residues' features."""


class EncoderModel(BaseModel):
    """The Transformer encoder's output."""

    def __init__(self, encoder: Encoder, options: ModelOptions, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, options.hidden_size)
        self.options = options
        self.encoder = encoder

    @property
    def max_residues(self) -> int | None:
        positions = self.options.max_position_embeddings
        return None if positions is None else positions - NUM_SPECIAL_TOKENS

    def forward(self, packed: Packed) -> Tensor:
        row_keys_1 = None
        if self.training and self.options.hidden_dropout:
            row_keys_1 = torch.randint(2**62, (1,), device=packed.tokens.device)
        x_1TD = self.encoder(packed.tokens, packed.positions, packed.segment_ids, packed.cu_seqlens, row_keys_1)
        return x_1TD[0, packed.residue_index]


class OneHotModel(BaseModel):
    """No model at all: 1 at the residue's token and 0 elsewhere."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, tokenizer.vocab_size)

    def forward(self, packed: Packed) -> Tensor:
        return F.one_hot(packed.tokens[0, packed.residue_index], self.num_features).float()


def discard_final_norm(base: BaseModel) -> None:
    """Let the last block's output be the features, as in ProteinLM's fork of TAPE; UserError where no norm follows."""
    if not isinstance(base, EncoderModel) or base.options.norm_placement != "pre":
        raise UserError(
            "--compat proteinlm: discards the norm behind the last block, which this base model doesn't have; give one "
            "with norms before attention and MLP, or leave the flag out"
        )
    base.encoder.final_norm = nn.Identity()


class TaskModel(nn.Module):
    """A base model and a head; the head's level says whether it reads residues or whole proteins.

    It is in evaluation mode, without dropout, but for the passes of a training step.
    """

    def __init__(self, base: BaseModel, head: Head, level: Level) -> None:
        super().__init__()
        self.base = base
        self.head = head
        self.level = level
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where its weights are, all of them."""
        return next(self.parameters()).device

    def features(self, packed: Packed) -> Tensor:
        """What the head reads: [n, D] for the level "protein", else [R, D]."""
        # What trains in bfloat16 ends here: the head computes in float32.
        features = self.base(packed).float()
        return mean_over_residues(features, packed.lengths) if self.level == "protein" else features


def transformer(path: Path) -> EncoderModel:
    """The encoder of a checkpoint of any format that the converters read; raises UserError."""
    pretrained = _load(path)
    return EncoderModel(pretrained.model.encoder, pretrained.options, pretrained.tokenizer)


def random_transformer(path: Path, seed: int) -> EncoderModel:
    """The same architecture and vocabulary as `transformer(path)`, with initial weights that `seed` decides.

    They are those of a pretraining from `seed` with this vocabulary. A converted checkpoint can have another one than
    its pretraining had (TAPE's, say): each token's embedding then starts from other numbers than it did there.
    """
    pretrained = _load(path)
    model = MaskedLanguageModel(pretrained.options, pretrained.tokenizer)
    initialize(model, pretrained.options, seed)
    return EncoderModel(model.encoder, pretrained.options, pretrained.tokenizer)


def export_encoder(base: BaseModel, path: Path, directory: Path) -> None:
    """Write the encoder, with the language model's head that the checkpoint at `path` has, as a native checkpoint into
    a new directory."""
    assert isinstance(base, EncoderModel)
    pretrained = _load(path)
    tensors = pretrained.model.state_dict()
    tensors |= {f"encoder.{name}": tensor.cpu() for name, tensor in base.encoder.state_dict().items()}
    directory.mkdir()
    write_native(Weights(base.options, base.tokenizer, tensors), directory)


def _load(path: Path) -> Pretrained:
    pretrained = load_pretrained(path)
    if not pretrained.tokenizer.one_letter_a_token:
        raise UserError(
            f"{path}: its tokens are the pieces of {pretrained.tokenizer.name}, and the tasks here need a token for "
            "each residue; give a model that was pretrained with --tokenizer esm2"
        )
    return pretrained


BASE_MODELS = ("transformer", "random", "onehot")


def build_base(name: str, from_pretrained: Path | None, seed: int) -> BaseModel:
    """The base model of that name; raises UserError where `from_pretrained` is missing, has no use or is unreadable."""
    if name == "onehot":
        if from_pretrained is not None:
            raise UserError("--from_pretrained has no use with the base model onehot; leave it out")
        return OneHotModel(get_tokenizer(_ONEHOT_TOKENIZER))
    if from_pretrained is None:
        what = "the weights of" if name == "transformer" else "the architecture of"
        raise UserError(f"the base model {name} needs --from_pretrained PATH, {what} a checkpoint directory")
    return transformer(from_pretrained) if name == "transformer" else random_transformer(from_pretrained, seed)


def num_parameters(module: nn.Module, *, trained_only: bool = False) -> int:
    """How many parameters a module has."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)
