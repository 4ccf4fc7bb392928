"""From letters to token ids and back: named vocabularies of letters, and sentencepiece models."""

from megatron_plm.tokenizers.opening import MODEL_SUFFIX, open_tokenizer, read_model, recorded_tokenizer
from megatron_plm.tokenizers.piece_model import SPECIAL_TOKENS
from megatron_plm.tokenizers.pieces import PIECE_LETTERS, PieceTokenizer
from megatron_plm.tokenizers.vocabulary import (
    STANDARD_AMINO_ACIDS,
    TOKENIZER_NAMES,
    Tokenizer,
    get_tokenizer,
    matching_rows,
    token_roles,
)

__all__ = [
    "MODEL_SUFFIX",
    "PIECE_LETTERS",
    "SPECIAL_TOKENS",
    "STANDARD_AMINO_ACIDS",
    "TOKENIZER_NAMES",
    "PieceTokenizer",
    "Tokenizer",
    "get_tokenizer",
    "matching_rows",
    "open_tokenizer",
    "read_model",
    "recorded_tokenizer",
    "token_roles",
]
