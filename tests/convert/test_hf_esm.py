"""Conversion from and to EsmForMaskedLM, against transformers' own model, files and tokenizer."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convert_sample import (
    SHAPES,
    TINY,
    options_of,
    our_logits,
    pack,
    random_sequences,
    random_weights,
    randomize,
)
from peer_comparison import TOLERANCE, assert_equal_values, change_config, padded_batch
from pretraining_runs import same_bits
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_plm.config.options import ModelOptions
from megatron_plm.convert.hf_esm import NOT_CARRIED
from megatron_plm.convert.huggingface import read_huggingface, write_huggingface
from megatron_plm.convert.pretrained import load_pretrained
from megatron_plm.convert.weights import CONTACT_HEAD, Weights
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import get_tokenizer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

ESM2 = get_tokenizer("esm2")


def their_model(options: ModelOptions, seed: int = 0) -> torch.nn.Module:
    from transformers_peer import esm_config

    model = transformers.EsmForMaskedLM(esm_config(options)).eval()
    randomize(model, seed)
    return model


@torch.no_grad()
def their_logits(model: torch.nn.Module, sequences: list[Tensor]) -> Tensor:
    """Logits of the real tokens of one padded batch, sequence after sequence."""
    ids, real = padded_batch(sequences, ESM2.pad_id)
    return model(input_ids=ids, attention_mask=real.long()).logits[real]


def write(weights: Weights, path: Path, dtype: str = "float32") -> Path:
    path.mkdir(exist_ok=True)
    write_huggingface(weights, path, dtype)
    return path


@pytest.mark.parametrize("embedding_layernorm", [False, True])
@pytest.mark.parametrize("token_dropout", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("direction", ["theirs to ours", "ours to theirs"])
def test_logits_equal_those_of_transformers(
    shape: tuple[int, int, int, int], token_dropout: bool, embedding_layernorm: bool, direction: str, tmp_path: Path
) -> None:
    options = replace(options_of(shape, token_dropout=token_dropout), embedding_layernorm=embedding_layernorm)
    if direction == "theirs to ours":
        theirs = their_model(options)
        theirs.save_pretrained(tmp_path)
        ours = load_pretrained(tmp_path).model
    else:
        weights = random_weights(options)
        ours = weights.build()
        theirs = transformers.AutoModelForMaskedLM.from_pretrained(write(weights, tmp_path)).eval()
    assert_equal_values(ours, ESM2, lambda sequences: their_logits(theirs, sequences))


def test_a_sequence_alone_without_attention_mask_gives_the_same_logits(tmp_path: Path) -> None:
    weights = random_weights()
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(write(weights, tmp_path)).eval()
    (sequence,) = random_sequences(ESM2, [40], masked=0.5)
    with torch.no_grad():
        expected = theirs(input_ids=sequence[None]).logits[0]
    ours = our_logits(weights.build(), pack([sequence], [0], 40, ESM2.pad_id))
    assert (ours - expected).abs().max() <= TOLERANCE


def test_rotary_frequencies_reach_transformers_as_they_are(tmp_path: Path) -> None:
    weights = random_weights()
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(write(weights, tmp_path))
    found = [buffer for name, buffer in theirs.named_buffers() if name.endswith("inv_freq")]
    assert found  # one, or one a layer
    assert all(torch.equal(buffer, weights.tensors["encoder.rotary.inverse_frequencies"]) for buffer in found)


@pytest.mark.parametrize("tokenizer", ["esm2", "tape-iupac"])
def test_a_round_trip_changes_no_bit(tokenizer: str, tmp_path: Path) -> None:
    for number, shape in enumerate(SHAPES):
        weights = random_weights(options_of(shape, tokenizer=tokenizer, token_dropout=number % 2 == 0), seed=number)
        back = read_huggingface(write(weights, tmp_path))
        assert same_bits(back.tensors, weights.tensors)
        assert (back.options, back.tokenizer, back.notes) == (weights.options, weights.tokenizer, ())


@pytest.mark.parametrize("name", ["esm2", "tape-iupac"])
def test_autotokenizer_gives_our_ids(name: str, tmp_path: Path) -> None:
    tokenizer = get_tokenizer(name)
    write(random_weights(options_of((1, 24, 2, 96), tokenizer=name)), tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size
    for sequence in ("MKTAYIAKQRQISFVKSHFSRQ", "ACDEFGHIKLMNPQRSTVWYXBUZO", "AJA"):
        expected = [tokenizer.cls_id, *tokenizer.encode(sequence).tolist(), tokenizer.eos_id]
        assert theirs(sequence)["input_ids"] == expected
    assert theirs("AA<mask>C")["input_ids"][3] == tokenizer.mask_id
    batch = theirs(["AAAA", "A"], padding=True)
    assert batch["input_ids"][1][3:] == [tokenizer.pad_id] * 3
    assert theirs.decode(theirs("AC")["input_ids"], skip_special_tokens=True).replace(" ", "") == "AC"


def test_transformers_finds_every_tensor_that_its_logits_need(tmp_path: Path) -> None:
    write(random_weights(), tmp_path)
    _, info = transformers.EsmForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    missing = set(info["missing_keys"]) - set(NOT_CARRIED)  # old versions also miss positions that rotary never reads
    missing -= {f"esm.{name}" for name in CONTACT_HEAD}  # those are told
    assert (missing, set(info["unexpected_keys"]), set(info["mismatched_keys"])) == (set(), set(), set())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_dtype_is_what_transformers_loads_and_what_comes_back(dtype: str, tmp_path: Path) -> None:
    weights = random_weights()
    write(weights, tmp_path, dtype)
    kind = getattr(torch, dtype)
    assert transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, torch_dtype="auto").dtype is kind
    back = read_huggingface(tmp_path).tensors
    for name, tensor in weights.tensors.items():
        is_rotary = name.endswith("inverse_frequencies")
        assert torch.equal(back[name], tensor if is_rotary else tensor.to(kind).float())


def test_shards_and_pickled_weights_of_transformers_are_read(tmp_path: Path) -> None:
    theirs = their_model(options_of(SHAPES[0]))
    whole, sharded, pickled = (tmp_path / name for name in ("whole", "sharded", "pickled"))
    theirs.save_pretrained(whole)
    theirs.save_pretrained(sharded, max_shard_size="2MB")
    assert not (sharded / "model.safetensors").exists()
    pickled.mkdir()
    (pickled / "config.json").write_bytes((whole / "config.json").read_bytes())
    torch.save(theirs.state_dict(), pickled / "pytorch_model.bin")
    expected = read_huggingface(whole).tensors
    assert same_bits(read_huggingface(sharded).tensors, expected)
    assert same_bits(read_huggingface(pickled).tensors, expected)

    min(sharded.glob("model-*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"shard model-00001.* is missing"):
        read_huggingface(sharded)


def test_an_index_cannot_lead_out_of_its_directory(tmp_path: Path) -> None:
    inside = write(random_weights(), tmp_path / "inside")
    (inside / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../outside.safetensors"}}))
    with pytest.raises(UserError, match=r"shard \.\./outside"):
        read_huggingface(inside)


def test_what_published_files_hold_beyond_the_model_is_dropped_with_its_reason(tmp_path: Path) -> None:
    weights = random_weights()
    tensors = load_file(write(weights, tmp_path) / "model.safetensors")
    extra = {
        "esm.embeddings.position_embeddings.weight": torch.zeros(1026, 24),
        "esm.embeddings.position_ids": torch.arange(1026)[None],
    }
    tied = {"lm_head.decoder.weight": tensors["esm.embeddings.word_embeddings.weight"].clone()}
    save_file({**tensors, **extra, **tied}, tmp_path / "model.safetensors")
    back = read_huggingface(tmp_path)
    assert same_bits(back.tensors, weights.tensors)
    assert sorted(note.split(":")[0] for note in back.notes) == sorted(extra)


def test_absent_rotary_frequencies_are_computed(tmp_path: Path) -> None:
    tensors = load_file(write(random_weights(), tmp_path) / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "inv_freq" not in k}, tmp_path / "model.safetensors")
    found = read_huggingface(tmp_path).tensors["encoder.rotary.inverse_frequencies"]
    assert torch.allclose(found, torch.tensor([10000 ** (-2 * i / TINY.head_dim) for i in range(TINY.head_dim // 2)]))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("esm.encoder.layer.1.attention.self.rotary_embeddings.inv_freq", r"layer\.0.*inv_freq, .*layer\.1.*differ"),
        ("lm_head.decoder.weight", r"word_embeddings\.weight, lm_head\.decoder\.weight: .* differ"),
    ],
)
def test_tensors_that_must_be_equal_and_are_not_are_refused(key: str, message: str, tmp_path: Path) -> None:
    tensors = load_file(write(random_weights(), tmp_path) / "model.safetensors")
    source = tensors.get(key, tensors["esm.embeddings.word_embeddings.weight"])
    save_file({**tensors, key: source + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        read_huggingface(tmp_path).build()


def test_a_vocabulary_in_another_order_is_mapped_by_token(tmp_path: Path) -> None:
    weights = random_weights()
    tensors = load_file(write(weights, tmp_path) / "model.safetensors")
    order = torch.randperm(ESM2.vocab_size, generator=torch.Generator().manual_seed(1)).tolist()
    for name in ("esm.embeddings.word_embeddings.weight", "lm_head.bias"):
        tensors[name] = torch.stack([tensors[name][i] for i in order])
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "vocab.txt").write_text("\n".join(ESM2.tokens[i] for i in order))
    change_config(tmp_path, mask_token_id=order.index(ESM2.mask_id), pad_token_id=order.index(ESM2.pad_id))
    assert same_bits(read_huggingface(tmp_path).tensors, weights.tensors)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_embedding_type": "absolute"}, 'position_embedding_type is "absolute"'),
        ({"emb_layer_norm_before": True}, r"2 tensors are missing \(esm\.embeddings\.layer_norm"),
        ({"is_decoder": True}, "is_decoder is true"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false"),
        ({"rope_theta": 500000.0}, "rope_theta is 500000.0"),
        ({"mask_token_id": 5}, "mask_token_id is 5"),
        ({"num_hidden_layers": None}, "num_hidden_layers has no value"),
        ({"hidden_size": "wide"}, 'hidden_size is "wide"'),
        ({"num_attention_heads": 7}, "24 is not divisible"),
        ({"vocab_size": 34}, "33 tokens for a vocab_size of 34"),
        ({"intermediate_size": 97}, r"intermediate\.dense\.bias has shape \[96\], but .* \[97\]"),
        ({"num_hidden_layers": 3}, r"16 tensors are missing \(esm\.encoder\.layer\.2"),
        ({"num_hidden_layers": 1}, r"17 tensors are unknown \(esm\.encoder\.layer\.1"),
    ],
    ids=str,
)
def test_a_configuration_that_means_another_model_is_refused(
    fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    write(random_weights(), tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(UserError, match=message):
        read_huggingface(tmp_path)


def test_dropout_is_carried_both_ways(tmp_path: Path) -> None:
    weights = random_weights(replace(TINY, hidden_dropout=0.25, attention_dropout=0.125))
    theirs = transformers.AutoConfig.from_pretrained(write(weights, tmp_path))
    assert (theirs.hidden_dropout_prob, theirs.attention_probs_dropout_prob) == (0.25, 0.125)
    assert read_huggingface(tmp_path).options == weights.options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_placement": "post"}, 'norm_placement is "post", and the format holds models with "pre" only'),
        ({"activation": "gelu_tanh"}, 'activation is "gelu_tanh"'),
        ({"normalization": "RMSNorm"}, 'normalization is "RMSNorm"'),
        (
            {"position_embedding_type": "learned_absolute", "max_position_embeddings": 9},
            r"learned positions .* --to proteinlm-tape or --to megatron",
        ),
        ({"add_bias_linear": False}, "add_bias_linear is false"),
        ({"head_transform": False}, "head_transform is false"),
        ({"untie_embeddings_and_output_weights": True}, "untie_embeddings_and_output_weights is true"),
        ({"objective": "clm"}, 'objective is "clm"'),
    ],
    ids=str,
)
def test_a_model_that_is_no_esm2_is_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        write_huggingface(random_weights(replace(TINY, **options)), tmp_path)
