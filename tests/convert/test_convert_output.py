"""Where tools/convert_checkpoint.py writes: what --force replaces, and what it must never touch."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import megatron_sample
import pytest
from convert_sample import SAMPLE, TINY, convert, random_weights, written
from pretraining_runs import same_bits
from processes import environment

from megatron_plm.convert.native import read_native
from megatron_plm.convert.pretrained import load_pretrained


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


def test_force_deletes_no_checkpoint_with_a_folder_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(random_weights(), "native", tmp_path / "native")
    output = written(random_weights(), "huggingface", tmp_path / "trainer")
    kept = output / "checkpoint-500" / "model.safetensors"
    kept.parent.mkdir()
    kept.write_text("weeks of work")
    assert convert("native", "huggingface", source, output, "--force") == 2
    assert f"{output} holds checkpoint-500, a folder that is no part of the checkpoint" in capsys.readouterr().err
    assert kept.read_text() == "weeks of work"


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


IN_THE_MIDDLE = """
import os, signal, sys
sys.path[:0] = sys.argv[3:]
from convert_sample import convert
from pathlib import Path
from megatron_plm.convert import tensor_files
write = tensor_files._SafetensorsFile.write
def written(file, key, tensor):
    write(file, key, tensor)
    if "layer.1" in key:
        print("in the middle", flush=True)
        signal.pause()
tensor_files._SafetensorsFile.write = written
convert("native", "huggingface", Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_conversion_excludes_another_and_killed_leaves_nothing_that_the_next_does_not_remove(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(random_weights(), "native", tmp_path / "native")
    out = tmp_path / "ünï çødé 蛋白"
    command = [sys.executable, "-c", IN_THE_MIDDLE, source, out, *sys.path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "in the middle\n"
            assert convert("native", "huggingface", source, out) == 2
            message = capsys.readouterr().err
            assert (message.count("\n"), f"{out}: another process is writing it" in message) == (1, True)
            assert not out.exists()
        finally:
            process.kill()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"native", f".{out.name}.{process.pid}.tmp", f".{out.name}.lock"}
    assert convert("native", "huggingface", source, out) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", out.name]
    assert same_bits(load_pretrained(out).model.state_dict(), read_native(source).tensors)


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


@pytest.mark.parametrize("name", ["x" * 250, "file/x"])
def test_an_output_that_cannot_be_made_is_told(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(random_weights(), "native", tmp_path / "native")
    (tmp_path / "file").write_text("")
    assert convert("native", "huggingface", source, tmp_path / name) == 2
    message = capsys.readouterr().err
    assert (message.count("\n"), f"{name}: cannot be written" in message) == (1, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "native"]
