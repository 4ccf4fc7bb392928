"""tools/megatron_converter.py: ProteinLM's converter as its users call it."""

import json
import os
from pathlib import Path

import pytest
import torch
from convert_sample import our_logits, pack
from fork_sample import FORK_LAYER_MODULES, FORK_OTHER_KEYS, forward_by_the_forks_names
from megatron_sample import D, logits, random_model, save
from torch import Tensor

from megatron_plm.convert.megatron_converter import main
from megatron_plm.convert.pretrained import load_pretrained
from megatron_plm.errors import run_command
from megatron_plm.files import only_writer
from megatron_plm.tokenizers import get_tokenizer

IUPAC = get_tokenizer("tape-iupac")
TAIL = "bert.bert_tail_dense"  # the fork has it, Megatron's model does not, and nothing reads it


def untrained(path: Path, **changes: Tensor) -> Path:
    """What the fork saves of a model that it has just made."""
    torch.manual_seed(0)
    layer = {
        "input_ln": (D,), "attention.self.query": (D, D), "attention.self.key": (D, D), "attention.self.value": (D, D),
        "attention.dense": (D, D), "post_attn_ln": (D,), "mlp.dense_h_4h": (4 * D, D), "mlp.dense_4h_h": (D, 4 * D),
    }  # fmt: skip
    assert set(layer) == set(FORK_LAYER_MODULES)
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (30, D),
        "bert.embeddings.position_embeddings.weight": (40, D),
        "bert.embeddings.token_type_embeddings.weight": (2, D),
        "mlm.decoder.weight": (30, D),
        "mlm.bias": (30,),
    }
    modules = {f"bert.encoder.layer.{i}.{name}": shape for i in range(4) for name, shape in layer.items()}
    modules |= {"bert.encoder.final_ln": (D,), "mlm.transform.dense": (D, D), "mlm.transform.LayerNorm": (D,)}
    for name, shape in (modules | {TAIL: (D, D)}).items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert set(shapes) >= FORK_OTHER_KEYS
    tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
    torch.save({**tensors, **changes}, path, _use_new_zipfile_serialization=False)
    return path


def expected_logits(tokens: Tensor) -> Tensor:
    """ProteinLM's logits of IUPAC tokens, for the tokens of IUPAC: without [unused1]."""
    rows = torch.tensor([*range(5), *range(6, 31)])
    return logits(random_model(), rows[tokens])[:, rows]


