"""Which formats there are, which one a path holds, and a model from any of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_plm.checkpoint_format import is_native
from megatron_plm.config.options import ModelOptions
from megatron_plm.convert import huggingface, tape
from megatron_plm.convert.config_json import CONFIG_JSON, ForeignConfig
from megatron_plm.convert.native import read_native, write_native
from megatron_plm.convert.weights import Weights
from megatron_plm.errors import UserError
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.tokenizers import Tokenizer


@dataclass(frozen=True)
class Format:
    """One format: how to read it, how to write it into an empty directory, and its mark in config.json."""

    read: Callable[[Path], Weights]
    write: Callable[[Weights, Path, str], tuple[str, ...]]  # (weights, directory, dtype) -> what is not carried
    model_type: str | None


FORMATS = {
    "native": Format(read_native, write_native, None),
    "huggingface": Format(huggingface.read_huggingface, huggingface.write_huggingface, huggingface.MODEL_TYPE),
    "proteinlm-tape": Format(tape.read_proteinlm_tape, tape.write_proteinlm_tape, tape.MODEL_TYPE),
}


@dataclass(frozen=True)
class Pretrained:
    """A model with the weights of a checkpoint of any format, on the CPU, in float32."""

    model: MaskedLanguageModel
    options: ModelOptions
    tokenizer: Tokenizer


def load_pretrained(path: Path) -> Pretrained:
    """Load a model from a checkpoint of any of `FORMATS`; UserError if it is of none or cannot be read."""
    weights = read_checkpoint(path, detect_format(path))
    return Pretrained(weights.build(), weights.options, weights.tokenizer)


def read_checkpoint(path: Path, format_name: str) -> Weights:
    """Read a checkpoint of that format; UserError if it cannot be read."""
    try:
        return FORMATS[format_name].read(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror or error}; look at its files and permissions"
        ) from None


def detect_format(path: Path) -> str:
    """The name of the format that `path` holds; UserError, saying what was found, if it is none of `FORMATS`."""
    if not path.is_dir():
        raise UserError(f"{path}: {'is a file' if path.exists() else 'does not exist'}; give a checkpoint directory")
    if is_native(path):
        return "native"
    if not (path / CONFIG_JSON).is_file():
        raise UserError(
            f"{path}: holds no checkpoint: neither a native one (a run directory, or state.json) nor a "
            f"{CONFIG_JSON} of {' or '.join(name for name, entry in FORMATS.items() if entry.model_type)}"
        )
    model_type = ForeignConfig(path).get("model_type", str, "")
    for name, entry in FORMATS.items():
        if entry.model_type == model_type:
            return name
    if not model_type:
        raise UserError(
            f"{path / CONFIG_JSON}: has no model_type, as those of stock TAPE and of ProteinLM's fork; their models "
            "have learned positions, which cannot be read yet"
        )
    raise UserError(
        f"{path / CONFIG_JSON}: the model_type is {model_type!r}; models that can be read have "
        f"{' or '.join(repr(entry.model_type) for entry in FORMATS.values() if entry.model_type)}"
    )
