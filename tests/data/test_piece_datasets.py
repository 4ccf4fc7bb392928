"""Datasets of pieces: sentencepiece's own ids for every protein, whatever the workers; letters decide about letters."""

import gzip
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from piece_models import NORMAL, SPECIALS, encoded, their_ids, theirs, trained, write
from preprocess_command import run

from megatron_plm.config.options import DataOptions
from megatron_plm.data import formats
from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.data.inspect.command import main as inspect
from megatron_plm.data.loader import IGNORED_LABEL, Loader
from megatron_plm.data.merge import main as merge
from megatron_plm.data.pipeline import preprocess
from megatron_plm.errors import run_command
from megatron_plm.tokenizers import PIECE_LETTERS, PieceTokenizer, get_tokenizer

MODELS = {name: trained(name) for name in ("unigram", "bpe")}
LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO.-J*8"


def proteins(count: int, *, seed: int = 3) -> list[str]:
    """Lower and upper case, unknown letters in runs, some proteins twice; none ends in a stop."""
    rng = random.Random(seed)
    weights = [6] * 20 + [1] * (len(LETTERS) - 20)
    texts = ["".join(rng.choices(LETTERS, weights, k=rng.randint(1, 400))) + "M" for _ in range(count)]
    return [rng.choice([str.upper, str.lower])(rng.choice(texts)) for _ in range(count)]


def fasta(texts: list[str]) -> bytes:
    return "".join(f">P{i}\n{text}\n" for i, text in enumerate(texts)).encode()