@pytest.mark.parametrize("single_file", [True, False])
def test_the_result_has_the_names_of_the_untrained_model_and_computes_what_proteinlm_does(
    single_file: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "mega", random_model(), num_ranks=1 if single_file else 4)
    source = tmp_path / "mega"
    if single_file:
        source = (folder / "mp_rank_00" / "model_optim_rng.pt").rename(tmp_path / "any name.pt")
    template, out = untrained(tmp_path / "untrained.bin"), tmp_path / "out" / "pytorch_model.bin"
    out.parent.mkdir()
    argv = ["-src", source, "-dst", template, "-out", out, "-dtp", "torch.float32", "-hidden", "48", "-heads", "4"]
    assert run_command(main, [str(word) for word in [*argv, "-layers", "4"]]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {out}: " in printed
    assert "not carried: the rows of [unused1]" in printed

    before, after = (torch.load(path, weights_only=True) for path in (template, out))
    assert {k: t.shape for k, t in after.items()} == {k: t.shape for k, t in before.items()}
    assert all(torch.equal(after[f"{TAIL}.{kind}"], before[f"{TAIL}.{kind}"]) for kind in ("weight", "bias"))
    tokens = torch.randint(0, 30, (25,), generator=torch.Generator().manual_seed(2))
    config = json.loads((out.parent / "config.json").read_text())
    assert (forward_by_the_forks_names(after, config, tokens) - expected_logits(tokens)).abs().max() <= 1e-5


def test_without_an_untrained_model_the_result_is_one_that_loads(tmp_path: Path) -> None:
    save(tmp_path / "mega", random_model(), num_ranks=2, version=0)
    argv = ["--src", str(tmp_path / "mega"), "--out", str(tmp_path / "pytorch_model.bin")]
    assert run_command(main, argv) == 0
    loaded = load_pretrained(tmp_path)
    tokens = torch.randint(0, 30, (25,), generator=torch.Generator().manual_seed(2))
    ours = our_logits(loaded.model.eval(), pack([tokens], [0], 25, IUPAC.pad_id))
    assert (ours - expected_logits(tokens)).abs().max() <= 1e-5


def test_a_narrow_type_and_a_configuration_that_is_there(tmp_path: Path) -> None:
    save(tmp_path / "mega", random_model())
    (tmp_path / "config.json").write_text("{}")
    argv = ["--src", str(tmp_path / "mega"), "--out", str(tmp_path / "pytorch_model.bin"), "--dtype", "torch.float16"]
    assert run_command(main, argv) == 0
    assert {t.dtype for t in torch.load(tmp_path / "pytorch_model.bin", weights_only=True).values()} == {torch.float16}
    assert (tmp_path / "config.json").read_text() == "{}"


BAD: dict[str, tuple[list[str], str]] = {
    "another shape": (["--hidden", "1024"], "--hidden 1024: the checkpoint has hidden_size 48"),
    "another number of heads": (["--heads", "16"], "--heads 16: the checkpoint has num_attention_heads 4"),
    "another number of layers": (["--layers", "16"], "--layers 16: the checkpoint has num_layers 4"),
    "a number of ranks for a type": (["--dtp", "2"], "'2' is no type of weights"),
    "an untrained model that is none": (["--dst", "absent.bin"], "--dst absent.bin: No such file"),
    "an untrained model of another shape": (
        ["--dst", "other.bin"],
        "mlm.transform.dense.weight has shape [2, 2], and the checkpoint gives [48, 48]",
    ),
    "an untrained model of something else": (["--dst", "small.bin"], "tensors are missing (bert.embeddings.posi"),
    "an output that is there": (["--out", "other.bin"], "--out other.bin: exists already"),
    "an output with the name of the configuration": (
        ["--out", "config.json"],
        "--out config.json: is the name of the configuration",
    ),
    "an output that is a folder": (["--out", "mega", "--force"], "--out mega: exists already"),
    "an output without a name": (["--out", "", "--force"], "--out .: exists already"),
    "an output that is no file": (["--out", "pipe", "--force"], "--out pipe: exists already"),
    "an output in no folder": (["--out", "absent/model.bin"], "absent/model.bin: cannot be written"),
    "an output in a file": (["--out", "other.bin/model.bin"], "other.bin/model.bin: cannot be written"),
    "no checkpoint": (["--src", "absent"], "--src absent: does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_exit_2_and_no_output(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, sentence = BAD[case]
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "mega", random_model())
    untrained(tmp_path / "other.bin", **{"mlm.transform.dense.weight": torch.ones(2, 2)})
    torch.save({"mlm.bias": torch.ones(30)}, tmp_path / "small.bin")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    assert run_command(main, ["--src", "mega", "--out", "pytorch_model.bin", *flags]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert sentence in printed.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("out", "flag"), [("src/model.pt", "--src src"), ("dst.bin", "--dst dst.bin")])
def test_force_does_not_replace_what_is_read(tmp_path, monkeypatch, out, flag, capsys):
    monkeypatch.chdir(tmp_path)
    Path("src").mkdir()
    for name in ("src/model.pt", "dst.bin"):
        Path(name).write_text("precious")
    argv = ["--src", "src", "--dst", "dst.bin", "--out", out, "--force"]
    assert run_command(main, argv) == 2
    assert f"--out {out}: is read, as {flag} or in it" in capsys.readouterr().err
    assert Path(out).read_text() == "precious"


def test_what_a_killed_conversion_left_is_removed_and_a_second_one_excluded(tmp_path, capsys):
    save(tmp_path / "mega", random_model())
    (tmp_path / ".model.bin.1.tmp").write_text("half")
    argv = ["--src", str(tmp_path / "mega"), "--out", str(tmp_path / "model.bin")]
    with only_writer(tmp_path / "model.bin"):
        assert run_command(main, argv) == 2
    assert "model.bin: another process is writing it" in capsys.readouterr().err
    assert run_command(main, argv) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"mega", "model.bin", "config.json"}


def test_nan_is_told(tmp_path, capsys):
    model = random_model()
    model["0.norm1.bias"][5] = float("nan")
    save(tmp_path / "mega", model)
    assert run_command(main, ["--src", str(tmp_path / "mega"), "--out", str(tmp_path / "model.bin")]) == 0
    assert (
        "warning: 1 value is NaN or infinite, converted as it is: encoder.blocks.0.attention_norm.bias (1)"
        in capsys.readouterr().out
    )
