"""Every kind of checkpoint that the converters read is a base model: the same features from all that can carry it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from finetune_sample import OPTIONS

from megatron_plm.config.options import ModelOptions
from megatron_plm.convert.pretrained import FORMATS, detect_format
from megatron_plm.convert.weights import Weights
from megatron_plm.model.initialize import initialize
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.tokenizers import get_tokenizer
from tape_finetune.batching import pack
from tape_finetune.data import Example
from tape_finetune.model import transformer

_LEARNED = replace(
    OPTIONS, position_embedding_type="learned_absolute", max_position_embeddings=40, token_dropout=False,
    hidden_dropout=0.1, attention_dropout=0.1,
)  # fmt: skip
_BERT = replace(
    _LEARNED, tokenizer="tape-iupac", norm_placement="post", embedding_layernorm=True, layernorm_epsilon=1e-12
)
_AMPLIFY = replace(
    OPTIONS, tokenizer="amplify", ffn_hidden_size=64, normalization="RMSNorm", activation="swiglu",
    add_bias_linear=False, head_transform=False, untie_embeddings_and_output_weights=True, token_dropout=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "name"),
    [
        pytest.param(OPTIONS, "native", id="ours"),
        pytest.param(OPTIONS, "huggingface", id="ESM-2"),
        pytest.param(_AMPLIFY, "huggingface", id="AMPLIFY"),
        pytest.param(_BERT, "huggingface", id="BERT"),
        pytest.param(_BERT, "tape", id="TAPE"),
        pytest.param(replace(_LEARNED, tokenizer="tape-iupac"), "proteinlm-tape", id="ProteinLM's fork"),
        pytest.param(replace(_LEARNED, tokenizer="proteinlm"), "megatron", id="ProteinLM"),
    ],
)
def test_a_base_model_of_each_format(options: ModelOptions, name: str, tmp_path: Path) -> None:
    tokenizer = get_tokenizer(options.tokenizer)
    model = MaskedLanguageModel(options, tokenizer).eval()
    initialize(model, options, seed=5)
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    FORMATS[name].write(Weights(options, tokenizer, model.state_dict()), directory, "float32")
    assert detect_format(directory) == name
    base = transformer(directory).eval()
    proteins = ["MKTAYIAKQRNDVW", "ACDEFGHIKLMN"]
    packed = pack([Example("", protein, None) for protein in proteins], base.tokenizer)
    with torch.no_grad():
        found = base(packed).split(packed.cu_seqlens.diff().tolist())
        for protein, features in zip(proteins, found, strict=True):
            ids = torch.tensor([[tokenizer.cls_id, *tokenizer.encode(protein), tokenizer.eos_id]])
            cut = torch.tensor([0, ids.shape[1]], dtype=torch.int32)
            expected = model.encoder(ids, torch.arange(ids.shape[1])[None], torch.ones_like(ids), cut)[0]
            torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    assert base.max_residues == (None if options.max_position_embeddings is None else 38)
