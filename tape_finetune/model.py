"""A base model that turns proteins into feature vectors, with a task's head on top.

Shapes: R residues of packed proteins, n proteins, D width of a feature vector.
"""

from collections.abc import Sequence
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
from tape_finetune.attention_maps import attention_of_pairs
from tape_finetune.base_model import BaseModel
from tape_finetune.baselines import BASELINES, build_baseline
from tape_finetune.batching import Packed
from tape_finetune.data import Example
from tape_finetune.heads import Head, HeadTable, Level, mean_over_residues, what_is_read
from tape_finetune.pair_heads import AttentionContactHead

_ONEHOT_TOKENIZER = "esm2"
ENCODER = "encoder"  # folder of a run directory


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
        return x_1TD[0]


class OneHotModel(BaseModel):
    """No model at all: 1 at the residue's token and 0 elsewhere."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, tokenizer.vocab_size)

    def forward(self, packed: Packed) -> Tensor:
        return F.one_hot(packed.tokens[0], self.num_features).float()


def discard_final_norm(base: BaseModel) -> None:
    """Let the last block's output be the features, as in ProteinLM's fork of TAPE; UserError where no norm follows."""
    if not isinstance(base, EncoderModel) or base.options.norm_placement != "pre":
        raise UserError(
            "--compat proteinlm: discards the norm behind the last block, which this base model doesn't have; give one "
            "with norms before attention and MLP, or leave the flag out"
        )
    base.encoder.final_norm = nn.Identity()


class TaskModel(nn.Module):
    """A base model and a head for a task of that level.

    It is in evaluation mode, without dropout, but for the passes of a training step.
    """

    def __init__(self, base: BaseModel, head: Head, level: Level) -> None:
        super().__init__()
        self.base = base
        self.head = head
        self.level = level
        self.reads = what_is_read(head, level)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where its weights are, all of them."""
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> "TaskModel":
        """As ever, but a base model that is not trained has no dropout."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.base.parameters()):
            self.base.eval()
        return self

    def features(self, packed: Packed) -> Tensor:
        """What the head reads (`heads.Reads`), one row after the other, protein by protein."""
        if self.reads == "attention":
            assert isinstance(self.base, EncoderModel)
            return attention_of_pairs(self.base.encoder, packed, self.base)
        # What trains in bfloat16 ends here: the head computes in float32.
        features_TD = self.base(packed).float()
        if self.reads == "tokens":
            return features_TD
        if self.reads == "first":
            return features_TD[packed.cu_seqlens[:-1].long()]
        features_RD = features_TD[packed.residue_index]
        return mean_over_residues(features_RD, packed.lengths) if self.reads == "mean" else features_RD

    def num_rows(self, example: Example) -> int:
        """How many rows an example has in `features`."""
        length = len(example.sequence)
        tokens = length + (1 if example.cropped else 2)  # <cls>, and <eos> where the end is there
        return {"mean": 1, "first": 1, "residues": length, "tokens": tokens, "attention": length**2}[self.reads]

    def outputs(self, features: Tensor, examples: Sequence[Example]) -> Tensor:
        """The task's outputs, from the features of these examples."""
        if self.reads != "tokens":
            return self.head(features, [len(example.sequence) for example in examples])
        rows = [self.num_rows(example) for example in examples]
        of_proteins = zip(self.head(features, rows).split(rows), examples, strict=True)
        return torch.cat([outputs[1 : 1 + len(example.sequence)] for outputs, example in of_proteins])


def build_head(heads: HeadTable, name: str, base: BaseModel, num_outputs: int) -> Head:
    """The head of that name, as wide as the base model's features; UserError where it needs what the model lacks."""
    if heads[name] is not AttentionContactHead:
        return heads[name](base.num_features, num_outputs)
    if not isinstance(base, EncoderModel):
        raise UserError(f"--head {name}: reads a Transformer's attention, which this base model doesn't have")
    return heads[name](base.options.num_layers * base.options.num_attention_heads, num_outputs)


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


BASE_MODELS = ("transformer", "random", "onehot", *BASELINES)


def build_base(name: str, from_pretrained: Path | None, seed: int) -> BaseModel:
    """The base model of that name; raises UserError where `from_pretrained` is missing, has no use or is unreadable."""
    if name == "onehot":
        if from_pretrained is not None:
            raise UserError("--from_pretrained has no use with the base model onehot; leave it out")
        return OneHotModel(get_tokenizer(_ONEHOT_TOKENIZER))
    if name in BASELINES:
        return build_baseline(name, from_pretrained, seed)
    if from_pretrained is None:
        what = "the weights of" if name == "transformer" else "the architecture of"
        raise UserError(f"the base model {name} needs --from_pretrained PATH, {what} a checkpoint directory")
    return transformer(from_pretrained) if name == "transformer" else random_transformer(from_pretrained, seed)


def num_parameters(module: nn.Module, *, trained_only: bool = False) -> int:
    """How many parameters a module has."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)
