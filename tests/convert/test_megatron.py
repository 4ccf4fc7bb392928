"""Megatron-LM's checkpoints: read as what they mean, whatever their version and ranks; written as they were."""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import megatron_sample as sample
import pytest
import torch
from convert_sample import PROTEINLM_TINY, convert, our_logits, pack, random_weights, written
from harmful_pickle import Calls
from megatron_sample import random_model, save
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


BOTH = ("mp_rank_00", "mp_rank_01")


def edited(edit: Callable[[dict], object], ranks: tuple[str, ...] = BOTH[:1]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for rank in ranks:
            sample.change(folder / rank / "model_optim_rng.pt", edit)

    return spoil


def words(content: dict) -> dict:
    return content["model"]["language_model"]["embedding"]["word_embeddings"]


def transformer(content: dict) -> dict:
    return content["model"]["language_model"]["transformer"]


QKV = "layers.1.attention.query_key_value.weight"
# what is wrong with a checkpoint of two ranks, and what the one sentence must say
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing rank": (
        lambda folder: (folder / "mp_rank_01" / "model_optim_rng.pt").unlink(),
        "mp_rank_01/model_optim_rng.pt missing",
    ),
    "a missing folder of a rank": (
        lambda folder: (folder / "mp_rank_01").rename(folder.parent / "elsewhere"),
        "mp_rank_01/model_optim_rng.pt missing",
    ),
    "a rank too many": (
        lambda folder: shutil.copytree(folder / "mp_rank_01", folder / "mp_rank_02"),
        "holds more ranks than the 2 of its args",
    ),
    "an iteration that is not there": (
        lambda folder: folder.rename(folder.with_name("iter_0000001")),
        "iter_0001000: is missing, and latest_checkpointed_iteration.txt names it",
    ),
    "a tracker that is no number": (
        lambda folder: (folder.parent / "latest_checkpointed_iteration.txt").write_text("soon"),
        "is 'soon'; expected the number of an iteration or 'release'",
    ),
    "a rank cut short": (
        lambda folder: os.truncate(folder / "mp_rank_01/model_optim_rng.pt", 9000),
        "mp_rank_01/model_optim_rng.pt: cannot be read",
    ),
    "ranks of two iterations": (edited(lambda c: c.update(iteration=7)), "its ranks have iteration 1000 and 7"),
    "an unknown version": (
        edited(lambda c: c.update(checkpoint_version=4.0), BOTH),
        "has checkpoint_version 4.0; expected 0 to 3.0",
    ),
    "no args": (edited(lambda c: c.pop("args")), "has no args"),
    "args without a needed one": (edited(lambda c: delattr(c["args"], "num_layers")), "num_layers has no value"),
    "another architecture": (
        edited(lambda c: setattr(c["args"], "apply_residual_connection_post_layernorm", True)),
        "apply_residual_connection_post_layernorm is true, but pre-LN models only",
    ),
    "another GELU in the head": (edited(lambda c: setattr(c["args"], "openai_gelu", True)), "openai_gelu is true"),
    "shared layers": (edited(lambda c: setattr(c["args"], "num_unique_layers", 2)), "num_unique_layers is 2"),
    "no model": (edited(lambda c: c.pop("model")), "with an entry 'model'"),
    "a missing key": (
        edited(lambda c: transformer(c).pop(QKV), BOTH),
        f"1 tensor is missing (language_model.transformer.{QKV})",
    ),
    "a key of one rank only": (edited(lambda c: transformer(c).pop(QKV), BOTH[1:]), "'absent'] in its ranks"),
    "an unknown key": (
        edited(lambda c: transformer(c).update({"layers.1.adapter.weight": torch.ones(2)}), BOTH),
        "1 tensor is unknown (language_model.transformer.layers.1.adapter.weight)",
    ),
    "what is no tensor": (
        edited(lambda c: transformer(c).update({"layers.1.adapter": "x"})),
        "layers.1.adapter is no tensor",
    ),
    "shapes that differ between ranks": (
        edited(lambda c: transformer(c).update({QKV: torch.ones(12, sample.D)})),
        f"{QKV} of stage 0 is [[12, 48], [72, 48]] in its ranks",
    ),
    "a shape of another model": (
        edited(lambda c: transformer(c).update({QKV: torch.ones(12, sample.D)}), BOTH),
        f"{QKV} has shape [24, 48], but the configuration beside it describes [144, 48]",
    ),
    "another vocabulary": (
        edited(lambda c: words(c).update(weight=torch.ones(15296, sample.D)), BOTH),
        "word_embeddings.weight has shape [30592, 48], but the configuration beside it describes [256, 48]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_exit_2_and_no_output(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, sentence = BAD[case]
    spoil(save(tmp_path / "source", random_model(), num_ranks=2))
    assert convert("megatron", "native", tmp_path / "source", tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert sentence in printed.err
    assert not (tmp_path / "out").exists()


def test_code_in_a_rank_runs_with_trust_pickle_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "source", random_model())
    marker = tmp_path / "it ran"
    sample.change(folder / "mp_rank_00/model_optim_rng.pt", lambda c: c.update(loss_scaler=Calls(Path.touch, marker)))
    assert convert("megatron", "native", tmp_path / "source", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert re.search(r"model_optim_rng\.pt: names .*pathlib\.Path.* and would run code", message)
    assert "nothing of it was run" in message
    assert "--trust-pickle" in message
    assert not marker.exists()
    assert not (tmp_path / "out").exists()
    assert convert("megatron", "native", tmp_path / "source", tmp_path / "out", "--trust-pickle") == 0
    assert marker.exists()
    assert "read with --trust-pickle" in capsys.readouterr().out


def test_a_distributed_checkpoint_of_megatron_core_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "source" / "iter_0000010").mkdir(parents=True)
    (tmp_path / "source" / "latest_checkpointed_iteration.txt").write_text("10")
    folder = tmp_path / "source" / "iter_0000010"
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (folder / ".metadata").write_bytes(b"")
    (folder / "common.pt").write_bytes(b"")
    for path in (tmp_path / "source", folder):
        for source in ("megatron", "native"):
            assert convert(source, "native", path, tmp_path / "out") == 2
            assert "a distributed checkpoint of megatron-core (torch_dist)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_placement": "post"}, 'norm_placement is "post"'),
        ({"activation": "swiglu"}, 'activation is "swiglu"'),
        ({"position_embedding_type": "rope", "max_position_embeddings": None}, 'position_embedding_type is "rope"'),
        ({"objective": "clm"}, 'objective is "clm"'),
        ({"tokenizer": "tape-iupac"}, "vocabulary is tape-iupac"),
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
