"""What benchmarks against transformers' ESM-2 share."""

from typing import Any

from megatron_plm.config.options import ModelOptions
from megatron_plm.errors import UserError
from megatron_plm.tokenizers import Tokenizer


def require_peer() -> None:
    """Raise UserError unless the peer's package is there."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the benchmark's peer needs {error.name}; install it with: pip install 'megatron-plm[huggingface]'"
        ) from None


def peer_config(options: ModelOptions, tokenizer: Tokenizer) -> Any:
    """The EsmConfig of the same shape, without dropout."""
    from transformers import EsmConfig

    return EsmConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_attention_heads,
        intermediate_size=options.ffn_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        position_embedding_type="rotary",
        token_dropout=options.token_dropout,
        mask_token_id=tokenizer.mask_id,
        pad_token_id=tokenizer.pad_id,
        layer_norm_eps=options.layernorm_epsilon,
    )
