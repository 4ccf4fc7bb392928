"""ESM-2 as it was published: fair-esm's own model gives our logits, both ways."""

import argparse
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convert_sample import TINY, convert, random_sequences, random_weights, randomize, written
from harmful_pickle import Calls
from peer_comparison import assert_equal_values, padded_batch
from pretraining_runs import same_bits
from torch import Tensor

from megatron_plm.config.options import ModelOptions
from megatron_plm.convert.fair_esm import read_fair_esm, write_fair_esm
from megatron_plm.convert.pretrained import load_pretrained
from megatron_plm.errors import UserError
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.tokenizers import get_tokenizer

esm = pytest.importorskip("esm")

ESM2 = get_tokenizer("esm2")
SHAPES = [(2, 320, 20), (3, 60, 5), (1, 24, 1)]  # layers, hidden size, heads
CONTACT_HEAD = ("contact_head.regression.weight", "contact_head.regression.bias")


def their_model(shape: tuple[int, int, int], *, token_dropout: bool = True) -> torch.nn.Module:
    layers, hidden, heads = shape
    model = esm.model.esm2.ESM2(layers, hidden, heads, token_dropout=token_dropout).eval()
    randomize(model)
    for layer in model.layers:  # as in the published files
        frequencies = layer.self_attn.rot_emb.inv_freq
        frequencies.copy_(frequencies.half().float())
    return model


def publish(model: torch.nn.Module, file: Path) -> Path:
    """Save a model as the published files have it: under fairseq's names, the contact head apart."""
    tensors: dict[str, Tensor] = {}
    regression: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        if key in CONTACT_HEAD:
            regression[key] = tensor
        else:
            tensors[("encoder." if key.startswith("lm_head.") else "encoder.sentence_encoder.") + key] = tensor
    shape = argparse.Namespace(
        arch="roberta_large",
        encoder_layers=model.num_layers,
        encoder_embed_dim=model.embed_dim,
        encoder_attention_heads=model.attention_heads,
        token_dropout=model.token_dropout,
        params_dtype=torch.float16,
        dropout=0.0,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"cfg": {"model": shape, "task": argparse.Namespace(mask_prob=0.15)}, "model": tensors}, file)
    torch.save({"model": regression}, file.with_name(f"{file.stem}-contact-regression.pt"))
    return file


@torch.no_grad()
def their_logits(model: torch.nn.Module, sequences: list[Tensor]) -> Tensor:
    """Logits of the real tokens of one padded batch, sequence after sequence."""
    ids, real = padded_batch(sequences, ESM2.pad_id)
    return model(ids)["logits"][real]


def assert_equal_logits(ours: MaskedLanguageModel, theirs: torch.nn.Module) -> None:
    assert_equal_values(ours, ESM2, lambda sequences: their_logits(theirs, sequences))


