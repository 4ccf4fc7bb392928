"""The loop in one process: what splits a step changes nothing, and the model learns."""

import math

import pytest
from pretraining_runs import checkpoint, column, largest_relative_difference, pretrain, read_tensors, records, same_bits

# As between one and two processes (tests/parallel/test_two_processes.py): only the order of fp32 sums differs.
LOSS, GRAD_NORM, WEIGHTS = 1e-5, 1e-4, 1e-4


@pytest.mark.parametrize("name", ["accumulate_2", "accumulate_1"])
def test_gradient_accumulation_is_the_whole_batch_at_once(one_process, name):
    whole, split = one_process / "plain", one_process / name
    assert column(split, "train", "loss") == pytest.approx(column(whole, "train", "loss"), rel=LOSS)
    assert column(split, "train", "grad_norm") == pytest.approx(column(whole, "train", "grad_norm"), rel=GRAD_NORM)
    for quantity in ("loss", "perplexity", "accuracy"):
        assert column(split, "valid", quantity) == pytest.approx(column(whole, "valid", quantity), rel=LOSS)
    weights = [read_tensors(checkpoint(run)) for run in (split, whole)]
    assert largest_relative_difference(*weights, "model.") < WEIGHTS


@pytest.mark.parametrize("names", [("plain", "recompute"), ("dropout", "dropout_recompute")])
def test_recomputing_each_block_changes_no_bit(one_process, names):
    plain, recomputed = (one_process / name for name in names)
    assert column(recomputed, "train", "loss") == column(plain, "train", "loss")
    assert same_bits(read_tensors(checkpoint(recomputed)), read_tensors(checkpoint(plain)))


def test_dropout_acts_in_training(one_process):
    plain, dropped = (column(one_process / name, "train", "loss") for name in ("plain", "dropout"))
    assert all(a != b for a, b in zip(plain, dropped, strict=True))
    assert dropped[-1] < dropped[0] - 0.05, "and lets it learn"


def test_bfloat16_trains_and_stays_close_to_float32(one_process):
    exact, rounded = (column(one_process / name, "train", "loss") for name in ("plain", "bf16"))
    # Rounding the logits to bfloat16 moves each by at most 2^-9 of itself, the loss by at most twice the largest move.
    # Logits stay below 4 here; rounding inside the network adds as much again.
    assert rounded == pytest.approx(exact, abs=2 * (2 * 4 * 2**-9))
    assert rounded != exact
    assert rounded[-1] < rounded[0] - 0.1
    saved = read_tensors(checkpoint(one_process / "bf16"))
    assert {str(t.dtype) for n, t in saved.items() if n.startswith("model.")} == {"torch.float32"}


def test_a_run_leaves_what_it_promises(one_process):
    run = one_process / "plain"
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints", "config.toml", "metrics.jsonl", "status", "tensorboard",
    ]  # fmt: skip
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step_00000010", "step_00000020"]
    assert checkpoint(run).resolve() == checkpoint(run, 20)
    assert (run / "status").read_text() == "finished\n"


def test_the_records_hold_together(one_process, pair_data):
    run = one_process / "plain"
    (start,), (end,) = records(run, "start"), records(run, "end")
    assert start["command"] == f"launch/pretrain.sh {' '.join(pair_data.flags)} --save={run}"
    assert (start["world_size"], start["seed"], start["train_sequences"]) == (1, 1234, 400)
    assert (end["step"], end["status"]) == (20, "finished")
    train = records(run, "train")
    assert [record["step"] for record in train] == list(range(1, 21))
    consumed = 0
    for record in train:
        consumed += record["tokens"]
        assert record["consumed_tokens"] == consumed
        assert record["fill"] == record["tokens"] / (8 * 64)
        assert 0.8 < record["fill"] <= 1
    rates = [3e-3 * k / 4 for k in (1, 2, 3, 4)] + [3e-3 - 2e-3 * k / 16 for k in range(16)]
    assert column(run, "train", "lr") == pytest.approx(rates)
    assert [record["step"] for record in records(run, "valid")] == [10, 20]


def test_the_first_loss_is_that_of_not_knowing_anything(one_process):
    assert column(one_process / "plain", "train", "loss")[0] == pytest.approx(math.log(33), rel=0.03)


def test_lines_gather_the_steps_between_them(pair_data, one_process, tmp_path):
    """The loss of a line is that of all labels since the last line, so it lies between those of its steps."""
    assert pretrain(*pair_data.flags, "--log-interval=4", "--train-iters=10", f"--save={tmp_path}") == 0
    assert column(tmp_path, "train", "step") == [4, 8, 10]
    single = records(one_process / "plain", "train")[:10]
    for record, steps in zip(records(tmp_path, "train"), (single[:4], single[4:8], single[8:]), strict=True):
        assert record["tokens"] == sum(step["tokens"] for step in steps)
        losses = [step["loss"] for step in steps]
        assert min(losses) < record["loss"] < max(losses)


def test_a_context_that_tells_the_letter_is_learnt(pair_data, tmp_path):
    flags = ["--train-iters=150", "--lr=1e-2", "--log-interval=50", "--eval-interval=150", "--save-interval=150"]
    flags += ["--eval-iters=1000"]  # all proteins, so that the letters are about equally frequent
    assert pretrain(*pair_data.flags, *flags, f"--save={tmp_path}") == 0
    (valid,) = records(tmp_path, "valid")
    assert valid["unigram_perplexity"] == pytest.approx(20, rel=0.15), "20 letters, equally frequent"
    assert valid["perplexity"] < 0.5 * valid["unigram_perplexity"]
    assert valid["accuracy"] > 0.4
    losses = column(tmp_path, "train", "loss")
    assert math.exp(losses[-1]) < 0.5 * valid["unigram_perplexity"]
    assert losses == sorted(losses, reverse=True)


def test_a_causal_model_learns_from_what_stands_before(pair_data, tmp_path):
    """Of two letters that a protein has, each next one is a guess of two, once both have been seen."""
    flags = ["--objective=clm", "--train-iters=100", "--lr=1e-2", "--eval-interval=100", "--eval-iters=1000"]
    assert pretrain(*pair_data.flags, *flags, f"--save={tmp_path}") == 0
    (valid,) = records(tmp_path, "valid")
    assert valid["num_labels"] > 2000, "every token but the first of each segment"
    assert valid["perplexity"] < 0.25 * valid["unigram_perplexity"]
    assert valid["loss"] == pytest.approx(math.log(valid["perplexity"]))


def test_without_save_nothing_is_written(pair_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert pretrain(*pair_data.flags, "--train-iters=2") == 0
    assert list(tmp_path.iterdir()) == []
    assert "nothing was saved" in capsys.readouterr().out


def test_without_a_validation_set_nothing_is_evaluated(pair_data, tmp_path):
    flags = [flag for flag in pair_data.flags if not flag.startswith("--valid")]
    assert pretrain(*flags, "--train-iters=2", f"--save={tmp_path}") == 0
    assert records(tmp_path, "valid") == []


def test_print_config_shows_the_run_and_starts_nothing(pair_data, tmp_path, capsys):
    assert pretrain(*pair_data.flags, f"--save={tmp_path / 'run'}", "--print-config") == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.toml").write_text(printed)
    assert not (tmp_path / "run").exists()
    assert pretrain("--config", tmp_path / "printed.toml", "--train-iters=1") == 0
    assert "seq_length = 64\n" in printed
