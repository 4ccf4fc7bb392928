"""Resolving options: what wins over what, and what a wrong key, flag or value is told."""

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_plm.config.load import build_parser, config_from_values, from_toml, load_config, to_toml
from megatron_plm.config.options import Config, option_fields
from megatron_plm.config.presets import PRESETS
from megatron_plm.config.problems import problems
from megatron_plm.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


def resolve(*argv: str) -> Config:
    return load_config(argv)[0]


@pytest.fixture
def toml(tmp_path):
    """Writes a TOML file and returns the flags that name it."""

    def write(text: str) -> tuple[str, str]:
        path = tmp_path / "options.toml"
        path.write_text(text, encoding="utf-8")
        return "--config", str(path)

    return write


def test_without_anything_the_defaults_hold():
    assert resolve() == Config()


def test_a_preset_sets_its_keys_and_nothing_else():
    config = resolve("--preset", "esm2-35m")
    assert (config.model.num_layers, config.model.hidden_size, config.model.num_attention_heads) == (12, 480, 20)
    assert config.preset == "esm2-35m"
    assert (config.data, config.training) == (Config().data, Config().training)


def test_toml_wins_over_the_preset_and_flags_win_over_toml(toml):
    file = toml('preset = "esm2-35m"\n[model]\nnum_layers = 3\n[training]\nlr = 1e-3\nseed = 7\n')
    config = resolve(*file, "--seed", "9")
    assert config.model.hidden_size == 480, "from the preset"
    assert config.model.num_layers == 3, "TOML over preset"
    assert config.training.lr == 1e-3, "TOML over default"
    assert config.training.seed == 9, "flag over TOML"
    assert config.data.seq_length == 1024, "default"


def test_the_order_of_flags_does_not_matter(toml):
    file = toml("[model]\nnum_layers = 3\n[data]\nseq_length = 128\n")
    flags = [("--num-layers", "5"), file, ("--preset", "tiny")]
    configs = [resolve(*(word for flag in order for word in flag)) for order in (flags, flags[::-1])]
    assert configs[0] == configs[1]
    assert (configs[0].model.num_layers, configs[0].data.seq_length, configs[0].model.hidden_size) == (5, 128, 64)


def test_a_preset_flag_that_the_file_would_overrule_is_refused(toml):
    file = toml('preset = "esm2-8m"\n[model]\nnum_layers = 6\nhidden_size = 320\n')
    with pytest.raises(UserError, match=r"--preset tiny: .* sets num_layers to 6 itself, the preset to 2; leave out"):
        resolve(*file, "--preset", "tiny")
    assert resolve(*file, "--preset", "esm2-8m").model.num_layers == 6
    partly = toml("[model]\nnum_layers = 2\n[training]\nlr = 1e-3\n")
    assert resolve(*partly, "--preset", "tiny").model.hidden_size == 64


def test_a_preset_flag_wins_over_the_preset_of_the_file(toml):
    config = resolve(*toml('preset = "esm2-35m"\n'), "--preset", "tiny")
    assert (config.preset, config.model.hidden_size) == ("tiny", PRESETS["tiny"]["hidden_size"])


def test_every_option_is_a_flag_of_its_type_and_reaches_its_field():
    for entry in option_fields().values():
        if entry.type is bool:
            values = {f"--no-{entry.flag[2:]}": False, entry.flag: True}
        else:
            word = entry.choices[-1] if entry.choices else "some text"
            text = {int: "17", float: "0.375", str: word, tuple: word}[entry.type]
            values = {f"{entry.flag}={text}": (text,) if entry.type is tuple else entry.type(text)}
        for flag, value in values.items():
            assert getattr(getattr(resolve(flag), entry.group), entry.name) == value, flag


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--hiden-size", "64"], ["--hiden-size", "'--hidden-size'"]),
        (["--num_layers=3"], ["--num_layers=3", "'--num-layers'"]),
        (["--no-token-dropuot"], ["--no-token-dropuot", "'--no-token-dropout'"]),
        (["--num-layer", "3"], ["--num-layer", "'--num-layers'"]),  # argparse would take the abbreviation
        (["zzz"], ["zzz", "--help"]),
        (["--num-layers", "three"], ["--num-layers", "three", "int"]),
        (["--num-layers", "3.5"], ["--num-layers", "3.5", "int"]),
        (["--lr", "fast"], ["--lr", "fast", "float"]),
        (["--num-layers"], ["--num-layers", "argument"]),
        (["--lr-decay-style", "cosin"], ["--lr-decay-style", "cosin", "linear", "cosine", "constant"]),
        (["--preset", "esm2_8m"], ["esm2_8m", "'esm2-8m'", "esm2-35m"]),
        (["--config", "no/such.toml"], ["--config", "no/such.toml", "No such file"]),
        (["--config", "."], ["--config", "directory"]),
    ],
)
def test_wrong_flags_are_refused_by_name(argv, said):
    with pytest.raises(UserError) as error:
        resolve(*argv)
    assert all(words in str(error.value) for words in said), error.value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[model]\nhiden_size = 64\n", ["'hiden_size'", "[model]", "'hidden_size'"]),
        ("[modle]\nhidden_size = 64\n", ["'modle'", "'model'"]),
        ("hidden_size = 64\n", ["'hidden_size'", "[model]"]),
        ("[data]\nlr = 0.1\n", ["'lr'", "[data]", "[training]"]),
        ("[training.lr]\npeak = 0.1\n", ["lr", "float"]),
        ('[model]\nnum_layers = "3"\n', ["num_layers", "int", "'3'"]),
        ("[model]\nnum_layers = true\n", ["num_layers", "int", "True"]),
        ("[model]\nnum_layers = 3.0\n", ["num_layers", "int", "3.0"]),
        ("[model]\ntoken_dropout = 1\n", ["token_dropout", "bool", "1"]),
        ("[data]\ndata_path = 5\n", ["data_path", "str", "5"]),
        ('[training]\nlr_decay_style = "cosin"\n', ["lr_decay_style", "'cosin'", "cosine"]),
        ("[training]\nlr = nan\n", ["lr", "finite", "nan"]),
        ("[training]\nclip_grad = inf\n", ["clip_grad", "finite", "inf"]),
        ("preset = 3\n", ["preset", "3"]),
        ("model = 3\n", ["'model'"]),
        ("[model\n", ["TOML", "line 1"]),
    ],
)
def test_wrong_toml_is_refused_by_file_and_key(toml, text, said):
    file = toml(text)
    with pytest.raises(UserError) as error:
        resolve(*file)
    assert all(words in str(error.value) for words in [file[1], *said]), error.value


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.toml: not valid TOML"):
        resolve("--config", str(tmp_path / "binary.toml"))


