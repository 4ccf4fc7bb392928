"""The command `train_tokenizer`: a model of the input, the same each time, complete or absent."""

import gzip
import json
import random
import sys
from pathlib import Path

import pytest
import sentencepiece
from preprocess_command import ROOT

from megatron_plm.data import formats
from megatron_plm.data.readers import open_inputs
from megatron_plm.data.train_tokenizer import main, sample_letters
from megatron_plm.errors import run_command
from megatron_plm.tokenizers import PIECE_LETTERS, SPECIAL_TOKENS, open_tokenizer

EXAMPLES = ROOT / "examples" / "data"
LETTERS = "LAGVSERTIDPKQNFYMHWC"


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    """500 proteins in which some words occur again and again, with unknown letters, lower case and final stops."""
    rng = random.Random(5)
    words = ["".join(rng.choices(LETTERS, k=rng.randint(2, 5))) for _ in range(60)]
    lines = []
    for number in range(500):
        text = "".join(rng.choices([*words, "j", "*", "x"], weights=[9] * 60 + [1] * 3, k=40))
        lines += [f">P{number}", text + "*"]
    (tmp_path / "in.fasta").write_text("\n".join(lines))
    return tmp_path / "in.fasta"


def run(fasta: Path, *flags: object) -> int:
    given = [str(flag) for flag in flags]
    defaults = {"--input": fasta, "--vocab-size": 200, "--output": fasta.parent / "x.model"}
    if "--output-prefix" in given:
        del defaults["--output"]
    for flag, value in defaults.items():
        given += [] if flag in given else [flag, str(value)]
    return run_command(main, given)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_the_model_is_for_proteins_and_says_so(
    fasta: Path, model_type: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(fasta, "--model-type", model_type) == 0
    peer = sentencepiece.SentencePieceProcessor(model_file=str(fasta.parent / "x.model"))
    pieces = [peer.id_to_piece(i) for i in range(peer.get_piece_size())]
    assert len(pieces) == 200
    assert tuple(pieces[:5]) == SPECIAL_TOKENS
    assert set("".join(pieces[5:])) == set(PIECE_LETTERS)
    assert peer.decode(peer.encode("MKTAYIAKQRQISFVKSHFSXBUZO.-")) == "MKTAYIAKQRQISFVKSHFSXBUZO.-"
    assert max(map(len, pieces[5:])) > 2
    out = capsys.readouterr().out
    for line in [
        "trained on       ",
        "% of the input\n",
        "tokens           200, the longest ",
        "letters a token  ",
        f"wrote            {fasta.parent}/x.model\n",
        f"--input {fasta} --tokenizer {fasta.parent}/x.model --output-prefix {fasta.parent}/x\n",
    ]:
        assert line in out


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_equal_input_and_seed_give_equal_files_and_another_sample_another(fasta: Path, model_type: str) -> None:
    seen = []
    for number, flags in enumerate([["--seed=1"], [], ["--seed=2"]]):
        output = fasta.parent / f"{number}.model"
        assert run(fasta, "--max-letters=9000", "--model-type", model_type, "--output", output, *flags) == 0
        seen.append(output.read_bytes())
    assert seen[0] == seen[1] != seen[2]


def test_the_sample_is_a_function_of_seed_and_input_only(fasta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compressed = fasta.with_suffix(".fasta.gz")
    compressed.write_bytes(gzip.compress(fasta.read_bytes()))
    records = [text for line in fasta.read_text().split("\n") if (text := line)[0] != ">"]
    stretches = {part for text in records for part in text.upper().replace("*", "J").split("J") if part}
    samples = []
    for path, block_size in [(fasta, 1 << 20), (fasta, 997), (compressed, 64)]:
        monkeypatch.setattr(formats, "BLOCK_SIZE", block_size)
        samples.append(sample_letters(open_inputs([path]), max_letters=5000, seed=3))
    assert samples[0] == samples[1] == samples[2]
    assert set(samples[0].texts) <= stretches
    assert 4500 < samples[0].num_letters <= 5000
    everything = sample_letters(open_inputs([fasta]), max_letters=10**9, seed=3)
    assert set(everything.texts) == stretches
    assert everything.num_letters_read == sum(len(text) - 1 for text in records)


def test_a_sample_is_drawn_from_everywhere_and_long_sequences_in_stretches(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("".join(f"{letter * 50_000}\n" for letter in LETTERS))
    sample = sample_letters(open_inputs([path]), max_letters=400_000, seed=1)
    assert {text[0] for text in sample.texts} == set(LETTERS)
    assert max(map(len, sample.texts)) == 4096
    assert sample.num_letters > 390_000
    assert sample.num_letters_read == 1_000_000
    least = sample_letters(open_inputs([path]), max_letters=1, seed=1)
    assert len(least.texts) == 1


def test_other_formats_and_names_in_any_language_are_taken(fasta: Path) -> None:
    texts = [line for line in fasta.read_text().split("\n") if line[0] != ">"]
    table, lines = fasta.parent / "ä.csv", fasta.parent / "蛋白.jsonl"
    table.write_text("name,seq\n" + "".join(f"x,{text}\n" for text in texts))
    lines.write_text("".join(json.dumps({"s": text}) + "\n" for text in texts))
    assert run(fasta) == 0
    assert run(fasta, "--input", table, "--column", "seq", "--output-prefix", fasta.parent / "ä 蛋") == 0
    assert run(fasta, "--input", lines, "--json-key", "s", "--output", fasta.parent / "j.model") == 0
    models = [open_tokenizer(str(fasta.parent / name)) for name in ("x.model", "ä 蛋.model", "j.model")]
    assert len({model.sha256 for model in models}) == 1
    assert models[1].name == "ä 蛋.model"
    assert run(fasta, "--output", fasta.parent / "made" / "x.model") == 0
    assert (fasta.parent / "made" / "x.model").read_bytes() == models[0].model


BAD = [
    (["--vocab-size", "32"], "--vocab-size must be 33 to 1,000,000, not 32"),
    (["--vocab-size", "9000000"], "--vocab-size must be 33 to 1,000,000"),
    (["--vocab-size", "50000"], "--vocab-size 50,000 is too large for this input"),
    (["--vocab-size", "50000", "--model-type", "bpe"], "--vocab-size 50,000 is too large for this input"),
    (["--vocab-size", "many"], "--vocab-size"),
    (["--model-type", "word"], "--model-type"),
    (["--max-letters", "0"], "--max-letters must be 1 or more"),
    (["--max-letters", "20"], "--vocab-size 200 is too large for this input"),
    (["--skip-lines", "-1"], "--skip-lines must be 0 or more"),
    (["--seed", "-1"], "--seed must be 0 to"),
    (["--output", "x.txt"], "--output x.txt: the name must end in .model"),
    (["--output", ".model"], "--output .model: the name must end in .model"),
    (["--output", "no/where/x.model"], "there is no folder no/where; make it first"),
    (["--output", "in.fasta/x.model"], "there is no folder in.fasta; make it first"),
    (["--output", "/proc/x.model"], "/proc/x.model: cannot be written"),
    (["--output", "old.model"], "old.model exists already; give another output, or --force"),
    (["--output", "folder.model", "--force"], "folder.model is a folder"),
    (["--output", "x.model", "--output-prefix", "x"], "give either --output FILE.model or --output-prefix PREFIX"),
    (["--input", "no.fasta"], "'no.fasta' does not exist"),
    (["--input", "empty.fasta"], "'empty.fasta' is empty"),
    (["--input", "unknown.fasta"], "the input holds no letter that a token could stand for"),
    (["--input", "damaged.fasta"], "'damaged.fasta', line 3: record 'b' has no sequence"),
    (["--vocab", "200"], "unknown flag --vocab; did you mean '--vocab-size'?"),
]


@pytest.mark.parametrize(("flags", "words"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_is_one_sentence_and_leaves_nothing(
    fasta: Path,
    flags: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = fasta.parent
    monkeypatch.chdir(folder)
    (folder / "folder.model").mkdir()
    for name, text in {"old.model": "old", "empty.fasta": "", "unknown.fasta": ">a\nJ*J\n"}.items():
        (folder / name).write_text(text)
    (folder / "damaged.fasta").write_text(">a\nMK\n>b\n>c\nMK\n")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    defaults = [] if "--output-prefix" in flags else ["--output", "out.model"]
    assert run_command(main, ["--input", "in.fasta", "--vocab-size", "200", *defaults, *flags]) == 2
    printed = capfd.readouterr()  # sentencepiece writes to the descriptor
    assert printed.err.startswith("error: ")
    assert words in printed.err
    assert printed.err.count("\n") == 1, printed.err
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_an_existing_file_is_replaced_where_asked_for(fasta: Path) -> None:
    (fasta.parent / "x.model").write_text("old")
    assert run(fasta, "--force") == 0
    assert open_tokenizer(str(fasta.parent / "x.model")).vocab_size == 200
    assert sorted(path.name for path in fasta.parent.iterdir()) == ["in.fasta", "x.model"]


def test_without_sentencepiece_the_way_to_install_it_is_told(
    fasta: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert run(fasta) == 2
    assert "run `pip install 'megatron-plm[sentencepiece]'`" in capsys.readouterr().err
