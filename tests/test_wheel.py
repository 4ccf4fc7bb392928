"""The wheel that users install holds all of the package, and its command runs from it."""

import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from processes import REPOSITORY, environment


def tracked_files() -> list[Path]:
    """The files of the checkout, relative to it; skips where there is none."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("the repository is no git checkout")
    names = [Path(name) for name in done.stdout.split("\0") if name]
    return [name for name in names if (REPOSITORY / name).is_file()]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, built of a copy of what git tracks."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked_files():
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / "copy" / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--wheel-dir", folder, folder / "copy"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("megatron_plm-*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "unpacked")
    return folder / "unpacked"


def run(unpacked: Path, *argv: str) -> subprocess.CompletedProcess:
    """`megatron-plm ARGV` from the wheel, in a folder without the sources."""
    code = (
        "import sys\n"
        "from megatron_plm import cli\n"
        f"assert cli.__file__.startswith({str(unpacked)!r}), cli.__file__\n"
        "sys.exit(cli.main())\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=unpacked.parent, env=environment(PYTHONPATH=str(unpacked)),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_it_holds_every_module_the_page_and_what_is_compiled(unpacked: Path) -> None:
    held = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    packages = {name for name in tracked_files() if name.parts[0] in ("megatron_plm", "tape_finetune")}
    assert {name for name in packages if name.suffix in (".py", ".html")} <= held
    assert Path("megatron_plm/report/page.html") in held
    for extension in ("megatron_plm/data/_native*.so", "megatron_plm/kernels/_cpu*.so"):
        assert len([name for name in held if name.match(extension)]) == 1
    assert {name.parts[0] for name in held if not name.parts[0].endswith(".dist-info")} == {
        "megatron_plm",
        "tape_finetune",
    }


def test_its_command_is_the_table_of_verbs(unpacked: Path) -> None:
    (entry_points,) = unpacked.glob("*.dist-info/entry_points.txt")
    assert entry_points.read_text().split("\n\n")[0].strip() == (
        "[console_scripts]\nmegatron-plm = megatron_plm.cli:main"
    )


def test_its_command_runs(unpacked: Path, tmp_path: Path) -> None:
    helped = run(unpacked, "--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "preprocess-data" in helped.stdout
    (tmp_path / "in.fasta").write_bytes(b">P1\nMKTAYIAKQR\n")
    done = run(unpacked, "preprocess-data", "--input", f"{tmp_path}/in.fasta", "--output-prefix", f"{tmp_path}/p")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "p.idx").exists()


def test_its_torchrun_names_the_process_that_failed(unpacked: Path) -> None:
    agent = [sys.executable, "-P", "-m", "megatron_plm.torchrun_agent", "--standalone", "--nproc-per-node=1"]
    done = subprocess.run(
        [*agent, "--no-python", "sh", "-c", "exit 3"], cwd=unpacked.parent, env=environment(PYTHONPATH=str(unpacked)),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    said = f"error: process 0 on {socket.gethostname()} ended with exit code 3; what it said is above"
    assert done.stderr.splitlines()[-1] == said
