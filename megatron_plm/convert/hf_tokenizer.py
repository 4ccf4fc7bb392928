"""Tokenizers in Hugging Face directories: which of ours a directory has, and files that cut proteins as ours do.

tokenizer.json is the format of the `tokenizers` library (0.20 to 0.23), which transformers reads for whatever model the
directory holds; nothing here imports either.
"""

import json
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from megatron_plm.convert.config_json import CONFIG_JSON, ForeignConfig, write_json
from megatron_plm.convert.vocabulary import VOCABULARY_FILE, given_vocabulary, tokenizer_of, tokens_listed
from megatron_plm.errors import JSON_ERRORS, UserError
from megatron_plm.tokenizers import TOKENIZER_NAMES, Tokenizer, get_tokenizer

TOKENIZER_JSON = "tokenizer.json"


def read_vocabulary(
    directory: Path, config: ForeignConfig, given: str | None = None, *, default: str | None = None
) -> tuple[Tokenizer, list[str], list[str]]:
    """The tokenizer of ours with a directory's tokens, these by its names in the directory's order, and notes.

    The names of special tokens may differ, as BERT's [CLS] and TAPE's <cls> do. Without files of a tokenizer the tokens
    are those that --tokenizer, `given`, means, or of `default`, where there is one. Raises UserError for any other
    vocabulary.
    """
    size = config.get("vocab_size", int)
    path, tokens = _read_tokens(directory)
    notes = []
    if tokens is not None and given is not None:
        raise UserError(f"--tokenizer {given}: {path} tells what the rows mean; leave the flag out")
    if tokens is None and given is not None:
        path, tokens = Path(given), given_vocabulary(given, default="esm2")[1]
    if tokens is None and default is not None:
        tokens = list(get_tokenizer(default).tokens)
        notes.append(f"{VOCABULARY_FILE}: there is none; the tokens of {default} are assumed, whose number fits")
    if tokens is None:
        raise UserError(
            f"{directory}: has no {VOCABULARY_FILE} and no {TOKENIZER_JSON}, so what its rows mean is unknown; fetch "
            "the tokenizer's files, too, or convert it with --tokenizer"
        )
    found = tokenizer_of(tokens)
    if found is not None and len(tokens) == size:
        return *found, notes
    raise UserError(
        f"{path}: {len(tokens)} tokens for a vocab_size of {size} in {CONFIG_JSON}; expected one of the vocabularies "
        f"{', '.join(TOKENIZER_NAMES)}, in any order"
    )


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The special tokens by transformers' names of their roles, for a protein that is `<cls> residues <eos>`."""
    return {
        "cls_token": tokenizer.tokens[tokenizer.cls_id],
        "eos_token": tokenizer.tokens[tokenizer.eos_id],
        "mask_token": tokenizer.tokens[tokenizer.mask_id],
        "pad_token": tokenizer.tokens[tokenizer.pad_id],
        "unk_token": tokenizer.tokens[tokenizer.unk_id],
    }


def write_letter_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int | None = None) -> None:
    """Write files from which transformers' AutoTokenizer makes what `tokenizer` makes of a protein, specials added.

    Small letters become capitals, white space vanishes, and an unknown letter is one unknown token.
    """
    special = special_tokens(tokenizer)
    (directory / VOCABULARY_FILE).write_text("\n".join(tokenizer.tokens), encoding="utf-8")
    write_json(directory / TOKENIZER_JSON, _tokenizer_json(tokenizer, special))
    write_json(directory / "special_tokens_map.json", special)
    limit = {} if max_length is None else {"model_max_length": max_length}
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            **limit,
            **special,
        },
    )


def _read_tokens(directory: Path) -> tuple[Path, list[str] | None]:
    """The tokens by id, with the file they come from; None if there is neither file."""
    path = directory / VOCABULARY_FILE
    if path.exists():
        return path, tokens_listed(path)
    path = directory / TOKENIZER_JSON
    if not path.exists():
        return directory / VOCABULARY_FILE, None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        ids = {**content["model"]["vocab"], **{added["content"]: added["id"] for added in content["added_tokens"]}}
        tokens = sorted(ids, key=lambda token: ids[token])
        if sorted(ids.values()) != list(range(len(ids))):
            raise ValueError("its ids are not 0, 1, 2, …")
    except (OSError, *JSON_ERRORS, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: lists no tokens by id ({error}); give a directory with {VOCABULARY_FILE}") from None
    return path, tokens


def _tokenizer_json(tokenizer: Tokenizer, special: dict[str, str]) -> dict[str, Any]:
    cls, eos = special["cls_token"], special["eos_token"]
    ids = {token: i for i, token in enumerate(tokenizer.tokens)}
    # `tokenizers` has no step that makes capitals.
    capitals = [
        {"type": "Replace", "pattern": {"String": letter.lower()}, "content": letter} for letter in ascii_uppercase
    ]

    def placed(*names: str) -> list[dict[str, Any]]:
        return [{"Sequence" if n in "AB" else "SpecialToken": {"id": n, "type_id": 0}} for n in names]

    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": ids[token], "content": token, "special": True,
                "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            }
            for token in tokenizer.tokens if len(token) > 1
        ],
        "normalizer": {"type": "Sequence", "normalizers": capitals},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "WhitespaceSplit"},
                {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": placed(cls, "A", eos),
            "pair": placed(cls, "A", eos, "B", eos),
            "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in (cls, eos)},
        },
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": special["unk_token"]},
    }  # fmt: skip
