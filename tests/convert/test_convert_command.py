"""tools/convert_checkpoint.py: what a user sees, and what is left behind."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convert_sample import CARRIED, SAMPLE, convert, native_checkpoint, random_weights, written
from full_disk import full_disk
from pretraining_runs import same_bits

from megatron_plm.convert.command import main, next_command
from megatron_plm.convert.native import read_native
from megatron_plm.convert.pretrained import FORMATS, detect_format
from megatron_plm.errors import UserError, run_command

REPOSITORY = Path(__file__).parents[2]
PAIRS = {
    f"{source} to {target}, model {number}": (options, source, target)
    for number, (options, names) in enumerate(CARRIED)
    for source in names
    for target in names
}


def test_every_format_is_tried() -> None:
    assert {target for _, _, target in PAIRS.values()} == FORMATS.keys()


@pytest.mark.parametrize("pair", PAIRS)
def test_every_format_converts_to_every_other_and_back_to_the_same_bits(
    pair: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, source, target = PAIRS[pair]
    weights = random_weights(options)
    start = written(weights, source, tmp_path / "start")
    assert convert(source, target, start, tmp_path / "there") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"wrote {tmp_path / 'there'}: {target}, ")
    assert lines[-1].startswith("next: python ")
    assert detect_format(tmp_path / "there") == target
    assert (tmp_path / "there" / FORMATS[target].mark).is_file()
    files = {path.name for path in (tmp_path / "there").iterdir()}
    assert files == {path.name for path in written(weights, target, tmp_path / "plain").iterdir()} | {"conversion.json"}
    shutil.rmtree(tmp_path / "plain")
    assert convert(target, "native", tmp_path / "there", tmp_path / "back") == 0
    back = read_native(tmp_path / "back")
    assert same_bits(back.tensors, weights.tensors)
    assert (back.options, back.tokenizer) == (weights.options, weights.tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "start", "there"]  # nothing left beside


def test_a_conversion_records_how_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native_checkpoint(tmp_path / "it's native")
    monkeypatch.chdir(tmp_path)
    records = []
    for _ in range(2):
        assert convert("native", "proteinlm-tape", Path("it's native"), Path("out/tape"), "--force") == 0
        records.append((tmp_path / "out" / "tape" / "conversion.json").read_bytes())
    assert records[0] == records[1]
    flags = ["--from", "native", "--to", "proteinlm-tape", "--input", "it's native", "--output", "out/tape", "--force"]
    assert json.loads(records[0]) == {
        "command": shlex.join(["python", "tools/convert_checkpoint.py", *flags]),
        "from": "native",
        "to": "proteinlm-tape",
        "input": "it's native",
    }


@pytest.mark.parametrize("target", ["native", "proteinlm-tape"])
def test_the_next_command_names_the_example_data_only_where_they_are(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    program = ["python", os.path.relpath(REPOSITORY / "tape_finetune" / "tape_train.py")]
    assert shlex.split(next_command(target, Path("o ut"))) == [*program, "--help"]
    Path("examples/data/structures").mkdir(parents=True)
    flags = ["--from_pretrained", "o ut", "--data_dir", "examples/data/structures"]
    command = ["transformer", "secondary_structure", *flags]
    assert shlex.split(next_command(target, Path("o ut"))) == [*program, *command]
    monkeypatch.chdir(REPOSITORY)
    assert shlex.split(next_command(target, Path("o ut"))) == ["python", "tape_finetune/tape_train.py", *command]


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


def test_values_beyond_float16_are_counted_and_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for target in FORMATS.keys() - {"native"}:
        weights = random_weights(SAMPLE[target])
        weights.tensors["head.dense.weight"][0, :3] = torch.tensor([7e4, -1e6, 65504.0])
        weights.tensors["head.bias"][0] = 1e5
        source = written(weights, "native", tmp_path / f"native for {target}")
        assert convert("native", target, source, tmp_path / "out", "--dtype", "float16") == 2
        message = capsys.readouterr().err
        assert "3 values are beyond the range of float16, most of them in" in message
        assert "dense.weight" in message
        assert not (tmp_path / "out").exists()
        assert convert("native", target, source, tmp_path / f"{target} bf16", "--dtype", "bfloat16") == 0


@pytest.mark.parametrize(
    ("source", "target", "flags", "sentence"),
    [
        ("native", "proteinlm-tape", ["--shard-size", "1GB"], "--shard-size: --to proteinlm-tape has no use for it"),
        ("native", "fair-esm", ["--target-tensor-parallel-size", "2"], "-size: --to fair-esm has no use for it"),
        ("native", "huggingface", ["--trust-pickle"], "--trust-pickle: --from native has no use for it"),
    ],
)
def test_a_flag_that_the_format_has_no_use_for_is_refused(
    source: str, target: str, flags: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(random_weights(), source, tmp_path / "in")
    assert convert(source, target, path, tmp_path / "out", *flags) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_native_output_is_float32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(random_weights(), "huggingface", tmp_path / "hf")
    assert convert("huggingface", "native", source, tmp_path / "out", "--dtype", "float16") == 2
    assert "native checkpoints hold float32 weights" in capsys.readouterr().err


@pytest.mark.parametrize("target", FORMATS)
def test_a_full_disk_leaves_no_output(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(random_weights(SAMPLE[target]), "native", tmp_path / "native")
    with full_disk():
        assert convert("native", target, source, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert f"{tmp_path / 'out'}: cannot be written" in message
    assert message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


ON_A_SMALL_DISK = """
import subprocess, sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
folder, formats = Path(sys.argv[1]), sys.argv[2].split(",")
disk = folder / "disk"
mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "none", str(disk)]
if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
    sys.exit(75)
from convert_sample import convert
for name in formats:
    assert convert("native", name, folder / name, disk / "out") == 2, name
    assert list(disk.iterdir()) == [], name
"""


def test_a_disk_that_fills_up_leaves_no_output(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("mounting a small disk takes util-linux")
    for target in FORMATS:  # of about 64 kB
        written(random_weights(SAMPLE[target]), "native", tmp_path / target)
    (tmp_path / "disk").mkdir()
    command = [sys.executable, "-c", ON_A_SMALL_DISK, tmp_path, ",".join(FORMATS), *sys.path]
    apart = ["unshare", "--user", "--map-root-user", "--mount"]
    done = subprocess.run([*apart, *command], capture_output=True, text=True, timeout=200)
    if done.returncode == 75 or "unshare: " in done.stderr:
        pytest.skip("this system lets no user mount a disk")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    lines = done.stderr.splitlines()
    sentence = "cannot be written: No space left on device; free some space or choose another disk"
    assert [line.partition("/out: ")[2] for line in lines] == [sentence] * len(FORMATS), lines


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
