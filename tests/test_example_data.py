"""The example data: what it holds, that splits share no near-duplicates, and that its script re-makes it."""

import csv
import gzip
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from processes import environment

DATA = Path(__file__).parents[1] / "examples" / "data"
SPLITS = ("train", "valid", "test")
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
SOURCES = os.environ.get("MEGATRON_PLM_EXAMPLE_SOURCES")
UNIPROT = Path("/usr/share/doc/mmseqs2/example-data/DB.fasta.gz")


def proteins(split: str, folder: Path = DATA) -> dict[str, str]:
    with gzip.open(folder / f"pretrain_{split}.fasta.gz", "rt") as file:
        entries = [record.partition("\n") for record in ("\n" + file.read()).split("\n>")[1:]]
    names = [header for header, _, _ in entries]
    assert len(set(names)) == len(names)
    return {header: body.replace("\n", "") for header, _, body in entries}


def peptides(split: str) -> list[dict[str, str]]:
    with open(DATA / "peptides" / f"{split}.csv", newline="") as file:
        return list(csv.DictReader(file))


def records(task: str, split: str) -> list[dict]:
    with gzip.open(DATA / "structures" / task / f"{task}_{split}.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def test_everything_together_is_below_four_megabytes():
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 4e6


def test_gzip_headers_hold_no_name_and_no_time():
    for path in DATA.rglob("*.gz"):
        assert path.read_bytes()[3:8] == bytes(5), path


# --- proteins ---


def test_proteins_have_uniprot_headers_and_plausible_sequences():
    train, valid = proteins("train"), proteins("valid")
    assert (len(train), len(valid)) == (4500, 500)
    for name, sequence in (train | valid).items():
        assert re.fullmatch(r"(sp|tr)\|[A-Z0-9]{6,10}\|[A-Z0-9]+_[A-Z0-9]+", name)
        assert 40 <= len(sequence) <= 1500
        assert set(sequence) <= set(AMINO_ACIDS + "XBZUO")


def test_train_and_valid_are_alike_in_length_letters_and_review():
    train, valid = proteins("train"), proteins("valid")
    reviewed = [sum(name.startswith("sp|") for name in split) / len(split) for split in (train, valid)]
    assert reviewed[0] == pytest.approx(reviewed[1], abs=0.02)
    lengths = [np.mean([len(sequence) for sequence in split.values()]) for split in (train, valid)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.1)
    letters = [Counter("".join(split.values())) for split in (train, valid)]
    for letter in AMINO_ACIDS:
        shares = [count[letter] / count.total() for count in letters]
        assert shares[0] == pytest.approx(shares[1], rel=0.15)


def largest_share_of_words(queries: list[str], targets: list[str], length: int = 5) -> float:
    """The largest share of a query's distinct words that occur in one single target."""
    owners = defaultdict(list)
    for index, target in enumerate(targets):
        for word in {target[i : i + length] for i in range(len(target) - length + 1)}:
            owners[word].append(index)
    largest = 0.0
    for query in queries:
        words = {query[i : i + length] for i in range(len(query) - length + 1)}
        hits = Counter(itertools.chain.from_iterable(owners.get(word, ()) for word in words))
        if hits:
            largest = max(largest, max(hits.values()) / len(words))
    return largest


def test_no_held_out_protein_resembles_a_training_protein():
    """At 75 % identity 0.75**5 = 24 % of the five-letter words survive on average.

    Chance alone reaches a tenth: four words of leucines and phenylalanines in a protein of 44 residues.
    """
    train, valid = list(proteins("train").values()), list(proteins("valid").values())
    assert largest_share_of_words(valid, train) < 0.12
    # The check sees what it should: a training protein with a quarter of its letters replaced.
    generator = random.Random(5)
    planted = "".join(letter if generator.random() < 0.75 else generator.choice(AMINO_ACIDS) for letter in train[7])
    assert largest_share_of_words([planted], train) > 0.15


# --- peptides ---


def test_peptides_have_ids_two_labels_and_clusters_of_one_split():
    rows = {split: peptides(split) for split in SPLITS}
    everything = [row for split in SPLITS for row in rows[split]]
    assert list(everything[0]) == ["id", "sequence", "label", "cluster"]
    assert len({row["id"] for row in everything}) == len(everything) == 4620
    assert len({row["sequence"] for row in everything}) == len(everything)
    assert all(set(row["sequence"]) <= set(AMINO_ACIDS) for row in everything)
    clusters = [{row["cluster"] for row in rows[split]} for split in SPLITS]
    assert not clusters[0] & clusters[1] | clusters[0] & clusters[2] | clusters[1] & clusters[2]
    for split, share in zip(SPLITS, (0.7, 0.15, 0.15), strict=True):
        labels = Counter(row["label"] for row in rows[split])
        assert set(labels) == {"amp", "other"}
        assert labels["amp"] == pytest.approx(2540 * share, rel=0.01)
        assert labels["other"] == pytest.approx(2080 * share, rel=0.01)


def test_no_peptide_is_65_percent_identical_to_one_of_another_split():
    assert largest_identity({split: [row["sequence"] for row in peptides(split)] for split in SPLITS}) < 0.65


def test_the_peptide_check_sees_a_near_duplicate_with_a_deletion():
    train = [row["sequence"] for row in peptides("train")]
    planted = next(sequence for sequence in train if len(sequence) == 30)
    assert largest_identity({"train": [*train[:200], planted], "test": [planted[3:14] + planted[15:]]}) > 0.9


def largest_identity(splits: dict[str, list[str]]) -> float:
    """Over all pairs of peptides in different splits: matches less gaps of the best alignment, by the shorter length.

    A pair at 65 % or more of the shorter length m has that many letters in common, and (q-gram lemma) at least
    0.3 m - 1 two-letter words; only pairs that pass both are aligned.
    """
    largest = 0.0
    for one, other in itertools.combinations(splits.values(), 2):
        shorter = np.minimum.outer([len(a) for a in one], [len(b) for b in other])
        letters, words = (shared_words(one, other, length) for length in (1, 2))
        pairs = np.argwhere((letters >= 0.65 * shorter) & (words >= 0.3 * shorter - 1))
        aligned = sorted(((one[i], other[j]) for i, j in pairs.tolist()), key=lambda pair: tuple(map(len, pair)))
        for start in range(0, len(aligned), 16384):
            largest = max(largest, float(identities(aligned[start : start + 16384]).max()))
    return largest


def shared_words(one: list[str], other: list[str], length: int) -> np.ndarray:
    """[len(one), len(other)]: the number of words in common, repeated words counted as often as both have them."""
    index = {"".join(word): i for i, word in enumerate(itertools.product(AMINO_ACIDS, repeat=length))}
    counts = [np.zeros((len(index), len(side)), dtype=np.uint8) for side in (one, other)]
    for count, side in zip(counts, (one, other), strict=True):
        for column, sequence in enumerate(side):
            for start in range(len(sequence) - length + 1):
                count[index[sequence[start : start + length]], column] += 1
    shared = np.zeros((len(one), len(other)), dtype=np.uint8)
    for mine, theirs in zip(*counts, strict=True):
        rows = np.flatnonzero(mine)
        shared[rows] += np.minimum.outer(mine[rows], theirs)
    return shared


def identities(pairs: list[tuple[str, str]]) -> np.ndarray:
    """Textbook local alignment (match 1, mismatch 0, gap -1), one cell at a time for all pairs together."""
    width = max(len(b) for _, b in pairs)
    codes = [
        np.array([[ord(letter) for letter in s.ljust(size, fill)] for s in side], dtype=np.uint8).T
        for side, size, fill in (
            ([a for a, _ in pairs], max(len(a) for a, _ in pairs), "."),
            ([b for _, b in pairs], width, "-"),
        )
    ]
    above = np.zeros((width + 1, len(pairs)), dtype=np.int8)
    best = np.zeros(len(pairs), dtype=np.int8)
    for a in codes[0]:
        row = np.zeros_like(above)
        for j, b in enumerate(codes[1], start=1):
            gap = np.maximum(above[j], row[j - 1]) - 1
            row[j] = np.maximum(above[j - 1] + (a == b), gap)
        np.maximum(best, row.max(axis=0), out=best)
        above = row
    return best / [min(map(len, pair)) for pair in pairs]


# --- structures ---


@pytest.mark.parametrize("split", SPLITS)
def test_structure_records_have_tapes_fields(split):
    to_three_classes = [0, 0, 0, 1, 1, 2, 2, 2]
    pairs = zip(records("secondary_structure", split), records("proteinnet", split), strict=True)
    for secondary, contact in pairs:
        length = secondary["protein_length"]
        assert secondary["id"] == contact["id"]
        assert secondary["primary"] == contact["primary"]
        assert len(secondary["primary"]) == contact["protein_length"] == length
        assert len(secondary["ss8"]) == len(secondary["valid_mask"]) == length
        assert secondary["ss3"] == [to_three_classes[c] for c in secondary["ss8"]]
        positions, seen = np.array(contact["tertiary"]), np.array(contact["valid_mask"], dtype=bool)
        assert positions.shape == (length, 3)
        assert (positions[~seen] == 0).all()
        neighbours = seen[1:] & seen[:-1]
        steps = np.linalg.norm(positions[1:] - positions[:-1], axis=1)[neighbours]
        assert np.median(steps) == pytest.approx(3.8, abs=0.1)


def test_no_chain_is_in_two_splits():
    sequences = {split: [record["primary"] for record in records("proteinnet", split)] for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert largest_share_of_words(sequences[one], sequences[other], length=4) < 0.2
        assert largest_share_of_words(sequences[other], sequences[one], length=4) < 0.2


def test_the_tool_makes_the_shipped_records_of_the_shipped_files(tmp_path):
    from tape_finetune.structures_to_tape import main

    main(["--input", str(DATA / "structures" / "files"), "--output-dir", str(tmp_path), "--splits", "all=1"])
    for task in ("secondary_structure", "proteinnet"):
        shipped = {record["id"]: record for split in SPLITS for record in records(task, split)}
        with gzip.open(tmp_path / task / f"{task}_all.jsonl.gz", "rt") as file:
            made = [json.loads(line) for line in file]
        assert len(made) == 5
        assert all(shipped[record["id"]] == record for record in made)


# --- README and script ---


def test_the_readme_states_the_true_numbers():
    readme = (DATA / "README.md").read_text()
    rows = dict(re.findall(r"^\| `([^`]+)` \| ([\d,]+) \|", readme, flags=re.MULTILINE))
    sizes = {f"pretrain_{split}.fasta.gz": len(proteins(split)) for split in ("train", "valid")}
    sizes |= {f"peptides/{split}.csv": len(peptides(split)) for split in SPLITS}
    for task, split in itertools.product(("secondary_structure", "proteinnet"), SPLITS):
        sizes[f"structures/{task}/{task}_{split}.jsonl.gz"] = len(records(task, split))
    assert {name: int(number.replace(",", "")) for name, number in rows.items()} == sizes
    shipped = {str(path.relative_to(DATA)) for path in DATA.rglob("*") if path.suffix in (".gz", ".csv")}
    assert {name for name in shipped if "structures/files/" not in name} == set(sizes)

    lines = {name: next(line for line in readme.splitlines() if f"`{name}`" in line) for name in sizes}
    for split in ("train", "valid"):
        residues = sum(map(len, proteins(split).values()))
        assert f"{residues:,} residues" in lines[f"pretrain_{split}.fasta.gz"]
    for split in SPLITS:
        labels = Counter(row["label"] for row in peptides(split))
        assert f"{labels['amp']:,}" in lines[f"peptides/{split}.csv"]
        assert f"{labels['other']:,}" in lines[f"peptides/{split}.csv"]
        name = f"structures/secondary_structure/secondary_structure_{split}.jsonl.gz"
        assert f"{sum(r['protein_length'] for r in records('secondary_structure', split)):,} residues" in lines[name]


def test_peptide_clusters_hold_what_they_promise(monkeypatch):
    """The script's bounds and its alignment against the textbook alignment here, on a sample of all pairs."""
    monkeypatch.syspath_prepend(str(DATA))
    from peptide_clusters import joined_pairs

    sample = sorted({row["sequence"] for row in peptides("train")[::20]}, key=lambda s: (len(s), s))
    pairs = list(itertools.combinations(range(len(sample)), 2))
    scores = identities([(sample[i], sample[j]) for i, j in pairs])
    expected = {pair for pair, score in zip(pairs, scores.tolist(), strict=True) if score >= 0.65}
    assert set(map(tuple, joined_pairs(sample))) == expected
    assert expected


def remake(tmp_path: Path, *flags: str) -> None:
    command = [sys.executable, str(DATA / "make_examples.py"), "--output-dir", str(tmp_path), *flags]
    subprocess.run(command, check=True, env=environment(), capture_output=True, text=True)
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert made
    for path in made:
        assert path.read_bytes() == (DATA / path.relative_to(tmp_path)).read_bytes(), path


@pytest.mark.skipif(SOURCES is None, reason="MEGATRON_PLM_EXAMPLE_SOURCES names no folder made as README.md says")
@pytest.mark.parametrize(
    "flags",
    [
        ("--peptides", "modlamp/modlamp/data/AMPvsUniProt.csv"),
        ("--structures", "biopython-1.88/Tests/PDB"),
    ],
)
def test_the_script_makes_the_same_bytes_from_the_packages(tmp_path, flags):
    remake(tmp_path, flags[0], str(Path(str(SOURCES), flags[1])))


@pytest.mark.skipif(SOURCES is None, reason="takes minutes: only with MEGATRON_PLM_EXAMPLE_SOURCES")
@pytest.mark.skipif(not UNIPROT.exists(), reason="the Debian package mmseqs2-examples is not installed")
def test_the_script_makes_the_same_proteins_from_the_package(tmp_path):
    remake(tmp_path, "--uniprot", str(UNIPROT))


def test_a_missing_source_is_one_sentence(tmp_path):
    command = [
        sys.executable,
        str(DATA / "make_examples.py"),
        "--peptides",
        "nowhere.csv",
        "--output-dir",
        str(tmp_path),
    ]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --peptides nowhere.csv: no such file")
