"""ProteinGym's tables as they are published: the wild type told by the sequences, Spearman's correlation scipy's."""

import csv
import re

import numpy as np
import pytest
from inference_sample import peer_checkpoint, random_sequences, run, write_fasta
from scipy.stats import spearmanr

from megatron_plm.inference.variants import spearman

(SEQUENCE,) = random_sequences([30], seed=2)
FIRST = 101  # of the numbers in the table
HEADER = ["mutant", "mutated_sequence", "DMS_score", "DMS_score_bin"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gym")
    peer_checkpoint(folder / "model")
    write_fasta(folder / "wt.fasta", [SEQUENCE], ["target"])
    return folder


def mutated(mutant):
    letters = list(SEQUENCE)
    for mutation in re.split("[:,]", mutant):
        letters[int(mutation[1:-1]) - FIRST] = mutation[-1].upper()
    return "".join(letters)


def mutants(seed=0):
    """Of one, two and three substitutions."""
    rng = np.random.default_rng(seed)
    found = []
    for count in (2, 1, 1, 3, 1, 1, 2, 1, 1, 1):
        places = rng.choice(len(SEQUENCE), count, replace=False)
        found.append(":".join(f"{SEQUENCE[p]}{p + FIRST}{rng.choice(list('ACDW'))}" for p in places))
    return found


def write_table(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])
    return path


def rows_of(values, texts=None):
    return [[m, mutated(m), value, 1] for m, value in zip(texts or mutants(), values, strict=True)]


def score(folder, table, output, *flags):
    base = ["--checkpoint", folder / "model", "--variants", table, "--first-position", FIRST, "--output", output]
    return run("score", "variants", *base, *flags)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_wild_type_is_told_by_the_mutated_sequences(folder, tmp_path):
    table = write_table(tmp_path / "v.csv", rows_of(range(10)))
    assert score(folder, table, tmp_path / "told.csv") == 0
    assert score(folder, table, tmp_path / "given.csv", "--wild-type", folder / "wt.fasta") == 0
    assert (tmp_path / "told.csv").read_bytes() == (tmp_path / "given.csv").read_bytes()
    assert list(read(tmp_path / "told.csv")[0]) == [*HEADER, "masked_marginals"]


def test_commas_and_small_letters_mean_the_same(folder, tmp_path):
    write_table(tmp_path / "v.csv", rows_of(range(10)))
    texts = [text.replace(":", ",").lower() for text in mutants()]
    write_table(tmp_path / "small.csv", [[m, mutated(m).lower(), 0, 1] for m in texts])
    found = []
    for name in ("v", "small"):
        assert score(folder, tmp_path / f"{name}.csv", tmp_path / f"{name}.out") == 0
        found.append([row["masked_marginals"] for row in read(tmp_path / f"{name}.out")])
    assert found[0] == found[1]


def test_the_correlation_is_scipys_and_rows_without_a_value_are_left_out(folder, tmp_path, capsys):
    values = [0.5, -1, 0.5, "", 3, "nan", 2.5, 1e-3, 7, 7]
    table = write_table(tmp_path / "v.csv", rows_of(values))
    assert score(folder, table, tmp_path / "out.csv", "--score-column", "DMS_score") == 0
    told = capsys.readouterr().out
    kept = [(float(row["masked_marginals"]), v) for row, v in zip(read(tmp_path / "out.csv"), values, strict=True)]
    kept = [(a, b) for a, b in kept if b not in ("", "nan")]
    expected = spearmanr(*zip(*kept, strict=True)).statistic
    assert f"Spearman correlation with DMS_score: {expected:.4f} (8 variants, 2 without a value left out)" in told
    assert abs(expected) > 0.01


def test_constant_values_have_no_correlation(folder, tmp_path, capsys):
    table = write_table(tmp_path / "v.csv", rows_of([1] * 10))
    assert score(folder, table, tmp_path / "out.csv", "--score-column", "DMS_score") == 0
    assert "Spearman correlation with DMS_score: not defined" in capsys.readouterr().out


