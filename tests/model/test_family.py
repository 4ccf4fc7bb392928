"""The members of the family: each is what its options say, and packing changes none."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from packing import SHAPE, TOKENIZER, build, pack, random_proteins
from transformers import BertConfig, BertForMaskedLM

from megatron_plm.config.load import load_config
from megatron_plm.config.options import ModelOptions
from megatron_plm.config.presets import PRESETS
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.tokenizers import get_tokenizer

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
LEARNED = {"position_embedding_type": "learned_absolute", "max_position_embeddings": 60, "token_dropout": False}
FAMILY = {
    "proteinlm": replace(SHAPE, **LEARNED, activation="gelu_tanh", layernorm_epsilon=1e-12),
    "tape": replace(SHAPE, **LEARNED, norm_placement="post", embedding_layernorm=True),
    "amplify": replace(
        SHAPE,
        normalization="RMSNorm",
        activation="swiglu",
        ffn_hidden_size=72,
        add_bias_linear=False,
        head_transform=False,
        untie_embeddings_and_output_weights=True,
        token_dropout=False,
    ),
    "esm-1b": replace(SHAPE, **{**LEARNED, "token_dropout": True}, embedding_layernorm=True),
}


@pytest.fixture(params=FAMILY, scope="module")
def model(request):
    return build(FAMILY[request.param])


def test_a_packed_protein_is_encoded_as_if_alone(model):
    proteins = random_proteins([3, 17, 9, 30, 10, 24])
    together = model.encoder(*pack([proteins[:3], proteins[3:5], proteins[5:]], 40))
    for row, members in enumerate((proteins[:3], proteins[3:5], proteins[5:])):
        at = 0
        for protein in members:
            alone = model.encoder(*pack([[protein]], len(protein)))[0]
            torch.testing.assert_close(together[row, at : at + len(protein)], alone, **TOLERANCE)
            at += len(protein)


def test_every_parameter_learns(model):
    model.zero_grad()
    logits = model(*pack([random_proteins([17, 9]), random_proteins([30], seed=1)], 60))
    (
        logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_block_without_rotation_is_torchs_encoder_layer(norm_first):
    options = replace(FAMILY["tape"], norm_placement="pre" if norm_first else "post")
    block = build(options).encoder.blocks["1"]
    D, N = options.hidden_size, options.num_attention_heads
    theirs = torch.nn.TransformerEncoderLayer(
        D, N, 4 * D, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    ours = dict(block.named_parameters())
    rows = {
        key: ours[f"attention.qkv.{key}"].detach().unflatten(0, (N, 3, -1)).transpose(0, 1)
        for key in ("weight", "bias")
    }
    state = {
        "self_attn.in_proj_weight": rows["weight"].reshape(3 * D, D),
        "self_attn.in_proj_bias": rows["bias"].reshape(3 * D),
    }
    names = {"attention.out": "self_attn.out_proj", "mlp.up": "linear1", "mlp.down": "linear2",
             "attention_norm": "norm1", "mlp_norm": "norm2"}  # fmt: skip
    for name, their_name in names.items():
        state |= {f"{their_name}.{key}": ours[f"{name}.{key}"].detach() for key in ("weight", "bias")}
    theirs.load_state_dict(state)
    x = torch.randn(1, 20, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows_of_one = pack([random_proteins([20])], 20)
    seen = []
    block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    encoder = build(options).encoder
    encoder.blocks = torch.nn.ModuleDict({"1": block})
    result = encoder.transform(x, rows_of_one.positions, rows_of_one.cu_seqlens)
    assert len(seen) == 1
    torch.testing.assert_close(result, theirs(x), **TOLERANCE)


def test_a_gated_mlp_without_biases_is_what_it_says():
    model = build(FAMILY["amplify"])
    mlp = model.encoder.blocks["0"].mlp
    x = torch.randn(2, 5, SHAPE.hidden_size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gate, value = mlp.up.weight[0::2], mlp.up.weight[1::2]
    torch.testing.assert_close(mlp(x), (F.silu(x @ gate.T) * (x @ value.T)) @ mlp.down.weight.T, **TOLERANCE)
    norm = model.encoder.final_norm
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, **TOLERANCE)
    assert not any(name.endswith("bias") for name, _ in model.encoder.named_parameters())


def test_epsilon_and_kind_are_those_of_every_norm():
    options = replace(FAMILY["amplify"], head_transform=True, embedding_layernorm=True, layernorm_epsilon=0.5)
    model = build(options)
    norms = {name: m for name, m in model.named_modules() if name.endswith("norm")}
    assert len(norms) == 2 * options.num_layers + 3
    x = torch.randn(3, options.hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name, norm in norms.items():
        expected = x / (x.pow(2).mean(-1, keepdim=True) + 0.5).sqrt() * norm.weight
        torch.testing.assert_close(norm(x), expected, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_the_tanh_form_is_the_mlps_alone():
    model = build(FAMILY["proteinlm"])
    mlp, head = model.encoder.blocks["0"].mlp, model.head
    x = torch.randn(2, 5, SHAPE.hidden_size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inside = x @ mlp.up.weight.T + mlp.up.bias
    tanh = 0.5 * inside * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inside + 0.044715 * inside**3)))
    torch.testing.assert_close(mlp(x), tanh @ mlp.down.weight.T + mlp.down.bias, **TOLERANCE)
    dense = x @ head.dense.weight.T + head.dense.bias
    exact = head.norm(0.5 * dense * (1 + torch.erf(dense / 2**0.5)))
    matrix = model.encoder.embedding.tokens.weight
    torch.testing.assert_close(head(x, matrix), exact @ matrix.T + head.bias, **TOLERANCE)


def test_a_head_of_its_own_does_not_follow_the_embedding():
    model = build(FAMILY["amplify"])
    x = torch.randn(1, 4, SHAPE.hidden_size, dtype=torch.float64)
    torch.testing.assert_close(model.head(x, None), x @ model.head.weight.T + model.head.bias, **TOLERANCE)


def test_learned_positions_restart_with_each_protein_and_count():
    model = build(FAMILY["proteinlm"])
    protein = random_proteins([12])[0]
    rows = pack([[protein, protein]], 24)
    encoded = model.encoder(*rows)
    torch.testing.assert_close(encoded[0, :12], encoded[0, 12:], **TOLERANCE)
    moved = rows._replace(positions=rows.positions + 3)
    assert (model.encoder(*moved) - encoded).abs().max() > 0.1


def number_of_parameters(preset):
    options = load_config(["--preset", preset])[0].model
    with torch.device("meta"):
        model = MaskedLanguageModel(options, get_tokenizer(options.tokenizer))
    return sum(p.numel() for p in model.parameters())


def test_the_tape_preset_has_the_size_of_the_same_bert():
    bert = BertConfig(
        vocab_size=30, hidden_size=512, num_hidden_layers=12, num_attention_heads=8, intermediate_size=2048,
        max_position_embeddings=8192, type_vocab_size=1,
    )  # fmt: skip
    with torch.device("meta"):
        theirs = BertForMaskedLM(bert).num_parameters()
    assert number_of_parameters("tape-transformer") == theirs - 512  # we have no segments


@pytest.mark.parametrize(
    ("preset", "layers", "D", "inner", "vocabulary"),
    [("amplify-120m", 24, 640, 1712, 27), ("amplify-350m", 32, 960, 2560, 27)],
)
def test_the_amplify_presets_have_the_published_shapes(preset, layers, D, inner, vocabulary):
    block = 4 * D * D + 3 * D * inner + 2 * D
    assert number_of_parameters(preset) == layers * block + D + 2 * vocabulary * D + vocabulary


@pytest.mark.parametrize(("preset", "layers", "D"), [("proteinlm-200m", 16, 1024), ("proteinlm-3b", 36, 2560)])
def test_the_proteinlm_presets_are_megatrons_bert_without_pooler(preset, layers, D):
    block = 12 * D * D + 13 * D
    head = D * D + D + 2 * D + 31
    assert number_of_parameters(preset) == layers * block + 2 * D + 31 * D + 2176 * D + head
    assert TOKENIZER.vocab_size != get_tokenizer("proteinlm").vocab_size == 31


def test_the_page_of_models_tells_every_preset_and_its_size():
    page = (Path(__file__).resolve().parents[2] / "docs/models.md").read_text(encoding="utf-8")
    cells = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in page.splitlines() if row.startswith("| `")]
    told = {row[0]: row[1:7] for row in cells if row[0] in PRESETS}
    expected = {}
    for preset in PRESETS:
        options = load_config(["--preset", preset])[0].model
        numbers = (options.num_layers, options.hidden_size, options.num_attention_heads, options.ffn_size)
        expected[preset] = [*(f"{n:,}" for n in (*numbers, number_of_parameters(preset))), options.tokenizer]
    assert told == expected


def test_the_page_of_models_tells_every_option_as_the_presets_have_it():
    page = (Path(__file__).resolve().parents[2] / "docs/models.md").read_text(encoding="utf-8")
    told = {
        row.split("`")[1]: [cell.strip(" `") for cell in row.split("|")[2:6]]
        for row in page.splitlines()
        if row.startswith("| `--")
    }
    models = [
        load_config(["--preset", name])[0].model
        for name in ("esm2-8m", "proteinlm-200m", "tape-transformer", "amplify-120m")
    ]

    def word(value):
        if isinstance(value, bool):
            return "yes" if value else "no"
        return {None: "", 0.0: "0", 1e-5: "1e-5", 1e-12: "1e-12"}.get(value, str(value))

    for flag, cells in told.items():
        assert cells == [word(getattr(model, flag.removeprefix("--").replace("-", "_"))) for model in models], flag
    shape = {"tokenizer", "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "init_method_std"}
    options = {"--" + field.name.replace("_", "-") for field in fields(ModelOptions) if field.name not in shape}
    assert options == set(told)
