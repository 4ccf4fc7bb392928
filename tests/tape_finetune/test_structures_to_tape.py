"""The command that writes TAPE's records of structure files."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from structure_sample import pdb_text

from megatron_plm.errors import UserError, run_command
from tape_finetune.dssp import SS3_OF_SS8
from tape_finetune.structures import read_chains
from tape_finetune.structures_to_tape import main

pytest.importorskip("gemmi", reason="reading structures needs gemmi")

FILES = Path(__file__).parents[2] / "examples" / "data" / "structures" / "files"
SHARES = ["--splits", "train=0.6,valid=0.2,test=0.2"]


def records(path: Path) -> list[dict]:
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def test_records_have_tapes_fields_and_agree_with_the_chains(tmp_path, capsys):
    assert main(["--input", str(FILES), "--output-dir", str(tmp_path), *SHARES]) == 0
    ids: dict[str, set[str]] = {"secondary_structure": set(), "proteinnet": set()}
    for split in ("train", "valid", "test"):
        for folder in ids:
            for record in records(tmp_path / folder / f"{folder}_{split}.jsonl.gz"):
                ids[folder].add(f"{split} {record['id']}")
                stem = record["id"].rsplit("_", 1)[0]
                (path,) = FILES.glob(f"{stem}.*")
                chain = next(chain for chain in read_chains(path) if chain.id == record["id"])
                assert record["primary"] == chain.primary
                assert record["protein_length"] == len(chain.primary)
                if folder == "proteinnet":
                    assert set(record) == {"id", "primary", "protein_length", "tertiary", "valid_mask"}
                    np.testing.assert_allclose(record["tertiary"], chain.alpha, atol=0.00501)
                    assert record["valid_mask"] == chain.has_alpha.astype(int).tolist()
                else:
                    assert set(record) == {"id", "primary", "protein_length", "ss3", "ss8", "valid_mask"}
                    assert record["ss8"] == chain.ss8.tolist()
                    assert record["ss3"] == SS3_OF_SS8[record["ss8"]].tolist()
                    assert record["valid_mask"] == chain.has_backbone.astype(int).tolist()
    assert len(ids["proteinnet"]) == 5
    assert ids["secondary_structure"] == ids["proteinnet"]
    out = capsys.readouterr().out
    assert "6 files read, 5 chains kept" in out
    assert "4 same sequence as a chain that is kept (2BEG_B, 2BEG_C, 2BEG_D, 2BEG_E)" in out
    assert "1 less than 0.5 of the residues resolved (3JQH_A)" in out
    assert "next: python tape_finetune/tape_train.py" in out


def test_the_same_input_gives_the_same_bytes_in_any_order(tmp_path):
    paths = sorted(map(str, FILES.iterdir()))
    main(["--input", *paths, "--output-dir", str(tmp_path / "one"), *SHARES])
    main(["--input", *reversed(paths), str(FILES / "*.gz"), "--output-dir", str(tmp_path / "two"), *SHARES])
    first = {path.relative_to(tmp_path / "one"): path.read_bytes() for path in (tmp_path / "one").rglob("*.gz")}
    second = {path.relative_to(tmp_path / "two"): path.read_bytes() for path in (tmp_path / "two").rglob("*.gz")}
    assert first == second
    assert len(first) == 6
    assert all(content[4:8] == bytes(4) for content in first.values()), "the gzip header must hold no time"


def test_limits_and_one_task_are_obeyed(tmp_path, capsys):
    main(
        [
            "--input",
            str(FILES),
            "--output-dir",
            str(tmp_path),
            "--splits",
            "all=1",
            "--task",
            "contact_prediction",
            "--min-length",
            "45",
            "--max-length",
            "230",
            "--min-resolved",
            "0.1",
        ]
    )
    kept = records(tmp_path / "proteinnet" / "proteinnet_all.jsonl.gz")
    assert sorted(record["id"] for record in kept) == ["1A8O_A", "1GBT_A", "1LCD_A", "3JQH_A"]
    assert not (tmp_path / "secondary_structure").exists()
    out = capsys.readouterr().out
    assert "5 shorter than 45 residues" in out
    assert "1 longer than 230 residues (6WQA_A)" in out


def test_identical_chains_are_kept_on_request_and_stay_in_one_split(tmp_path):
    main(["--input", str(FILES), "--output-dir", str(tmp_path), "--keep-identical", *SHARES])
    splits = [
        split
        for split in ("train", "valid", "test")
        for record in records(tmp_path / "proteinnet" / f"proteinnet_{split}.jsonl.gz")
        if record["id"].startswith("2BEG")
    ]
    assert len(splits) == 5
    assert len(set(splits)) == 1


def test_files_of_one_name_in_two_folders_get_different_ids(tmp_path):
    for folder, name in (("one", "ALA"), ("two", "GLY")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.pdb").write_text(pdb_text([(number, "", name) for number in range(1, 31)]))
    main(["--input", str(tmp_path), "--output-dir", str(tmp_path / "out"), "--splits", "all=1"])
    kept = records(tmp_path / "out" / "proteinnet" / "proteinnet_all.jsonl.gz")
    assert [record["id"] for record in kept] == ["model_A", "model_A#2"]


def test_among_many_files_those_without_protein_are_counted_and_named(tmp_path, capsys):
    (tmp_path / "good.pdb").write_text(pdb_text([(number, "", "ALA") for number in range(1, 31)]))
    (tmp_path / "empty.pdb").write_text("")
    (tmp_path / "noise.cif").write_bytes(bytes(range(256)))
    (tmp_path / "water.pdb").write_text(
        "HETATM    1  O   HOH A   1       0.000   0.000   0.000  1.00 10.00           O  \n"
    )
    main(["--input", str(tmp_path), "--output-dir", str(tmp_path / "out"), "--splits", "all=1"])
    out = capsys.readouterr().out
    assert "4 files read, 1 chains kept" in out
    assert "1 is empty; expected a PDB or mmCIF file (empty.pdb)" in out
    assert "1 is binary" in out
    assert "1 holds no protein chain (water.pdb)" in out


def damaged(name: str, content: bytes):
    return pytest.param(name, content, id=name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        damaged("empty.pdb", b""),
        damaged("blank.cif", b"\n \n"),
        damaged("binary.pdb", bytes(range(256)) * 20),
        damaged("text.pdb", b"The quick brown fox\n" * 50),
        damaged("broken.cif", b"data_x\nloop_\n_atom_site.id\n_atom_site.type_symbol\n1 C 2\n"),
        damaged("no_atoms.cif", b"data_x\n_entry.id x\n"),
        damaged("not_gzip.pdb.gz", b"\x1f\x8bnot a gzip file"),
        damaged("truncated.pdb.gz", gzip.compress(b"ATOM" * 10_000)[:-20]),
        damaged("water.pdb", b"HETATM    1  O   HOH A   1       0.000   0.000   0.000  1.00 10.00           O  \n"),
    ],
)
def test_a_bad_file_is_one_sentence_and_leaves_nothing(tmp_path, capsys, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert run_command(main, ["--input", str(path), "--output-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--input", "nowhere/*.pdb"], "--input nowhere/*.pdb: no such file or folder"),
        (["--input", "{folder}"], "holds no structure file"),
        (["--input", "{files}", "--splits", "a=0.2,b=0.2,c=0.2,d=0.2,e=0.1,f=0.1"], "nothing is left for"),
        (["--input", "{files}", "--min-resolved", "2"], "--min-resolved 2"),
        (["--input", "{files}", "--max-length", "3"], "--max-length 3"),
        (["--input", "{files}", "--min-length", "9999"], "no usable chain in 6 file(s): 10 shorter than 9999"),
    ],
)
def test_bad_flags_are_one_sentence(tmp_path, capsys, flags, reason):
    (tmp_path / "folder").mkdir()
    flags = [flag.format(folder=tmp_path / "folder", files=FILES) for flag in flags]
    assert run_command(main, [*flags, "--output-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_output_directory_that_cannot_be_made_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run_command(main, ["--input", str(FILES), "--output-dir", str(tmp_path / "file" / "out"), *SHARES]) == 2
    assert f"error: {tmp_path / 'file' / 'out'}" in capsys.readouterr().err


def test_an_earlier_run_is_replaced_as_a_whole_and_only_on_request(tmp_path, capsys):
    arguments = ["--input", str(FILES), "--output-dir", str(tmp_path)]
    main([*arguments, *SHARES])
    (tmp_path / "proteinnet" / "proteinnet_old.jsonl").write_text("")
    (tmp_path / "proteinnet" / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run_command(main, [*arguments, "--splits", "train=1"]) == 2
    assert "proteinnet_old" not in (error := capsys.readouterr().err)
    assert "secondary_structure_test.jsonl.gz exists already" in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    main([*arguments, "--splits", "train=1", "--force", "--task", "contact_prediction"])
    names = {path.name for path in (tmp_path / "proteinnet").iterdir()}
    assert names == {"proteinnet_train.jsonl.gz", "notes.txt"}
    assert len(records(tmp_path / "proteinnet" / "proteinnet_train.jsonl.gz")) == 5
    assert len(list((tmp_path / "secondary_structure").iterdir())) == 3, "the other task's files are not touched"


def test_a_failure_while_writing_leaves_no_file(tmp_path, monkeypatch):
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device", "the disk")

    monkeypatch.setattr("megatron_plm.files.os.fsync", fail)
    with pytest.raises(UserError, match="No space left"):
        main(["--input", str(FILES), "--output-dir", str(tmp_path), *SHARES])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_chain_of_alpha_carbons_cannot_serve_secondary_structure(tmp_path):
    lines = pdb_text([(number, "", "ALA") for number in range(1, 31)]).splitlines(keepends=True)
    (tmp_path / "alpha.pdb").write_text("".join(line for line in lines if line[12:16] == " CA "))
    flags = ["--input", str(tmp_path / "alpha.pdb"), "--output-dir", str(tmp_path / "out"), "--splits", "all=1"]
    with pytest.raises(UserError, match="has a full backbone, which secondary_structure needs"):
        main(flags)
    assert main([*flags, "--task", "contact_prediction"]) == 0
