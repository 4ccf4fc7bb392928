"""The native checkpoint directory, as the trainer writes it and the converters read and write it.

    step_00000100/
      .metadata, *.distcp   torch Distributed Checkpoint: "model.<parameter>" and, where training goes on, "optimizer.*"
      config.toml           the resolved configuration
      state.json            step, consumed tokens, data cursor, tokenizer
      tokenizer.model       where the tokenizer is a sentencepiece model: that model

Beside the steps, the symbolic link `latest` names the newest complete one.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_plm.config.load import from_toml, to_toml
from megatron_plm.config.options import Config
from megatron_plm.errors import JSON_ERRORS, UserError
from megatron_plm.tokenizers import MODEL_SUFFIX, PieceTokenizer, Tokenizer, get_tokenizer, read_model

FORMAT, VERSION = "megatron-plm-checkpoint", 2
CONFIG_FILE, STATE_FILE, DCP_METADATA = "config.toml", "state.json", ".metadata"
TOKENIZER_FILE = "tokenizer.model"
CHECKPOINTS, LATEST = "checkpoints", "latest"


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint holds beside tensors and configuration."""

    tokenizer: str
    tokenizer_sha256: str
    step: int = 0
    consumed_tokens: int = 0
    cursor: dict[str, Any] = field(default_factory=dict)
    data_sha256: str | None = None  # of the training dataset, which gives the cursor its meaning
    has_optimizer: bool = False


def write_description(directory: Path, config: Config, state: CheckpointState) -> None:
    """Write config.toml and state.json into `directory`."""
    write_config(directory / CONFIG_FILE, config)
    document = {"format": FORMAT, "version": VERSION, **asdict(state)}
    (directory / STATE_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def write_config(path: Path, config: Config) -> None:
    """Write the configuration for later starts: without what concerns this one only, its beginning and traces."""
    no_trace: dict[str, Any] = {"profile": False, "record_memory_history": False}
    no_trace |= dict.fromkeys(("profile_step_start", "profile_step_end", "profile_ranks"))
    begun_anew = replace(config, training=replace(config.training, load=None, **no_trace))
    path.write_text(to_toml(begun_anew), encoding="utf-8")


def read_description(directory: Path) -> tuple[Config, CheckpointState]:
    """Read config.toml and state.json of a checkpoint; raises UserError where they are missing or unfit."""
    try:
        document: dict[str, Any] = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
        config = from_toml((directory / CONFIG_FILE).read_text(encoding="utf-8"), place=str(directory / CONFIG_FILE))
        if document.pop("format") != FORMAT or document.pop("version") != VERSION:
            raise ValueError(f"not {FORMAT} version {VERSION}")
        return config, CheckpointState(**document)
    except (OSError, *JSON_ERRORS, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{directory}: not a native checkpoint: {STATE_FILE} or {CONFIG_FILE}: {reason}") from None


def write_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    """Write what of the tokenizer only its own file tells; nothing for those whose name is enough."""
    if isinstance(tokenizer, PieceTokenizer):
        (directory / TOKENIZER_FILE).write_bytes(tokenizer.model)


def checkpoint_tokenizer(directory: Path, state: CheckpointState) -> Tokenizer:
    """The tokenizer a checkpoint was trained with; raises UserError if it is missing or has another token list."""
    tokenizer: Tokenizer
    if state.tokenizer.endswith(MODEL_SUFFIX):
        tokenizer = read_model(directory / TOKENIZER_FILE, name=state.tokenizer)
        if tokenizer.sha256 != state.tokenizer_sha256:
            raise UserError(f"{directory}: {TOKENIZER_FILE} is not the one of this checkpoint; copy it again")
        return tokenizer
    tokenizer = get_tokenizer(state.tokenizer)
    if tokenizer.sha256 != state.tokenizer_sha256:
        raise UserError(
            f"{directory}: its tokenizer {state.tokenizer!r} had another token list than the one of that name here; "
            "use the version of megatron-plm that wrote the checkpoint"
        )
    return tokenizer


def is_native(path: Path) -> bool:
    """Whether `path` is a native checkpoint or a run directory with one."""
    try:
        find_checkpoint(path)
    except UserError:
        return False
    return True


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the latest of a run directory. Raises UserError if there is none.

    Where the link `latest` leads nowhere, as after that step was deleted by hand, the newest step takes its place.
    """
    for place in _places(path):
        if (place / STATE_FILE).is_file():
            return place.resolve()
    newest = newest_step(path) or newest_step(path / CHECKPOINTS)
    if newest is not None:
        return newest.resolve()
    raise UserError(f"{path}: no complete checkpoint; give a run directory or one of its {CHECKPOINTS}/step_* folders")


def newest_step(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in a folder of checkpoints, if there is one."""
    complete = [path for path in folder.glob("step_*") if (path / STATE_FILE).is_file()]
    return max(complete, key=lambda path: path.name, default=None)


def _places(path: Path) -> tuple[Path, Path, Path]:
    return path, path / LATEST, path / CHECKPOINTS / LATEST
