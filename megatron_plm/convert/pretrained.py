"""Which formats there are, which one a path holds, and a model from any of them."""

import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_plm.config.options import ModelOptions
from megatron_plm.convert import fair_esm, huggingface, megatron, native, proteinlm_tape, tape
from megatron_plm.convert.config_json import CONFIG_JSON, model_type_of
from megatron_plm.convert.weights import Weights, untrained_head_warning
from megatron_plm.errors import UserError
from megatron_plm.model.heads import ContactHead
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.tokenizers import Tokenizer

_MODULES = (native, megatron, huggingface, tape, proteinlm_tape, fair_esm)  # in the order in which they look at a path
FORMATS = {module.FORMAT.name: module.FORMAT for module in _MODULES}


@dataclass(frozen=True)
class Pretrained:
    """A model with the weights of a checkpoint of any format, on the CPU, in float32, and its contact head if there is
    one."""

    model: MaskedLanguageModel
    options: ModelOptions
    tokenizer: Tokenizer
    contact_head: ContactHead | None = None


def load_pretrained(path: Path) -> Pretrained:
    """Load a model from a checkpoint of any of `FORMATS`; UserError if it is of none or cannot be read.

    What a user must know before relying on it is printed to standard error.
    """
    weights = read_checkpoint(path, detect_format(path))
    model = weights.build()
    untrained = untrained_head_warning(model, weights.options, weights.tokenizer)
    for warning in weights.warnings or ((f"{path}: {untrained}",) if untrained else ()):
        print(f"warning: {warning}", file=sys.stderr)
    return Pretrained(model, weights.options, weights.tokenizer, weights.build_contact_head())


def read_checkpoint(path: Path, format_name: str, **flags: object) -> Weights:
    """Read a checkpoint of that format, its tensors left in the files; UserError if it cannot be read."""
    try:
        return FORMATS[format_name].read(path, **flags)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror or error}; look at its files and permissions"
        ) from None


def detect_format(path: Path) -> str:
    """The name of the format that `path` holds; UserError, saying what was found, if it is none of `FORMATS`."""
    if not path.exists():
        raise UserError(f"{path}: does not exist; give a checkpoint")
    for name, entry in FORMATS.items():
        if entry.recognises(path):
            return name
    if not (path / CONFIG_JSON).is_file():
        looks = "; ".join(f"{name}: {entry.looks_like}" for name, entry in FORMATS.items())
        what = "is a file, and no checkpoint" if path.is_file() else "holds no checkpoint"
        raise UserError(f"{path}: {what} of a format that can be read ({looks})")
    model_type = model_type_of(path)
    if not model_type:
        raise UserError(
            f"{path / CONFIG_JSON}: has no model_type, and the weights beside it have the names of neither stock TAPE "
            "nor ProteinLM's fork of it; give a checkpoint of a format that can be read"
        )
    known = ", ".join(map(repr, (*huggingface.MODEL_TYPES, proteinlm_tape.MODEL_TYPE)))
    raise UserError(f"{path / CONFIG_JSON}: the model_type is {model_type!r}; models that can be read have {known}")
