"""Errors for users: one line, an exit code, the nearest known word."""

import subprocess
import sys

import pytest
from processes import environment

from megatron_plm.errors import UserError, run_command, suggestion


def test_a_user_error_is_one_line_and_exit_code_2(capsys):
    def command(argv):
        raise UserError(f"{argv[0]}: line 3 has no name; give it one")

    assert run_command(command, ["x.fasta"]) == 2
    assert capsys.readouterr() == ("", "error: x.fasta: line 3 has no name; give it one\n")


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (75, 75)])
def test_the_commands_own_code_is_kept(returned, code):
    assert run_command(lambda _: returned, []) == code


def test_an_interrupt_exits_with_130_and_no_traceback(capsys):
    def command(_):
        raise KeyboardInterrupt

    assert run_command(command, []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_other_exceptions_are_faults_of_the_program_and_pass():
    def command(argv):
        return 1 // len(argv)

    with pytest.raises(ZeroDivisionError):
        run_command(command, [])


def test_the_nearest_word_is_suggested_or_none():
    assert suggestion("hiden", ["hidden", "heads"]) == "; did you mean 'hidden'?"
    assert suggestion("zzz", ["hidden", "heads"]) == ""


def test_a_file_name_that_is_no_text_is_printed_as_its_bytes():
    command = "import sys; from megatron_plm.errors import run_command; run_command(lambda argv: print(argv[0]))"
    done = subprocess.run(
        [sys.executable, "-c", command, b"o\xffut"],
        capture_output=True,
        env=environment(PYTHONIOENCODING="utf-8:strict"),
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, b"o\xffut\n"), done.stderr
