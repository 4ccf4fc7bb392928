"""The data benchmark measures what it says: the same work on all sides, in processes of their own."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_plm.benchmark.command import main
from megatron_plm.benchmark.data import BARS, SEQ_LENGTHS, _checks, copy_records, missed, repeat_fasta
from megatron_plm.benchmark.data_side import SIDES, _sequences
from megatron_plm.benchmark.processes import run_side
from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.errors import UserError, run_command
from megatron_plm.tokenizers import get_tokenizer

PROTEINS = [">a\nMKTAYIAKQR\nQISFVKSHFS\n", ">b x\nmkvjlag\n", ">c\nACDEFGHIKLMNPQRSTVWY"]


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "in.fasta.gz"
    path.write_bytes(gzip.compress("".join(PROTEINS).encode()))
    return path


def test_the_input_is_repeated_whole(fasta: Path, tmp_path: Path) -> None:
    size = repeat_fasta(str(fasta), tmp_path / "all", 150)
    text = (tmp_path / "all").read_text()
    assert text == ("".join(PROTEINS) + "\n") * 3
    assert size == len(text)
    assert copy_records(tmp_path / "all", tmp_path / "part", 30) == len(PROTEINS[0] + PROTEINS[1])
    assert (tmp_path / "part").read_text() == PROTEINS[0] + PROTEINS[1]


@pytest.mark.filterwarnings("ignore:::megatron")
def test_all_sides_do_the_same_work(fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "all"
    repeat_fasta(str(fasta), path, 150)
    assert list(_sequences(str(path)))[:3] == ["MKTAYIAKQRQISFVKSHFS", "mkvjlag", "ACDEFGHIKLMNPQRSTVWY"]
    expected = [get_tokenizer("esm2").encode(sequence).tolist() for sequence in _sequences(str(path))]
    for side, flags in {"ours": ["1"], "add_document": [], "add_item": []}.items():
        figures = SIDES[side](str(path), str(tmp_path / side), *flags)
        assert 0 < figures["seconds"] < 60
        assert [tokens.tolist() for tokens in IndexedDataset(tmp_path / side)] == expected
    assert (tmp_path / "ours.bin").read_bytes() == (tmp_path / "add_document.bin").read_bytes()
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "add_document.idx").read_bytes()
    capsys.readouterr()


def test_a_sides_memory_is_seen_and_its_failure_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "side.py").write_text(
        "import json, sys, time\n"
        "if sys.argv[1] == 'fail': sys.exit('error: a sentence')\n"
        "held = b'x' * (int(sys.argv[1]) * 10**6)\n"
        "time.sleep(0.3)\n"
        "print('a line'); print(json.dumps({'size': len(held)}))\n"
    )
    small, large = (run_side("side", [megabytes], cores=1) for megabytes in (1, 80))
    assert large["size"] == 80 * 10**6
    assert 70e6 < large["peak_memory"] - small["peak_memory"] < 90e6
    with pytest.raises(UserError, match=r"^fail: a sentence$"):
        run_side("side", ["fail"], cores=1)


def found(**changes: float) -> dict[str, dict[str, float]]:
    """One round in which every bar is just reached, changed as said (`side__key`)."""
    sides = {
        "one_worker": {"megabytes_per_second": 200.0, "peak_memory": 100e6},
        "two_workers": {"megabytes_per_second": 340.0, "peak_memory": 300e6},
        "add_document": {"megabytes_per_second": 200 / 15},
        "add_item": {"megabytes_per_second": 7.0},
        **{f"loader_{n}": {"tokens_per_second": 5e6, "fill": 0.98, "first_batch_seconds": 0.1} for n in SEQ_LENGTHS},
    }
    for name, value in changes.items():
        side, key = name.split("__")
        sides[side][key] = value
    return sides


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"one_worker__megabytes_per_second": 199.0}, ["one_worker", "against_peer"]),
        ({"add_item__megabytes_per_second": 14.0}, ["against_peer"]),  # the faster of the two counts
        ({"two_workers__megabytes_per_second": 339.0}, ["second_worker"]),
        ({"two_workers__peak_memory": 301e6}, ["peak_memory"]),
        ({"loader_2176__tokens_per_second": 4.9e6}, ["loader_2176"]),
        ({"loader_1024__fill": 0.979}, ["fill_1024"]),
    ],
)
def test_every_bar_is_checked(changes: dict[str, float], expected: list[str]) -> None:
    checks = _checks([found(**changes)] * 3)
    assert missed({"checks": checks, "two_workers_write_the_same": True}) == expected
    assert checks.keys() == BARS.keys()


def test_one_bad_round_of_three_changes_no_median_but_the_peak_of_memory() -> None:
    bad = found(one_worker__megabytes_per_second=1.0, one_worker__peak_memory=1e9)
    checks = _checks([found(), bad, found()])
    assert [name for name, check in checks.items() if not check["met"]] == ["peak_memory"]
    assert missed({"checks": {}, "two_workers_write_the_same": False}) == ["two_workers_write_the_same"]


def test_without_the_peer_all_but_its_bar_is_there() -> None:
    side = found()
    del side["add_document"], side["add_item"]
    assert _checks([side]).keys() == BARS.keys() - {"against_peer"}


def test_memory_that_the_system_does_not_tell_is_no_bar_reached() -> None:
    side = found()
    side["one_worker"]["peak_memory"] = None
    assert not _checks([side])["peak_memory"]["met"]


def test_the_command_writes_the_figures_of_this_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    proteins = ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), n)) for n in rng.integers(30, 600, 400)]
    path, output = tmp_path / "in.fasta", tmp_path / "data.json"
    path.write_text("".join(f">p{i}\n{protein}\n" for i, protein in enumerate(proteins)))
    sizes = ["--megabytes", "2", "--peer-megabytes", "1", "--rounds", "1", "--seconds", "0.2"]
    assert main(["data", "--input", str(path), *sizes, "--quick", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    (only,) = result["rounds"]
    assert result["bytes"]["ours"] >= 2_000_000 > result["bytes"]["peer"] >= 1_000_000
    speed = result["bytes"]["ours"] / 1e6 / only["one_worker"]["seconds"]
    assert result["checks"]["one_worker"]["value"] == pytest.approx(speed)
    assert result["two_workers_write_the_same"]
    assert 0.9 < only["loader_1024"]["fill"] <= 1
    assert only["loader_2176"]["first_batch_seconds"] > 0
    printed = capsys.readouterr()
    for text in (
        "preprocess_data, 2 workers",
        "megatron-core, add_item",
        "open and first batch, rows of 2,176",
        "at most",
    ):
        assert text in printed.out
    assert "round 1 of 1: one_worker" in printed.err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--megabytes", "0"], "argument --megabytes: '0' is not a whole number of 1 or more"),
        (["--seconds", "-1"], "argument --seconds: '-1' is not a number of seconds above 0"),
        (["--output", "absent/data.json"], "--output absent/data.json: there is no folder absent"),
        (["--input", "absent.fasta", "--quick"], "'absent.fasta' does not exist"),
    ],
)
def test_a_wrong_flag_is_a_sentence(
    flags: list[str],
    expected: str,
    fasta: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megatron_plm.benchmark.data.run_side", lambda *_, **__: pytest.fail("the measurement began"))
    assert run_command(main, ["data", "--input", str(fasta), *flags]) == 2
    printed = capsys.readouterr()
    assert expected in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)


def test_without_megatron_core_the_way_to_install_it_is_named(
    fasta: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_plm.benchmark.data.find_spec", lambda _: None)
    assert run_command(main, ["data", "--input", str(fasta)]) == 2
    assert "pip install --no-deps megatron-core" in capsys.readouterr().err


def test_quick_makes_only_the_sizes_smaller_that_were_not_typed(
    fasta: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def measure(options: object, _: object) -> dict:
        seen.append((options.megabytes, options.peer_megabytes, options.rounds, options.seconds))
        raise UserError("enough")

    monkeypatch.setattr("megatron_plm.benchmark.data.measure", measure)
    for flags in ([], ["--quick"], ["--quick", "--rounds", "7"]):
        assert run_command(main, ["data", "--input", str(fasta), *flags]) == 2
    assert seen == [(1024, 64, 3, 5.0), (32, 4, 2, 1.0), (32, 4, 7, 1.0)]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["data", "--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    assert "at least so many MB (default: 1024; with --quick: 32)" in help_text
