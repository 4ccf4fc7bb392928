"""Conversion from and to the published layout of AMPLIFY. There is no package of it: its forward pass is written here,
after chandar-lab's src/amplify/model, with rotary positions as complex numbers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from convert_sample import (
    AMPLIFY_TINY,
    convert,
    native_checkpoint,
    random_weights,
)
from peer_comparison import assert_equal_values, change_config
from pretraining_runs import same_bits
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_plm.config.options import ModelOptions
from megatron_plm.config.presets import preset_options
from megatron_plm.convert.hf_amplify import read_amplify, stated_width, swiglu_width
from megatron_plm.convert.huggingface import write_huggingface
from megatron_plm.convert.pretrained import detect_format, load_pretrained
from megatron_plm.convert.weights import INVERSE_FREQUENCIES
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import get_tokenizer

AMPLIFY = get_tokenizer("amplify")
# Layers, hidden size, heads, and the width that config.json states with the one that AMPLIFY makes of it.
SHAPES = [(2, 64, 2, 256, 176), (3, 60, 5, 240, 160), (1, 24, 1, 96, 64), (2, 48, 6, 36, 24)]


def options_of(shape: tuple[int, int, int, int, int]) -> ModelOptions:
    layers, hidden, heads, _, inner = shape
    return replace(
        AMPLIFY_TINY, num_layers=layers, hidden_size=hidden, num_attention_heads=heads, ffn_hidden_size=inner
    )


def published(shape: tuple[int, int, int, int, int], directory: Path) -> dict[str, Tensor]:
    """Write a random model as the published ones are, without going through the converter; returns its tensors."""
    layers, hidden, heads, stated, inner = shape
    generator = torch.Generator().manual_seed(3)

    def matrix(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator) * size[-1] ** -0.5

    def norm() -> Tensor:
        return 1 + 0.2 * torch.randn(hidden, generator=generator)

    tensors = {"encoder.weight": matrix(27, hidden) * hidden**0.5, "layer_norm_2.weight": norm()}
    tensors |= {"decoder.weight": matrix(27, hidden), "decoder.bias": matrix(27)}
    for i in range(layers):
        layer = f"transformer_encoder.{i}"
        tensors |= {f"{layer}.{part}.weight": matrix(hidden, hidden) for part in ("q", "k", "v", "wo")}
        tensors |= {f"{layer}.{part}.weight": norm() for part in ("attention_norm", "ffn_norm")}
        tensors[f"{layer}.ffn.w12.weight"] = matrix(2 * inner, hidden)
        tensors[f"{layer}.ffn.w3.weight"] = matrix(hidden, inner)
    save_file(tensors, directory / "model.safetensors")
    config = {
        "architectures": ["AMPLIFY"], "model_type": "AMPLIFY", "att_bias": False, "ffn_bias": False,
        "auto_map": {"AutoConfig": "amplify.AMPLIFYConfig", "AutoModel": "amplify.AMPLIFY"},
        "decoder_init_range": 0.02, "embedding_init_range": 0.02, "dropout_prob": 0, "hidden_act": "SwiGLU",
        "hidden_size": hidden, "intermediate_size": stated, "layer_norm_after_embedding": False,
        "layer_norm_before_last_layer": True, "max_length": 2048, "norm_eps": 1e-05, "num_attention_heads": heads,
        "num_hidden_layers": layers, "pad_token_id": 0, "rms_norm": True, "vocab_size": 27,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    tokens = ["<pad>", "<unk>", "<mask>", "<bos>", "<eos>", *"|LAGVSERTIDPKQNFYMHWCB"]
    model = {"type": "WordPiece", "unk_token": "<unk>", "vocab": {token: i for i, token in enumerate(tokens)}}
    added = [{"id": i, "content": token, "special": True} for i, token in enumerate(tokens[:5])]
    (directory / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": model}))
    return tensors


def forward(tensors: dict[str, Tensor], heads: int, ids: Tensor) -> Tensor:
    """Logits [L, V] of one protein, by AMPLIFY's names."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * tensors[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ tensors[f"{name}.weight"].T

    def turned(x: Tensor) -> Tensor:  # neighbours are real and imaginary parts
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        size = x.shape[-1]
        angles = torch.arange(len(ids))[:, None] / 10000 ** (torch.arange(0, size, 2) / size)
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(2)

    x = tensors["encoder.weight"][ids]
    num_layers = sum(name.endswith(".wo.weight") for name in tensors)
    for layer in (f"transformer_encoder.{i}" for i in range(num_layers)):
        y = norm(x, f"{layer}.attention_norm")
        q, k, v = (linear(y, f"{layer}.{part}").unflatten(1, (heads, -1)) for part in "qkv")
        scores = torch.einsum("ihd,jhd->hij", turned(q), turned(k)) / q.shape[-1] ** 0.5
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
        x = x + linear(mixed, f"{layer}.wo")
        gate, value = linear(norm(x, f"{layer}.ffn_norm"), f"{layer}.ffn.w12").chunk(2, dim=-1)
        x = x + linear(F.silu(gate) * value, f"{layer}.ffn.w3")
    return linear(norm(x, "layer_norm_2"), "decoder") + tensors["decoder.bias"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("direction", ["theirs to ours", "ours to theirs"])
def test_logits_equal_those_of_amplify(shape: tuple[int, int, int, int, int], direction: str, tmp_path: Path) -> None:
    if direction == "theirs to ours":
        tensors = published(shape, tmp_path)
        loaded = load_pretrained(tmp_path)
        assert (loaded.options, loaded.tokenizer) == (options_of(shape), AMPLIFY)
        ours = loaded.model
    else:
        weights = random_weights(options_of(shape))
        assert write_huggingface(weights, tmp_path) == ()
        ours, tensors = weights.build(), load_file(tmp_path / "model.safetensors")
        assert json.loads((tmp_path / "config.json").read_text())["intermediate_size"] == shape[3]

    def theirs(sequences: list[Tensor]) -> Tensor:
        return torch.cat([forward(tensors, shape[2], sequence) for sequence in sequences])

    assert_equal_values(ours, AMPLIFY, theirs)


def test_a_published_model_comes_back_in_every_bit(tmp_path: Path) -> None:
    for number, shape in enumerate(SHAPES):
        source, out = tmp_path / f"{number}", tmp_path / f"{number} out"
        source.mkdir(), out.mkdir()
        tensors = published(shape, source)
        assert read_amplify(source).notes == ()
        write_huggingface(read_amplify(source), out)
        assert same_bits(load_file(out / "model.safetensors"), tensors)
        theirs, ours = (json.loads((place / "config.json").read_text()) for place in (source, out))
        changed = {name for name in theirs if theirs[name] != ours[name]}
        assert changed == {"auto_map"}  # which names the class where ours does not lie: on the Hub


def test_without_a_tokenizers_files_the_published_tokens_are_assumed(tmp_path: Path) -> None:
    published(SHAPES[0], tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (note,) = read_amplify(tmp_path).notes
    assert "vocab.txt: there is none; the tokens of amplify are assumed" in note


def test_a_round_trip_changes_no_bit(tmp_path: Path) -> None:
    for number, shape in enumerate(SHAPES):
        weights = random_weights(replace(options_of(shape), hidden_dropout=0.1, attention_dropout=0.1), seed=number)
        assert write_huggingface(weights, tmp_path) == ()
        assert detect_format(tmp_path) == "huggingface"
        back = read_amplify(tmp_path)
        assert same_bits(dict(back.tensors), weights.tensors)
        assert (back.options, back.tokenizer, back.notes) == (weights.options, weights.tokenizer, ())


@pytest.mark.parametrize(("preset", "stated"), [("amplify-120m", 2560), ("amplify-350m", 3840)])
def test_the_presets_have_the_published_width(preset: str, stated: int) -> None:
    options = ModelOptions(**preset_options(preset))
    assert (stated_width(options), swiglu_width(stated)) == (stated, options.ffn_size)


def test_the_next_command_is_one_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native_checkpoint(tmp_path / "native", AMPLIFY_TINY)
    assert convert("native", "huggingface", tmp_path / "native", tmp_path / "out") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("next: python tape_finetune/tape_train.py")  # transformers alone has no AMPLIFY


def test_rates_of_dropout_that_amplify_cannot_tell_apart_are_named(tmp_path: Path) -> None:
    (note,) = write_huggingface(random_weights(replace(AMPLIFY_TINY, hidden_dropout=0.1)), tmp_path)
    assert note == "attention_dropout 0.0: AMPLIFY has one rate for all, 0.1"


def test_other_rotary_frequencies_than_the_computed_are_refused(tmp_path: Path) -> None:
    weights = random_weights(AMPLIFY_TINY)
    weights.tensors[INVERSE_FREQUENCIES].copy_(weights.tensors[INVERSE_FREQUENCIES].half())
    with pytest.raises(UserError, match="AMPLIFY computes its rotary frequencies, and those of this model are others"):
        write_huggingface(weights, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ffn_hidden_size": 60}, "inside the model's MLPs is 60, and AMPLIFY's is a multiple of 8"),
        ({"normalization": "LayerNorm"}, 'normalization is "LayerNorm"'),
        ({"add_bias_linear": True}, "add_bias_linear is true"),
        ({"head_transform": True}, "head_transform is true"),
        ({"untie_embeddings_and_output_weights": False}, "untie_embeddings_and_output_weights is false"),
        ({"embedding_layernorm": True}, "embedding_layernorm is true"),
        ({"token_dropout": True}, "token_dropout is true"),
        ({"norm_placement": "post"}, 'norm_placement is "post"'),
        ({"objective": "clm"}, 'objective is "clm"'),
    ],
    ids=str,
)
def test_a_model_that_is_no_amplify_is_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        write_huggingface(random_weights(replace(AMPLIFY_TINY, **options)), tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rms_norm": False}, "rms_norm is false"),
        ({"hidden_act": "GELU"}, 'hidden_act is "GELU"'),
        ({"att_bias": True}, "att_bias is true"),
        ({"layer_norm_after_embedding": True}, "layer_norm_after_embedding is true"),
        ({"layer_norm_before_last_layer": False}, "layer_norm_before_last_layer is false"),
        ({"intermediate_size": 300}, r"ffn\.w12\.weight has shape \[352, 64\], but .* \[400, 64\]"),
        ({"num_attention_heads": 7}, "64 is not divisible"),
        ({"vocab_size": 33}, "27 tokens for a vocab_size of 33"),
        ({"num_hidden_layers": 3}, r"8 tensors are missing \(transformer_encoder\.2"),
        ({"dropout_prob": 1}, "--hidden-dropout must lie in"),
    ],
    ids=str,
)
def test_a_configuration_that_means_another_model_is_refused(
    fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    published(SHAPES[0], tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(UserError, match=message):
        read_amplify(tmp_path)
