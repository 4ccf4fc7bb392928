"""Encoders that were saved without a language-model head, as TAPE's published weights: read, and said loudly."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convert_sample import TAPE_TINY, TINY, Packed, convert, random_weights, randomize, written
from peer_comparison import assert_equal_values, change_config, padded_batch
from pretraining_runs import same_bits
from safetensors.torch import load_file, save_file
from tape_peer import import_tape, tape_config
from torch import Tensor

from megatron_plm.config.options import ModelOptions
from megatron_plm.convert.native import read_native
from megatron_plm.convert.pretrained import detect_format, load_pretrained, read_checkpoint
from megatron_plm.convert.weights import native_shapes
from megatron_plm.errors import UserError
from megatron_plm.model.initialize import initialize
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.tokenizers import get_tokenizer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

WARNING = "has no language-model head, so it gets initial values"


def stock_tape(path: Path) -> torch.nn.Module:
    """As `bert-base`, in the pickle of torch before 1.6."""
    model = import_tape().ProteinBertModel(tape_config(TAPE_TINY)).eval()
    randomize(model)
    path.mkdir(exist_ok=True)
    model.save_pretrained(path)
    file = path / "pytorch_model.bin"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    return model


def esm(path: Path) -> torch.nn.Module:
    from transformers_peer import esm_config

    return saved(transformers.EsmModel(esm_config(TINY)), path, "esm2")


def bert(path: Path) -> torch.nn.Module:
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        max_position_embeddings=64,
    )  # fmt: skip
    return saved(transformers.BertModel(config), path, "tape-iupac")


def saved(model: torch.nn.Module, path: Path, tokenizer: str) -> torch.nn.Module:
    randomize(model)
    model.save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(get_tokenizer(tokenizer).tokens))
    return model.eval()


PEERS = {"tape": (stock_tape, TAPE_TINY), "huggingface esm": (esm, TINY), "huggingface bert": (bert, TAPE_TINY)}


def our_hidden(model: MaskedLanguageModel, packed: Packed) -> Tensor:
    return model.encoder(*packed.inputs)[packed.rows, packed.columns]


@pytest.mark.parametrize("peer", PEERS)
def test_hidden_states_equal_those_of_the_peers_encoder(
    peer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, options = PEERS[peer]
    theirs = make(tmp_path / "in")
    name = peer.split()[0]
    assert detect_format(tmp_path / "in") == name
    assert not any(key.startswith(("bert.", "esm.")) for key in theirs.state_dict())
    assert convert(name, "native", tmp_path / "in", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert printed.count("warning: ") == 1
    assert WARNING in printed
    assert WARNING in json.loads((tmp_path / "out" / "conversion.json").read_text())["warnings"][0]
    weights = read_native(tmp_path / "out")
    tokenizer = weights.tokenizer
    assert tokenizer.name == options.tokenizer

    def their_hidden(sequences: list[Tensor]) -> Tensor:
        ids, real = padded_batch(sequences, tokenizer.pad_id)
        return theirs(ids, real.long())[0][real]

    assert_equal_values(weights.build(), tokenizer, their_hidden, our_hidden)


def test_the_head_is_the_one_that_training_begins_with(tmp_path: Path) -> None:
    stock_tape(tmp_path)
    weights = read_checkpoint(tmp_path, "tape")
    model = MaskedLanguageModel(weights.options, weights.tokenizer)
    initialize(model, weights.options, seed=0)
    initial = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("head.")}
    assert len(initial) == 5
    assert same_bits({name: weights.tensors[name] for name in initial}, initial)


def test_a_tool_that_loads_one_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bert(tmp_path)
    capsys.readouterr()
    load_pretrained(tmp_path)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"warning: {tmp_path} {WARNING}")
    load_pretrained(written(random_weights(TAPE_TINY), "tape", tmp_path / "whole"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("peer", PEERS)
def test_a_tool_that_loads_what_comes_from_one_is_told_until_the_head_is_trained(
    peer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, _ = PEERS[peer]
    make(tmp_path / "in")
    name = peer.split()[0]
    assert convert(name, "native", tmp_path / "in", tmp_path / "out") == 0
    assert convert("native", name, tmp_path / "out", tmp_path / "there", "--dtype", "bfloat16") == 0
    assert convert(name, "native", tmp_path / "there", tmp_path / "back") == 0
    for place in ("out", "there", "back"):
        capsys.readouterr()
        load_pretrained(tmp_path / place)
        told = capsys.readouterr().err
        assert told.startswith(f"warning: {tmp_path / place}: its language-model head has the initial values")
        assert told.count("\n") == 1
    weights = read_native(tmp_path / "out")
    trained = {key: t * 1.01 if key == "head.dense.weight" else t for key, t in weights.tensors.items()}
    load_pretrained(written(replace(weights, tensors=trained), "native", tmp_path / "trained"))
    assert capsys.readouterr().err == ""


def forks_encoder(path: Path) -> ModelOptions:
    """A model of ProteinLM's fork without its head and prefix."""
    options = replace(TAPE_TINY, norm_placement="pre", embedding_layernorm=False)
    written(random_weights(options), "proteinlm-tape", path)
    tensors = torch.load(path / "pytorch_model.bin", weights_only=True)
    tensors = {k.removeprefix("bert."): t for k, t in tensors.items() if not k.startswith("mlm.")}
    tensors |= {"bert_tail_dense.weight": torch.ones(24, 24), "bert_tail_dense.bias": torch.ones(24)}  # it never runs
    torch.save(tensors, path / "pytorch_model.bin")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "model_type"}))
    return options


def test_an_encoder_of_proteinlms_fork_is_read(tmp_path: Path) -> None:
    options = forks_encoder(tmp_path / "fork")
    assert detect_format(tmp_path / "fork") == "proteinlm-tape"
    weights = read_checkpoint(tmp_path / "fork", "proteinlm-tape")
    assert WARNING in weights.warnings[0]
    assert not any("mlm.transform" in note for note in weights.notes)
    encoder = {name for name in native_shapes(options, weights.tokenizer) if name.startswith("encoder.")}
    expected = random_weights(options).tensors
    assert same_bits({name: weights.tensors[name] for name in encoder}, {name: expected[name] for name in encoder})


def test_a_huge_size_is_told_before_a_head_is_made(tmp_path: Path) -> None:
    stock_tape(tmp_path)
    change_config(tmp_path, hidden_size=3 * 2**20)
    with pytest.raises(UserError, match=r"has shape \[24\], but the configuration beside it describes \[3145728\]"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("kept", ["lm_head.bias", "lm_head.dense.weight", "lm_head.layer_norm.bias"])
def test_a_part_of_a_head_is_no_absent_head(kept: str, tmp_path: Path) -> None:
    source = written(random_weights(), "huggingface", tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    left = {key: tensor for key, tensor in tensors.items() if not key.startswith("lm_head.") or key == kept}
    save_file(left, source / "model.safetensors")
    with pytest.raises(UserError, match=r"4 tensors are missing \(lm_head"):
        load_pretrained(source)
