"""The layout of transformers' BertForMaskedLM (4.46 to 5.x) in `huggingface` directories."""

from pathlib import Path

from megatron_plm.convert import bert
from megatron_plm.convert.config_json import (
    CONFIG_JSON,
    ForeignConfig,
    fields_from,
    options_from,
    require_letters,
    require_options,
    write_json,
)
from megatron_plm.convert.hf_tokenizer import read_vocabulary, write_letter_tokenizer
from megatron_plm.convert.other_names import NORM_NAMES, with_current_names
from megatron_plm.convert.tensor_files import read_tensors, write_safetensors_shards
from megatron_plm.convert.transforms import vocabulary_rows
from megatron_plm.convert.weights import Weights, drop_not_carried, export_tensors, import_tensors

MODEL_TYPE = "bert"
_NAME = "huggingface"
_HEAD = "cls.predictions"
_TIED_BIAS = f"{_HEAD}.decoder.bias"
_TIED = (f"{_HEAD}.decoder.weight", _TIED_BIAS)

NOT_CARRIED = {
    **bert.NOT_CARRIED,
    "cls.seq_relationship.weight": "the head for the next sentence, which proteins do not have",
    "cls.seq_relationship.bias": "the head for the next sentence, which proteins do not have",
}


def read_bert(directory: Path) -> Weights:
    """Read a BertForMaskedLM directory; UserError for anything a model of ours would compute differently."""
    config = ForeignConfig.read(directory)
    config.require("hidden_act", "gelu", "the head of the models here has the exact GELU, and BERT's has the MLPs'")
    config.require("position_embedding_type", "absolute", "only learned positions can be read", default="absolute")
    for name in ("is_decoder", "add_cross_attention"):
        config.require(name, False, "the models here are plain BERT encoders", default=False)
    tokenizer, tokens, notes = read_vocabulary(directory, config)
    options = options_from(
        config,
        tokenizer,
        max_position_embeddings=config.get("max_position_embeddings", int),
        **bert.CARRIED,
    )
    found = with_current_names(read_tensors(directory), NORM_NAMES, directory)
    kept, dropped = drop_not_carried(found, NOT_CARRIED)
    table = bert.key_map(
        options,
        vocabulary_rows(tokenizer.tokens, tokens),
        head=_HEAD,
        num_token_types=config.get("type_vocab_size", int),
        tied_bias=(_TIED_BIAS,),
    )
    tensors = import_tensors(table, kept, options, tokenizer, str(directory))
    return Weights(options, tokenizer, tensors, (*notes, *dropped, *bert.token_type_notes(kept)))


def write_bert(weights: Weights, directory: Path, dtype: str, shard_size: int) -> tuple[str, ...]:
    """Write a BertForMaskedLM directory with its tokenizer; returns what is not carried.

    Weights of more than `shard_size` bytes are cut into several files.
    """
    options, tokenizer = weights.options, weights.tokenizer
    require_options(options, bert.CARRIED, _NAME)
    require_letters(tokenizer, _NAME)
    rows = vocabulary_rows(tokenizer.tokens, tokenizer.tokens)
    table = bert.key_map(options, rows, head=_HEAD, num_token_types=1, tied_bias=(_TIED_BIAS,))
    # transformers ties both again; safetensors stores no tensor under two names
    export = export_tensors(table, weights, dtype, leave_out=_TIED)
    write_safetensors_shards(export.meta, export.stream, directory, shard_size)
    config = {
        "architectures": ["BertForMaskedLM"],
        "model_type": MODEL_TYPE,
        **fields_from(options, tokenizer, dtype),
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "max_position_embeddings": options.max_position_embeddings,
        "type_vocab_size": 1,
        "pad_token_id": tokenizer.pad_id,
    }
    write_json(directory / CONFIG_JSON, config)
    write_letter_tokenizer(tokenizer, directory, options.max_position_embeddings)
    return (bert.WRITTEN_TOKEN_TYPES,)
