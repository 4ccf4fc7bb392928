"""Megatron-LM's checkpoints: read as what they mean, whatever their version and ranks; written as they were."""

from dataclasses import replace
from pathlib import Path

import megatron_sample as sample
import pytest
import torch
from convert_sample import PROTEINLM_TINY, convert, our_logits, pack, random_weights, written
from megatron_sample import random_model, save, words
from pretraining_runs import same_bits

from megatron_plm.convert.megatron import read_megatron, write_megatron
from megatron_plm.convert.native import read_native
from megatron_plm.convert.pretrained import detect_format, load_pretrained
from megatron_plm.convert.weights import Weights
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import get_tokenizer

PROTEINLM = get_tokenizer("proteinlm")
OPTIONS = replace(
    PROTEINLM_TINY,
    num_layers=sample.LAYERS,
    hidden_size=sample.D,
    num_attention_heads=sample.N,
    max_position_embeddings=sample.P,
    layernorm_epsilon=sample.EPSILON,
)
LAYOUTS = [(num_stages, num_ranks, version) for version in (0, 1.0, 2.0, 3.0) for num_stages, num_ranks in
           ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2))]  # fmt: skip


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """What all layouts of one model must be read as: that of one rank."""
    return read_megatron(save(tmp_path_factory.mktemp("whole"), random_model()).parent)


def test_the_options_are_those_of_the_args(expected: Weights) -> None:
    assert (expected.options, expected.tokenizer, expected.notes) == (OPTIONS, PROTEINLM, ())


@pytest.mark.parametrize(("num_stages", "num_ranks", "version"), LAYOUTS)
def test_logits_are_those_of_proteinlms_model_and_weights_the_same_at_every_layout(
    num_stages: int, num_ranks: int, version: float, expected: Weights, tmp_path: Path
) -> None:
    model = random_model()
    save(tmp_path, model, num_stages=num_stages, num_ranks=num_ranks, version=version)
    assert detect_format(tmp_path) == "megatron"
    weights = read_megatron(tmp_path)
    assert same_bits(dict(weights.tensors), dict(expected.tensors))
    assert weights.options == OPTIONS

    generator = torch.Generator().manual_seed(1)
    proteins = [torch.randint(0, 31, (length,), generator=generator) for length in (17, 40, 1, 9)]
    theirs = torch.cat([sample.logits(model, protein) for protein in proteins])
    assert theirs.abs().max() > 1
    ours = our_logits(weights.build().eval(), pack(proteins, [0, 0, 1, 1], 60, PROTEINLM.pad_id))
    # fp32 in another order of sums; tanh and erf form of GELU differ by 4e-3 in the logits.
    assert ours.shape[1] == 31, "padding of the vocabulary reaches no one"
    worst = (ours - theirs).abs().max().item()
    print(f"max abs logit difference {worst:.1e}")  # pytest -rP shows it; docs/converters.md states the largest
    assert worst <= 1e-5


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_round_trip_changes_no_bit_and_files_are_those_of_megatron(
    num_ranks: int, expected: Weights, tmp_path: Path
) -> None:
    source = written(expected, "native", tmp_path / "native")
    flags = ["--target-tensor-parallel-size", str(num_ranks)]
    assert convert("native", "megatron", source, tmp_path / "there", *flags) == 0
    assert convert("megatron", "native", tmp_path / "there", tmp_path / "back") == 0
    back = read_native(tmp_path / "back")
    assert same_bits(dict(back.tensors), dict(expected.tensors))
    assert back.options == expected.options

    theirs = save(tmp_path / "theirs", random_model(), num_ranks=num_ranks)
    assert (tmp_path / "there" / "latest_checkpointed_iteration.txt").read_text() == "release"
    for rank in range(num_ranks):
        file = f"mp_rank_{rank:02d}/model_optim_rng.pt"
        one, other = (
            torch.load(folder / file, weights_only=False) for folder in (tmp_path / "there" / "release", theirs)
        )
        assert len(words(one)["weight"]) == 128
        for content in (one, other):  # but for the rows that mean nothing
            for key, entry in (("weight", words(content)), ("bias", content["model"]["lm_head"])):
                entry[key] = entry[key][: max(0, 31 - 128 * rank)]
        assert flat(one["model"]).keys() == flat(other["model"]).keys()
        assert same_bits(flat(one["model"]), flat(other["model"]))
        assert one["checkpoint_version"] == 3.0
        differing = {k: v for k, v in vars(one["args"]).items() if vars(other["args"]).get(k, v) != v}
        assert differing == {"params_dtype": torch.float32}


