"""tools/convert_checkpoint.py: what a user sees, and what is left behind."""

import contextlib
import json
import pickle
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from convert_sample import TINY, native_checkpoint, options_of, random_weights, same_tensors
from safetensors.torch import load_file, save_file
from test_native import Payload

from megatron_plm.convert.command import main
from megatron_plm.convert.huggingface import write_huggingface
from megatron_plm.convert.native import read_native
from megatron_plm.convert.pretrained import FORMATS, detect_format, load_pretrained
from megatron_plm.convert.tape import write_proteinlm_tape
from megatron_plm.convert.weights import Weights
from megatron_plm.errors import UserError, run_command

REPOSITORY = Path(__file__).parents[2]
IUPAC = options_of((2, 24, 3, 96), tokenizer="tape-iupac")


def convert(source: str, target: str, before: Path, after: Path, *flags: str) -> int:
    argv = ["--from", source, "--to", target, "--input", str(before), "--output", str(after), *flags]
    return run_command(main, argv)


def written(weights: Weights, format_name: str, path: Path) -> Path:
    path.mkdir(parents=True)
    FORMATS[format_name].write(weights, path, "float32")
    return path


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_every_format_converts_to_every_other_and_back_to_the_same_bits(
    source: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = random_weights(IUPAC)
    start = written(weights, source, tmp_path / "start")
    assert convert(source, target, start, tmp_path / "there") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"wrote {tmp_path / 'there'}: {target}, ")
    assert lines[-1].startswith("next: python ")
    assert detect_format(tmp_path / "there") == target
    assert convert(target, "native", tmp_path / "there", tmp_path / "back") == 0
    back = read_native(tmp_path / "back")
    assert same_tensors(back.tensors, weights.tensors)
    assert (back.options, back.tokenizer) == (weights.options, weights.tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "start", "there"]  # nothing left beside


def test_what_is_not_carried_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native_checkpoint(tmp_path / "native")
    assert convert("native", "proteinlm-tape", tmp_path / "native", tmp_path / "tape") == 0
    assert "not carried: the rows of ., -, <null_1>: TAPE's" in capsys.readouterr().out


def test_the_number_of_parameters_is_that_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = native_checkpoint(tmp_path / "native")
    assert convert("native", "huggingface", tmp_path / "native", tmp_path / "hf") == 0
    count = sum(parameter.numel() for parameter in weights.build().parameters())
    assert f" {count:,} parameters, float32" in capsys.readouterr().out


def test_the_tool_runs_and_the_command_it_prints_runs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    native_checkpoint(tmp_path / "it's native")
    tool = [sys.executable, str(REPOSITORY / "tools" / "convert_checkpoint.py")]
    flags = ["--from", "native", "--to", "huggingface", "--input", "it's native", "--output", 'a "b" it\'s']
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([*tool, *flags], **run)
    assert (done.returncode, done.stderr) == (0, "")
    command = done.stdout.splitlines()[-1].removeprefix("next: ")
    assert shlex.split(command)[:2] == ["python", "-c"]
    shown = subprocess.run(["bash", "-c", command], **run)
    assert shown.stdout.strip() == "torch.Size([1, 12, 33])", shown.stderr


# What is wrong with the input, and what the one sentence must say. Each changes a converted directory.


def edit_config(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


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
    "another architecture": (lambda d: edit_config(d, model_type="bert"), "the model_type is 'bert'"),
    "stock TAPE's configuration": (
        lambda d: edit_config(d, model_type=None),
        "as those of stock TAPE and of ProteinLM",
    ),
    "another vocabulary": (lambda d: (d / "vocab.txt").write_text("A\nC\n"), "2 tokens for a vocab_size of 33"),
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
    payload = {"mlm.bias": torch.zeros(30), "x": Payload(marker)}
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


@pytest.mark.parametrize("source", FORMATS)
def test_a_wrong_from_is_told_the_right_one(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(random_weights(), source, tmp_path / "in")
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


def test_values_beyond_float16_are_counted_and_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = random_weights()
    weights.tensors["head.dense.weight"][0, :3] = torch.tensor([7e4, -1e6, 65504.0])
    weights.tensors["head.bias"][0] = 1e5
    source = written(weights, "native", tmp_path / "native")
    for target in ("huggingface", "proteinlm-tape"):
        assert convert("native", target, source, tmp_path / "out", "--dtype", "float16") == 2
        message = capsys.readouterr().err
        assert "3 values are beyond the range of float16, most of them in" in message
        assert "dense.weight" in message
        assert not (tmp_path / "out").exists()
        assert convert("native", target, source, tmp_path / f"{target} bf16", "--dtype", "bfloat16") == 0


def test_a_native_output_is_float32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(random_weights(), "huggingface", tmp_path / "hf")
    assert convert("huggingface", "native", source, tmp_path / "out", "--dtype", "float16") == 2
    assert "native checkpoints hold float32 weights" in capsys.readouterr().err


def test_an_existing_output_is_kept_without_force_and_replaced_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(random_weights(), "native", tmp_path / "native")
    old = written(random_weights(seed=1), "huggingface", tmp_path / "hf")
    before = load_pretrained(old).model.state_dict()
    assert convert("native", "huggingface", source, old) == 2
    assert "exists already" in capsys.readouterr().err
    assert same_tensors(load_pretrained(old).model.state_dict(), before)
    assert convert("native", "huggingface", source, old, "--force") == 0
    assert same_tensors(load_pretrained(old).model.state_dict(), read_native(source).tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "native"]


def test_force_deletes_no_folder_that_is_not_a_checkpoint_and_never_the_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    source = written(random_weights(), "native", run / "checkpoints" / "step_00000001")
    for output, sentence in ((run, "is no checkpoint directory"), (source, "holds the input")):
        assert convert("native", "huggingface", source, output, "--force") == 2
        assert sentence in capsys.readouterr().err
        assert read_native(source).options == TINY


def test_a_failed_conversion_with_force_leaves_the_old_output(tmp_path: Path) -> None:
    source = written(random_weights(), "huggingface", tmp_path / "hf")
    old = written(random_weights(seed=1), "native", tmp_path / "native")
    cut(source / "model.safetensors", 5000)
    assert convert("huggingface", "native", source, old, "--force") == 2
    assert same_tensors(read_native(old).tensors, random_weights(seed=1).tensors)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Writes beyond 20 kB of a file fail, as on a full disk. Not a fixture: pytest's own log would be such a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("target", FORMATS)
def test_a_full_disk_leaves_no_output(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(random_weights(), "native", tmp_path / "native")
    with full_disk():
        assert convert("native", target, source, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert f"{tmp_path / 'out'}: cannot be written" in message
    assert message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


def test_an_output_folder_without_write_permission_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(random_weights(), "native", tmp_path / "native")
    (tmp_path / "file").write_text("")
    assert convert("native", "huggingface", source, tmp_path / "file" / "out") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_flags_that_do_not_exist_are_a_sentence() -> None:
    with pytest.raises(UserError, match="--from"):
        main(["--to", "native", "--input", "a", "--output", "b"])
    assert run_command(main, ["--from", "pdf", "--to", "native", "--input", "a", "--output", "b"]) == 2


def test_reading_the_flags_imports_no_transformers() -> None:
    code = "import sys, megatron_plm.convert.command; print(sorted({'transformers', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n"
