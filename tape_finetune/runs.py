"""The directory of a fine-tuning run, RESULTS/TASK-MODEL-SUFFIX/.

results.json        what came out: scores of every split with intervals, and the course of training
run.json            what is needed to use the model again: task, head, architecture, data folder
model.safetensors   weights of base model and head ("base.*", "head.*")
predictions_SPLIT.jsonl.gz   truth and prediction of each protein, where tape_eval was asked for it
"""

import json
import math
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file

from megatron_plm.config.options import ModelOptions
from megatron_plm.convert import config_json
from megatron_plm.convert.tensor_files import write_safetensors
from megatron_plm.errors import JSON_ERRORS, UserError
from megatron_plm.files import atomic_file
from megatron_plm.model.transformer import Encoder
from megatron_plm.tokenizers import get_tokenizer
from tape_finetune.base_model import BaseModel
from tape_finetune.baselines import BASELINES
from tape_finetune.bootstrap import Interval
from tape_finetune.data import Split
from tape_finetune.model import EncoderModel, OneHotModel, TaskModel, build_head, discard_final_norm
from tape_finetune.tasks import TASKS, Task

RESULTS_FILE, RUN_FILE, WEIGHTS_FILE = "results.json", "run.json", "model.safetensors"
FORMAT, VERSION = "megatron-plm-finetuned", 1


@dataclass(frozen=True)
class Run:
    """A model with what is needed to score it on further data."""

    model: TaskModel
    task: Task
    base_model: str
    head: str
    primary_metric: str
    max_length: int | None  # residues; longer proteins are cropped
    data_dir: Path | None  # None is the task's default place
    seed: int
    compat: str | None = None  # whose fault of old is copied: tape or proteinlm
    windows: bool = False  # longer proteins are read in windows of max_length instead

    def load(self, split: str, path: Path) -> Split:
        """A split as the model takes it; raises UserError."""
        return self.task.load(split, path, self.max_length, windows=self.windows)

    def files(self, data_dir: Path | None = None) -> dict[str, Path]:
        """The files of the splits, in `data_dir` or where the run had them."""
        return self.task.files(data_dir or self.data_dir)


def directory_name(task: str, base_model: str, time_or_name: str) -> str:
    """TASK-MODEL-SUFFIX; the suffix is the name given, or for "time" the time and six random digits."""
    suffix = time_or_name
    if time_or_name == "time":
        suffix = f"{time.strftime('%y-%m-%d-%H-%M-%S')}_{secrets.randbelow(10**6):06d}"
    if not suffix or Path(suffix).name != suffix:
        raise UserError(f"--time_or_name {time_or_name!r}: expected 'time' or a name without slashes")
    return f"{task}-{base_model}-{suffix}"


def predictions_file(split: str) -> str:
    """The name of the file with a split's predictions."""
    return f"predictions_{split}.jsonl.gz"


def check_target(path: Path, *, force: bool) -> None:
    """Raise UserError where a run directory cannot be written as `path`, so that no training is done in vain.

    With `force`, what stands there may be a run directory or an empty one, nothing else.
    """
    if path.name in ("", ".."):
        raise UserError(f"{path}: is no name for a new directory; give one")
    if os.path.lexists(path):
        if not force:
            raise UserError(f"{path} exists already; give another output, or --force to replace it")
        is_folder = path.is_dir() and not path.is_symlink()
        if not is_folder or not ((path / RUN_FILE).is_file() or not any(path.iterdir())):
            raise UserError(
                f"{path}: holds no {RUN_FILE}, so it is no run that --force may replace; give another output"
            )
    parent = next(place for place in path.absolute().parents if os.path.exists(place))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{path}: {parent} cannot be written to; choose a folder with write permission")


def split_facts(split: Split) -> dict[str, Any]:
    """What a split is, for results.json: its file, and what was done to its proteins."""
    return {
        "num_examples": len(split.examples),
        "cropped": split.num_cropped,
        "windowed": split.num_windowed,
        "num_undefined": split.num_undefined,
        "num_dropped": split.num_dropped,
        "file": split.path.name,
        "sha256": split.sha256,
    }


def split_result(split: Split, scores: Mapping[str, Interval], num_in_train: int | None) -> dict[str, Any]:
    """One entry of `splits` in results.json; `num_in_train` of None is unknown."""
    values = {name: asdict(interval) for name, interval in scores.items()}
    return {**split_facts(split), "num_in_train": num_in_train, "metrics": values}


def save_run(directory: Path, run: Run) -> None:
    """Write run.json and model.safetensors into an existing directory; OSError or UserError if the disk refuses."""
    base = run.model.base
    document = {
        "format": FORMAT,
        "version": VERSION,
        "task": {"name": run.task.name, "state": run.task.state()},
        "base_model": run.base_model,
        "head": run.head,
        "tokenizer": {"name": base.tokenizer.name, "sha256": base.tokenizer.sha256},
        "model": None if isinstance(base, OneHotModel) else asdict(base.options),
        "primary_metric": run.primary_metric,
        "max_length": run.max_length,
        "windows": run.windows,
        "data_dir": None if run.data_dir is None else str(run.data_dir),
        "seed": run.seed,
        "compat": run.compat,
    }
    write_json(directory / RUN_FILE, document)
    weights = {name: tensor.cpu() for name, tensor in run.model.state_dict().items()}
    write_safetensors(weights, directory / WEIGHTS_FILE)