def flat(content: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    found = {}
    for key, value in content.items():
        found |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def test_the_exact_gelu_is_told_by_the_switched_off_fusion(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", random_model())
    sample.change(folder / "mp_rank_00/model_optim_rng.pt", lambda c: setattr(c["args"], "bias_gelu_fusion", False))
    weights = read_megatron(tmp_path / "in")
    assert weights.options == replace(OPTIONS, activation="gelu")
    back = read_megatron(written(weights, "megatron", tmp_path / "out"))
    assert back.options == weights.options


def test_a_narrow_checkpoint_is_widened_exactly_and_written_narrow_again(expected: Weights, tmp_path: Path) -> None:
    write_megatron(expected, tmp_path, "float16", target_tensor_parallel_size=2)
    back = read_megatron(tmp_path)
    assert same_bits(dict(back.tensors), {k: t.half().float() for k, t in expected.tensors.items()})
    content = torch.load(tmp_path / "release/mp_rank_01/model_optim_rng.pt", weights_only=False)
    assert content["args"].params_dtype is torch.float16
    assert content["args"].fp16


def test_all_ways_to_name_a_checkpoint_mean_the_same(expected: Weights, tmp_path: Path) -> None:
    folder = save(tmp_path / "all", random_model(), num_ranks=2)
    alone = tmp_path / "alone"
    alone.mkdir()
    (save(tmp_path / "one", random_model()) / "mp_rank_00" / "model_optim_rng.pt").rename(alone / "model_optim_rng.pt")
    (tmp_path / "release").mkdir()
    written(expected, "megatron", tmp_path / "released")
    rank = folder / "mp_rank_01"
    for path in (folder, rank, rank / "model_optim_rng.pt", alone, alone / "model_optim_rng.pt", tmp_path / "released"):
        assert detect_format(path) == "megatron"
        assert same_bits(dict(read_megatron(path).tensors), dict(expected.tensors)), path
    (alone / "model_optim_rng.pt").unlink()
    (rank / "model_optim_rng.pt").rename(alone / "model_optim_rng.pt")
    with pytest.raises(UserError, match="is one of 2 ranks"):
        read_megatron(alone)


def test_heads_that_proteins_do_not_need_are_dropped_with_a_note(expected: Weights, tmp_path: Path) -> None:
    folder = save(tmp_path, random_model())

    def add(content: dict) -> None:
        content["model"]["binary_head"] = {"weight": torch.ones(2, sample.D), "bias": torch.ones(2)}
        content["model"]["language_model"]["pooler"] = {
            "dense.weight": torch.ones(sample.D, sample.D),
            "dense.bias": torch.ones(sample.D),
        }

    sample.change(folder / "mp_rank_00/model_optim_rng.pt", add)
    weights = read_megatron(tmp_path)
    assert sorted(note.split(":")[0] for note in weights.notes) == [
        "binary_head.bias",
        "binary_head.weight",
        "language_model.pooler.dense.bias",
        "language_model.pooler.dense.weight",
    ]
    assert same_bits(dict(weights.tensors), dict(expected.tensors))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_placement": "post"}, 'norm_placement is "post"'),
        ({"activation": "swiglu"}, 'activation is "swiglu"'),
        ({"position_embedding_type": "rope", "max_position_embeddings": None}, 'position_embedding_type is "rope"'),
        ({"objective": "clm"}, 'objective is "clm"'),
    ],
    ids=str,
)
def test_a_model_that_the_format_cannot_hold_is_refused(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        write_megatron(random_weights(replace(OPTIONS, **options)), tmp_path)


@pytest.mark.parametrize("num_ranks", [3, 0, 8])
def test_ranks_that_do_not_divide_the_heads_are_refused(num_ranks: int, expected: Weights, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"-size {num_ranks}: does not divide the model's 4 attention heads"):
        write_megatron(expected, tmp_path, target_tensor_parallel_size=num_ranks)
    assert not list(tmp_path.iterdir())


def test_a_model_loads_for_use(expected: Weights, tmp_path: Path) -> None:
    save(tmp_path, random_model(), num_ranks=4, version=0)
    assert same_bits(dict(load_pretrained(tmp_path).model.state_dict()), dict(expected.tensors))
