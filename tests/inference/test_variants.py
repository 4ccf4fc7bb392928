"""Scores of variants equal those of a plain loop over transformers' model."""

import csv

import numpy as np
import pytest
from inference_sample import (
    ESM2,
    peer_checkpoint,
    random_sequences,
    run,
    their_log_probabilities,
    with_specials,
    write_fasta,
)

TOLERANCE = 1e-5  # log probabilities of order one to ten agree to about 1e-6; the file holds six digits
(SEQUENCE,) = random_sequences([40], seed=2)


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peer")
    model = peer_checkpoint(folder / "model")
    write_fasta(folder / "wt.fasta", [SEQUENCE], ["target"])
    return folder, model


def variants(first=1):
    """Some of one, two and three mutations, one of them silent."""
    rng = np.random.default_rng(1)
    found = [f"{SEQUENCE[0]}{first}{SEQUENCE[0]}"]
    for count in (1, 1, 1, 2, 3):
        places = rng.choice(len(SEQUENCE), count, replace=False)
        found.append(":".join(f"{SEQUENCE[p]}{p + first}{rng.choice(list('ACDXW'))}" for p in places))
    return found


def write_table(path, mutants, column="mutant"):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([column, "DMS_score", "note, quoted"])
        writer.writerows([mutant, number / 10, 'a "b", c'] for number, mutant in enumerate(mutants))
    return path


def score(folder, table, output, *flags):
    base = ["--checkpoint", folder / "model", "--variants", table, "--wild-type", folder / "wt.fasta"]
    assert run("score", "variants", *base, "--output", output, *flags) == 0
    with output.open(newline="") as file:
        return list(csv.DictReader(file))


def naive(model, variant, *, masked, first=1):
    total = 0.0
    for mutation in variant.split(":"):
        place = int(mutation[1:-1]) - first + 1  # <cls> stands before the first residue
        tokens = with_specials(SEQUENCE)
        if masked:
            tokens[place] = ESM2.mask_id
        log_p = their_log_probabilities(model, tokens)[place]
        total += log_p[ESM2.tokens.index(mutation[-1])] - log_p[ESM2.tokens.index(mutation[0])]
    return total


@pytest.mark.parametrize("strategy", ["masked-marginals", "wt-marginals"])
@pytest.mark.parametrize("flags", [[], ["--max-length", 42, "--batch-tokens", 42]], ids=["default", "small rows"])
def test_scores_equal_those_of_a_plain_loop(peer, tmp_path, strategy, flags):
    folder, model = peer
    table = write_table(tmp_path / "v.csv", variants())
    rows = score(folder, table, tmp_path / "out.csv", "--strategy", strategy, *flags)
    assert [row["mutant"] for row in rows] == variants()
    assert [row["DMS_score"] for row in rows] == ["0.0", "0.1", "0.2", "0.3", "0.4", "0.5"]
    assert rows[0]["note, quoted"] == 'a "b", c'
    found = [float(row[strategy.replace("-", "_")]) for row in rows]
    assert found[0] == 0
    expected = [naive(model, variant, masked=strategy.startswith("masked")) for variant in variants()]
    assert found == pytest.approx(expected, abs=TOLERANCE)
    assert max(map(abs, expected)) > 0.5


def test_the_default_is_masked_marginals_and_positions_may_begin_elsewhere(peer, tmp_path):
    folder, model = peer
    table = write_table(tmp_path / "v.tsv", [], column="x")
    table.write_text("x\n" + "".join(f"{variant}\n" for variant in variants(first=25)))
    rows = score(folder, table, tmp_path / "out.csv", "--first-position", 25, "--mutant-column", "x")
    expected = [naive(model, variant, masked=True, first=25) for variant in variants(first=25)]
    assert [float(row["masked_marginals"]) for row in rows] == pytest.approx(expected, abs=TOLERANCE)


def test_a_sequence_typed_is_the_wild_type(peer, tmp_path):
    folder, _ = peer
    table = write_table(tmp_path / "v.csv", variants())
    score(folder, table, tmp_path / "file.csv")
    base = ["--checkpoint", folder / "model", "--variants", table, "--output", tmp_path / "typed.csv"]
    assert run("score", "variants", *base, "--sequence", f"{SEQUENCE[:10].lower()} {SEQUENCE[10:]}") == 0
    assert (tmp_path / "typed.csv").read_bytes() == (tmp_path / "file.csv").read_bytes()


