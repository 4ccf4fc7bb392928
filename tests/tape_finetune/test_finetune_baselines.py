"""TAPE's LSTM and ResNet against tape-proteins' own."""

import json
from pathlib import Path

import pytest
import torch
from tape_peer import import_tape

from megatron_plm.errors import UserError
from tape_finetune import evaluate, train
from tape_finetune.baselines import BASELINES, build_baseline
from tape_finetune.batching import pack
from tape_finetune.data import Example

PROTEINS = ["MKTAYIAKQRQISFVK", "ACDE", "GGHIKLMNPQRSTVWYXA"]
SIZES = {
    "lstm": {"input_size": 8, "hidden_size": 12, "num_hidden_layers": 2},
    "resnet": {"hidden_size": 12, "num_hidden_layers": 3},
}


def _tape_directory(name: str, folder: Path, **changes) -> tuple[Path, torch.nn.Module]:
    """A directory that TAPE's own code wrote, and its model."""
    models = import_tape(f"tape.models.modeling_{name}")
    title = {"lstm": "LSTM", "resnet": "ResNet"}[name]
    config = getattr(models, f"Protein{title}Config")(**SIZES[name], **changes)
    torch.manual_seed(0)
    kind = {"lstm": "ProteinLSTMForLM", "resnet": "ProteinResNetForMaskedLM"}[name]
    model = getattr(models, kind)(config).eval()
    for parameter in model.parameters():  # norms and biases that do nothing would hide that they are swapped
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder.mkdir()
    model.save_pretrained(folder)
    return folder, getattr(model, name)


@pytest.mark.parametrize("name", SIZES)
def test_features_are_those_of_tapes_model(name, tmp_path):
    folder, theirs = _tape_directory(name, tmp_path / name)
    ours = build_baseline(name, folder, seed=1).eval()
    packed = pack([Example("", protein, None) for protein in PROTEINS], ours.tokenizer)
    with torch.no_grad():
        found = ours(packed).split(packed.cu_seqlens.diff().tolist())
        for protein, features in zip(PROTEINS, found, strict=True):
            ids = import_tape().TAPETokenizer(vocab="iupac").encode(protein)
            expected = theirs(torch.tensor(ids)[None], torch.ones(1, len(ids), dtype=torch.long))[0][0]
            torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SIZES)
def test_fresh_models_have_tapes_sizes(name):
    models = import_tape(f"tape.models.modeling_{name}")
    config = getattr(models, {"lstm": "ProteinLSTMConfig", "resnet": "ProteinResNetConfig"}[name])()
    _, options_kind = BASELINES[name]
    assert all(getattr(config, field) == value for field, value in vars(options_kind()).items())


@pytest.mark.parametrize("name", SIZES)
def test_fresh_models_have_the_seeds_weights(name, monkeypatch):
    kind, options_kind = BASELINES[name]
    monkeypatch.setitem(BASELINES, name, (kind, lambda: options_kind(**SIZES[name])))
    a, b, c = (build_baseline(name, None, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["tokens.weight"], c["tokens.weight"])


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("task", ["csv", "secondary_structure"])
def test_baselines_train_and_are_scored_again(name, task, peptide_dir, structure_dir, tmp_path):
    folder, _ = _tape_directory(name, tmp_path / name)
    data = ["--data_dir", peptide_dir, "--sequence_column=sequence", "--label_column=label", "--kind=classification"]
    flags = data if task == "csv" else ["--data_dir", structure_dir]
    flags += ["--from_pretrained", folder, "--num_train_epochs=1", "--output_dir", tmp_path, "--exp_name=a"]
    assert train.main([str(flag) for flag in [name, task, *flags]]) == 0
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["from_pretrained"] == str(folder)
    assert evaluate.main([name, task, str(tmp_path / "a"), "--split", "test"]) == 0
    assert json.loads((tmp_path / "a" / "results.json").read_text()) == results


def test_directories_of_other_models_are_refused(tmp_path):
    folder, _ = _tape_directory("lstm", tmp_path / "lstm")
    with pytest.raises(UserError, match="is missing or not of the shape that config"):
        build_baseline("resnet", folder, seed=1)
    other, _ = _tape_directory("lstm", tmp_path / "other", vocab_size=31)
    with pytest.raises(UserError, match="has 31 tokens; expected the 30 of TAPE's IUPAC vocabulary"):
        build_baseline("lstm", other, seed=1)
