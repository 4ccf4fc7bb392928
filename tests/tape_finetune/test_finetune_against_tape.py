"""The first steps of training beside stock tape-proteins: same weights, proteins, order and head, gradients zeroed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_sample import sequence, structure_record, write_jsonl
from tape_peer import import_tape, tape_config
from torch import Tensor, nn

from megatron_plm.config.options import ModelOptions
from tape_finetune import fit, train

STEPS, BATCH, RATE = 20, 4, 3e-4
OPTIONS = ModelOptions(
    num_layers=2, hidden_size=32, num_attention_heads=4, norm_placement="post", max_position_embeddings=64,
    position_embedding_type="learned_absolute", layernorm_epsilon=1e-12,
)  # fmt: skip
_NORMALIZED = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A model directory that TAPE's own code wrote, without dropout, which would draw other numbers here and there."""
    models = import_tape("tape.models.modeling_bert")
    config = tape_config(OPTIONS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tape")
    models.ProteinBertForMaskedLM(config).save_pretrained(folder)
    return folder


class Recorded:
    """What our training did: the weights before it, the examples of each step, and the mean loss of each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.weights: dict[str, Tensor] = {}
        self.examples: list[list[Any]] = []
        self.losses: list[float] = []
        self.task: Any = None
        step = fit.train_step

        def recording(model, task, source, parts, *rest):
            self.weights = self.weights or {name: tensor.clone() for name, tensor in model.state_dict().items()}
            self.task = task
            self.examples.append([example for part in parts for example in source.chosen(part)])
            loss_sum, num_labels, norm = step(model, task, source, parts, *rest)
            self.losses.append(loss_sum / num_labels)
            return loss_sum, num_labels, norm

        monkeypatch.setattr(fit, "train_step", recording)


def _theirs(directory: Path, kind: str, ours: Recorded, head: str, names: dict[str, str], **changes: Any) -> nn.Module:
    """Their model with the weights of the directory, and our head's first ones."""
    models = import_tape("tape.models.modeling_bert")
    config = models.ProteinBertConfig.from_pretrained(directory, **changes)
    model = getattr(models, kind)(config)
    state = {k: v for k, v in torch.load(directory / "pytorch_model.bin").items() if k.startswith("bert.")}
    for name, tensor in ours.weights.items():
        if name.startswith("head."):
            module, _, rest = name.removeprefix("head.").partition(".")
            place = names[module] if module == "pooler" else f"{head}.{names[module]}"
            state[f"{place}.{_NORMALIZED.get(rest, rest)}"] = tensor
    missing = model.load_state_dict(state, strict=False)
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    # One vector that every token gets: ours has it in the positions, and so once where theirs would train both.
    model.bert.embeddings.token_type_embeddings.weight.requires_grad_(False)
    return model


def _their_losses(
    model: nn.Module, batches: Iterator[dict[str, Tensor]], total: int, monkeypatch: pytest.MonkeyPatch
) -> list[float]:
    """Their optimizer's groups, schedule, clipping and steps, with gradients zeroed.

    Their AdamW calls torch in a way that is gone, so torch's takes its place; a buffer that only fp16 uses wants CUDA.
    """
    setup = import_tape("tape.utils.setup_utils")
    training = import_tape("tape.training")
    monkeypatch.setattr(setup, "AdamW", torch.optim.AdamW)
    monkeypatch.setattr(torch.cuda, "IntTensor", torch.IntTensor, raising=False)
    optimizer = setup.setup_optimizer(model, RATE)
    runner = training.BackwardRunner(
        model, optimizer, device=torch.device("cpu"), n_gpu=0, num_train_optimization_steps=total
    ).train()
    losses = []
    for batch in batches:
        loss, _ = runner.forward(batch)
        runner.backward(loss)
        runner.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _train(task: str, directory: Path, data: Path, results: Path, *flags: str) -> None:
    words = ["transformer", task, f"--from_pretrained={directory}", f"--data_dir={data}", f"--output_dir={results}"]
    rates = [f"--learning_rate={RATE}", "--warmup_steps=0", "--num_train_epochs=1", f"--batch_size={BATCH}"]
    assert train.main([*words, *rates, "--head=tape", *flags]) == 0


def _compare(ours: list[float], theirs: list[float]) -> None:
    assert len(ours) >= STEPS
    assert ours[0] - ours[STEPS - 1] > 0.01  # it does learn something
    assert theirs[:STEPS] == pytest.approx(ours[:STEPS], abs=1e-4)


def test_secondary_structure_trains_as_with_tape(directory, tmp_path, monkeypatch):
    """All proteins have one length: TAPE's BatchNorm would count the padding too."""
    rng = np.random.default_rng(1)
    for split, count in {"train": STEPS * BATCH, "valid": 2}.items():
        records = [structure_record(rng, f"{split}{i}", 40) | {"valid_mask": [1] * 40} for i in range(count)]
        write_jsonl(tmp_path / f"secondary_structure_{split}.jsonl", records)
    ours = Recorded(monkeypatch)
    _train("secondary_structure", directory, tmp_path, tmp_path / "results")
    names = {"norm": "0", "hidden": "1", "output": "4"}
    kind = "ProteinBertForSequenceToSequenceClassification"
    model = _theirs(directory, kind, ours, "classify.classify.main", names, num_labels=3)
    datasets = import_tape("tape.datasets")
    dataset = datasets.SecondaryStructureDataset.__new__(datasets.SecondaryStructureDataset)
    dataset.tokenizer = import_tape().TAPETokenizer(vocab="iupac")

    def batches() -> Iterator[dict[str, Tensor]]:
        for examples in ours.examples:
            dataset.data = [{"primary": example.sequence, "ss3": example.label} for example in examples]
            yield dataset.collate_fn([dataset[index] for index in range(len(examples))])

    _compare(ours.losses, _their_losses(model, batches(), len(ours.losses), monkeypatch))


def test_fluorescence_trains_as_with_tape(directory, tmp_path, monkeypatch):
    """Pooled <cls>, squared error; TAPE is given the labels as ours scales them."""
    rng = np.random.default_rng(2)
    for split, count in {"train": STEPS * BATCH, "valid": 4}.items():
        proteins = [sequence(rng, int(rng.integers(20, 40))) for _ in range(count)]
        records = [{"primary": p, "log_fluorescence": [1.0 * (p.count("K") + p.count("L"))]} for p in proteins]
        write_jsonl(tmp_path / f"fluorescence_{split}.jsonl", records)
    ours = Recorded(monkeypatch)
    _train("fluorescence", directory, tmp_path, tmp_path / "results")
    names = {"pooler": "bert.pooler.dense", "hidden": "0", "output": "3"}
    model = _theirs(directory, "ProteinBertForValuePrediction", ours, "predict.value_prediction.main", names)
    datasets = import_tape("tape.datasets")
    dataset = datasets.FluorescenceDataset.__new__(datasets.FluorescenceDataset)
    dataset.tokenizer = import_tape().TAPETokenizer(vocab="iupac")

    def batches() -> Iterator[dict[str, Tensor]]:
        for examples in ours.examples:
            labels = [(float(e.label) - ours.task.mean) / ours.task.deviation for e in examples]
            pairs = zip(examples, labels, strict=True)
            dataset.data = [{"primary": e.sequence, "log_fluorescence": [label]} for e, label in pairs]
            yield dataset.collate_fn([dataset[index] for index in range(len(examples))])

    _compare(ours.losses, _their_losses(model, batches(), len(ours.losses), monkeypatch))
