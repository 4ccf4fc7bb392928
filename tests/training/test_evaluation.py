"""What an evaluation reports, counted again one label at a time."""

import math

import numpy as np
import pytest
import torch
from sample_proteins import write_dataset

from megatron_plm.config.load import load_config
from megatron_plm.data.blend import Cursor
from megatron_plm.data.loader import Loader
from megatron_plm.errors import UserError
from megatron_plm.parallel.mesh import World
from megatron_plm.tokenizers import get_tokenizer
from megatron_plm.training.loop import evaluate
from megatron_plm.training.state import build_run, open_datasets

ALONE = World(0, 1, torch.device("cpu"), None)
TOKENIZER = get_tokenizer("esm2")


def build(flags, *more):
    config, _ = load_config([*flags, *more])
    return build_run(config, ALONE, open_datasets(config))


def every_label(run):
    """(token in the input, label, log-probabilities of that place) for each label of the first epoch."""
    for step in run.valid_loader.first_epoch(run.config.training.eval_iters):
        for batch in step.micro_batches:
            logits = run.model.parts[0](batch.tokens, batch.positions, batch.segment_ids, batch.cu_seqlens)
            log_p = logits.double().log_softmax(-1)
            for row, place in zip(*(batch.label_id >= 0).nonzero().T.tolist(), strict=True):
                index = int(batch.label_index[row, place])
                yield int(batch.tokens[row, index]), int(batch.label_id[row, place]), log_p[row, index]


@pytest.fixture(scope="module")
def run(pair_data):
    run = build(pair_data.flags)
    with torch.no_grad():  # away from the start, where all letters are nearly equal
        for parameter in run.model.parts[0].parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return run


def test_every_figure_is_a_count_over_labels(run):
    found = evaluate(run)
    with torch.no_grad():
        labels = list(every_label(run))
    hidden = [(label, log_p) for token, label, log_p in labels if token == TOKENIZER.mask_id]
    assert 0.7 < len(hidden) / len(labels) < 0.9
    assert found["num_labels"] == len(hidden)
    assert found["loss"] == pytest.approx(-sum(float(p[label]) for _, label, p in labels) / len(labels), rel=1e-5)
    surprise = -sum(float(log_p[label]) for label, log_p in hidden) / len(hidden)
    assert found["perplexity"] == pytest.approx(math.exp(surprise), rel=1e-5)
    right = sum(int(log_p.argmax()) == label for label, log_p in hidden)
    assert found["accuracy"] == pytest.approx(right / len(hidden), abs=1e-12)
    counts = np.bincount([label for label, _ in hidden])
    frequencies = counts[counts > 0] / len(hidden)
    assert found["unigram_perplexity"] == pytest.approx(float(np.prod(frequencies**-frequencies)), rel=1e-9)


def test_evaluation_changes_nothing_and_is_the_same_again(run):
    before = {name: value.clone() for name, value in run.model.parts[0].state_dict().items()}
    cursor = run.progress.cursor
    first, second = evaluate(run), evaluate(run)
    assert first == second
    assert run.progress.cursor == cursor == Cursor.start(1)
    assert all(torch.equal(value, before[name]) for name, value in run.model.parts[0].state_dict().items())
    assert all(parameter.grad is None for parameter in run.model.parts[0].parameters())


def test_batch_sizes_do_not_matter_where_the_whole_set_is_read(pair_data):
    found = [
        evaluate(build(pair_data.flags, "--eval-iters=1000", *sizes))
        for sizes in (
            ["--micro-batch-size=8"],
            ["--micro-batch-size=1"],
            ["--micro-batch-size=3", "--global-batch-size=9"],
        )
    ]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)


def test_shares_of_processes_add_up_to_the_whole(pair_data):
    """Without process groups: the loaders of four processes hold each label of one process exactly once."""
    run = build(pair_data.flags, "--micro-batch-size=2")

    def labels(rank, world_size):
        loader = Loader(
            run.datasets.valid.datasets, [1.0], run.config.data, TOKENIZER, micro_batch_size=2, global_batch_size=8,
            seed=1234, name="valid", rank=rank, world_size=world_size,
        )  # fmt: skip
        for step in loader.first_epoch(4):
            for batch in step.micro_batches:
                yield from batch.label_id[batch.label_id >= 0].tolist()

    assert sorted(label for rank in range(4) for label in labels(rank, 4)) == sorted(labels(0, 1))


def test_eval_iters_limits_the_batches(pair_data):
    few, all_of_it = (evaluate(build(pair_data.flags, f"--eval-iters={n}")) for n in (1, 1000))
    assert few["num_labels"] < all_of_it["num_labels"]


def test_a_set_without_a_letter_to_predict_is_refused_by_name(pair_data, tmp_path):
    """Proteins of unknown letters only have no labels, and a perplexity over none would look perfect."""
    unknown = write_dataset(tmp_path / "unknown", [np.full(30, TOKENIZER.unk_id, dtype=np.uint8)] * 3)
    with pytest.raises(UserError, match=f"--valid-data-path {unknown}: no letter of it was hidden"):
        evaluate(build(pair_data.flags, f"--valid-data-path={unknown}"))


def test_a_loss_beyond_any_perplexity_is_no_crash(pair_data):
    """As of a learning rate ten thousand times too high, which is caught a little later."""
    run = build(pair_data.flags)
    with torch.no_grad():
        run.model.parts[0].head.norm.weight.fill_(1e6)
        run.model.parts[0].encoder.embedding.tokens.weight.mul_(1e3)
    found = evaluate(run)
    assert found["loss"] > 1000
    assert math.isfinite(found["perplexity"])
