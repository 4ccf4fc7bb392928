"""Embeddings equal transformers' hidden states, protein by protein, whatever the input, the rows and the file."""

import gzip
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet
import pytest
from inference_sample import (
    ESM2,
    our_checkpoint,
    our_last_states,
    peer_checkpoint,
    random_sequences,
    run,
    their_hidden_states,
    with_specials,
    write_fasta,
)
from piece_models import trained
from processes import environment

from megatron_plm.config.options import ModelOptions
from megatron_plm.convert.native import write_native
from megatron_plm.convert.weights import Weights
from megatron_plm.model.transformer import MaskedLanguageModel

# Both compute in fp32, with hidden states of order one, and differ in the order of sums only.
TOLERANCE = 1e-5
SEQUENCES = random_sequences([7, 31, 1, 12, 50, 2, 23, 90, 5, 18], letters="LAGVSERTIDPKQNFYMHWCXBUZO-.")


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """The folder of a checkpoint, with a FASTA file, and the model."""
    folder = tmp_path_factory.mktemp("peer")
    model = peer_checkpoint(folder / "model")
    write_fasta(folder / "in.fasta", SEQUENCES)
    return folder, model


def embed(folder: Path, output: Path, *flags: object) -> dict[str, Any]:
    """Embed FOLDER/in.fasta with FOLDER/model; returns what the file holds."""
    base = ["--checkpoint", folder / "model", "--input", folder / "in.fasta", "--output", output]
    assert run("embed", *base, *flags) == 0
    return read(output)


