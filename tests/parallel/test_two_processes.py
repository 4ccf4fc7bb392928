"""Two processes that share a model by FSDP2 train as one process does."""

import pytest
import torch
from pretraining_runs import checkpoint, column, largest_relative_difference, pretrain, read_tensors, records, same_bits
from torch import nn
from two_process_work import BF16_LAYOUTS, CLIP, GRADIENT_MODELS, GRADIENTS, IMPOSSIBLE, whole_gradients

from megatron_plm.benchmark.parity import relative_difference
from megatron_plm.config.load import load_config
from megatron_plm.model.initialize import initialize
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.tokenizers import get_tokenizer

# Only the order of fp32 additions differs. Each of some 10^4 terms of a sum is rounded by 6e-8 of the sum, at random:
# 6e-6 after a step at worst, where 1e-7 is seen; 20 steps of Adam move the weights apart by the bound of the design.
LOSS, GRAD_NORM, WEIGHTS = 1e-5, 1e-4, 1e-4
# Of one parameter in the first step, where 4e-7 is seen: some sums cancel to a part of their terms.
GRADIENT = 4e-6


@pytest.fixture(scope="module")
def folders(one_process, two_processes):
    return one_process, two_processes.folder


def test_every_run_of_both_processes_ended_in_order(two_processes):
    for probe in two_processes.probes:
        codes = dict(probe["codes"])
        assert codes.pop("full") == 1
        assert codes == {name: 2 if name.startswith("impossible") else 0 for name in codes}
        assert len(codes) == 10 + len(IMPOSSIBLE)


def test_a_layout_that_cannot_be_is_told_once_and_named_by_its_flag(two_processes):
    said = [(two_processes.folder / f"output_{rank}.txt").read_text() for rank in (0, 1)]
    told = [line for line in said[0].splitlines() if line.startswith("error: ") and "step_" not in line]
    assert len(told) == len(IMPOSSIBLE)
    for line, flag in zip(told, ("--global-batch-size 12", "heads 1", "--num-layers 1", "-size 3 = 3"), strict=True):
        assert flag in line
    assert all("step_" in line for line in said[1].splitlines() if line.startswith("error: "))


def test_a_process_that_cannot_save_beside_its_training_ends_both_and_is_told_once(two_processes):
    said = "".join((two_processes.folder / f"output_{rank}.txt").read_text() for rank in (0, 1))
    assert said.count("error: ") == len(IMPOSSIBLE) + 1
    assert "step_00000005: the checkpoint cannot be written (No space left on device)" in said
    assert not list((two_processes.folder / "full/checkpoints").glob("step_*"))
    assert len(records(two_processes.folder / "full", "train")) < 10


@pytest.mark.parametrize("name", ["plain", "accumulate", "recompute", "from_one"])
def test_losses_gradient_norms_and_weights_are_those_of_one_process(folders, name):
    one, two = folders[0] / "plain", folders[1] / name
    steps = column(two, "train", "step")
    assert steps == list(range(11 if name == "from_one" else 1, 21))
    for quantity, tolerance in (("loss", LOSS), ("grad_norm", GRAD_NORM)):
        assert column(two, "train", quantity) == pytest.approx(
            column(one, "train", quantity)[-len(steps) :], rel=tolerance
        )
    for quantity in ("lr", "tokens", "consumed_tokens", "fill"):
        assert column(two, "train", quantity) == column(one, "train", quantity)[-len(steps) :]
    weights = [read_tensors(checkpoint(run)) for run in (two, one)]
    assert largest_relative_difference(*weights, "model.") < WEIGHTS
    assert largest_relative_difference(*weights, "optimizer.") < WEIGHTS


def test_the_runs_did_learn_so_that_equal_weights_say_something(folders):
    first, last = (read_tensors(checkpoint(folders[0] / "plain", step)) for step in (10, 20))
    assert largest_relative_difference(first, last, "model.") > 1000 * WEIGHTS


def test_validation_is_that_of_one_process(folders):
    one, two = (records(folder / "plain", "valid") for folder in folders)
    assert [record["step"] for record in one] == [10, 20]
    for ours, theirs in zip(one, two, strict=True):
        for quantity in ("loss", "perplexity", "accuracy"):
            assert ours[quantity] == pytest.approx(theirs[quantity], rel=1e-6)
        assert ours["num_labels"] == theirs["num_labels"]
        assert ours["unigram_perplexity"] == theirs["unigram_perplexity"]


def test_bfloat16_stays_close_to_one_process_in_bfloat16(folders):
    one, two = (column(folder / "bf16", "train", "loss") for folder in folders)
    # Half of each sum is made elsewhere, but sums over labels and over processes are fp32: what differs is the rounding
    # of activations in micro-batches of the same rows, and after a step that of weights one bfloat16 (2^-8) apart.
    assert two == pytest.approx(one, rel=2**-8)