@pytest.mark.parametrize("highest", [3, 1000])
def test_ranks_with_and_without_ties_correlate_as_scipys(highest):
    rng = np.random.default_rng(highest)
    a, b = (rng.integers(0, highest, 200).astype(float) for _ in range(2))
    assert spearman(a, b + a) == pytest.approx(spearmanr(a, b + a).statistic, rel=1e-12)


def first(row):
    return lambda rows: [row, *rows[1:]]


def third(row):
    return lambda rows: [*rows[:2], row, *rows[3:]]


A = SEQUENCE[0]
OTHER = "W" if A != "W" else "C"
ONE = f"{A}{FIRST}{OTHER}"


@pytest.mark.parametrize(
    ("change", "flags", "expected"),
    [
        (third([ONE, mutated(ONE), "high", 1]), [], "v.csv, line 4: DMS_score: 'high' is no number"),
        (third([ONE, mutated(ONE), "inf", 1]), [], "v.csv, line 4: DMS_score: 'inf' has no place among numbers"),
        (third([ONE, SEQUENCE, 1, 1]), [], f"v.csv, line 4: {ONE}: the mutated_sequence is not that of this variant"),
        (third([ONE, SEQUENCE[1:], 1, 1]), [], "v.csv, line 4: "),
        (first([ONE, SEQUENCE, 1, 1]), [], f"line 2: {ONE}: the mutated sequence has {A} at position {FIRST}, not"),
        (first([ONE, "", 1, 1]), [], f"line 2: {ONE}: there is no position {FIRST} in the mutated sequence"),
        (first([f"{A}5W", SEQUENCE, 1, 1]), [], "--first-position says where its numbers begin"),
        (lambda rows: rows, ["--score-column", "DMS_scores"], "no column 'DMS_scores', or several: its columns are"),
        (lambda rows: rows, ["--score-column", "DMS_scores"], "did you mean 'DMS_score'?; name the column of the meas"),
    ],
)
def test_what_does_not_fit_is_told_with_its_line_before_any_work(folder, tmp_path, change, flags, expected, capsys):
    table = write_table(tmp_path / "v.csv", change(rows_of(range(10))))
    assert score(folder, table, tmp_path / "out.csv", *(flags or ["--score-column", "DMS_score"])) == 2
    told = capsys.readouterr()
    assert expected in told.err
    assert (told.out, told.err.count("\n"), len(list(tmp_path.iterdir()))) == ("", 1, 1)


def test_a_protein_with_a_letter_that_the_model_lacks_is_told_by_its_sequences(folder, tmp_path, capsys):
    texts = [ONE, f"{SEQUENCE[1]}{FIRST + 1}{'W' if SEQUENCE[1] != 'W' else 'C'}"]
    write_table(tmp_path / "v.csv", [[text, f"{mutated(text)}J", 0, 1] for text in texts])
    (tmp_path / "wt.fasta").write_text(f">wt\n{SEQUENCE}J\n")
    assert score(folder, tmp_path / "v.csv", tmp_path / "told.csv") == 0
    assert "scored 2 variants of the protein of the first row, at 2 positions" in capsys.readouterr().out
    assert score(folder, tmp_path / "v.csv", tmp_path / "given.csv", "--wild-type", tmp_path / "wt.fasta") == 0
    assert (tmp_path / "told.csv").read_bytes() == (tmp_path / "given.csv").read_bytes()


def test_two_columns_of_one_name_are_refused_as_one_would_be_lost(folder, tmp_path, capsys):
    (tmp_path / "v.csv").write_text(f"mutant,note,note\n{ONE},a,b\n")
    assert score(folder, tmp_path / "v.csv", tmp_path / "out.csv", "--wild-type", folder / "wt.fasta") == 2
    assert "v.csv has several columns 'note'" in capsys.readouterr().err


def test_without_wild_type_and_without_sequences_the_ways_to_give_one_are_named(folder, tmp_path, capsys):
    (tmp_path / "v.csv").write_text(f"mutant\n{ONE}\n")
    assert score(folder, tmp_path / "v.csv", tmp_path / "out.csv") == 2
    told = capsys.readouterr().err
    assert "v.csv has no column 'mutated_sequence' to tell the wild type; give it with --wild-type" in told
