"""`tape`: the files of stock tape-proteins 0.5, for post-LN models (ProteinBertModel, ProteinBertForMaskedLM).

config.json and pytorch_model.bin; keys as in its `tape/models/modeling_bert.py`; rows of the vocabulary in the order of
its IUPAC tokens. A directory is told by the names of its weights: its config.json has no model_type.
"""

from pathlib import Path

import torch

from megatron_plm.convert import bert
from megatron_plm.convert.config_json import CONFIG_JSON, ForeignConfig, model_type_of, write_json
from megatron_plm.convert.format import Format
from megatron_plm.convert.lazy import compact
from megatron_plm.convert.pickles import write_pickle
from megatron_plm.convert.proteinlm_tape import MODEL_TYPE as FORK
from megatron_plm.convert.proteinlm_tape import lost_rows, require_vocabulary
from megatron_plm.convert.tensor_files import PYTORCH_FILE, holds_tensor
from megatron_plm.convert.transforms import vocabulary_rows
from megatron_plm.convert.vocabulary import given_vocabulary
from megatron_plm.convert.weights import DTYPES, Weights
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import get_tokenizer, token_roles

NAME = "tape"
_TOKENIZER = "tape-iupac"
_MARK = "encoder.layer.0.attention.output.LayerNorm"
_MARKS = [f"{prefix}{_MARK}.{kind}" for prefix in ("bert.", "") for kind in ("weight", "gamma")]
LAYOUT = bert.Layout(format_name=NAME, head="mlm")


def read_tape(directory: Path, *, tokenizer: str | None = None) -> Weights:
    """Read such a directory, whose vocabulary `tokenizer` tells where it is not TAPE's IUPAC; UserError for anything a
    model of ours cannot compute."""
    config = ForeignConfig.read(directory)
    ours, tokens = given_vocabulary(tokenizer, _TOKENIZER)
    require_vocabulary(config, len(tokens), tokenizer)
    return bert.read(directory, config, ours, vocabulary_rows(ours.tokens, tokens), LAYOUT)


def write_tape(weights: Weights, directory: Path, dtype: str = "float32") -> tuple[str, ...]:
    """Write such a directory; returns what is not carried. One pickle: all is in memory when it is written."""
    options, ours, theirs = weights.options, weights.tokenizer, get_tokenizer(_TOKENIZER)
    if options.norm_placement == "pre":
        raise UserError(
            f"--to {NAME}: the model normalizes what goes into attention and MLP (pre-LN), and stock TAPE the sums "
            f"behind them; --to {FORK} writes it by the names of ProteinLM's fork of TAPE"
        )
    export = bert.export(weights, vocabulary_rows(token_roles(ours), token_roles(theirs)), LAYOUT, dtype)
    tensors = {key: compact(tensor) for key, tensor in export.stream}
    # TAPE would fill what it misses with random numbers, other ones at every start.
    tensors[f"{bert.POOLER}.weight"] = torch.eye(options.hidden_size, dtype=DTYPES[dtype])
    tensors[f"{bert.POOLER}.bias"] = torch.zeros(options.hidden_size, dtype=DTYPES[dtype])
    write_pickle(tensors, directory / PYTORCH_FILE)
    write_json(directory / CONFIG_JSON, bert.config_fields(options, theirs, dtype))
    return (
        f"{bert.POOLER}: the models here have none; the identity is written, so TAPE pools the tanh of <cls>",
        bert.WRITTEN_TOKEN_TYPES,
        *lost_rows(ours, theirs),
    )


FORMAT = Format(
    name=NAME,
    mark=CONFIG_JSON,
    recognises=lambda path: model_type_of(path) == "" and holds_tensor(path, *_MARKS),
    read=read_tape,
    write=write_tape,
    read_flags=("tokenizer",),
    looks_like=f"a {CONFIG_JSON} without model_type, and {PYTORCH_FILE} with the names of TAPE's ProteinBertModel",
)
