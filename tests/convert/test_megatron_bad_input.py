"""What is said of Megatron-LM checkpoints that are wrong, damaged or foreign: one sentence, and no output."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import megatron_sample as sample
import pytest
import torch
from convert_sample import convert
from harmful_pickle import Calls
from megatron_sample import random_model, save, words

BOTH = ("mp_rank_00", "mp_rank_01")


def edited(edit: Callable[[dict], object], ranks: tuple[str, ...] = BOTH[:1]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for rank in ranks:
            sample.change(folder / rank / "model_optim_rng.pt", edit)

    return spoil


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
        "has checkpoint_version 4.0; expected 0, 1, or 2 to 3.0",
    ),
    "no args": (edited(lambda c: c.pop("args")), "has no args"),
    "args without a needed one": (edited(lambda c: delattr(c["args"], "num_layers"), BOTH), "num_layers has no value"),
    "another architecture": (
        edited(lambda c: setattr(c["args"], "apply_residual_connection_post_layernorm", True), BOTH),
        "apply_residual_connection_post_layernorm is true, but pre-LN models only",
    ),
    "another GELU in the head": (
        edited(lambda c: setattr(c["args"], "openai_gelu", True), BOTH),
        "openai_gelu is true",
    ),
    "heads that the ranks cannot share": (
        edited(lambda c: setattr(c["args"], "num_attention_heads", 3), BOTH),
        "args have 3 heads for 2 ranks",
    ),
    "shared layers": (edited(lambda c: setattr(c["args"], "num_unique_layers", 2), BOTH), "num_unique_layers is 2"),
    "no model": (edited(lambda c: c.pop("model")), "with an entry 'model'"),
    "a missing key": (
        edited(lambda c: transformer(c).pop(QKV), BOTH),
        f"1 tensor is missing (language_model.transformer.{QKV})",
    ),
    "a key of one rank only": (
        edited(lambda c: transformer(c).pop(QKV), BOTH[1:]),
        f"mp_rank_01/model_optim_rng.pt: language_model.transformer.{QKV} is absent, and [72, 48]",
    ),
    "a key of the other rank only": (
        edited(lambda c: transformer(c).update({"layers.1.adapter.weight": torch.ones(2)}), BOTH[1:]),
        "mp_rank_01/model_optim_rng.pt: language_model.transformer.layers.1.adapter.weight is [2] of torch.float32, "
        "and absent",
    ),
    "values that differ between ranks": (
        edited(lambda c: transformer(c)["layers.1.input_layernorm.weight"].add_(1), BOTH[1:]),
        "mp_rank_01/model_optim_rng.pt: language_model.transformer.layers.1.input_layernorm.weight has other values",
    ),
    "types that differ between ranks": (
        edited(lambda c: transformer(c).update({QKV: transformer(c)[QKV].half()}), BOTH[1:]),
        f"{QKV} is [72, 48] of torch.float16, and [72, 48] of torch.float32",
    ),
    "args that differ between ranks": (
        edited(lambda c: setattr(c["args"], "bias_gelu_fusion", False), BOTH[1:]),
        "mp_rank_01/model_optim_rng.pt: its args have bias_gelu_fusion False, and those of",
    ),
    "no args in the other rank": (
        edited(lambda c: c.pop("args"), BOTH[1:]),
        "mp_rank_01/model_optim_rng.pt: has no args",
    ),
    "a version between two": (
        edited(lambda c: c.update(checkpoint_version=1.5), BOTH),
        "has checkpoint_version 1.5; expected 0, 1, or 2 to 3.0",
    ),
    **{
        f"a vocabulary in multiples of {multiple}": (
            edited(lambda c, multiple=multiple: setattr(c["args"], "make_vocab_size_divisible_by", multiple), BOTH),
            f"make_vocab_size_divisible_by is {multiple}; expected 1 to",
        )
        for multiple in (0, -1, 10**30)
    },
    **{
        f"a tracker with {text!r}": (
            lambda folder, text=text: (folder.parent / "latest_checkpointed_iteration.txt").write_text(text),
            "expected the number of an iteration or 'release'",
        )
        for text in ("9" * 5000, "١٢", "-1", "")
    },
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
        f"{QKV} is [72, 48] of torch.float32, and [12, 48] of torch.float32 in",
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


def test_a_tensor_of_two_stages_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "source", random_model(), num_stages=2, num_ranks=2)
    extra = {"final_layernorm.weight": torch.ones(sample.D)}
    for rank in (0, 1):
        sample.change(folder / f"mp_rank_{rank:02d}_000/model_optim_rng.pt", lambda c: transformer(c).update(extra))
    assert convert("megatron", "native", tmp_path / "source", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert (
        "mp_rank_00_001/model_optim_rng.pt: holds language_model.transformer.final_layernorm.weight, which" in message
    )
    assert "mp_rank_00_000/model_optim_rng.pt, another stage, holds, too" in message
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