def load_run(directory: Path, *, base_model: str, task: str) -> Run:
    """Read what `save_run` wrote; raises UserError where it is no such directory, or one of another model or task."""
    document = read_json(directory / RUN_FILE)
    try:
        if document["format"] != FORMAT or document["version"] != VERSION:
            raise ValueError(f"not {FORMAT} version {VERSION}")
        for what, asked, found in (
            ("base model", base_model, document["base_model"]),
            ("task", task, document["task"]["name"]),
        ):
            if asked != found:
                raise UserError(f"{directory}: this run has the {what} {found!r}, not {asked!r}; name {found} instead")
        base = _rebuild_base(directory, document)
        saved_task = TASKS[task].from_state(document["task"]["state"])
        head = build_head(saved_task.heads, document["head"], base, saved_task.num_outputs)
        model = TaskModel(base, head, saved_task.level)
        data_dir = document["data_dir"]
        run = Run(
            model=model,
            task=saved_task,
            base_model=base_model,
            head=document["head"],
            primary_metric=document["primary_metric"],
            max_length=document["max_length"],
            data_dir=None if data_dir is None else Path(data_dir),
            seed=document["seed"],
            compat=document.get("compat"),
            windows=document.get("windows", False),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory / RUN_FILE}: not the description of a fine-tuned model: {error}") from None
    _load_weights(model, directory / WEIGHTS_FILE)
    return run


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a run directory; raises UserError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give a directory that tape_finetune/tape_train.py wrote"
        ) from None
    except JSON_ERRORS as error:
        raise UserError(f"{path}: not valid JSON ({error}); train again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object; train again")
    return value


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON object, null for numbers that are not finite; the file is complete or as it was."""
    with atomic_file(path) as aside:
        config_json.write_json(aside, _finite(document))


def describe(split: Split, num_in_train: int | None) -> str:
    """How many proteins a split has, and what there is to know of them, in a few words."""
    facts = {
        "cropped": split.num_cropped,
        "in windows": split.num_windowed,
        "without a label": split.num_undefined,
        "dropped": split.num_dropped,
        "also in train": num_in_train,
    }
    told = ", ".join(f"{count:,} {what}" for what, count in facts.items() if count)
    return f"{split.name} {len(split.examples):,}" + (f" ({told})" if told else "")


def score_lines(splits: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> list[str]:
    """A table of the scores of results.json's `splits`, for the terminal."""
    width = max(len(name) for name in (*splits, *metrics)) + 2
    lines = [f"{'split':<{width}}{'metric':<{width}}{'value':>8}   95 % interval    examples"]
    for split, result in splits.items():
        for metric in metrics:
            score = result["metrics"][metric]
            interval = f"[{score['low']:.3f}, {score['high']:.3f}]"
            line = f"{split:<{width}}{metric:<{width}}{score['value']:8.3f}   {interval:<17}{result['num_examples']}"
            counts = {"cropped": result["cropped"], "in windows": result.get("windowed", 0)}
            lines.append(line + "".join(f" ({count} {what})" for what, count in counts.items() if count))
    return lines


def _finite(value: Any) -> Any:
    """A JSON value with None in place of NaN and infinities, which JSON has no way to write."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rebuild_base(directory: Path, document: Mapping[str, Any]) -> BaseModel:
    """The base model's architecture, its weights not loaded yet."""
    tokenizer = get_tokenizer(document["tokenizer"]["name"])
    if tokenizer.sha256 != document["tokenizer"]["sha256"]:
        raise UserError(f"{directory}: the token list of {tokenizer.name!r} has changed since this run; train again")
    if document["base_model"] in BASELINES:
        kind, options_kind = BASELINES[document["base_model"]]
        return kind(options_kind(**document["model"]))
    if document["model"] is None:
        return OneHotModel(tokenizer)
    options = ModelOptions(**document["model"])
    base = EncoderModel(Encoder(options, tokenizer), options, tokenizer)
    if document.get("compat") == "proteinlm":
        discard_final_norm(base)
    return base


def _load_weights(model: TaskModel, path: Path) -> None:
    expected = model.state_dict()
    try:
        weights = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: the weights cannot be read ({error}); train again") from None
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights or name not in expected:
            raise UserError(
                f"{path}: {name} is {'missing' if name in expected else 'not part of the model'}; "
                "the weights are of another architecture than run.json describes"
            )
        if weights[name].shape != expected[name].shape:
            raise UserError(
                f"{path}: {name} has the shape {list(weights[name].shape)}, but run.json describes "
                f"{list(expected[name].shape)}; the weights are of another architecture"
            )
    model.load_state_dict(weights)
