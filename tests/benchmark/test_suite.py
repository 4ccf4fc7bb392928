"""The suites run their steps, keep what each found whatever becomes of the others, and tell it by the exit code."""

import json
import os
import subprocess
import sys
import time

import pytest
from processes import REPOSITORY

from megatron_plm.benchmark import suite, suite_steps
from megatron_plm.benchmark.checks import check
from megatron_plm.benchmark.command import SUBJECTS, main
from megatron_plm.benchmark.suite_steps import SuiteStep, cpu_steps, gpu_steps
from megatron_plm.errors import run_command


@pytest.mark.timeout(600)
def test_make_bench_gpu_runs_without_a_gpu_in_its_quick_form(tmp_path):
    out = tmp_path / "figures"
    flags = "--quick --only train-650m attention checkpoint"
    command = ["make", "bench-gpu", f"PYTHON={sys.executable}", f"OUT={out}", f"SUITE_FLAGS={flags}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    summary = json.loads((out / "summary.json").read_text())
    assert [(step["name"], step["status"]) for step in summary["steps"]] == [
        (name, "ok") for name in ("dataset", "train-650m", "attention", "checkpoint")
    ], done.stdout + done.stderr
    assert summary["results"].keys() == {"train-650m", "attention", "checkpoint"}
    assert summary["checks"].keys() == {"attention: esm2-8m", "checkpoint: tiny"}
    stall = summary["checks"]["checkpoint: tiny"]
    assert done.returncode == (0 if stall["met"] else 2), "make's 2 is the suite's 1"
    text = (out / "summary.md").read_text()
    assert "attention, esm2-8m: error of ours against float64" in text
    assert "## checkpoint" in text
    assert "attention, esm2-8m: error of ours against float64" in done.stdout
    assert (out / "logs" / "attention.txt").read_text()


def python_step(name, code, seconds=60.0):
    return SuiteStep(name, (sys.executable, "-c", code), 1.0, seconds)


def test_a_step_that_fails_or_hangs_loses_no_other(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    good = json.dumps({"checks": {"x": check("a ratio", 3.0, 2.5)}, "missed": [], "value": 1})
    low = json.dumps({"checks": {"x": check("a low ratio", 2.0, 2.5)}, "missed": ["x", "something else"]})
    steps = [
        python_step("hangs", "import subprocess, time; subprocess.Popen(['sleep', '77.5']); time.sleep(60)", 1.5),
        python_step("fails", "import sys; print('before'); sys.exit('error: a sentence')"),
        python_step("good", f"open(r'{out}/good.json', 'w').write({good!r}); print('a table')"),
        python_step("low", f"open(r'{out}/low.json', 'w').write({low!r})"),
    ]
    monkeypatch.setattr(suite, "cpu_steps", lambda *_, **__: steps)
    start = time.monotonic()
    assert main(["suite", "cpu", "--output-dir", str(out)]) == 1
    assert time.monotonic() - start < 30
    summary = json.loads((out / "summary.json").read_text())
    assert [step["status"] for step in summary["steps"]] == ["out of time", "failed", "ok", "ok"]
    assert summary["results"]["good"]["value"] == 1
    assert summary["missed_otherwise"] == ["low: something else"]
    assert "sleep\x0077.5" not in _command_lines(), "what a step started ends with it"
    printed = capsys.readouterr().out
    assert "failed after" in printed
    assert "error: a sentence" in printed
    assert [line.endswith("MISSED") for line in printed.splitlines() if "ratio" in line] == [False, True]
    assert "hangs: out of time; see logs/hangs.txt" in printed
    assert "a table" in (out / "summary.md").read_text()

    monkeypatch.setattr(suite, "cpu_steps", lambda *_, **__: steps[2:3])
    assert main(["suite", "cpu", "--output-dir", str(out)]) == 0, "into the folder of the suite before"
    assert not (out / "low.json").exists()


def _command_lines():
    lines = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/cmdline") as file:
                lines.append(file.read())
        except OSError:
            continue
    return "\n".join(lines)


def test_what_no_time_is_left_for_is_told(tmp_path, monkeypatch):
    steps = [python_step("slow", "import time; time.sleep(60)"), python_step("next", "print(1)")]
    monkeypatch.setattr(suite, "cpu_steps", lambda *_, **__: steps)
    assert main(["suite", "cpu", "--output-dir", str(tmp_path / "out"), "--seconds", "1.5"]) == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [step["status"] for step in summary["steps"]] == ["out of time", "out of time"]


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("steps_of", [cpu_steps, gpu_steps])
def test_every_step_is_a_command_that_its_subject_takes(steps_of, quick, tmp_path, monkeypatch, capsys):
    """Each command line is parsed by the subject; nothing is measured."""
    monkeypatch.setattr("megatron_plm.benchmark.command.choose_sizes", _stop)
    for step in steps_of(tmp_path, quick=quick):
        if "tools/benchmark.py" in step.words:
            argv = step.words[step.words.index("tools/benchmark.py") + 1 :]
            assert argv[0] in SUBJECTS
            with pytest.raises(_Parsed):
                main(argv)
    capsys.readouterr()


class _Parsed(Exception):
    pass


def _stop(_):
    raise _Parsed


def test_bars_of_a_step_that_is_not_judged_are_none_of_the_suites(tmp_path, monkeypatch):
    out = tmp_path / "out"
    low = json.dumps({"checks": {"x": check("a low ratio", 2.0, 2.5)}, "missed": ["x", "something else"]})
    words = (sys.executable, "-c", f"open(r'{out}/low.json', 'w').write({low!r})")
    monkeypatch.setattr(suite, "cpu_steps", lambda *_, **__: [SuiteStep("low", words, 1.0, 60.0, is_judged=False)])
    assert main(["suite", "cpu", "--output-dir", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["results"]["low"]["missed"] == ["x", "something else"]
    assert summary["checks"] == {}


def test_the_steps_fit_into_the_time_that_is_promised(tmp_path, monkeypatch):
    monkeypatch.setattr(suite_steps, "find_spec", lambda name: name != "transformers")
    steps = {"cpu": cpu_steps(tmp_path, quick=False), "gpu": gpu_steps(tmp_path, quick=False)}
    assert suite._SECONDS == {"cpu": 590.0, "gpu": 460.0}
    for name, each in steps.items():
        assert sum(step.expected for step in each) <= suite._SECONDS[name]
        assert all(step.expected < step.seconds for step in each)
    words = [word for step in steps["gpu"] for word in step.words]
    assert {f"esm2-{shape}" for shape in ("8m", "35m", "150m", "650m", "3b")} <= set(words)
    assert {"attention", "checkpoint", "data", "tests", "profile"} <= {step.name for step in steps["gpu"]}
    (tests,) = suite_steps._test_step(tmp_path)
    assert any("test_attention_benchmark.py" in word for word in tests.words)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["gpu"], "suite gpu: torch sees no GPU here; --quick tries all steps on the CPU"),
        (["cpu", "--only", "trian"], "--only trian: no such step; there are dataset, train, embed"),
        (["cpu", "--seconds", "0"], "argument --seconds: '0' is not a number of seconds above 0"),
    ],
)
def test_a_wrong_flag_is_a_sentence(flags, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run_command(main, ["suite", *flags, "--output-dir", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert expected in printed.err
    assert printed.err.count("\n") == 1


def test_a_folder_of_other_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "logs").mkdir()  # which many a folder has
    (tmp_path / "thesis.txt").write_text("mine")
    assert run_command(main, ["suite", "cpu", "--output-dir", str(tmp_path)]) == 2
    assert "holds something else than figures" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"
