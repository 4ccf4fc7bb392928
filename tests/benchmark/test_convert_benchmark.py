"""Conversions stream: what they need of memory does not grow with the checkpoint."""

import json
import sys
from pathlib import Path

import pytest

from megatron_plm.benchmark import convert
from megatron_plm.benchmark.command import main


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process's anonymous memory")
def test_a_conversion_takes_a_few_of_its_tensors_not_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(convert.CASES, "native to huggingface, bfloat16")  # each is a process that imports torch
    output = tmp_path / "out.json"
    assert main(["convert", "--megabytes", "200", "--hidden-size", "512", "--check", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["bytes"] > 190e6
    assert result["largest_tensor"] == 4 * 4 * 512**2
    taken = {name: figures["peak_memory"] - figures["memory_before"] for name, figures in result["conversions"].items()}
    # 5 to 16 MB were seen: at most four tensors.
    assert all(taken[name] < 40e6 for name, (*_, has_bar) in convert.CASES.items() if has_bar), taken
    assert taken["native to proteinlm-tape"] > 180e6, "one pickle: this shows that the measurement sees a checkpoint"
    printed = capsys.readouterr().out
    assert all(name in printed for name in convert.CASES)


def test_more_than_the_bar_is_a_miss() -> None:
    def verdicts(num_bytes: float, peak: float) -> list[str]:
        figures = {"has_bar": True, "peak_memory": peak, "memory_before": 0, "seconds": 1}
        return convert.missed({"bytes": num_bytes, "conversions": {"x": figures, "y": {**figures, "has_bar": False}}})

    assert verdicts(2e9, 1.21e9) == ["x"]
    assert verdicts(2e9, 1.19e9) == []
    assert verdicts(2e8, 1.21e9) == []
