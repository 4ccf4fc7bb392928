"""Training on pieces: the run needs no model file, and its checkpoints hold the model."""

import re
import shutil
from pathlib import Path

import pytest
from piece_models import EXAMPLES, trained, write
from pretraining_runs import checkpoint, column, pretrain, read_tensors, same_bits

from megatron_plm.checkpoint_format import checkpoint_tokenizer, find_checkpoint, read_description
from megatron_plm.convert.command import main as convert
from megatron_plm.convert.pretrained import load_pretrained
from megatron_plm.data.preprocess import main as preprocess
from megatron_plm.errors import run_command
from tape_finetune.train import main as tape_train

TOKENIZER = trained("unigram")
SHAPE = [
    "--num-layers=2", "--hidden-size=32", "--num-attention-heads=2", "--seq-length=128", "--packing-window=64",
    "--micro-batch-size=4", "--global-batch-size=4", "--lr-warmup-iters=1", "--log-interval=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the dataset `data` and the run `run` of 3 steps on it; the model file is gone."""
    folder = tmp_path_factory.mktemp("pieces")
    model = write(folder / "pieces.model", TOKENIZER)
    source = EXAMPLES / "pretrain_valid.fasta.gz"
    flags = ["--input", source, "--tokenizer", model, "--output-prefix", folder / "data", "--max-length", 200]
    assert run_command(preprocess, list(map(str, flags))) == 0
    flags = [f"--data-path={folder / 'data'}", f"--valid-data-path={folder / 'data'}", f"--tokenizer={model}"]
    flags += ["--eval-interval=3", "--eval-iters=1"]
    assert pretrain(*SHAPE, *flags, "--train-iters=3", f"--save={folder / 'run'}") == 0
    model.unlink()
    return folder


@pytest.fixture
def place(trained_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, elsewhere and as the working directory."""
    shutil.copytree(trained_once, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def test_the_checkpoint_holds_the_model_and_a_head_for_every_piece(trained_once: Path) -> None:
    directory = find_checkpoint(trained_once / "run")
    assert (directory / "tokenizer.model").read_bytes() == TOKENIZER.model
    _, state = read_description(directory)
    assert (state.tokenizer, state.tokenizer_sha256) == ("pieces.model", TOKENIZER.sha256)
    assert checkpoint_tokenizer(directory, state).tokens == TOKENIZER.tokens
    assert read_tensors(directory)["model.encoder.embedding.tokens.weight"].shape == (400, 32)
    assert column(trained_once / "run", "train", "loss")[0] == pytest.approx(6.0, abs=0.3)  # log 400


def test_a_run_goes_on_by_the_models_name_alone_and_is_the_uninterrupted_one(place: Path) -> None:
    flags = [*SHAPE, "--data-path=data", "--valid-data-path=data", "--eval-interval=3", "--eval-iters=1"]
    assert pretrain(*flags, "--tokenizer=pieces.model", "--train-iters=3", "--save=again") == 0
    assert same_bits(read_tensors(checkpoint(place / "again")), read_tensors(checkpoint(place / "run")))
    for run, name in [("run", "pieces.model"), ("again", "somewhere/else/pieces.model")]:
        assert pretrain(*flags, f"--tokenizer={name}", "--train-iters=5", f"--load={run}", f"--save={run}") == 0
    assert same_bits(read_tensors(checkpoint(place / "again")), read_tensors(checkpoint(place / "run")))


def test_weights_are_read_and_written_with_the_tokenizer(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(convert, ["--from=native", "--to=native", "--input=run", "--output=out"]) == 0
    assert re.search(r"next: \S*launch/pretrain\.sh --help", capsys.readouterr().out)
    pretrained = load_pretrained(place / "out")
    assert pretrained.tokenizer.sha256 == TOKENIZER.sha256
    assert pretrained.tokenizer.decode(pretrained.tokenizer.encode("MKTAYIAK")) == "MKTAYIAK"
    flags = ["--data-path=data", "--tokenizer=pieces.model", "--train-iters=2", "--pretrained-checkpoint=out"]
    assert pretrain(*SHAPE, *flags) == 0


@pytest.mark.parametrize("target", ["huggingface", "proteinlm-tape"])
def test_formats_of_letters_refuse_pieces(target: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(convert, ["--from=native", f"--to={target}", "--input=run", "--output=out"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --to {target}: the model's tokens are the pieces of pieces.model")
    assert not (place / "out").exists()


@pytest.mark.usefixtures("place")
def test_tasks_refuse_pieces(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--from_pretrained=run", f"--data_dir={EXAMPLES / 'peptides'}", "--sequence_column=sequence"]
    flags += ["--label_column=label", "--kind=classification", "--num_train_epochs=1", "--output_dir=out"]
    for base in ("transformer", "random"):
        assert run_command(tape_train, [base, "csv", *flags]) == 2
        assert "run: its tokens are the pieces of pieces.model, and the tasks here need" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--data-path data", "'pieces.model'", "'esm2'", "give --tokenizer pieces.model here"]),
        (["--tokenizer=other.model"], ["--tokenizer other.model: there is no such file", "'pieces.model'"]),
        (["--tokenizer=taken/pieces.model"], ["'pieces.model' has the name of the model's, but is another one"]),
        (["--tokenizer=junk.model"], ["junk.model' is no sentencepiece model"]),
        (["--tokenizer=pieces.model", "--data-path=nowhere"], ["nowhere.idx' does not exist"]),
    ],
)
def test_another_tokenizer_than_the_datasets_is_refused(
    flags: list[str], words: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "taken").mkdir()
    write(place / "taken" / "pieces.model", trained("bpe"))
    (place / "junk.model").write_bytes(b">P1\n")
    assert pretrain(*SHAPE, "--data-path=data", "--train-iters=1", *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def test_a_checkpoint_without_its_model_or_with_another_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = find_checkpoint(place / "run") / "tokenizer.model"
    argv = ["--from=native", "--to=native", "--input=run", "--output=out"]
    for content, words in [
        (trained("bpe").model, "tokenizer.model is not the one of this checkpoint"),
        (b"", "is no sentencepiece model"),
        (None, "tokenizer.model' cannot be read"),
    ]:
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        assert run_command(convert, argv) == 2
        assert words in capsys.readouterr().err


def test_a_run_of_another_tokenizer_goes_on_with_the_pieces_that_both_have_and_none_other(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bpe = trained("bpe")
    write(place / "bpe.model", bpe)
    source = str(EXAMPLES / "pretrain_valid.fasta.gz")
    assert run_command(preprocess, ["--input", source, "--tokenizer=bpe.model", "--output-prefix=bpe"]) == 0
    flags = ["--data-path=bpe", "--tokenizer=bpe.model", "--train-iters=1"]
    capsys.readouterr()
    assert pretrain(*SHAPE, *flags, "--pretrained-checkpoint=run") == 0
    shared = len(set(bpe.tokens) & set(TOKENIZER.tokens))
    assert 10 < shared < len(bpe.tokens)
    told = f"its rows of pieces.model go by name to {shared} of {len(bpe.tokens)} tokens, initial values to "
    assert told in capsys.readouterr().out
    assert pretrain(*SHAPE, *flags, "--load=run") == 2
    way_out = f"preprocess the FASTA file with --tokenizer {find_checkpoint(place / 'run') / 'tokenizer.model'}"
    assert way_out in capsys.readouterr().err