@pytest.mark.parametrize("token_dropout", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_published_file_gives_fair_esms_logits(
    shape: tuple[int, int, int], token_dropout: bool, tmp_path: Path
) -> None:
    theirs = their_model(shape, token_dropout=token_dropout)
    file = publish(theirs, tmp_path / "esm2_t6_8M_UR50D.pt")
    for path in (file, tmp_path):  # the file, or the folder with it and its contact head
        loaded = load_pretrained(path)
        assert_equal_logits(loaded.model, theirs)
    layers, hidden, heads = shape
    assert loaded.options == ModelOptions(
        num_layers=layers, hidden_size=hidden, num_attention_heads=heads, token_dropout=token_dropout
    )
    rotary = theirs.layers[0].self_attn.rot_emb.inv_freq
    assert torch.equal(loaded.model.encoder.rotary.inverse_frequencies, rotary)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fair_esm_loads_what_is_written(shape: tuple[int, int, int], tmp_path: Path) -> None:
    layers, hidden, heads = shape
    weights = random_weights(ModelOptions(num_layers=layers, hidden_size=hidden, num_attention_heads=heads))
    write_fair_esm(weights, tmp_path)
    content = torch.load(tmp_path / "esm2.pt", weights_only=False)
    with warnings.catch_warnings(record=True) as caught:
        theirs, alphabet = esm.pretrained.load_model_and_alphabet_core("esm2", content)
    assert [str(w.message) for w in caught if "Regression" in str(w.message)]  # and no other key is missing
    assert_equal_logits(weights.build(), theirs.eval())
    assert alphabet.all_toks == list(ESM2.tokens)


def test_a_round_trip_changes_no_bit(tmp_path: Path) -> None:
    weights = random_weights()
    written(weights, "fair-esm", tmp_path / "there")
    back = read_fair_esm(tmp_path / "there")
    assert same_bits(dict(back.tensors), weights.tensors)
    assert (back.options, back.tokenizer, back.notes) == (weights.options, weights.tokenizer, ())


def test_the_contact_head_beside_the_file_or_in_it_is_read(tmp_path: Path) -> None:
    theirs = their_model(SHAPES[1])
    regression = theirs.contact_head.regression
    file = publish(theirs, tmp_path / "esm2.pt")
    for _ in range(2):
        head = load_pretrained(file).contact_head
        assert torch.equal(head.regression.weight, regression.weight)
        assert torch.equal(head.regression.bias, regression.bias)
        beside = tmp_path / "esm2-contact-regression.pt"
        if beside.exists():
            content = torch.load(file, weights_only=False)
            content["model"].update(torch.load(beside)["model"])
            torch.save(content, file)
            beside.unlink()


def test_fair_esm_loads_the_contact_head_that_is_written(tmp_path: Path) -> None:
    theirs = their_model(SHAPES[1])
    weights = read_fair_esm(publish(theirs, tmp_path / "in" / "esm2.pt"))
    assert weights.notes == ()
    written(weights, "fair-esm", tmp_path / "out")
    content = torch.load(tmp_path / "out" / "esm2.pt", weights_only=False)
    regression = torch.load(tmp_path / "out" / "esm2-contact-regression.pt")
    back, _ = esm.pretrained.load_model_and_alphabet_core("esm2", content, regression)
    tokens = random_sequences(ESM2, [30], masked=0)[0][None]
    with torch.no_grad():
        assert torch.equal(back.eval().predict_contacts(tokens), theirs.predict_contacts(tokens))


def test_a_file_that_is_no_contact_head_is_told(tmp_path: Path) -> None:
    file = publish(their_model(SHAPES[1]), tmp_path / "esm2.pt")
    torch.save([1], tmp_path / "esm2-contact-regression.pt")
    with pytest.raises(UserError, match=r"esm2-contact-regression.pt: expected a contact head"):
        read_fair_esm(file)


def test_absent_frequencies_and_output_matrix_are_those_of_the_model(tmp_path: Path) -> None:
    theirs = their_model(SHAPES[1])
    file = publish(theirs, tmp_path / "esm2.pt")
    content = torch.load(file, weights_only=False)
    for key in [key for key in content["model"] if key.endswith(("inv_freq", "lm_head.weight"))]:
        del content["model"][key]
    torch.save(content, file)
    for layer in theirs.layers:
        size = len(layer.self_attn.rot_emb.inv_freq)
        layer.self_attn.rot_emb.inv_freq.copy_(10000.0 ** -(torch.arange(size) / size))
    assert_equal_logits(load_pretrained(file).model, theirs)


def edited(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        content = torch.load(file, weights_only=False)
        edit(content)
        torch.save(content, file)

    return spoil


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file cut short": (lambda file: file.write_bytes(file.read_bytes()[:9000]), "esm2.pt: cannot be read"),
    "another model of fair-esm's": (
        edited(lambda c: c.update(args=c.pop("cfg")["model"])),
        "its architecture is 'roberta_large'; of fair-esm's models only ESM-2 can be read",
    ),
    "no description": (edited(lambda c: c.pop("cfg")), "has no Namespace in 'cfg' or 'args'"),
    "no model": (edited(lambda c: c.pop("model")), "with entries 'cfg' and 'model', found other things"),
    "a state_dict": (lambda file: torch.save({"x": torch.ones(2)}, file), "found other things"),
    "a wrong shape": (
        edited(lambda c: c["model"].update({"encoder.sentence_encoder.layers.1.fc1.weight": torch.ones(9, 60)})),
        "layers.1.fc1.weight has shape [9, 60], but the configuration beside it describes [240, 60]",
    ),
    "a missing key": (
        edited(lambda c: c["model"].pop("encoder.sentence_encoder.layers.1.fc1.weight")),
        "1 tensor is missing (layers.1.fc1.weight)",
    ),
    "an unknown key": (
        edited(lambda c: c["model"].update({"encoder.sentence_encoder.embed_positions.weight": torch.ones(9, 60)})),
        "1 tensor is unknown (embed_positions.weight)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_exit_2_and_no_output(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, sentence = BAD[case]
    file = publish(their_model(SHAPES[1]), tmp_path / "in" / "esm2.pt")
    spoil(file)
    assert convert("fair-esm", "native", file, tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert sentence in printed.err
    assert not (tmp_path / "out").exists()


def test_code_in_a_file_runs_with_trust_pickle_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = publish(their_model(SHAPES[1]), tmp_path / "in" / "esm2.pt")
    marker = tmp_path / "it ran"
    edited(lambda c: c.update(task=Calls(Path.touch, marker)))(file)
    assert convert("fair-esm", "native", file, tmp_path / "out") == 2
    assert "--trust-pickle" in capsys.readouterr().err
    assert not marker.exists()
    assert convert("fair-esm", "native", file, tmp_path / "out", "--trust-pickle") == 0
    assert marker.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layernorm_epsilon": 1e-12}, "layernorm_epsilon is 1e-12"),
        ({"embedding_layernorm": True}, "embedding_layernorm is true"),
        ({"tokenizer": "tape-iupac"}, "this one has tape-iupac"),
        ({"ffn_hidden_size": 50}, "50 for 24"),
    ],
    ids=str,
)
def test_a_model_that_fair_esm_cannot_hold_is_refused(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        write_fair_esm(random_weights(replace(TINY, **options)), tmp_path)


def test_a_folder_with_another_models_configuration_is_told_as_that(tmp_path: Path) -> None:
    publish(their_model(SHAPES[2]), tmp_path / "optimizer.pt")
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match="the model_type is 't5'"):
        load_pretrained(tmp_path)


def test_a_folder_with_several_models_is_told_so(tmp_path: Path) -> None:
    for name in ("one.pt", "other.pt"):
        publish(their_model(SHAPES[2]), tmp_path / name)
    with pytest.raises(UserError, match="holds no checkpoint of a format that can be read"):
        load_pretrained(tmp_path)
    assert load_pretrained(tmp_path / "one.pt").options.hidden_size == 24
