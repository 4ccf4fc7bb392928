"""What a checkpoint holds of a run, and loading it, at any number of processes."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_plm.checkpoint_format import (
    TOKENIZER_FILE,
    CheckpointState,
    checkpoint_tokenizer,
    find_checkpoint,
    read_description,
)
from megatron_plm.config.options import Config
from megatron_plm.data.blend import Cursor
from megatron_plm.data.mixture import as_typed
from megatron_plm.distributed_checkpoint import (
    READ_ERRORS,
    SafePlanner,
    SafeReader,
    reason_of,
    without_single_process_warning,
)
from megatron_plm.errors import UserError
from megatron_plm.training.other_vocabulary import BY_TOKEN, OtherVocabulary
from megatron_plm.training.state import Progress, Run

_ONLY_IN_TRAINING = ("hidden_dropout", "attention_dropout")  # options of the model that its weights do not depend on


def load_checkpoint(run: Run, source: Path) -> Path:
    """Put the checkpoint that `source` names into `run`: weights, optimizer and progress. Returns its path.

    Raises UserError where the checkpoint's model or data options are not the run's.
    """
    path = find_checkpoint(source)
    saved_config, saved = read_description(path)
    _check_resumable(path, saved_config, saved, run)
    _read(run, path, run_tensors(run, copies=True), "--load")
    _fill_copies(run)
    run.progress = Progress(Cursor.from_dict(saved.cursor), saved.step, saved.consumed_tokens)
    return path


def load_pretrained_weights(run: Run, source: Path) -> str:
    """Put only the weights of the checkpoint that `source` names into `run`, which begins anew. Returns words on it.

    Where the checkpoint has another tokenizer, the rows of its tokens go by their names; a token that it lacks keeps
    its initial values. Raises UserError where its model is not the run's, or no residue is in both vocabularies.
    """
    flag = "--pretrained-checkpoint"
    path = find_checkpoint(source)
    saved_config, saved = read_description(path)
    vocabulary = OtherVocabulary(ours=run.datasets.tokenizer, theirs=checkpoint_tokenizer(path, saved))
    is_other = vocabulary.theirs.sha256 != vocabulary.ours.sha256
    if is_other and not vocabulary.shares_residues:
        raise _other_tokenizer(flag, path, saved, run)
    of_weights = [pair for pair in _model_options(saved_config, run.config) if pair[0] not in _ONLY_IN_TRAINING]
    _refuse_differences(flag, path, of_weights)
    state = run_tensors(run, copies=True)["model"]
    whole = {name: vocabulary.room_for(state[name]) for name in BY_TOKEN if is_other and name in state}
    _read(run, path, {"model": {**state, **whole}}, flag)
    for name, tensor in whole.items():
        vocabulary.fill(state[name], tensor)
    _fill_copies(run)
    return f"the weights of {path}" + (f"; {vocabulary.told()}" if is_other else "")


def run_tensors(run: Run, *, copies: bool) -> dict[str, Any]:
    """What a checkpoint holds of this process, by the names of the whole model: weights, buffers, moments of AdamW.

    The tensors are the run's own: reading into them is loading. `copies`: with those whose original is elsewhere.
    """
    parameters = {**(run.model.copies if copies else {}), **run.model.originals}
    buffers = {name: buffer for part in run.model.parts for name, buffer in part.named_buffers()}
    moments = {name: _moments(run.optimizer, parameter) for name, parameter in parameters.items()}
    return {
        "model": {**{name: parameter.data for name, parameter in parameters.items()}, **buffers},
        "optimizer": {"state": moments},
    }


def _fill_copies(run: Run) -> None:
    """Give copies what was read into their originals, where this process holds both."""
    for name, copy in run.model.copies.items():
        original = run.model.originals.get(name)
        if original is not None:
            copy.data.copy_(original.data)
            for key, value in _moments(run.optimizer, original).items():
                _moments(run.optimizer, copy)[key].copy_(value)


def _moments(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
    """AdamW's state of a parameter, made as AdamW does where there has been no step yet."""
    if not optimizer.state[parameter]:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter.data),
            "exp_avg_sq": torch.zeros_like(parameter.data),
        }
    return optimizer.state[parameter]


def _read(run: Run, path: Path, state: dict[str, Any], flag: str) -> None:
    """Fill the tensors of `state` from the checkpoint at `path`; collective."""
    try:
        with without_single_process_warning():
            load(state, storage_reader=SafeReader(path), planner=SafePlanner(), no_dist=run.world.mesh is None)
    except READ_ERRORS as error:
        raise UserError(
            f"{flag} {path}: the checkpoint is damaged or incomplete ({reason_of(error)}); give another one of the run"
        ) from None


def _check_resumable(path: Path, saved_config: Config, saved: CheckpointState, run: Run) -> None:
    if checkpoint_tokenizer(path, saved).sha256 != run.datasets.tokenizer.sha256:
        raise _other_tokenizer("--load", path, saved, run)
    if not saved.has_optimizer:
        raise UserError(
            f"--load {path}: the checkpoint holds weights only, without optimizer and position in the data; "
            "give a checkpoint that training wrote, or begin a new run from it with --pretrained-checkpoint"
        )
    # The weights fix the model; the meaning of the data cursor depends on the rest.
    new = run.config
    pairs = _model_options(saved_config, new)
    pairs += [
        (name, value, getattr(new.data, name))
        for name, value in asdict(saved_config.data).items()
        if name not in ("data_path", "valid_data_path", "num_workers")
    ]
    pairs.append(("seed", saved_config.training.seed, new.training.seed))
    _refuse_differences("--load", path, pairs)
    if saved.data_sha256 != run.datasets.train.sha256:
        raise UserError(
            f"--load {path}: --data-path {as_typed(new.data.data_path)} is not the dataset of that run, so its "
            "position in the data means nothing here; give the same dataset, or begin a new run from the weights with "
            "--pretrained-checkpoint"
        )


def _other_tokenizer(flag: str, path: Path, saved: CheckpointState, run: Run) -> UserError:
    file = path / TOKENIZER_FILE
    return UserError(
        f"{flag} {path}: the checkpoint's tokenizer is {saved.tokenizer!r} and the dataset's is "
        f"{run.datasets.tokenizer.name!r}; preprocess the FASTA file with --tokenizer "
        f"{file if file.exists() else saved.tokenizer}"
    )


def _model_options(saved: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """Each option of the model that decides what its weights compute, with its value there and here."""
    was, now = asdict(saved.model), asdict(new.model)
    was["ffn_hidden_size"], now["ffn_hidden_size"] = saved.model.ffn_size, new.model.ffn_size
    # Where a sentencepiece model lies is of no matter, and which tokenizer it is was compared before.
    return [(name, was[name], now[name]) for name in was if name not in ("init_method_std", "tokenizer")]


def _refuse_differences(flag: str, path: Path, pairs: list[tuple[str, Any, Any]]) -> None:
    for name, was, now in pairs:
        if was != now:
            raise UserError(
                f"{flag} {path}: --{name.replace('_', '-')} was {was} there and is {now} here; use the same value "
                f"(--config {path / 'config.toml'} takes them all)"
            )
