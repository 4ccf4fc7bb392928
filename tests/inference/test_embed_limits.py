"""What embedding needs: memory that does not grow with the input, packages only where used, a GPU only if asked for."""

import subprocess
import sys

import pytest
from inference_sample import our_checkpoint, random_sequences, run, write_fasta
from processes import environment

PEAK = """
import resource, sys
from megatron_plm.inference.embed import main
main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("limits")
    our_checkpoint(folder / "model", num_layers=1, hidden_size=256, num_attention_heads=4, ffn_hidden_size=32)
    write_fasta(folder / "in.fasta", random_sequences([100] * 1500))
    write_fasta(folder / "few.fasta", random_sequences([100] * 100))
    return folder


@pytest.mark.parametrize("ending", ["npz", "h5", "parquet"])
def test_memory_does_not_grow_with_the_input(folder, tmp_path, ending):
    def peak(name: str) -> int:
        """Of a run in a process of its own, in bytes."""
        argv = ["--checkpoint", folder / "model", "--input", folder / name, "--output", tmp_path / f"{name}.{ending}"]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *map(str, argv), "--pooling", "residues"],
            env=environment(), capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return 1024 * int(done.stdout.splitlines()[-1])

    growth = peak("in.fasta") - peak("few.fasta")
    size = (tmp_path / f"in.fasta.{ending}").stat().st_size
    print(f"grew by {growth / 1e6:.0f} MB for {size / 1e6:.0f} MB")  # pytest -rP shows it
    assert size > 150e6
    assert growth < 0.6 * size  # a row group of Parquet, 16 MB, is held several times


@pytest.mark.parametrize(("ending", "package", "extra"), [("h5", "h5py", "hdf5"), ("parquet", "pyarrow", "parquet")])
def test_a_missing_package_is_told_before_any_work(folder, tmp_path, ending, package, extra, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    argv = ["--checkpoint", folder / "model", "--input", folder / "in.fasta", "--output", tmp_path / f"out.{ending}"]
    assert run("embed", *argv) == 2
    told = capsys.readouterr().err
    assert f"needs the package {package}: run `pip install 'megatron-plm[{extra}]'`" in told
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_is_not_there_is_told(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    argv = ["--checkpoint", folder / "model", "--input", folder / "in.fasta", "--output", tmp_path / "out.npz"]
    assert run("embed", *argv, "--device", "cuda") == 2
    assert "--device cuda: torch sees no GPU here" in capsys.readouterr().err


def test_a_full_disk_is_told_and_the_work_can_go_on(folder, tmp_path, capsys):
    argv = ["--checkpoint", folder / "model", "--input", folder / "few.fasta", "--output", tmp_path / "out.npz"]
    # The numbers are 100 kB: a limit below the size of the file that they are put together to.
    code = (
        "import resource, signal, sys\n"
        "from megatron_plm.errors import run_command\n"
        "from megatron_plm.inference.embed import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (103_000, 103_000))\n"
        "sys.exit(run_command(main))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)], env=environment(), capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "out.npz: cannot be written: File too large; free some space or choose another disk" in done.stderr
    assert not (tmp_path / "out.npz").exists()
    assert run("embed", *argv) == 0
    assert "going on behind 100 proteins" in capsys.readouterr().out
