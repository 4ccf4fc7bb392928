"""`huggingface`: config.json, model.safetensors and a tokenizer's files, for models that transformers can open.

Which layout they have is the model's choice: EsmForMaskedLM (hf_esm.py), BertForMaskedLM (hf_bert.py) or AMPLIFY
(hf_amplify.py).
"""

from pathlib import Path

from megatron_plm.convert import hf_amplify, hf_bert, hf_esm
from megatron_plm.convert.config_json import CONFIG_JSON, model_type_of
from megatron_plm.convert.format import Format
from megatron_plm.convert.weights import Weights
from megatron_plm.errors import UserError

NAME = "huggingface"
DEFAULT_SHARD_SIZE = 5 * 10**9  # transformers' own, of most of its versions
_READERS = {
    hf_esm.MODEL_TYPE: hf_esm.read_esm,
    hf_bert.MODEL_TYPE: hf_bert.read_bert,
    hf_amplify.MODEL_TYPE: hf_amplify.read_amplify,
}
MODEL_TYPES = tuple(_READERS)


def read_huggingface(directory: Path, *, tokenizer: str | None = None) -> Weights:
    """Read a directory in the layout that its model_type names; `tokenizer` tells the vocabulary of one without."""
    return _READERS.get(model_type_of(directory) or "", hf_esm.read_esm)(directory, tokenizer)


def write_huggingface(
    weights: Weights, directory: Path, dtype: str = "float32", shard_size: int = DEFAULT_SHARD_SIZE
) -> tuple[str, ...]:
    """Write a directory in the layout that can hold such a model; returns what is not carried.

    Weights of more than `shard_size` bytes are cut into several files.
    """
    options = weights.options
    if options.position_embedding_type == "learned_absolute" and options.norm_placement == "pre":
        raise UserError(
            f"--to {NAME}: transformers has no model with learned positions that normalizes what goes into attention "
            "and MLP, as ProteinLM's does; --to proteinlm-tape or --to megatron writes it"
        )
    if options.position_embedding_type == "learned_absolute":
        write = hf_bert.write_bert
    else:
        write = hf_amplify.write_amplify if options.activation == "swiglu" else hf_esm.write_esm
    return write(weights, directory, dtype, shard_size)


FORMAT = Format(
    name=NAME,
    mark=CONFIG_JSON,
    recognises=lambda path: model_type_of(path) in MODEL_TYPES,
    read=read_huggingface,
    write=write_huggingface,
    looks_like=f"a {CONFIG_JSON} with model_type {' or '.join(map(repr, MODEL_TYPES))}",
    read_flags=("tokenizer",),
    write_flags=("shard_size",),
    has_contact_head=True,
)
