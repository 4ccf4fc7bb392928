"""The predictions that tape_eval --save_predictions left in a run directory."""

import gzip
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_plm.errors import JSON_ERRORS, UserError
from tape_finetune.predictions import NO_LABEL
from tape_finetune.reporting.groups import TaskScores
from tape_finetune.runs import predictions_file


@dataclass(frozen=True)
class Saved:
    """One run's lines of one split; each has `length`, `truth` and `prediction`."""

    label: str
    seed: int
    split: str
    directory: str
    lines: tuple[Mapping[str, Any], ...]

    @property
    def kind(self) -> str:
        """What is predicted: value, label, labels, residues or contacts."""
        truth, prediction = self.lines[0]["truth"], self.lines[0]["prediction"]
        if "labels" in truth and isinstance(prediction["probabilities"], list):
            return "residues"
        return next(iter(truth))

    def pairs(self) -> list[tuple[str, str]]:
        """(true, predicted) class of each protein or scored residue."""
        if self.kind == "label":
            return [(line["truth"]["label"], line["prediction"]["label"]) for line in self.lines]
        return [
            (true, predicted)
            for line in self.lines
            for true, predicted in zip(line["truth"]["labels"], line["prediction"]["labels"], strict=True)
            if true != NO_LABEL
        ]


def find_saved(task: TaskScores) -> Saved | None:
    """The predictions to draw: of the headline's split where they were saved, else of another test split; of the first
    model that has them, at its lowest seed. None where there are none; raises UserError where they can't be read."""
    first = task.headline[0]
    for split in (first, *(split for split in task.test_splits if split != first)):
        for model in task.models:
            for run in model.runs:
                path = Path(run.directory, predictions_file(split))
                if split in run.splits and path.is_file():
                    lines = _read(path, run.splits[split].num_examples)
                    return Saved(model.label, run.seed, split, run.directory, lines)
    return None


def _read(path: Path, num_examples: int) -> tuple[Mapping[str, Any], ...]:
    way_out = "write it again with tape_eval --save_predictions"
    try:
        lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        for line in lines:
            line["truth"].keys(), line["prediction"].keys()
    except (OSError, EOFError, zlib.error, *JSON_ERRORS, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no file of predictions that can be read ({error}); {way_out}") from None
    if len(lines) != num_examples:
        raise UserError(f"{path}: has {len(lines):,} proteins, but {num_examples:,} were scored; {way_out}")
    return tuple(lines)
