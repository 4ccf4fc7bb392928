"""config.json of foreign model directories: checked reading, and the fields common to EsmForMaskedLM and TAPE's fork.

Both spell the shape of a Transformer as transformers' BERT did.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from megatron_plm.config.options import Config, ModelOptions
from megatron_plm.config.problems import problems
from megatron_plm.errors import JSON_ERRORS, UserError
from megatron_plm.tokenizers import Tokenizer

CONFIG_JSON = "config.json"

T = TypeVar("T")


class ForeignConfig:
    """A config.json, whose fields are asked for by name and type."""

    def __init__(self, directory: Path) -> None:
        """Read `directory`/config.json; UserError if it is missing or no JSON object."""
        self.path = directory / CONFIG_JSON
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}; the directory needs its configuration") from None
        except JSON_ERRORS as error:
            raise UserError(f"{self.path}: not valid JSON ({error}); fetch the file again") from None
        if not isinstance(content, dict):
            raise UserError(f"{self.path}: expected a JSON object, found {type(content).__name__}")
        self._content: dict[str, Any] = content

    def get(self, name: str, kind: type[T], default: T | None = None) -> T:
        """The field `name`, or `default` where it is absent or null; UserError if it is needed or ill-typed."""
        value = self._content.get(name)
        if value is None:
            value = default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            found = "has no value" if value is None else f"is {json.dumps(value)}"
            raise UserError(f"{self.path}: {name} {found}; expected a value of type {kind.__name__}")
        return value

    def require(self, name: str, needed: T, reason: str, *, default: T | None = None) -> None:
        """UserError with `reason` unless field `name`, or its `default` where absent, is `needed`."""
        value = self.get(name, type(needed), default)
        if value != needed:
            raise UserError(f"{self.path}: {name} is {json.dumps(value)}, but {reason}")


def model_type_of(path: Path) -> str | None:
    """The model_type of a directory's config.json, empty where it has none; None where there is no such file."""
    return ForeignConfig(path).get("model_type", str, "") if (path / CONFIG_JSON).is_file() else None


def options_from(config: ForeignConfig, tokenizer: Tokenizer) -> ModelOptions:
    """The options of a model with rotary positions and a tied head; UserError if it is none or cannot be built."""
    config.require("position_embedding_type", "rotary", "the models here have rotary positions", default="absolute")
    config.require("tie_word_embeddings", True, "the models here have a tied head", default=True)
    hidden_size, inner_size = config.get("hidden_size", int), config.get("intermediate_size", int)
    options = ModelOptions(
        tokenizer=tokenizer.name,
        num_layers=config.get("num_hidden_layers", int),
        hidden_size=hidden_size,
        num_attention_heads=config.get("num_attention_heads", int),
        ffn_hidden_size=None if inner_size == 4 * hidden_size else inner_size,
        layernorm_epsilon=config.get("layer_norm_eps", float),
        token_dropout=config.get("token_dropout", bool),
        init_method_std=config.get("initializer_range", float, 0.02),
    )
    found = problems(Config(model=options))
    if found:
        raise UserError(f"{config.path} describes a model that cannot be built here: {found[0]}")
    return options


def dropout_notes(config: ForeignConfig) -> tuple[str, ...]:
    """What is lost of dropout, which models here do not have."""
    rates = {name: config.get(name, float, 0.0) for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")}
    return tuple(f"{name} {rate}: models here have no dropout" for name, rate in rates.items() if rate)


def fields_from(options: ModelOptions, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """The fields `options_from` reads, with those a reader of the file needs beside them.

    Raises UserError for a causal model: readers of these files would let every token see the ones behind it.
    """
    if options.objective != "mlm":
        raise UserError(f"--to: the model's objective is {options.objective}, and the format holds masked models only")
    return {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.num_layers,
        "num_attention_heads": options.num_attention_heads,
        "intermediate_size": options.ffn_size,
        "layer_norm_eps": options.layernorm_epsilon,
        "initializer_range": options.init_method_std,
        "position_embedding_type": "rotary",
        "token_dropout": options.token_dropout,
        "tie_word_embeddings": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "torch_dtype": dtype,
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
