"""The arguments that Megatron-LM saves with a checkpoint: what they say of the model, and those of a model of ours."""

import argparse
from pathlib import Path
from typing import Any

import torch

from megatron_plm.config.options import ModelOptions
from megatron_plm.convert.config_json import ForeignConfig, checked
from megatron_plm.convert.megatron_ranks import shared_args
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import Tokenizer

VERSION = 3.0
VOCABULARY_MULTIPLE = 128  # of rows that each rank has, --make-vocab-size-divisible-by


def version_and_args(
    stages: list[list[dict[str, Any]]], files: list[list[Path]], place: str
) -> tuple[float, ForeignConfig]:
    """The checkpoint's version and the arguments of the command that trained it; UserError if the ranks disagree."""
    ranks = [rank for stage in stages for rank in stage]
    for name in ("checkpoint_version", "iteration"):
        found = sorted({str(rank.get(name)) for rank in ranks})
        if len(found) > 1:
            raise UserError(f"{place}: its ranks have {name} {' and '.join(found)}; copy all ranks of one iteration")
    version = ranks[0].get("checkpoint_version", 0)
    is_number = isinstance(version, int | float) and not isinstance(version, bool)
    if not is_number or not (version in (0, 1) or 2 <= version <= VERSION):
        raise UserError(f"{place}: has checkpoint_version {version!r}; expected 0, 1, or 2 to {VERSION}")
    return version, ForeignConfig(shared_args(stages, files), f"{place}: args")


def options_from(args: ForeignConfig, tokenizer: Tokenizer) -> ModelOptions:
    """The model that the arguments describe, with that vocabulary; UserError if it is none of ours."""
    args.require("apply_residual_connection_post_layernorm", False, "pre-LN models only can be read", default=False)
    args.require("openai_gelu", False, "the heads here have the exact GELU", default=False)
    num_layers, hidden_size = args.get("num_layers", int), args.get("hidden_size", int)
    args.require("num_unique_layers", num_layers, "each layer here has weights of its own", default=num_layers)
    inner_size = args.get("ffn_hidden_size", int, 4 * hidden_size)
    options = ModelOptions(
        tokenizer=tokenizer.name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=args.get("num_attention_heads", int),
        ffn_hidden_size=None if inner_size == 4 * hidden_size else inner_size,
        layernorm_epsilon=args.get("layernorm_epsilon", float),
        position_embedding_type="learned_absolute",
        max_position_embeddings=args.get("max_position_embeddings", int),
        # The fused kernel, which is on unless it was switched off, has the tanh form.
        activation="gelu_tanh" if args.get("bias_gelu_fusion", bool, True) else "gelu",
        hidden_dropout=args.get("hidden_dropout", float, 0.0),
        attention_dropout=args.get("attention_dropout", float, 0.0),
        token_dropout=False,
        init_method_std=args.get("init_method_std", float, 0.02),
    )
    return checked(options, args.place)


def args_from(options: ModelOptions, dtype: torch.dtype, num_ranks: int, rows: int) -> argparse.Namespace:
    """What `options_from` reads, and what Megatron-LM compares with its own arguments when it loads."""
    return argparse.Namespace(
        num_layers=options.num_layers,
        hidden_size=options.hidden_size,
        ffn_hidden_size=options.ffn_size,
        num_attention_heads=options.num_attention_heads,
        max_position_embeddings=options.max_position_embeddings,
        layernorm_epsilon=options.layernorm_epsilon,
        apply_residual_connection_post_layernorm=False,
        openai_gelu=False,
        onnx_safe=None,
        bias_gelu_fusion=options.activation == "gelu_tanh",
        hidden_dropout=options.hidden_dropout,
        attention_dropout=options.attention_dropout,
        init_method_std=options.init_method_std,
        make_vocab_size_divisible_by=VOCABULARY_MULTIPLE,
        padded_vocab_size=rows,
        tokenizer_type="BertWordPieceLowerCase",
        tensor_model_parallel_size=num_ranks,
        pipeline_model_parallel_size=1,
        params_dtype=dtype,
        fp16=dtype == torch.float16,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )
