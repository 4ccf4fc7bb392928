"""What tools/convert_checkpoint.py says of inputs that are wrong or damaged: one sentence, and no output."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convert_sample import SAMPLE, convert, random_weights, written
from harmful_pickle import Calls
from peer_comparison import change_config
from safetensors.torch import load_file, save_file

from megatron_plm.convert.huggingface import write_huggingface
from megatron_plm.convert.pretrained import FORMATS, load_pretrained
from megatron_plm.convert.proteinlm_tape import write_proteinlm_tape
from megatron_plm.errors import UserError


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def pickled(directory: Path, content: object) -> None:
    (directory / "model.safetensors").unlink()
    torch.save(content, directory / "pytorch_model.bin")


QUERY = "esm.encoder.layer.1.attention.self.query.weight"


# what is wrong with the input, and what the one sentence must say; each changes a converted directory
BAD_HUGGINGFACE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing key": (lambda d: edit_tensors(d, lambda t: t.pop(QUERY)), f"1 tensor is missing ({QUERY})"),
    "an unknown key": (
        lambda d: edit_tensors(d, lambda t: t.update({"classifier.weight": torch.ones(2)})),
        "1 tensor is unknown (classifier.weight)",
    ),
    "a wrong shape": (
        lambda d: edit_tensors(d, lambda t: t.update({QUERY: torch.ones(24, 30)})),
        f"{QUERY} has shape [24, 30], but the configuration beside it describes [24, 24]",
    ),
    "a type that is no weight": (
        lambda d: edit_tensors(d, lambda t: t.update({QUERY: torch.ones(24, 24, dtype=torch.int64)})),
        f"{QUERY} has type torch.int64",
    ),
    "a shortened file": (lambda d: cut(d / "model.safetensors", 5000), "model.safetensors: cannot be read"),
    "an empty file": (lambda d: cut(d / "model.safetensors", 0), "model.safetensors: cannot be read"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no weights; expected model.safetensors"),
    "no configuration": (lambda d: (d / "config.json").unlink(), "holds no checkpoint"),
    "a configuration that is no JSON": (lambda d: cut(d / "config.json", 40), "config.json: not valid JSON"),
    "a configuration that is a list": (lambda d: (d / "config.json").write_text("[]"), "expected a JSON object"),
    "another architecture": (lambda d: change_config(d, model_type="t5"), "the model_type is 't5'"),
    "a configuration without model_type": (
        lambda d: change_config(d, model_type=None),
        "the names of neither stock TAPE nor ProteinLM's fork",
    ),
    "a huge size that the heads do not share": (
        lambda d: change_config(d, hidden_size=2**40, num_attention_heads=12),
        "--num-attention-heads 12; head counts that do: 4, 8, 16",
    ),
    "an integer beyond all floats": (
        lambda d: change_config(d, layer_norm_eps=10**400),
        "layer_norm_eps is an integer beyond the range of a float",
    ),
    "an infinite epsilon": (
        lambda d: change_config(d, layer_norm_eps=float("inf")),
        "--layernorm-epsilon must be finite, not inf",
    ),
    "an index of shards that names no file": (
        lambda d: (
            (d / "model.safetensors").rename(d / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
        ),
        "model.safetensors.index.json: cannot be read (weight_map names what is no file)",
    ),
    "another vocabulary": (lambda d: (d / "vocab.txt").write_text("A\nC\n"), "2 tokens for a vocab_size of 33"),
    "a vocab.txt that is a folder": (
        lambda d: ((d / "vocab.txt").unlink(), (d / "vocab.txt").mkdir()),
        "vocab.txt: cannot be read: Is a directory",
    ),
    "a tokenizer.json that is a folder": (
        lambda d: ((d / "vocab.txt").unlink(), (d / "tokenizer.json").mkdir()),
        "tokenizer.json: lists no tokens by id",
    ),
    "a config.json that is a folder": (
        lambda d: ((d / "config.json").unlink(), (d / "config.json").mkdir()),
        "holds no checkpoint",
    ),
    **{
        f"half a contact head, its {kind}": (
            lambda d, kind=kind, shape=shape: edit_tensors(
                d, lambda t: t.update({f"esm.contact_head.regression.{kind}": torch.ones(shape)})
            ),
            f"has esm.contact_head.regression.{kind} and no esm.contact_head.regression.{other}, one half",
        )
        for kind, other, shape in (("weight", "bias", (1, 6)), ("bias", "weight", (1,)))
    },
    "an index that names a missing shard": (
        lambda d: (
            (d / "model.safetensors").unlink(),
            (d / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
            ),
        ),
        "shard model-00001-of-00002.safetensors, which model.safetensors.index.json lists, is missing",
    ),
    "weights that are a link to itself": (
        lambda d: ((d / "model.safetensors").unlink(), (d / "model.safetensors").symlink_to("model.safetensors")),
        "no weights; expected model.safetensors",
    ),
    "weights that are a folder": (
        lambda d: ((d / "model.safetensors").unlink(), (d / "model.safetensors").mkdir()),
        "no weights; expected model.safetensors",
    ),
    "a header of safetensors that promises more than there is": (
        lambda d: (d / "model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}"),
        "model.safetensors: cannot be read",
    ),
    "an empty configuration": (lambda d: (d / "config.json").write_bytes(b""), "config.json: not valid JSON"),
    "a configuration in other bytes": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe{}"), "not valid JSON"),
    "no layers": (lambda d: change_config(d, num_hidden_layers=0), "num-layers"),
    "layers without end": (lambda d: change_config(d, num_hidden_layers=10**7), "a model of 10,000,000 layers"),
    "less than no layers": (lambda d: change_config(d, num_hidden_layers=-1), "num-layers"),
    "a truth for a number": (lambda d: change_config(d, hidden_size=True), "hidden_size is true"),
    "a vocabulary with a token twice": (
        lambda d: (d / "vocab.txt").write_text((d / "vocab.txt").read_text().replace("Z", "O")),
        "33 tokens for a vocab_size of 33",
    ),
    "a pickle of other things": (lambda d: pickled(d, {"weights": [1, 2]}), "expected tensors by name"),
}


@pytest.mark.parametrize("case", BAD_HUGGINGFACE)
def test_bad_input_is_one_sentence_exit_2_and_no_output(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, sentence = BAD_HUGGINGFACE[case]
    source = tmp_path / "source"
    source.mkdir()
    write_huggingface(random_weights(), source, "float32")
    spoil(source)
    assert convert("huggingface", "native", source, tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert sentence in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_code_in_a_pickle_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "it ran"
    payload = {"mlm.bias": torch.zeros(30), "x": Calls(Path.touch, marker)}
    for number, save in enumerate((torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2)))):
        source = tmp_path / f"source{number}"
        source.mkdir()
        write_proteinlm_tape(random_weights(), source, "float32")
        save(payload, source / "pytorch_model.bin")
        assert convert("proteinlm-tape", "native", source, tmp_path / "out") == 2
        assert "would run code (nothing of it was run)" in capsys.readouterr().err
        assert not marker.exists()
        assert not (tmp_path / "out").exists()
    pickle.loads(pickle.dumps(payload))
    assert marker.exists()  # a careless reader would have run it


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_that_is_refused_is_one_sentence_without_warnings(
    zipped: bool, protocol: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    source = written(random_weights(), "proteinlm-tape", tmp_path / "tape")
    content = {"x": Calls(Path.touch, tmp_path / "it ran")}
    path = source / "pytorch_model.bin"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert convert("proteinlm-tape", "native", source, tmp_path / "out") == 2
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    recorded = [warning for warning in recwarn if "torch.jit" not in str(warning.message)]
    recwarn.clear()
    assert convert("proteinlm-tape", "native", source, tmp_path / "out") == 2
    assert [str(warning.message) for warning in (*recorded, *recwarn)] == []
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize("zipped", [False, True])
def test_a_pytorch_file_cut_short_anywhere_is_a_sentence(zipped: bool, tmp_path: Path) -> None:
    source = written(random_weights(), "proteinlm-tape", tmp_path / "tape")
    path = source / "pytorch_model.bin"
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    # the head of a legacy file is small pickles, where every byte counts
    for size in [*range(0, 400), *range(400, len(whole), len(whole) // 40)]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"pytorch_model\.bin: (is damaged|cannot be read)") as caught:
            load_pretrained(source)
        assert "\n" not in str(caught.value)
        assert ". " not in str(caught.value), "torch's advice is no part of the sentence"


@pytest.mark.parametrize("source", FORMATS)
def test_a_wrong_from_is_told_the_right_one(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(random_weights(SAMPLE[source]), source, tmp_path / "in")
    for wrong in set(FORMATS) - {source}:
        assert convert(wrong, "native", path, tmp_path / "out") == 2
        assert f"holds a {source} checkpoint, not {wrong}; give --from {source}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_input_that_is_nothing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, sentence in (("file", "is a file"), ("absent", "does not exist"), ("empty", "holds no checkpoint")):
        assert convert("native", "huggingface", tmp_path / name, tmp_path / "out") == 2
        assert sentence in capsys.readouterr().err


def test_half_a_contact_head_of_fair_esm_and_of_a_native_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = random_weights()
    half = replace(weights, tensors={**weights.tensors, "contact_head.regression.weight": torch.ones(1, 6)})
    sentence = "has contact_head.regression.weight and no contact_head.regression.bias, one half of a contact head"
    source = written(weights, "fair-esm", tmp_path / "fair-esm")
    torch.save({"model": {"contact_head.regression.weight": torch.ones(1, 6)}}, source / "esm2-contact-regression.pt")
    written(half, "native", tmp_path / "native")
    for name in ("fair-esm", "native"):
        assert convert(name, "huggingface", tmp_path / name, tmp_path / "out") == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
