"""The kernels for the CPU, of every set of instructions here, under AddressSanitizer and UndefinedBehaviorSanitizer."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc" / "cpu"
FLAGS = ("-std=c++17", "-O1", "-g1", "-ffp-contract=fast", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def test_every_set_of_instructions_is_right_and_stays_inside_its_memory(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    (tmp_path / "probe.cpp").write_text("int main() { return 0; }\n")
    probe = subprocess.run(["g++", *FLAGS, tmp_path / "probe.cpp", "-o", tmp_path / "probe"], capture_output=True)
    if probe.returncode or subprocess.run([tmp_path / "probe"], capture_output=True).returncode:
        pytest.skip("g++ cannot link or run with the sanitizers")
    sources = [HERE / "check_cpu_kernels.cpp", *(path for path in SOURCES.glob("*.cpp") if path.stem != "module")]
    program = tmp_path / "check"
    subprocess.run(["g++", *FLAGS, f"-I{SOURCES}", *sources, "-o", program, "-ldl", "-pthread"], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "plain" in done.stdout.splitlines()
