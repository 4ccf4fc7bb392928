"""The quick form of the fine-tuning benchmark, and its verdicts."""

import json

import pytest
from processes import REPOSITORY

from megatron_plm.benchmark import finetune
from megatron_plm.benchmark.command import main
from megatron_plm.errors import UserError

pytest.importorskip("peft")


def test_each_way_is_measured(tmp_path, capsys, monkeypatch):
    for name in (
        "accumulation",
        "checkpointing",
    ):  # each way is a process that imports torch; "all three" has these two
        monkeypatch.delitem(finetune.WAYS, name)
    for split in ("train", "valid", "test"):
        rows = (REPOSITORY / f"examples/data/peptides/{split}.csv").read_text().splitlines(keepends=True)
        (tmp_path / f"{split}.csv").write_text("".join([rows[0], *rows[1::40]]))
    output = tmp_path / "figures.json"
    assert main(["finetune", "--quick", f"--data-dir={tmp_path}", f"--output={output}"]) == 0
    ways = json.loads(output.read_text())["ways"]
    assert list(ways) == list(finetune.WAYS)
    assert all(0 < figures["score"] <= 1 and figures["seconds"] > 0 for figures in ways.values())
    trained = {name: figures["num_trained_parameters"] for name, figures in ways.items()}
    assert trained["full"] > trained["LoRA"] > trained["frozen"]
    assert trained["LoRA"] == trained["all three"]
    assert all(figures["peak_memory"] > 10**7 for figures in ways.values())
    assert "LoRA's adapters are" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("adapters", "score", "missed"),
    [(20, 0.95, []), (21, 0.95, ["share of the adapters"]), (20, 0.94, ["score with LoRA"])],
)
def test_bars_of_lora(adapters, score, missed):
    full = {"num_parameters": 1000, "score": 1.0}
    result = {"ways": {"full": full, "LoRA": {"num_adapter_parameters": adapters, "score": score}}}
    assert finetune.missed(result) == missed


def test_a_way_that_fails_says_why(tmp_path):
    with pytest.raises(UserError, match=r"full: --data_dir .*: no such folder"):
        main(["finetune", "--quick", f"--data-dir={tmp_path / 'none'}"])
