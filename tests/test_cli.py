"""`megatron-plm VERB`: every verb answers --help, and is the same function as the file of its name."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from processes import REPOSITORY, environment

from megatron_plm import __version__, cli
from megatron_plm.cli import VERBS

ELSEWHERE = {f"tape-{verb}": f"tape_finetune/tape_{verb}.py" for verb in ("train", "eval", "predict")}
ELSEWHERE["tape-report"] = "tape_finetune/report.py"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; returns exit code, standard output and standard error."""

    def typed(*argv):
        monkeypatch.setattr(sys, "argv", ["megatron-plm", *argv])
        try:
            code = cli.main()
        except SystemExit as stop:  # argparse's --help
            code = stop.code
        return code, *capsys.readouterr()

    return typed


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_answers_help(run, verb):
    code, output, errors = run(verb, "--help")
    assert (code, errors) == (0, "")
    assert output.startswith("usage: ")
    assert len(output.splitlines()) > 3


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_the_overview_lists_every_verb(run, argv):
    code, output, _ = run(*argv)
    assert code == 0
    for verb, (_, text) in VERBS.items():
        assert f"  {verb} " in output
        assert text in output


def test_the_version_is_the_packages(run):
    assert run("--version") == (0, f"{__version__}\n", "")


def test_an_unknown_verb_exits_with_2_and_names_the_nearest(run):
    code, output, errors = run("pretrian", "--lr", "1")
    assert (code, output) == (2, "")
    assert errors.startswith("error: unknown verb 'pretrian'; did you mean 'pretrain'?")
    assert errors.count("\n") == 1


def test_a_wrong_flag_of_a_verb_exits_with_2(run):
    code, _, errors = run("pretrain", "--hiden-size", "3")
    assert code == 2
    assert "--hidden-size" in errors


def verb_file(verb: str) -> Path:
    return REPOSITORY / ELSEWHERE.get(verb, f"tools/{verb.replace('-', '_')}.py")


def test_every_tool_has_a_verb():
    assert {path.stem for path in (REPOSITORY / "tools").glob("*.py")} == {
        verb_file(verb).stem for verb in VERBS if verb != "pretrain" and verb not in ELSEWHERE
    }


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "pretrain"])
def test_a_verb_and_its_file_are_the_same_function(verb):
    spec = importlib.util.spec_from_file_location(f"file_of_{verb.replace('-', '_')}", verb_file(verb))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main is importlib.import_module(VERBS[verb][0]).main


def test_a_tool_run_as_a_file_reports_errors_in_one_line():
    done = subprocess.run(
        [sys.executable, "tools/preprocess_data.py", "--input", "no/such.fasta", "--output-prefix", "no/where"],
        capture_output=True, text=True, timeout=120, cwd=REPOSITORY, env=environment(),
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
