"""Which vocabulary of ours a list of tokens is, whatever their order and the names of the special ones.

Two tokens are the same if they have the same role or the same letter, so rows always go by token.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_plm.errors import UserError
from megatron_plm.tokenizers import TOKENIZER_NAMES, Tokenizer, get_tokenizer, token_roles

VOCABULARY_FILE = "vocab.txt"  # a token a line, in the order of the rows

# What other vocabularies call the five roles, by ESM-2's names.
_ROLES = {
    "[PAD]": "<pad>", "[UNK]": "<unk>", "[MASK]": "<mask>", "[CLS]": "<cls>", "<bos>": "<cls>",
    "[SEP]": "<eos>", "<sep>": "<eos>",
}  # fmt: skip


def tokenizer_of(tokens: Sequence[str]) -> tuple[Tokenizer, list[str]] | None:
    """The tokenizer of ours with these tokens, and they by its names, in the same order; None if there is none."""
    for tokenizer in map(get_tokenizer, TOKENIZER_NAMES):
        if sorted(tokens) == sorted(tokenizer.tokens):
            return tokenizer, list(tokens)
        ours = dict(zip(token_roles(tokenizer), tokenizer.tokens, strict=True))
        roles = [_ROLES.get(token, token) for token in tokens]
        if sorted(roles) == sorted(ours):
            return tokenizer, [ours[role] for role in roles]
    return None


def given_vocabulary(given: str | None, default: str) -> tuple[Tokenizer, list[str]]:
    """What --tokenizer means, or `default`, a name, where it was not given.

    That is the name of a tokenizer, or a file with a token a line, as vocab.txt. Returns the tokenizer of ours and its
    tokens in the order of the rows; raises UserError if there is none.
    """
    if given is None or given in TOKENIZER_NAMES:
        tokenizer = get_tokenizer(given or default)
        return tokenizer, list(tokenizer.tokens)
    path = Path(given)
    if not path.exists():
        raise UserError(
            f"--tokenizer {given}: expected one of {', '.join(TOKENIZER_NAMES)}, or a file that lists a token a line"
        )
    return vocabulary_in(path)


def vocabulary_in(path: Path) -> tuple[Tokenizer, list[str]]:
    """The tokenizer of ours of a file with a token a line, and its tokens in that order; UserError if it is none."""
    tokens = tokens_listed(path)
    found = tokenizer_of(tokens)
    if found is None:
        raise UserError(
            f"{path}: its {len(tokens)} tokens are those of none of the vocabularies {', '.join(TOKENIZER_NAMES)}, in "
            "any order; give the file that belongs to the checkpoint"
        )
    return found


def tokens_listed(path: Path) -> list[str]:
    """The tokens of a file with one a line; UserError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").split()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror or error}; expected a file with a token a line"
        ) from None