def test_a_whole_number_is_a_float_too(toml):
    lr = resolve(*toml("[training]\nlr = 1\n")).training.lr
    assert (lr, type(lr)) == (1.0, float)


@pytest.mark.parametrize("flag", [entry.flag for entry in option_fields().values() if entry.type is float])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_number_may_be_infinite(flag, value):
    with pytest.raises(UserError, match=f"{flag}.*finite.*{math.fabs(float(value))}"):
        resolve(f"{flag}={value}")


def _values(entry):
    texts = st.text(st.characters(exclude_categories=["Cs"]))
    kinds = {
        bool: st.booleans(),
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: st.sampled_from(entry.choices) if entry.choices else texts,
        tuple: st.lists(texts, min_size=1).map(tuple),
    }
    return kinds[entry.type] | st.none() if entry.optional else kinds[entry.type]


@given(
    st.fixed_dictionaries({}, optional={name: _values(entry) for name, entry in option_fields().items()}),
    st.none() | st.sampled_from([*PRESETS, "gone", 'a "quoted"\n\x7f name']),
)
def test_any_configuration_survives_toml(values, preset):
    config = config_from_values(values, preset=preset)
    assert from_toml(to_toml(config), place="here") == config


@pytest.mark.parametrize(
    "text", ["", '"', "'", "\\", "\n\t\r\b\f\x00\x1f", "\x7f", "\x85\u2028\ufeff", "ä/€/𝕏", "[model]", "a = 1 # b"]
)
def test_any_text_survives_toml(text):
    config = config_from_values({"data_path": (text, "0.5"), "save": text}, preset=text)
    assert from_toml(to_toml(config), place="here") == config


def test_several_datasets_are_words_behind_the_flag_and_a_list_in_toml(toml):
    blend = ("0.7", "a b", "0.3", "c")
    assert resolve("--data-path", *blend, "--seed", "1").data.data_path == blend
    assert resolve(*toml('[data]\ndata_path = [0.7, "a b", 0.3, "c"]\n')).data.data_path == blend
    assert resolve(*toml('[data]\ndata_path = "a b"\n')).data.data_path == ("a b",)
    for wrong in ("3", "[[1]]", "true", "{}"):
        with pytest.raises(UserError, match="data_path must be a string or a list"):
            resolve(*toml(f"[data]\ndata_path = {wrong}\n"))


def test_the_saved_configuration_resolves_to_itself(toml):
    config = resolve("--preset", "tiny", "--lr", "0.01", "--no-token-dropout", "--save", "runs/a b")
    assert resolve(*toml(to_toml(config))) == config