def test_wild_types_longer_than_the_model_are_scored_in_windows(peer, tmp_path):
    folder, model = peer
    table = write_table(tmp_path / "v.csv", [f"{SEQUENCE[20]}21W"])
    (row,) = score(folder, table, tmp_path / "out.csv", "--max-length", 12, "--overlap", 11)
    # Position 21 is token 21; of all windows of 12 tokens that hold it, 15 to 26 and 16 to 27 are the most central.
    tokens = with_specials(SEQUENCE)[15:27]
    tokens[6] = ESM2.mask_id
    log_p = their_log_probabilities(model, tokens)[6]
    expected = log_p[ESM2.tokens.index("W")] - log_p[ESM2.tokens.index(SEQUENCE[20])]
    assert float(row["masked_marginals"]) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("strategy", ["masked-marginals", "wt-marginals"])
@pytest.mark.parametrize("others", [[], variants()], ids=["alone", "among others"])
def test_the_row_of_the_wild_type_has_score_0(peer, tmp_path, strategy, others):
    folder, _ = peer
    column = strategy.replace("-", "_")
    rows = []
    if others:
        rows = score(folder, write_table(tmp_path / "v.csv", others), tmp_path / "plain.csv", "--strategy", strategy)
    names = ["WT", *others, "_wt", "wt", "_WT"]
    found = score(folder, write_table(tmp_path / "wt.csv", names), tmp_path / "out.csv", "--strategy", strategy)
    assert [row["mutant"] for row in found] == names
    assert [row[column] for row in found] == ["0.000000", *(row[column] for row in rows), *["0.000000"] * 3]


OTHER = "W" if SEQUENCE[1] != "W" else "C"


@pytest.mark.parametrize(
    ("mutant", "expected"),
    [
        (f"{OTHER}2A", f"line 3: {OTHER}2A: the wild type, target, has {SEQUENCE[1]} at position 2, not {OTHER}"),
        (f"{SEQUENCE[0]}0A", "there is no position 0; the wild type, target, has 1 to 40"),
        (f"{SEQUENCE[0]}41A", "there is no position 41"),
        ("", "'' is no mutation; expected"),
        (f"{SEQUENCE[0]}1", "is no mutation"),
        (f"{SEQUENCE[0]}1A:", "'' is no mutation"),
        (f"{SEQUENCE[0]}1A:{SEQUENCE[1]}2A,", "'' is no mutation"),
        (f"{SEQUENCE[0]}1*", "is a stop codon"),
        (f"{SEQUENCE[0]}1-", "is a deletion or an insertion"),
        (f"{SEQUENCE[0]}1del", "is a deletion or an insertion"),
        (f"{SEQUENCE[1]}2A:1_2insG", "is a deletion or an insertion"),
        (f"WT:{SEQUENCE[0]}1A", "'WT' is no mutation"),
        (f"{SEQUENCE[0]}1J", "the model's vocabulary has no letter J"),
        (f"{SEQUENCE[0]}1A:{SEQUENCE[0]}1C", "changes position 1 twice"),
    ],
)
def test_a_wrong_variant_is_told_with_its_line(peer, tmp_path, mutant, expected, capsys):
    folder, _ = peer
    table = write_table(tmp_path / "v.csv", [variants()[1], mutant])
    base = ["--checkpoint", folder / "model", "--variants", table, "--wild-type", folder / "wt.fasta"]
    assert run("score", "variants", *base, "--output", tmp_path / "out.csv") == 2
    told = capsys.readouterr().err
    assert "v.csv, line 3: " in told
    assert expected in told
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "v.csv: empty"),
        (b"mutant\n", "v.csv: holds no variant"),
        (b"mutants,x\nA1C,2\n", "no column 'mutant', or several: its columns are mutants, x; did you mean 'mutants'?"),
        (b"mutant,masked_marginals\nA1C,2\n", "has a column 'masked_marginals' already"),
        (b"mutant,x\nA1C\n", "line 2: the row has not as many fields"),
        (b"mutant,x\nA1C,2,3\n", "line 2: the row has not as many fields"),
        (b"mutant\n\xff\n", "not UTF-8 text"),
        (b'mutant\n"A1C\n', "line 2: unexpected end of data"),
    ],
)
def test_a_damaged_table_is_told(peer, tmp_path, content, expected, capsys):
    folder, _ = peer
    (tmp_path / "v.csv").write_bytes(content)
    base = ["--checkpoint", folder / "model", "--variants", tmp_path / "v.csv", "--wild-type", folder / "wt.fasta"]
    assert run("score", "variants", *base, "--output", tmp_path / "out.csv") == 2
    assert expected in capsys.readouterr().err


def test_a_wild_type_file_with_several_proteins_is_refused(peer, tmp_path, capsys):
    folder, _ = peer
    several = write_fasta(tmp_path / "two.fasta", [SEQUENCE, "MK"])
    table = write_table(tmp_path / "v.csv", variants())
    base = ["--checkpoint", folder / "model", "--variants", table, "--output", tmp_path / "out.csv"]
    assert run("score", "variants", *base, "--wild-type", several) == 2
    assert "two.fasta holds several proteins" in capsys.readouterr().err
