"""Whatever PREFIX.json holds, merging, inspecting and training tell it in one sentence, or do what is right."""

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_selection import TOKENIZER, proteins, write_fasta

from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.data.inspect.command import main as inspect
from megatron_plm.data.merge import main as merge
from megatron_plm.data.mixture import check_same_run, open_mixture
from megatron_plm.data.pipeline import preprocess
from megatron_plm.data.rearrange import Selection
from megatron_plm.data.splits import parse_splits
from megatron_plm.errors import USER_ERROR_EXIT_CODE, run_command

ODD = {
    "deleted": None, "null": None, "true": True, "-1": -1, "2": 2, "0.5": 0.5, "NaN": float("nan"), "huge": 10**400,
    "Infinity": float("inf"), "text": "x", "no text": "", "half a character": "\ud800", "lines": "a\nb\x1b[2J",
    "[]": [], "[[]]": [[]], "[1, 2]": [1, 2], "{}": {}, "{text}": {"A": "x"}, "{-1}": {"A": -1},
    "{huge}": {"A": 10**400},
}  # fmt: skip


def places(description: Any) -> Iterator[tuple[str | int, ...]]:
    """The way to every value in a description; of the many in one list or object to the first and last."""
    yield ()
    keys = list(description) if isinstance(description, dict) else range(len(description))
    for key in keys if len(keys) < 20 else [*keys[:5], *keys[-2:]]:
        if isinstance(description[key], dict | list):
            yield from ((key, *rest) for rest in places(description[key]))
        else:
            yield (key,)


def changed(description: dict[str, Any], place: tuple[str | int, ...], odd: str) -> Any:
    """A copy with an odd value at `place`."""
    if not place:
        return ODD[odd]
    result = copy.deepcopy(description)
    *way, key = place
    owner: Any = result
    for step in way:
        owner = owner[step]
    if odd == "deleted":
        del owner[key]
    else:
        owner[key] = ODD[odd]
    return result


def training(train: Path, valid: Path) -> Callable[[], int]:
    def opened(_: object) -> None:
        mixtures = [open_mixture([str(prefix)], TOKENIZER, flag="--data-path") for prefix in (train, valid)]
        check_same_run(*mixtures)
        assert all(len(mixture.sha256) == 64 for mixture in mixtures)

    return lambda: run_command(opened, [])


def test_no_description_leads_to_a_traceback_or_to_half_a_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of files
    source = write_fasta(tmp_path / "in.fasta", proteins(30))
    prefix, merged = tmp_path / "p_train", tmp_path / "merged"
    selection = Selection(min_length=15, splits=parse_splits("train=0.8,valid=0.2"))
    preprocess([source], tmp_path / "p", TOKENIZER, selection=selection, command="as typed")
    description = json.loads((tmp_path / "p_train.json").read_text())
    commands: dict[str, Callable[[], int]] = {
        "merge": lambda: run_command(merge, ["--input", str(prefix), str(prefix), "--output-prefix", str(merged)]),
        "inspect": lambda: run_command(inspect, [str(prefix)]),
        "verify": lambda: run_command(inspect, [str(prefix), "--verify"]),
        "train": training(prefix, tmp_path / "p_valid"),
    }
    faults, seen = [], 0
    for place in places(description):
        for odd in ODD:
            (tmp_path / "p_train.json").write_text(json.dumps(changed(description, place, odd)))
            for name, command in commands.items():
                capsys.readouterr()
                what = f"{name}, {'.'.join(map(str, place))} {odd}"
                seen += 1
                try:
                    code = command()
                except Exception as error:
                    faults.append(f"{what}: {error!r}")
                    continue
                error = capsys.readouterr().err
                if code == USER_ERROR_EXIT_CODE:
                    if not error.startswith("error: ") or error.count("\n") != 1 or str(prefix) not in error:
                        faults.append(f"{what}: {error}")
                elif code or error:
                    faults.append(f"{what}: exit code {code}: {error}")
                if name == "merge" and code == 0:
                    if run_command(inspect, [str(merged), "--verify"]):
                        faults.append(f"{what}: {capsys.readouterr().err}")
                    IndexedDataset(merged)
                left = list(tmp_path.glob("merged*"))
                if left and code:
                    faults.append(f"{what}: left files")
                for path in left:
                    path.unlink()
    assert not faults, "\n".join(faults)
    assert seen > 1000
