"""Pseudo-perplexities equal those of a plain loop over transformers' model, one masked copy at a time."""

import csv

import numpy as np
import pytest
from inference_sample import (
    ESM2,
    our_checkpoint,
    peer_checkpoint,
    random_sequences,
    run,
    their_log_probabilities,
    with_specials,
    write_fasta,
)

# Log probabilities of order one to ten agree to about 1e-6; the file holds six digits.
TOLERANCE = 1e-5
SEQUENCES = ["MKJ1VXA-.LZ", *random_sequences([1, 9, 26, 14])]


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peer")
    model = peer_checkpoint(folder / "model")
    write_fasta(folder / "in.fasta", SEQUENCES, ["a", "b", "é,", "d", "b"])
    return folder, model


def score(folder, output, *flags):
    base = ["--checkpoint", folder / "model", "--input", folder / "in.fasta", "--output", output]
    assert run("score", "perplexity", *base, *flags) == 0
    with output.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def naive(model, sequence, longest=10**9, overlap=0, *, masked=True):
    """Sum of log p of the letters, and their number, by one pass a letter."""
    tokens = with_specials(sequence)
    last = max(len(tokens) - longest, 0)
    starts = sorted({*range(0, last, longest - overlap), last})
    total = count = 0
    for place in range(1, len(tokens) - 1):
        if tokens[place] not in ESM2.residue_ids:
            continue
        # The window whose nearer cut end is farthest away.
        inside = [start for start in starts if start <= place < start + longest]
        room = [min(place - s if s else np.inf, s + longest - 1 - place if s < last else np.inf) for s in inside]
        start = inside[int(np.argmax(room))]
        part = tokens[start : start + longest]
        if masked:
            part = [*part]
            part[place - start] = ESM2.mask_id
        total += their_log_probabilities(model, part)[place - start, tokens[place]]
        count += 1
    return total, count


@pytest.mark.parametrize("flags", [[], ["--max-length", 28, "--batch-tokens", 28]], ids=["default", "small rows"])
def test_pseudo_perplexity_equals_masking_each_letter_in_turn(peer, tmp_path, flags):
    folder, model = peer
    rows = score(folder, tmp_path / "out.csv", *flags)
    assert [row["id"] for row in rows] == ["a", "b", "é,", "d", "b"]
    for row, sequence in zip(rows, SEQUENCES, strict=True):
        total, count = naive(model, sequence)
        assert (int(row["length"]), int(row["scored"])) == (len(sequence), count)
        assert float(row["log_likelihood"]) == pytest.approx(total, abs=TOLERANCE * count)
        assert float(row["pseudo_perplexity"]) == pytest.approx(np.exp(-total / count), rel=TOLERANCE)
    assert naive(model, SEQUENCES[0])[1] == 7  # neither the unknown letters nor the gaps


def test_long_proteins_are_scored_in_the_windows_that_surround_each_residue(peer, tmp_path):
    folder, model = peer
    rows = score(folder, tmp_path / "out.csv", "--max-length", 12, "--overlap", 5)
    for row, sequence in zip(rows, SEQUENCES, strict=True):
        total, count = naive(model, sequence, 12, 5)
        assert float(row["log_likelihood"]) == pytest.approx(total, abs=TOLERANCE * count)


def test_the_approximation_in_one_pass_hides_nothing_and_says_so(peer, tmp_path):
    folder, model = peer
    rows = score(folder, tmp_path / "out.csv", "--one-pass", "--max-length", 12, "--overlap", 5)
    for row, sequence in zip(rows, SEQUENCES, strict=True):
        total, count = naive(model, sequence, 12, 5, masked=False)
        assert "pseudo_perplexity" not in row
        assert float(row["one_pass_perplexity"]) == pytest.approx(np.exp(-total / count), rel=TOLERANCE)


def test_a_protein_without_letters_to_predict_has_no_perplexity(peer, tmp_path):
    folder, _ = peer
    path = write_fasta(tmp_path / "j.fasta", ["J1", "MK"])
    rows = score(folder, tmp_path / "out.csv", "--input", path)
    assert (rows[0]["scored"], rows[0]["pseudo_perplexity"]) == ("0", "")
    assert float(rows[1]["pseudo_perplexity"]) > 1


def test_a_causal_model_is_refused(tmp_path, capsys):
    our_checkpoint(tmp_path / "model", objective="clm")
    path = write_fasta(tmp_path / "in.fasta", ["MK"])
    base = ["--checkpoint", tmp_path / "model", "--input", path, "--output", tmp_path / "out.csv"]
    assert run("score", "perplexity", *base) == 2
    assert "objective is clm" in capsys.readouterr().err
