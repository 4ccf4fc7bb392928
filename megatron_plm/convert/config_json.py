"""Foreign configurations: checked reading, and the fields common to EsmForMaskedLM and TAPE's fork.

Both have a config.json that spells the shape of a Transformer as transformers' BERT did.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from megatron_plm.config.options import ModelOptions
from megatron_plm.config.problems import problems
from megatron_plm.convert.weights import config_of
from megatron_plm.errors import JSON_ERRORS, UserError
from megatron_plm.tokenizers import Tokenizer

CONFIG_JSON = "config.json"
_MOST_LAYERS = 10_000  # far beyond any model: a spoiled number would take the memory of as many names

T = TypeVar("T")


class ForeignConfig:
    """The fields of a foreign configuration, asked for by name and type."""

    def __init__(self, content: Mapping[str, Any], place: str) -> None:
        self.place = place
        self._content = content

    @staticmethod
    def read(directory: Path) -> "ForeignConfig":
        """`directory`/config.json; UserError if it is missing or no JSON object."""
        path = directory / CONFIG_JSON
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; the directory needs its configuration") from None
        except JSON_ERRORS as error:
            raise UserError(f"{path}: not valid JSON ({error}); fetch the file again") from None
        if not isinstance(content, dict):
            raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
        return ForeignConfig(content, str(path))

    def get(self, name: str, kind: type[T], default: T | None = None) -> T:
        """The field `name`, or `default` where it is absent or null; UserError if it is needed or ill-typed."""
        value = self._content.get(name)
        if value is None:
            value = default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            try:
                value = float(value)
            except OverflowError:
                raise UserError(f"{self.place}: {name} is an integer beyond the range of a float; correct it") from None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            found = "has no value" if value is None else f"is {_shown(value)}"
            raise UserError(f"{self.place}: {name} {found}; expected a value of type {kind.__name__}")
        return value

    def choice(self, name: str, choices: Mapping[str, str], default: str | None = None) -> str:
        """The key of `choices` whose value the field `name` has, or `default` where it is absent; UserError if none."""
        value = self.get(name, str, default)
        for ours, theirs in choices.items():
            if theirs == value:
                return ours
        raise UserError(
            f"{self.place}: {name} is {_shown(value)}, and no model here has it; expected "
            f"{' or '.join(map(_shown, choices.values()))}"
        )

    def require(self, name: str, needed: T, reason: str, *, default: T | None = None) -> None:
        """UserError with `reason` unless field `name`, or its `default` where absent, is `needed`."""
        value = self.get(name, type(needed), default)
        if value != needed:
            raise UserError(f"{self.place}: {name} is {_shown(value)}, but {reason}")


def model_type_of(path: Path) -> str | None:
    """The model_type of a directory's config.json, empty where it has none; None where there is no such file."""
    return ForeignConfig.read(path).get("model_type", str, "") if (path / CONFIG_JSON).is_file() else None


def checked(options: ModelOptions, place: str) -> ModelOptions:
    """The options; UserError, naming `place`, if no such model can be built."""
    found = problems(config_of(options))
    if options.num_layers > _MOST_LAYERS:
        raise UserError(
            f"{place} describes a model of {options.num_layers:,} layers; expected at most {_MOST_LAYERS:,}; give the "
            "configuration that belongs to the weights"
        )
    if found:
        raise UserError(f"{place} describes a model that cannot be built here: {found[0]}")
    return options


def options_from(config: ForeignConfig, tokenizer: Tokenizer, **fixed: Any) -> ModelOptions:
    """The options that the common fields tell, with those that are `fixed`; UserError if no such model can be built."""
    config.require("tie_word_embeddings", True, "the models of this format have a tied head", default=True)
    hidden_size, inner_size = config.get("hidden_size", int), config.get("intermediate_size", int)
    options = ModelOptions(
        tokenizer=tokenizer.name,
        num_layers=config.get("num_hidden_layers", int),
        hidden_size=hidden_size,
        num_attention_heads=config.get("num_attention_heads", int),
        ffn_hidden_size=None if inner_size == 4 * hidden_size else inner_size,
        layernorm_epsilon=config.get("layer_norm_eps", float),
        hidden_dropout=config.get("hidden_dropout_prob", float, 0.0),
        attention_dropout=config.get("attention_probs_dropout_prob", float, 0.0),
        init_method_std=config.get("initializer_range", float, 0.02),
        **fixed,
    )
    return checked(options, config.place)


def fields_from(options: ModelOptions, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """The fields `options_from` reads, with those a reader of the file needs beside them."""
    return {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.num_layers,
        "num_attention_heads": options.num_attention_heads,
        "intermediate_size": options.ffn_size,
        "layer_norm_eps": options.layernorm_epsilon,
        "initializer_range": options.init_method_std,
        "tie_word_embeddings": True,
        "hidden_dropout_prob": options.hidden_dropout,
        "attention_probs_dropout_prob": options.attention_dropout,
        "torch_dtype": dtype,
    }


def require_options(options: ModelOptions, needed: Mapping[str, Any], format_name: str) -> None:
    """UserError, naming the first of them, if the model has other options than those that the format can hold."""
    for name, value in {"objective": "mlm", **needed}.items():
        allowed = value if isinstance(value, tuple) else (value,)
        found = getattr(options, name)
        if found not in allowed:
            raise UserError(
                f"--to {format_name}: the model's {name} is {_shown(found)}, and the format holds models with "
                f"{' or '.join(map(_shown, allowed))} only; --to native keeps it"
            )


def require_letters(tokenizer: Tokenizer, format_name: str) -> None:
    """UserError if the tokens of a model are pieces of several letters, which the format's tokenizer does not know."""
    if not tokenizer.one_letter_a_token:
        raise UserError(
            f"--to {format_name}: the model's tokens are the pieces of {tokenizer.name}, and the format's are letters; "
            "--to native keeps the model with its tokenizer"
        )


def _shown(value: object) -> str:
    return json.dumps(value, default=repr)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