def test_help_names_every_flag_with_its_meaning_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        load_config(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for entry in option_fields().values():
        assert f" {entry.flag}" in text
        assert " ".join(entry.help.split()) in text
        if entry.default is not None:
            assert f"(default: {entry.default})" in text


def test_the_parser_offers_nothing_but_the_options_and_its_own_flags():
    offered = re.findall(r"--[\w-]+", build_parser("x").format_usage())
    expected = {entry.flag for entry in option_fields().values()}
    expected |= {f"--no-{entry.flag[2:]}" for entry in option_fields().values() if entry.type is bool}
    assert set(offered) == expected | {"--config", "--preset", "--print-config"}


# What cannot work, with the words that the message must contain.
IMPOSSIBLE = [
    *(([f"{flag}=0"], [flag, "above 0", "not 0"]) for flag in (
        "--num-layers", "--hidden-size", "--num-attention-heads", "--packing-window", "--micro-batch-size",
        "--global-batch-size", "--train-iters", "--log-interval", "--eval-interval", "--eval-iters", "--save-interval",
        "--keep-last", "--ffn-hidden-size",
    )),
    *(([f"{flag}=-3"], [flag, "not -3"]) for flag in (
        "--num-layers", "--hidden-size", "--num-attention-heads", "--packing-window", "--micro-batch-size",
        "--global-batch-size", "--train-iters", "--keep-last", "--ffn-hidden-size", "--lr-warmup-iters",
    )),
    *(([f"{flag}=0"], [flag, "above 0", "not 0.0"]) for flag in (
        "--lr", "--adam-eps", "--layernorm-epsilon", "--init-method-std",
    )),
    *(([f"{flag}=-0.5"], [flag, "not -0.5"]) for flag in (
        "--lr", "--min-lr", "--weight-decay", "--clip-grad", "--adam-beta1", "--adam-beta2", "--mask-prob",
        "--adam-eps", "--layernorm-epsilon", "--init-method-std",
    )),
    *(([f"{flag}=1"], [flag, "not 1.0"]) for flag in ("--adam-beta1", "--adam-beta2", "--mask-prob")),
    (["--mask-prob=0"], ["--mask-prob", "not 0.0"]),
    (["--mask-span-length=0.5"], ["--mask-span-length", "at least 1", "not 0.5"]),
    (["--mask-token-share=0.8", "--mask-random-share=0.3"], ["--mask-token-share 0.8", "--mask-random-share 0.3"]),
    (["--mask-random-share=-0.1"], ["--mask-random-share -0.1", "0 or more"]),
    (["--shuffle-block-size=-1"], ["--shuffle-block-size", "not -1"]),
    (["--num-workers=-1"], ["--num-workers", "not -1"]),
    (["--seq-length=15"], ["--seq-length", "at least 16", "not 15"]),
    (["--hidden-dropout=1.0"], ["--hidden-dropout", "[0, 1)", "not 1.0"]),
    (["--position-embedding-type=learned_absolute"], ["--max-position-embeddings is missing"]),
    (["--max-position-embeddings=64"], ["--max-position-embeddings 64", "rotary positions have no limit"]),
    (["--preset=proteinlm-200m", "--seq-length=4096"], ["--seq-length 4096", "2176 positions", "at most 2176"]),
    (["--min-lr=0.1", "--lr=0.01"], ["--min-lr 0.1", "--lr 0.01"]),
    (["--fused-kernels", "--hidden-size=10240"], ["--fused-kernels", "at most 8,192", "--hidden-size is 10,240"]),
    (["--num-attention-heads=7"], ["--hidden-size 320", "--num-attention-heads 7", "that do: 4, 5, 8"]),
    (["--hidden-size=1099511627776", "--num-attention-heads=12"], ["that do: 4, 8, 16"]),
    (["--hidden-size=60", "--num-attention-heads=20"], ["--hidden-size 60", "--num-attention-heads 20", "odd", "3"]),
    (["--global-batch-size=10"], ["--global-batch-size 10", "--micro-batch-size 4", "12"]),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "said"), IMPOSSIBLE, ids=lambda value: " ".join(value) if value else "")
def test_every_impossible_value_is_named_with_its_flag(argv, said):
    found = problems(resolve(*argv))
    assert any(all(words in sentence for words in said) for sentence in found), found


def test_impossible_batches_count_the_processes():
    config = resolve("--global-batch-size=12", "--micro-batch-size=4")
    assert problems(config, world_size=3) == []
    (sentence,) = problems(config, world_size=2)
    assert all(
        words in sentence
        for words in ["--global-batch-size 12", "--micro-batch-size 4", "2 data-parallel processes", "16"]
    )


def test_all_problems_are_told_at_once():
    assert len(problems(resolve("--lr=0", "--keep-last=0", "--seq-length=1"))) >= 3


def test_defaults_and_presets_have_no_problem():
    assert problems(Config()) == []
    assert all(problems(resolve("--preset", name)) == [] for name in PRESETS)


def test_none_unsets_a_number_that_a_preset_sets_and_the_saved_configuration_remembers_it(tmp_path):
    flags = ["--preset=proteinlm-200m", "--position-embedding-type=rope", "--max-position-embeddings=none"]
    config = resolve(*flags)
    assert config.model.max_position_embeddings is None
    assert problems(config) == []
    text = to_toml(config)
    assert 'max_position_embeddings = "none"' in text
    assert from_toml(text, place="the text") == config
    (file := tmp_path / "saved.toml").write_text(text)
    assert resolve("--config", str(file)) == config
    with pytest.raises(UserError, match="--num-layers"):
        resolve("--num-layers=none")
