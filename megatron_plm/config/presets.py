"""Named model shapes. A preset sets only the keys listed; everything else keeps its default."""

from typing import Any

from megatron_plm.errors import UserError, suggestion

# What the models of Megatron-LM's and of BERT's kind have in common.
_BERT = {
    "position_embedding_type": "learned_absolute",
    "layernorm_epsilon": 1e-12,
    "token_dropout": False,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
}
# Xiao et al. 2021 (arXiv:2108.07435), with Megatron-LM's GELU.
_PROTEINLM = {"tokenizer": "proteinlm", **_BERT, "max_position_embeddings": 2176, "activation": "gelu_tanh"}
# Rao et al. 2019 (arXiv:1906.08230), with the positions of its published configuration.
_TAPE = {
    "tokenizer": "tape-iupac",
    **_BERT,
    "max_position_embeddings": 8192,
    "norm_placement": "post",
    "embedding_layernorm": True,
}
# Fournier et al. 2024 (doi:10.1101/2024.09.23.614603).
_AMPLIFY = {
    "tokenizer": "amplify",
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "add_bias_linear": False,
    "head_transform": False,
    "untie_embeddings_and_output_weights": True,
    "token_dropout": False,
}

# ESM-2 shapes: Lin et al. 2023 (doi:10.1126/science.ade2574), table S1; `tiny` is ours, for tests and first steps. The
# shape of ProteinLM's 3B model was never published: it has ESM-2's here.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4},
    "esm2-8m": {"num_layers": 6, "hidden_size": 320, "num_attention_heads": 20},
    "esm2-35m": {"num_layers": 12, "hidden_size": 480, "num_attention_heads": 20},
    "esm2-150m": {"num_layers": 30, "hidden_size": 640, "num_attention_heads": 20},
    "esm2-650m": {"num_layers": 33, "hidden_size": 1280, "num_attention_heads": 20},
    "esm2-3b": {"num_layers": 36, "hidden_size": 2560, "num_attention_heads": 40},
    "esm2-15b": {"num_layers": 48, "hidden_size": 5120, "num_attention_heads": 40},
    "proteinlm-200m": {**_PROTEINLM, "num_layers": 16, "hidden_size": 1024, "num_attention_heads": 16},
    "proteinlm-3b": {**_PROTEINLM, "num_layers": 36, "hidden_size": 2560, "num_attention_heads": 40},
    "tape-transformer": {**_TAPE, "num_layers": 12, "hidden_size": 512, "num_attention_heads": 8},
    # The feed-forward width: two thirds of four times the hidden size, up to a multiple of 8.
    "amplify-120m": {
        **_AMPLIFY,
        "num_layers": 24,
        "hidden_size": 640,
        "num_attention_heads": 10,
        "ffn_hidden_size": 1712,
    },
    "amplify-350m": {
        **_AMPLIFY,
        "num_layers": 32,
        "hidden_size": 960,
        "num_attention_heads": 15,
        "ffn_hidden_size": 2560,
    },
}


def preset_options(name: str, *, place: str = "--preset") -> dict[str, Any]:
    """The options that preset `name` sets; raises UserError for an unknown name, which stands at `place`."""
    if name not in PRESETS:
        raise UserError(f"{place}: unknown preset {name!r}; known are {', '.join(PRESETS)}{suggestion(name, PRESETS)}")
    return PRESETS[name]
