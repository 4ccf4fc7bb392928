"""Random models of odd shapes in both libraries, and inputs for both."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_plm.config.options import ModelOptions
from megatron_plm.convert.command import main
from megatron_plm.convert.native import write_native
from megatron_plm.convert.pretrained import FORMATS
from megatron_plm.convert.weights import Weights
from megatron_plm.errors import run_command
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.tokenizers import Tokenizer, get_tokenizer

# Layers, hidden size, heads, feed-forward size.
SHAPES = [(2, 320, 20, 1280), (3, 60, 5, 240), (1, 24, 1, 96), (2, 48, 6, 36)]
TINY = ModelOptions(num_layers=2, hidden_size=24, num_attention_heads=3)
IUPAC_TINY = replace(TINY, tokenizer="tape-iupac")
PROTEINLM_TINY = replace(
    TINY,
    tokenizer="proteinlm",
    position_embedding_type="learned_absolute",
    max_position_embeddings=64,
    activation="gelu_tanh",
    hidden_dropout=0.1,
    attention_dropout=0.1,
    token_dropout=False,
)
TAPE_TINY = replace(
    PROTEINLM_TINY,
    tokenizer="tape-iupac",
    norm_placement="post",
    embedding_layernorm=True,
    activation="gelu",
    layernorm_epsilon=1e-12,
)
AMPLIFY_TINY = replace(
    TINY,
    tokenizer="amplify",
    ffn_hidden_size=64,
    normalization="RMSNorm",
    activation="swiglu",
    add_bias_linear=False,
    head_transform=False,
    untie_embeddings_and_output_weights=True,
    token_dropout=False,
)

# Models, and the formats that can carry all of each.
CARRIED: list[tuple[ModelOptions, tuple[str, ...]]] = [
    (TINY, ("native", "huggingface", "fair-esm")),
    (IUPAC_TINY, ("native", "huggingface", "proteinlm-tape")),
    (PROTEINLM_TINY, ("native", "megatron")),
    (TAPE_TINY, ("native", "tape", "huggingface")),
    (AMPLIFY_TINY, ("native", "huggingface")),
    (replace(PROTEINLM_TINY, tokenizer="tape-iupac"), ("native", "proteinlm-tape")),
]
SAMPLE = {name: options for options, names in reversed(CARRIED) for name in names}  # a model for each format


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter a value of its own, biases and norms too, such that logits are of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise * parameter.shape[1] ** -0.5)
        else:
            parameter.copy_(noise * 0.2 + (1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0))


def options_of(
    shape: tuple[int, int, int, int], *, token_dropout: bool = True, tokenizer: str = "esm2"
) -> ModelOptions:
    layers, hidden, heads, inner = shape
    return ModelOptions(
        tokenizer=tokenizer,
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_hidden_size=None if inner == 4 * hidden else inner,
        token_dropout=token_dropout,
    )


def random_weights(options: ModelOptions = TINY, seed: int = 0) -> Weights:
    """A random model; an ESM-2's rotary frequencies are rounded through fp16, as those of published files are."""
    tokenizer = get_tokenizer(options.tokenizer)
    model = MaskedLanguageModel(options, tokenizer)
    randomize(model, seed)
    if model.encoder.rotary is not None and options.normalization == "LayerNorm":
        frequencies = model.encoder.rotary.inverse_frequencies
        frequencies.copy_(frequencies.half().float())
    return Weights(options, tokenizer, model.state_dict())


def native_checkpoint(path: Path, options: ModelOptions = TINY, seed: int = 0) -> Weights:
    """Write a random native checkpoint; returns what it holds."""
    weights = random_weights(options, seed)
    path.mkdir(parents=True)
    write_native(weights, path, "float32")
    return weights


@dataclass(frozen=True)
class Packed:
    """Arguments of our model, and the row and column of each real token, sequence after sequence."""

    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    rows: Tensor
    columns: Tensor


def pack(sequences: Sequence[Tensor], row_of: Sequence[int], row_length: int, pad_id: int) -> Packed:
    """Lay sequences of token ids into rows, the i-th into row `row_of[i]` (ascending), padded to `row_length`."""
    num_rows = row_of[-1] + 1
    tokens = torch.full((num_rows, row_length), pad_id)
    positions, segments = torch.zeros_like(tokens), torch.zeros_like(tokens)
    used, count = [0] * num_rows, [0] * num_rows
    cuts, rows, columns = {num_rows * row_length}, [], []
    for sequence, row in zip(sequences, row_of, strict=True):
        offsets = torch.arange(len(sequence))
        span = offsets + used[row]
        used[row] += len(sequence)
        count[row] += 1
        tokens[row, span], positions[row, span], segments[row, span] = sequence, offsets, count[row]
        rows.append(torch.full_like(span, row))
        columns.append(span)
        start = row * row_length + int(span[0])
        cuts |= {start, start + len(sequence)}
    inputs = (tokens, positions, segments, torch.tensor(sorted({0, *cuts}), dtype=torch.int32))
    return Packed(inputs, torch.cat(rows), torch.cat(columns))


def random_sequences(tokenizer: Tokenizer, lengths: Sequence[int], *, masked: float, seed: int = 0) -> list[Tensor]:
    """Sequences `<cls> residues <eos>` of so many tokens, a share of the residues replaced by `<mask>`."""
    generator = torch.Generator().manual_seed(seed)
    letters = torch.from_numpy(tokenizer.residue_ids.astype("int64"))
    sequences = []
    for length in lengths:
        residues = letters[torch.randint(len(letters), (length - 2,), generator=generator)]
        residues[torch.rand(length - 2, generator=generator) < masked] = tokenizer.mask_id
        ends = torch.tensor([tokenizer.cls_id]), torch.tensor([tokenizer.eos_id])
        sequences.append(torch.cat([ends[0], residues, ends[1]]))
    return sequences


@torch.no_grad()
def our_logits(model: MaskedLanguageModel, packed: Packed) -> Tensor:
    """Logits of the real tokens, [T, V], sequence after sequence."""
    return model(*packed.inputs)[packed.rows, packed.columns]


def convert(source: str, target: str, before: Path, after: Path, *flags: str) -> int:
    """Run the command in this process; returns its exit code."""
    argv = ["--from", source, "--to", target, "--input", str(before), "--output", str(after), *flags]
    return run_command(main, argv)


def written(weights: Weights, format_name: str, path: Path) -> Path:
    """Write the weights in a format into a new directory; returns it."""
    path.mkdir(parents=True)
    FORMATS[format_name].write(weights, path, "float32")
    return path
