"""Stock tape-proteins 0.5, installed without its dependencies, and its models of the same shape as ours."""

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest

from megatron_plm.config.options import ModelOptions

# What its modules import at their head to download files and to log; no model calls any of it.
_LACKING = {
    "boto3": (),
    "botocore": (),
    "botocore.exceptions": ("ClientError",),
    "requests": (),
    "tensorboardX": ("SummaryWriter",),
}


def import_tape(module: str = "tape") -> ModuleType:
    """The package `tape`, or a module of it; the test is skipped where it is not installed."""
    if "tape" not in sys.modules and importlib.util.find_spec("tape") is None:
        pytest.skip("tape-proteins is not installed (make test does it)")
    absent = {name: names for name, names in _LACKING.items() if name not in sys.modules and not _is_there(name)}
    for name, names in absent.items():
        empty = ModuleType(name)
        for attribute in names:
            setattr(empty, attribute, type(attribute, (Exception,), {}))
        sys.modules[name] = empty
    try:
        return importlib.import_module(module)
    finally:  # other packages look whether they are there
        for name in absent:
            del sys.modules[name]


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it is a part of
        return False


def tape_config(options: ModelOptions, **changes: Any) -> Any:
    """TAPE's configuration of our model; `changes` are fields of theirs."""
    fields = {
        "vocab_size": 30,
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.num_layers,
        "num_attention_heads": options.num_attention_heads,
        "intermediate_size": options.ffn_size,
        "max_position_embeddings": options.max_position_embeddings,
        "type_vocab_size": 1,
        "layer_norm_eps": options.layernorm_epsilon,
    }
    return import_tape().ProteinBertConfig(**{**fields, **changes})
