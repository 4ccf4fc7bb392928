"""How often an input is read, and what is said of the values in it."""

import json
from pathlib import Path

import pytest
import torch
from convert_sample import SAMPLE, convert, random_weights, written
from fork_sample import forks_directory
from pretraining_runs import same_bits

from megatron_plm.convert.pretrained import FORMATS, detect_format, load_pretrained, read_checkpoint


@pytest.mark.parametrize("is_fork", [True, False])
def test_an_old_pickle_is_read_once_however_many_formats_look_at_it(
    is_fork: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_fork:
        forks_directory(tmp_path)
    else:
        written(random_weights(SAMPLE["tape"]), "tape", tmp_path / "in")
        (tmp_path / "in").rename(tmp_path / "tape")
    source = tmp_path if is_fork else tmp_path / "tape"
    file = source / "pytorch_model.bin"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    reads = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: (reads.append(args), load(*args, **kwargs))[1])
    first = load_pretrained(source).model.state_dict()
    assert len(reads) == 1
    assert same_bits(load_pretrained(source).model.state_dict(), first)
    assert len(reads) == 2, "nothing is kept of what was read"
    assert detect_format(source) == ("proteinlm-tape" if is_fork else "tape")
    tensors = load(file, weights_only=True)
    torch.save({key: tensor + 1 for key, tensor in tensors.items()}, file, _use_new_zipfile_serialization=False)
    changed = load_pretrained(source).model.state_dict()["encoder.final_norm.bias" if is_fork else "head.norm.bias"]
    assert torch.equal(changed, first["encoder.final_norm.bias" if is_fork else "head.norm.bias"] + 1)


@pytest.mark.parametrize("target", FORMATS)
def test_nan_and_inf_are_counted_named_and_converted(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = random_weights(SAMPLE[target])
    weights.tensors["head.dense.weight"][0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    weights.tensors["head.dense.weight"][1, :2] = 3e38  # their sum is beyond all floats, and none of them is
    weights.tensors["head.norm.bias"][1] = weights.tensors["encoder.embedding.tokens.weight"][9, 2] = float("nan")
    weights.tensors["head.norm.weight"][:2] = 3e38
    source = written(weights, "native", tmp_path / "native")
    assert convert("native", target, source, tmp_path / "out") == 0
    warning = (
        "5 values are NaN or infinite, converted as they are: head.dense.weight (3), "
        "encoder.embedding.tokens.weight (1), head.norm.bias (1)"
    )
    assert f"warning: {warning}\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["warnings"] == [warning]
    assert convert(target, "native", tmp_path / "out", tmp_path / "back") == 0
    assert f"warning: {warning}\n" in capsys.readouterr().out
    back = read_checkpoint(tmp_path / "back", "native").tensors["head.dense.weight"]
    assert torch.allclose(back, weights.tensors["head.dense.weight"], rtol=0, atol=0, equal_nan=True)
    assert (
        convert("native", target, written(random_weights(SAMPLE[target]), "native", tmp_path / "b"), tmp_path / "c")
        == 0
    )
    assert "warning" not in capsys.readouterr().out