def read(path: Path) -> dict[str, Any]:
    """The arrays of a file of any format, under the names that npz has for them."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            return dict(file)
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            arrays = {name: dataset[:] for name, dataset in file.items()}
            return {**arrays, "ids": file["ids"].asstr()[:], "about": file.attrs["about"]}
    table = pyarrow.parquet.read_table(path)
    arrays = {"ids": np.array(table["id"].to_pylist()), "lengths": table["length"].to_numpy()}
    for name in table.column_names[2:]:
        values = table[name].to_pylist()
        per_residue = name.startswith("residues")
        arrays[name] = np.concatenate(values).astype(np.float32) if per_residue else np.array(values, np.float32)
    if any(name.startswith("residues") for name in arrays):
        arrays["offsets"] = np.concatenate([[0], np.cumsum(arrays["lengths"])])
    return {**arrays, "about": table.schema.metadata[b"about"].decode()}


def difference(found: np.ndarray, expected: Any) -> float:
    expected = np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max())


@pytest.mark.parametrize("ending", ["npz", "h5", "parquet"])
def test_every_pooling_of_every_layer_equals_transformers(peer, tmp_path, ending):
    folder, model = peer
    flags = [
        "--pooling",
        "mean",
        "cls",
        "residues",
        "--layers",
        0,
        1,
        2,
        -1,
        "--batch-tokens",
        128,
        "--max-length",
        100,
    ]
    found = embed(folder, tmp_path / f"out.{ending}", *flags)
    states = [their_hidden_states(model, with_specials(sequence)) for sequence in SEQUENCES]
    assert found["ids"].tolist() == [f"p{number}" for number in range(len(SEQUENCES))]
    assert found["lengths"].tolist() == list(map(len, SEQUENCES))
    assert found["offsets"].tolist() == np.cumsum([0, *map(len, SEQUENCES)]).tolist()
    for layer in range(4):
        of_layer = [state[layer] for state in states]
        assert difference(found[f"mean_layer{layer}"], [x[1:-1].mean(0) for x in of_layer]) <= TOLERANCE
        assert difference(found[f"cls_layer{layer}"], [x[0] for x in of_layer]) <= TOLERANCE
        assert difference(found[f"residues_layer{layer}"], np.concatenate([x[1:-1] for x in of_layer])) <= TOLERANCE
    assert json.loads(str(found["about"]))["layers"] == [0, 1, 2, 3]


def test_the_default_is_the_mean_of_the_last_layer(peer, tmp_path, capsys):
    folder, model = peer
    found = embed(folder, tmp_path / "out.npz")
    assert found.keys() == {"ids", "lengths", "mean", "about"}
    assert found["mean"].dtype == np.float32
    expected = [their_hidden_states(model, with_specials(sequence))[-1, 1:-1].mean(0) for sequence in SEQUENCES]
    assert difference(found["mean"], expected) <= TOLERANCE
    assert "embedded 10 proteins in " in capsys.readouterr().out


@pytest.mark.parametrize("token_dropout", [True, False])
def test_token_dropout_acts_as_in_the_model(tmp_path, token_dropout):
    model = peer_checkpoint(tmp_path / "model", token_dropout=token_dropout, seed=1)
    write_fasta(tmp_path / "in.fasta", SEQUENCES[:3])
    found = embed(tmp_path, tmp_path / "out.npz", "--layers", 0)
    scale = 0.88 if token_dropout else 1.0
    vectors = model.esm.embeddings.word_embeddings.weight.detach().numpy() * scale
    assert difference(found["mean"], [vectors[ESM2.encode(s).astype(int)].mean(0) for s in SEQUENCES[:3]]) <= TOLERANCE


def test_packed_rows_and_one_protein_a_row_give_the_same(peer, tmp_path):
    folder, _ = peer
    flags = ["--pooling", "mean", "residues", "--max-length", 92]
    packed = embed(folder, tmp_path / "packed.npz", *flags, "--batch-tokens", 1000)
    single = embed(folder, tmp_path / "single.npz", *flags, "--batch-tokens", 92)
    for name in ("mean", "residues"):
        assert difference(packed[name], single[name]) <= TOLERANCE


@pytest.mark.parametrize("overlap", [0, 3, 7])
def test_windows_are_averaged_residue_by_residue(peer, tmp_path, overlap):
    folder, model = peer
    longest = 11
    flags = ["--max-length", longest, "--overlap", overlap, "--batch-tokens", 30]
    found = embed(folder, tmp_path / "out.npz", *flags, "--pooling", "mean", "cls", "residues")
    for number, sequence in enumerate(SEQUENCES):
        tokens = with_specials(sequence)
        last = max(len(tokens) - longest, 0)
        starts = sorted({*range(0, last, longest - overlap), last})
        sums, counts = np.zeros((len(tokens), 32)), np.zeros(len(tokens))
        for start in starts:
            part = tokens[start : start + longest]
            sums[start : start + longest] += their_hidden_states(model, part)[-1]
            counts[start : start + longest] += 1
        states = (sums / counts[:, None])[1:-1]
        begin, end = found["offsets"][number : number + 2]
        assert difference(found["residues"][begin:end], states) <= TOLERANCE
        assert difference(found["mean"][number], states.mean(0)) <= TOLERANCE
        assert difference(found["cls"][number], their_hidden_states(model, tokens[:longest])[-1, 0]) <= TOLERANCE


def test_learned_positions_set_the_longest_window(tmp_path, capsys):
    options = {"position_embedding_type": "learned_absolute", "max_position_embeddings": 20}
    model = our_checkpoint(tmp_path / "model", **options, norm_placement="post", token_dropout=False)
    write_fasta(tmp_path / "in.fasta", [SEQUENCES[3], SEQUENCES[6]])
    found = embed(tmp_path, tmp_path / "out.npz", "--pooling", "cls", "--overlap", 0)
    expected = [our_last_states(model, with_specials(sequence)[:20])[0] for sequence in (SEQUENCES[3], SEQUENCES[6])]
    assert difference(found["cls"], expected) <= TOLERANCE
    assert "longer proteins: 1 of more than 20 tokens, in windows that share 0" in capsys.readouterr().out
    argv = ["--checkpoint", tmp_path / "model", "--input", tmp_path / "in.fasta", "--output", tmp_path / "b.npz"]
    assert run("embed", *argv, "--max-length", 21) == 2
    assert "learned positions for 20 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["npz", "h5", "parquet"])
def test_float16_is_the_rounded_float32(peer, tmp_path, ending):
    folder, _ = peer
    flags = ["--pooling", "mean", "residues"]
    wide = embed(folder, tmp_path / f"wide.{ending}", *flags)
    narrow = embed(folder, tmp_path / f"narrow.{ending}", *flags, "--dtype", "float16")
    for name in ("mean", "residues"):
        assert (narrow[name] == wide[name].astype(np.float16)).all()
        assert ending == "parquet" or narrow[name].dtype == np.float16
    if ending == "parquet":
        kind = pyarrow.parquet.read_schema(tmp_path / "narrow.parquet").field("mean").type
        assert str(kind) == "fixed_size_list<element: halffloat>[32]"


def test_values_beyond_float16_are_told_and_nothing_is_written(tmp_path, capsys):
    model = peer_checkpoint(tmp_path / "model")
    model.esm.encoder.emb_layer_norm_after.weight.data *= 1e6
    model.save_pretrained(tmp_path / "model")
    write_fasta(tmp_path / "in.fasta", SEQUENCES)
    base = ["--checkpoint", tmp_path / "model", "--input", tmp_path / "in.fasta", "--output", tmp_path / "out.npz"]
    assert run("embed", *base, "--dtype", "float16") == 2
    assert "beyond the range of float16 (mean); use --dtype float32" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.fasta", "model"]


@pytest.mark.parametrize("ending", ["npz", "h5", "parquet"])
def test_names_keep_their_letters_and_their_order_and_may_stand_twice(peer, tmp_path, ending, capsys):
    folder, _ = peer
    names = ["sp|P1|A_HUMAN", "Zoë", "蛋白", "sp|P1|A_HUMAN", "x" * 300]
    path = write_fasta(tmp_path / "odd.fasta", SEQUENCES[:5], names)
    found = embed(folder, tmp_path / f"out.{ending}", "--input", path)
    assert found["ids"].tolist() == names
    plain = embed(folder, tmp_path / f"plain.{ending}")
    assert difference(found["mean"], plain["mean"][:5]) <= TOLERANCE
    assert "repeated names: 1; " in capsys.readouterr().out


INPUTS = {
    "in.fasta.gz": gzip.compress("".join(f">p{n} x\n{s}\n" for n, s in enumerate(SEQUENCES)).encode()),
    "in.csv": ("id,sequence\n" + "".join(f"p{n},{s}\n" for n, s in enumerate(SEQUENCES))).encode(),
    "in.jsonl": "".join(json.dumps({"id": f"p{n}", "sequence": s}) + "\n" for n, s in enumerate(SEQUENCES)).encode(),
}


@pytest.mark.parametrize("name", INPUTS)
def test_every_format_of_input_gives_the_same_file(peer, tmp_path, name):
    folder, _ = peer
    embed(folder, tmp_path / "plain.npz")
    (tmp_path / name).write_bytes(INPUTS[name])
    embed(folder, tmp_path / "out.npz", "--input", tmp_path / name)
    assert (tmp_path / "out.npz").read_bytes() == (tmp_path / "plain.npz").read_bytes()


def test_proteins_without_names_are_numbered(peer, tmp_path, capsys):
    folder, _ = peer
    (tmp_path / "a.txt").write_text("MKV\nMLA\n")
    (tmp_path / "b.csv").write_text("sequence\nMKV\n")
    argv = ["--checkpoint", folder / "model", "--output", tmp_path / "out.npz", "--input"]
    assert run("embed", *argv, tmp_path / "a.txt", tmp_path / "b.csv") == 2
    assert "no column 'id'" in capsys.readouterr().err
    assert run("embed", *argv, tmp_path / "a.txt", tmp_path / "b.csv", "--numbered") == 0
    assert read(tmp_path / "out.npz")["ids"].tolist() == ["1", "2", "3"]


def test_unknown_letters_are_counted_or_refused(peer, tmp_path, capsys):
    folder, model = peer
    (tmp_path / "j.fasta").write_text(">a\nMKJJV1\n>b\nmkv*\n")
    found = embed(folder, tmp_path / "out.npz", "--input", tmp_path / "j.fasta")
    assert "unknown letters: 3, read as the unknown token: 1 1, J 2" in capsys.readouterr().out
    tokens = [0, *(ESM2.tokens.index(t) for t in ["M", "K", "<unk>", "<unk>", "V", "<unk>"]), 2]
    assert difference(found["mean"][0], their_hidden_states(model, tokens)[-1, 1:-1].mean(0)) <= TOLERANCE
    assert difference(found["mean"][1], their_hidden_states(model, with_specials("MKV"))[-1, 1:-1].mean(0)) <= TOLERANCE
    base = ["--checkpoint", folder / "model", "--input", tmp_path / "j.fasta", "--output", tmp_path / "b.npz"]
    assert run("embed", *base, "--strict") == 2
    assert "unknown letter 'J' at position 3 of record 'a'" in capsys.readouterr().err


def test_a_pipe_is_read_once(peer, tmp_path):
    folder, _ = peer
    embed(folder, tmp_path / "plain.npz")
    words = [sys.executable, "-m", "megatron_plm.cli", "embed", "--checkpoint", folder / "model", "--input", "-"]
    command = f"cat {shlex.quote(str(folder / 'in.fasta'))} | {shlex.join(map(str, words))} --output out.npz"
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.npz").read_bytes() == (tmp_path / "plain.npz").read_bytes()


def test_tokens_of_several_letters_have_means_but_no_residues(tmp_path, capsys):
    tokenizer = trained("unigram", vocab_size=300, max_letters=20_000)
    options = ModelOptions(tokenizer=tokenizer.name, num_layers=1, hidden_size=16, num_attention_heads=2)
    model = MaskedLanguageModel(options, tokenizer).eval()
    (tmp_path / "model").mkdir()
    write_native(Weights(options, tokenizer, model.state_dict()), tmp_path / "model", "float32")
    sequence = random_sequences([60])[0]
    write_fasta(tmp_path / "in.fasta", [sequence])
    pieces = tokenizer.encode(sequence).tolist()
    assert len(pieces) < 60
    found = embed(tmp_path, tmp_path / "out.npz")
    states = our_last_states(model, [tokenizer.cls_id, *pieces, tokenizer.eos_id])
    assert found["lengths"].tolist() == [len(pieces)]
    assert difference(found["mean"], states[None, 1:-1].mean(1)) <= TOLERANCE
    base = ["--checkpoint", tmp_path / "model", "--input", tmp_path / "in.fasta", "--output", tmp_path / "b.npz"]
    assert run("embed", *base, "--pooling", "residues") == 2
    assert "take mean or cls" in capsys.readouterr().err


def test_another_format_than_the_ending_tells(peer, tmp_path):
    folder, _ = peer
    base = ["--checkpoint", folder / "model", "--input", folder / "in.fasta"]
    assert run("embed", *base, "--output", tmp_path / "vectors", "--output-format", "npz") == 0
    assert np.load(tmp_path / "vectors")["mean"].shape == (10, 32)


def test_bf16_is_near_fp32(peer, tmp_path):
    folder, _ = peer
    exact = embed(folder, tmp_path / "exact.npz")["mean"]
    rough = embed(folder, tmp_path / "rough.npz", "--bf16")["mean"]
    assert 0 < np.abs(rough - exact).max() < 0.1  # 8 bits of mantissa, values of order one
