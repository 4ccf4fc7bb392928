"""tools/convert_checkpoint.py: what a user sees, and what is left behind."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import megatron_sample
import pytest
import torch
from convert_sample import CARRIED, SAMPLE, TINY, convert, native_checkpoint, random_weights, written
from full_disk import full_disk
from pretraining_runs import same_bits

from megatron_plm.convert.command import main, next_command
from megatron_plm.convert.native import read_native
from megatron_plm.convert.pretrained import FORMATS, detect_format, load_pretrained
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
    assert next_command(target, Path("o ut")) == "python tape_finetune/tape_train.py --help"
    Path("examples/data/structures").mkdir(parents=True)
    assert next_command(target, Path("o ut")) == (
        "python tape_finetune/tape_train.py transformer secondary_structure --from_pretrained 'o ut' "
        "--data_dir examples/data/structures"
    )


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


def test_an_existing_output_is_kept_without_force_and_replaced_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(random_weights(), "native", tmp_path / "native")
    old = written(random_weights(seed=1), "huggingface", tmp_path / "hf")
    before = load_pretrained(old).model.state_dict()
    assert convert("native", "huggingface", source, old) == 2
    assert "exists already" in capsys.readouterr().err
    assert same_bits(load_pretrained(old).model.state_dict(), before)
    assert convert("native", "huggingface", source, old, "--force") == 0
    assert same_bits(load_pretrained(old).model.state_dict(), read_native(source).tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "native"]


def test_force_deletes_no_folder_that_is_not_a_checkpoint_and_never_the_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    source = written(random_weights(), "native", run / "checkpoints" / "step_00000001")
    theirs = megatron_sample.save(tmp_path / "a run of Megatron-LM", megatron_sample.random_model()).parent
    refused = "is no checkpoint directory"
    for output, sentence in ((run, refused), (theirs, refused), (source, "holds the input")):
        assert convert("native", "huggingface", source, output, "--force") == 2
        assert sentence in capsys.readouterr().err
        assert read_native(source).options == TINY


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def input_of_links(folder: Path) -> tuple[str, Path, Path]:
    """A directory whose weights are links into another one; the latter is the output."""
    stored = written(random_weights(), "huggingface", folder / "stored")
    linked = folder / "linked"
    linked.mkdir()
    for path in stored.iterdir():
        (linked / path.name).symlink_to(path)
    return "huggingface", linked, stored


def input_of_a_run(folder: Path) -> tuple[str, Path, Path]:
    step = written(random_weights(), "native", folder / "run" / "checkpoints" / "step_00000002")
    (step.parent / "latest").symlink_to(step.name)
    return "native", folder / "run", step


def input_of_megatron(folder: Path) -> tuple[str, Path, Path]:
    written(random_weights(SAMPLE["megatron"]), "megatron", folder / "theirs")
    release = folder / "theirs" / "release"
    (release / "config.json").write_text("{}")
    (release / "conversion.json").write_text('{"command": "", "from": "native", "to": "tape"}')
    return "megatron", folder / "theirs", release


def input_of_one_rank(folder: Path) -> tuple[str, Path, Path]:
    written(random_weights(SAMPLE["megatron"]), "megatron", folder / "theirs")
    return "megatron", folder / "theirs" / "release" / "mp_rank_00", folder / "theirs"


@pytest.mark.parametrize("case", [input_of_links, input_of_a_run, input_of_megatron, input_of_one_rank])
def test_an_output_that_holds_what_the_input_means_is_refused(
    case: Callable[[Path], tuple[str, Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, source, output = case(tmp_path)
    before = contents(tmp_path)
    assert convert(name, "native", source, output, "--force") == 2
    assert "holds the input" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_an_output_in_the_input_is_refused_and_one_in_its_run_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, run, step = input_of_a_run(tmp_path)
    for source in (run, step):
        assert convert(name, "huggingface", source, step / "export") == 2
        assert "lies in the checkpoint" in capsys.readouterr().err
        assert not (step / "export").exists()
    assert convert(name, "huggingface", run, run / "export") == 0


def test_force_deletes_no_directory_for_a_file_with_a_common_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(random_weights(), "native", tmp_path / "native")
    website, run = tmp_path / "website", tmp_path / "run"
    website.mkdir()
    written(random_weights(), "native", run / "checkpoints" / "step_00000001")
    for folder in (website, run):
        for content in ("{}", '{"model_type": "t5"}', "no JSON"):
            (folder / "config.json").write_text(content)
            before = contents(folder)
            assert convert("native", "huggingface", source, folder, "--force") == 2
            assert "is no checkpoint directory" in capsys.readouterr().err
            assert contents(folder) == before


def test_force_replaces_what_a_conversion_wrote_though_it_is_spoiled(tmp_path: Path) -> None:
    source = written(random_weights(), "native", tmp_path / "native")
    assert convert("native", "huggingface", source, tmp_path / "hf") == 0
    (tmp_path / "hf" / "config.json").write_text("no JSON")
    assert convert("native", "huggingface", source, tmp_path / "hf", "--force") == 0
    assert same_bits(load_pretrained(tmp_path / "hf").model.state_dict(), read_native(source).tensors)


def test_the_working_directory_can_be_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(random_weights(), "native", tmp_path / "native")
    old = written(random_weights(seed=1), "huggingface", tmp_path / "hf")
    monkeypatch.chdir(old)
    assert convert("native", "huggingface", source, Path(), "--force") == 0
    assert same_bits(load_pretrained(old).model.state_dict(), read_native(source).tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "native"]


@pytest.mark.parametrize("leads", [True, False])
def test_an_output_that_is_a_link_is_refused(leads: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(random_weights(), "native", tmp_path / "native")
    written(random_weights(seed=1), "huggingface", tmp_path / "hf")
    (tmp_path / "link").symlink_to("hf" if leads else "nowhere")
    before = contents(tmp_path)
    assert convert("native", "huggingface", source, tmp_path / "link", "--force") == 2
    assert "is a symbolic link" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert (tmp_path / "link").is_symlink()


def test_a_failed_conversion_with_force_leaves_the_old_output(tmp_path: Path) -> None:
    source = written(random_weights(), "huggingface", tmp_path / "hf")
    old = written(random_weights(seed=1), "native", tmp_path / "native")
    os.truncate(source / "model.safetensors", 5000)
    assert convert("huggingface", "native", source, old, "--force") == 2
    assert same_bits(read_native(old).tensors, random_weights(seed=1).tensors)


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
