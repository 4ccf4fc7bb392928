"""The contact head goes along where a format has a place for it, bit by bit, and is told as lost where it has none."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convert_sample import convert, random_weights, written
from pretraining_runs import same_bits

from megatron_plm.convert.pretrained import detect_format, load_pretrained, read_checkpoint
from megatron_plm.convert.weights import CONTACT_HEAD, Weights, contact_head_shapes

transformers = pytest.importorskip("transformers")


def with_contact_head() -> Weights:
    weights = random_weights()
    generator = torch.Generator().manual_seed(7)
    shapes = contact_head_shapes(weights.options)
    assert set(shapes) == set(CONTACT_HEAD)
    head = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return replace(weights, tensors={**weights.tensors, **head})


def read(path: Path) -> Weights:
    return read_checkpoint(path, detect_format(path))


@pytest.mark.parametrize("formats", [["huggingface"], ["native"], ["fair-esm"], ["huggingface", "native", "fair-esm"]])
def test_a_round_trip_changes_no_bit(formats: list[str], tmp_path: Path) -> None:
    weights = with_contact_head()
    for number, name in enumerate(formats):
        path = written(weights, name, tmp_path / str(number))
        weights = read(path)
        assert weights.notes == ()
    assert same_bits(dict(weights.tensors), with_contact_head().tensors)
    head = load_pretrained(path).contact_head
    assert torch.equal(head.regression.weight, with_contact_head().tensors[CONTACT_HEAD[0]])


def test_transformers_reads_and_writes_it(tmp_path: Path) -> None:
    weights = with_contact_head()
    model = transformers.EsmForMaskedLM.from_pretrained(written(weights, "huggingface", tmp_path / "ours"))
    assert torch.equal(model.esm.contact_head.regression.weight, weights.tensors[CONTACT_HEAD[0]])
    assert torch.equal(model.esm.contact_head.regression.bias, weights.tensors[CONTACT_HEAD[1]])
    model.save_pretrained(tmp_path / "theirs")
    assert same_bits(dict(read(tmp_path / "theirs").tensors), weights.tensors)


@pytest.mark.parametrize("name", ["huggingface", "native", "fair-esm"])
def test_a_model_without_one_has_none(name: str, tmp_path: Path) -> None:
    assert load_pretrained(written(random_weights(), name, tmp_path / "out")).contact_head is None


def test_it_is_told_where_it_is_lost_and_counts_as_no_parameter(tmp_path: Path, capsys) -> None:
    written(with_contact_head(), "native", tmp_path / "with")
    written(random_weights(), "native", tmp_path / "without")
    printed = []
    for source in ("with", "without"):
        for target in ("proteinlm-tape", "huggingface"):
            assert convert("native", target, tmp_path / source, tmp_path / f"{source}-{target}") == 0
            printed.append(capsys.readouterr().out)
    lost = "not carried: contact_head.regression: proteinlm-tape has no place for it"
    assert [lost in text for text in printed] == [True, False, False, False]
    assert ["predict_contacts would be random" in text for text in printed] == [False, False, False, True]
    counts = [text.split(" parameters")[0].split(", ")[-1] for text in printed]
    assert len(set(counts[1::2])) == 1
