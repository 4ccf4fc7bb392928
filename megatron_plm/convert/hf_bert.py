"""The layout of transformers' BertForMaskedLM (4.46 to 5.x) in `huggingface` directories."""

from pathlib import Path

from megatron_plm.convert import bert
from megatron_plm.convert.config_json import CONFIG_JSON, ForeignConfig, write_json
from megatron_plm.convert.hf_tokenizer import read_vocabulary, write_letter_tokenizer
from megatron_plm.convert.tensor_files import write_safetensors_shards
from megatron_plm.convert.transforms import vocabulary_rows
from megatron_plm.convert.weights import Weights

MODEL_TYPE = "bert"
_HEAD = "cls.predictions"
_TIED_BIAS = f"{_HEAD}.decoder.bias"
_TIED = (f"{_HEAD}.decoder.weight", _TIED_BIAS)
_NEXT_SENTENCE = "the head for the next sentence, which proteins do not have"

LAYOUT = bert.Layout(
    format_name="huggingface",
    head=_HEAD,
    tied_bias=(_TIED_BIAS,),
    not_carried={f"cls.seq_relationship.{kind}": _NEXT_SENTENCE for kind in ("weight", "bias")},
)


def read_bert(directory: Path, given: str | None = None) -> Weights:
    """Read a BertForMaskedLM directory; UserError for anything a model of ours would compute differently.

    `given` is the --tokenizer of a directory that does not tell it.
    """
    config = ForeignConfig.read(directory)
    config.require("position_embedding_type", "absolute", "only learned positions can be read", default="absolute")
    for name in ("is_decoder", "add_cross_attention"):
        config.require(name, False, "the models here are plain BERT encoders", default=False)
    tokenizer, tokens, notes = read_vocabulary(directory, config, given)
    rows = vocabulary_rows(tokenizer.tokens, tokens)
    return bert.read(directory, config, tokenizer, rows, LAYOUT, tuple(notes))


def write_bert(weights: Weights, directory: Path, dtype: str, shard_size: int) -> tuple[str, ...]:
    """Write a BertForMaskedLM directory with its tokenizer; returns what is not carried.

    Weights of more than `shard_size` bytes are cut into several files.
    """
    options, tokenizer = weights.options, weights.tokenizer
    rows = vocabulary_rows(tokenizer.tokens, tokenizer.tokens)
    # transformers ties both again; safetensors stores no tensor under two names
    export = bert.export(weights, rows, LAYOUT, dtype, leave_out=_TIED)
    write_safetensors_shards(export.meta, export.stream, directory, shard_size)
    config = {
        "architectures": ["BertForMaskedLM"],
        "model_type": MODEL_TYPE,
        **bert.config_fields(options, tokenizer, dtype),
        "position_embedding_type": "absolute",
        "pad_token_id": tokenizer.pad_id,
    }
    write_json(directory / CONFIG_JSON, config)
    write_letter_tokenizer(tokenizer, directory, options.max_position_embeddings)
    return (bert.WRITTEN_TOKEN_TYPES,)