def folded(text: str) -> str:
    return "".join(letter if letter in PIECE_LETTERS else "?" for letter in text.upper())


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with in.fasta, both models and an empty folder out."""
    (tmp_path / "out").mkdir()
    (tmp_path / "in.fasta").write_bytes(fasta(proteins(300)))
    for name, tokenizer in MODELS.items():
        write(tmp_path / f"{name}.model", tokenizer)
    return tmp_path


def dataset(place: Path, name: str = "p") -> IndexedDataset:
    return IndexedDataset(place / "out" / name)


@pytest.mark.parametrize("name", MODELS)
def test_the_dataset_holds_sentencepieces_ids_and_says_what_it_holds(place: Path, name: str) -> None:
    assert run(place, "--tokenizer", place / f"{name}.model") == 0
    tokenizer, peer, data, texts = MODELS[name], theirs(MODELS[name]), dataset(place), proteins(300)
    assert [tokens.tolist() for tokens in data] == [their_ids(peer, folded(text)) for text in texts]
    assert data.tokens.dtype == np.uint16
    assert [tokenizer.decode(tokens) for tokens in data] == [folded(text).replace("?", "<unk>") for text in texts]
    described = data.metadata
    assert described["tokenizer"] == {**MODELS[name].described(), "name": f"{name}.model"}
    counts = np.bincount(data.tokens, minlength=400)
    assert described["token_counts"] == dict(zip(tokenizer.tokens, counts.tolist(), strict=True))
    letters = "".join(texts).upper()
    unknown = {letter: letters.count(letter) for letter in "J*8"}
    assert described["unknown_letters"] == unknown
    assert described["num_unknown_letters"] == sum(unknown.values())
    assert described["num_residues"] == len(data.tokens)


def test_the_files_are_the_same_for_every_number_of_workers_and_block_size(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [place / "a.fasta.gz", place / "in.fasta", place / "c.fasta.gz"]
    for path in (inputs[0], inputs[2]):
        path.write_bytes(gzip.compress(fasta(proteins(100, seed=len(path.name)))))
    seen = set()
    for block_size, workers in [(1 << 20, 1), (1 << 20, 2), (997, 1), (997, 2), (64, 5)]:
        monkeypatch.setattr(formats, "BLOCK_SIZE", block_size)
        preprocess(inputs, place / "out" / "p", MODELS["unigram"], workers=workers, force=True)
        seen.add(tuple((place / "out" / f"p.{end}").read_bytes() for end in ("bin", "idx", "json")))
    assert len(seen) == 1


@pytest.mark.parametrize("flags", [["--dedup"], ["--dedup", "--shuffle", "--workers", "2"]])
def test_splits_and_repetitions_are_those_of_letters(place: Path, flags: list[str]) -> None:
    shares = ["--split", "train=0.6,valid=0.3,test=0.1", *flags]
    assert run(place, "--tokenizer", place / "bpe.model", "--output-prefix", place / "out" / "p", *shares) == 0
    assert run(place, "--tokenizer", "esm2", "--output-prefix", place / "out" / "e", *shares) == 0
    for split in ("train", "valid", "test"):
        pieces, letters = dataset(place, f"p_{split}"), dataset(place, f"e_{split}")
        texts = [MODELS["bpe"].decode(tokens) for tokens in pieces]
        assert texts == [get_tokenizer("esm2").decode(tokens) for tokens in letters]
        assert len(set(texts)) == len(texts) > 5


def test_lengths_are_counted_in_tokens_and_clusters_stay_together(place: Path) -> None:
    counts = [len(their_ids(theirs(MODELS["bpe"]), folded(text))) for text in proteins(300)]
    flags = ["--tokenizer", place / "bpe.model", "--min-length", 40, "--max-length", 120]
    assert run(place, *flags) == 0
    assert dataset(place).lengths.tolist() == [count for count in counts if 40 <= count <= 120]
    table = place / "clusters.tsv"
    table.write_text("".join(f"P{i // 10}\tP{i}\n" for i in range(300)))
    assert run(place, *flags[:2], "--clusters", table, "--shuffle", "--output-prefix", place / "out" / "c") == 0
    assert dataset(place, "c").num_documents == 30
    assert sorted(dataset(place, "c").lengths.tolist()) == sorted(counts)


def test_an_unknown_letter_is_an_error_where_asked_for(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "in.fasta").write_text(">a\nMKTA\n>b\nMKJA\n")
    assert run(place, "--tokenizer", place / "bpe.model", "--strict") == 2
    assert "line 4: unknown letter 'J' at position 3 of record 'b'" in capsys.readouterr().err
    assert not list((place / "out").iterdir())
    (place / "in.fasta").write_text(">a\nMKta\n")
    assert run(place, "--tokenizer", place / "bpe.model", "--keep-case") == 0
    assert dataset(place).metadata["unknown_letters"] == {"a": 1, "t": 1}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.model", b">P1\nMK\n" * 90, "x.model' is no sentencepiece model, or is damaged"),
        ("x.model", MODELS["bpe"].model[:1000], "x.model' is no sentencepiece model, or is damaged"),
        ("x.model", b"", "x.model' is no sentencepiece model, or is damaged (it lists no pieces)"),
        ("x.txt", MODELS["bpe"].model, "unknown tokenizer"),
        ("no/x.model", None, "no/x.model' cannot be read: No such file or directory"),
        ("out", None, "unknown tokenizer"),
    ],
)
def test_what_is_no_model_is_one_sentence_and_leaves_nothing(
    place: Path, name: str, content: bytes | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (place / name).write_bytes(content)
    assert run(place, "--tokenizer", place / name) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert not list((place / "out").iterdir())


def test_without_sentencepiece_the_way_to_install_it_is_told_before_anything_is_read(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (place / "in.fasta").write_text(">a\n")
    assert run(place, "--tokenizer", place / "bpe.model", "--workers", "2") == 2
    assert "run `pip install 'megatron-plm[sentencepiece]'`" in capsys.readouterr().err
    assert not list((place / "out").iterdir())


def test_a_dataset_is_looked_into_and_merged_without_the_model_file(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("p", "q"):
        assert run(place, "--tokenizer", place / "bpe.model", "--output-prefix", place / "out" / name) == 0
    (place / "bpe.model").unlink()
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    inputs = [str(place / "out" / name) for name in ("p", "q")]
    assert run_command(merge, ["--input", *inputs, "--output-prefix", str(place / "out" / "m")]) == 0
    capsys.readouterr()
    assert run_command(inspect, [str(place / "out" / "m"), "--verify", "--samples", "1"]) == 0
    out = capsys.readouterr().out
    assert "tokenizer   bpe.model (400 tokens)\n" in out
    assert "inside the vocabulary of 400" in out
    assert folded(proteins(300)[0])[:40].split("?")[0] in out
    assert len(dataset(place, "m")) == 600


def test_datasets_of_two_models_are_not_merged(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in MODELS:
        assert run(place, "--tokenizer", place / f"{name}.model", "--output-prefix", place / "out" / name) == 0
    inputs = [str(place / "out" / name) for name in MODELS]
    assert run_command(merge, ["--input", *inputs, "--output-prefix", str(place / "out" / "m")]) == 2
    assert "is of tokenizer bpe.model" in capsys.readouterr().err


def test_a_damaged_model_in_the_description_is_told_and_the_rest_shown(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(place, "--tokenizer", place / "bpe.model") == 0
    path = place / "out" / "p.json"
    described = json.loads(path.read_text())
    described["tokenizer"]["model"] = described["tokenizer"]["model"][:400]
    path.write_text(json.dumps(described))
    capsys.readouterr()
    assert run_command(inspect, [str(place / "out" / "p"), "--samples", "1"]) == 0
    out = capsys.readouterr().out
    assert f"tokenizer   bpe.model, which cannot be used here ('{place}/out/p.json', the model of tokenizer" in out
    assert f"tokens      {len(dataset(place).tokens):,}\n" in out


def test_a_vocabulary_above_65536_has_four_bytes_a_token(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    amino = PIECE_LETTERS[:20]
    texts = [*PIECE_LETTERS, *(a + b + c + d for a in amino for b in amino for c in amino for d in amino[:9])]
    pieces = [(text, 0.0, kind) for text, kind in SPECIALS.items()]
    model = encoded(pieces + [(text, -5.0 - i / 1e5, NORMAL) for i, text in enumerate(texts)])
    tokenizer = PieceTokenizer.from_model(model, name="large.model", place="x")
    assert tokenizer.vocab_size > 1 << 16
    preprocess([place / "in.fasta"], place / "out" / "p", tokenizer, workers=2)
    data, peer = dataset(place), theirs(tokenizer)
    assert data.tokens.dtype == np.int32
    assert data.tokens.max() > 1 << 16
    assert [tokens.tolist() for tokens in data] == [their_ids(peer, folded(text)) for text in proteins(300)]
    assert run_command(inspect, [str(place / "out" / "p"), "--verify"]) == 0
    assert "counts of lengths and letters are those of .json" in capsys.readouterr().out


def test_batches_hide_pieces_and_never_special_tokens(place: Path) -> None:
    tokenizer = MODELS["unigram"]
    preprocess([place / "in.fasta"], place / "out" / "p", tokenizer)
    options = DataOptions(seq_length=256, mask_token_share=0.0, mask_random_share=1.0, num_workers=0)
    loader = Loader(
        [dataset(place)], [1.0], options, tokenizer, micro_batch_size=8, global_batch_size=8, seed=1, name="train"
    )
    stands: set[int] = set()
    was: set[int] = set()
    for _, step in zip(range(6), loader.steps(loader.start()), strict=False):
        (batch,) = step.micro_batches
        for row, index, label in zip(batch.tokens, batch.label_index, batch.label_id, strict=True):
            used = label != IGNORED_LABEL
            was |= set(label[used].tolist())
            stands |= set(row[index[used]].tolist())
    assert was <= set(tokenizer.residue_ids.tolist())
    assert stands <= set(tokenizer.standard_ids.tolist())
    assert len(stands) > 200
    assert any(len(tokenizer.tokens[i]) > 1 for i in was)
