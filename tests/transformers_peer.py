"""transformers' ESM-2 of the same shape as ours."""

from typing import Any

from transformers import EsmConfig

from megatron_plm.config.options import ModelOptions
from megatron_plm.tokenizers import get_tokenizer


def esm_config(options: ModelOptions, **changes: Any) -> EsmConfig:
    """Their configuration of our model, without dropout; `changes` are fields of theirs."""
    tokenizer = get_tokenizer("esm2")
    fields = {
        "vocab_size": tokenizer.vocab_size,
        "mask_token_id": tokenizer.mask_id,
        "pad_token_id": tokenizer.pad_id,
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.num_layers,
        "num_attention_heads": options.num_attention_heads,
        "intermediate_size": options.ffn_size,
        "layer_norm_eps": options.layernorm_epsilon,
        "position_embedding_type": "rotary",
        "token_dropout": options.token_dropout,
        "emb_layer_norm_before": options.embedding_layernorm,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return EsmConfig(**{**fields, **changes})