@pytest.mark.parametrize("name", BF16_LAYOUTS)
def test_bfloat16_at_other_layouts_stays_close_to_one_process_in_bfloat16(folders, name):
    for quantity, tolerance in (("loss", 2**-8), ("grad_norm", 2**-4)):
        one, two = (column(run, "train", quantity) for run in (folders[0] / "bf16", folders[1] / f"bf16_{name}"))
        assert two == pytest.approx(one, rel=tolerance)


def test_recomputing_changes_no_bit(folders):
    plain, recomputed = (read_tensors(checkpoint(folders[1] / name)) for name in ("plain", "recompute"))
    assert same_bits(plain, recomputed)


@pytest.mark.parametrize("step", [10, 20])
def test_saving_beside_the_training_writes_the_same_bits(folders, step):
    plain, beside = (read_tensors(checkpoint(folders[1] / name, step)) for name in ("plain", "async"))
    assert same_bits(plain, beside)


def test_resuming_at_the_same_layout_is_bitwise_the_uninterrupted_run(folders):
    plain, resumed = (folders[1] / name for name in ("plain", "resumed"))
    assert same_bits(read_tensors(checkpoint(plain)), read_tensors(checkpoint(resumed)))
    assert column(resumed, "train", "loss") == column(plain, "train", "loss")[10:]
    assert records(resumed, "valid")[-1] == records(plain, "valid")[-1]


def test_one_process_goes_on_where_two_stopped(folders, pair_data, tmp_path):
    assert pretrain(*pair_data.flags, f"--load={checkpoint(folders[1] / 'plain', 10)}", f"--save={tmp_path}") == 0
    losses = column(tmp_path, "train", "loss")
    assert len(losses) == 10
    assert losses == pytest.approx(column(folders[1] / "plain", "train", "loss")[10:], rel=LOSS)
    weights = [read_tensors(checkpoint(run)) for run in (tmp_path, folders[1] / "plain")]
    assert largest_relative_difference(*weights, "model.") < WEIGHTS


def test_the_world_counts_its_processes_exactly(two_processes):
    for rank, probe in enumerate(two_processes.probes):
        assert (probe["rank"], probe["size"]) == (rank, 2)
        assert probe["sum"] == [3, 2**52 + 1, 0.5]
        assert probe["any"] == [True, True, False, True]


def test_each_process_holds_about_half_of_the_weights_and_together_all(two_processes):
    shares = [probe["local_numel"] for probe in two_processes.probes]
    whole = sum(value.numel() for value in two_processes.probes[0]["initial"].values())
    assert sum(shares) == whole
    assert max(shares) < 0.55 * whole


def test_sharded_models_start_from_the_weights_of_one_process(two_processes, pair_data):
    config, _ = load_config(pair_data.flags)
    model = MaskedLanguageModel(config.model, get_tokenizer("esm2"))
    initialize(model, config.model, config.training.seed)
    for probe in two_processes.probes:
        assert same_bits(probe["initial"], {name: p.detach() for name, p in model.named_parameters()})


@pytest.mark.parametrize("rank", [0, 1])
def test_clipping_shards_is_clipping_the_whole(two_processes, rank):
    probe = two_processes.probes[rank]
    whole = {name: nn.Parameter(torch.zeros_like(gradient)) for name, gradient in probe["gradients"].items()}
    for name, parameter in whole.items():
        parameter.grad = probe["gradients"][name].clone()
    norm = nn.utils.clip_grad_norm_(whole.values(), CLIP)
    assert probe["norm"] == pytest.approx(norm.item(), rel=1e-6)
    assert probe["norm"] > 2 * CLIP, "or there is nothing to clip"
    assert same_bits(probe["gradients"], probe["unclipped"]), "0 turns clipping off"
    for name, parameter in whole.items():
        torch.testing.assert_close(probe["clipped"][name], parameter.grad, rtol=1e-6, atol=1e-12)


@pytest.fixture(scope="module")
def gradients_alone(pair_data):
    return {model: whole_gradients([*pair_data.flags, *more]) for model, more in GRADIENT_MODELS.items()}


@pytest.mark.parametrize(("model", "layout"), GRADIENTS)
def test_every_gradient_on_every_process_is_that_of_one_process(two_processes, gradients_alone, model, layout):
    """Also those of what is held by all, as norms, biases, embedding and head are under tensor parallelism: there it is
    that parts of a sum get lost or count twice, which shows in the norm of all gradients only a little."""
    alone = gradients_alone[model]
    found = [probe["gradients_at"][f"{model} {layout}"] for probe in two_processes.probes]
    # A pipeline's processes have the parameters of their stages, any others all.
    assert set().union(*found) - {"copy of encoder.embedding.tokens.weight"} == alone.keys()
    assert layout == "pp" or found[0].keys() == found[1].keys()
    differences = {
        f"{parameter} on {rank}": relative_difference(gradient, alone[parameter.removeprefix("copy of ")])
        for rank, gradients in enumerate(found)
        for parameter, gradient in gradients.items()
    }
    assert {where: value for where, value in differences.items() if not value <= GRADIENT} == {}
