"""Other packages' kernels are found where they are installed, and refused in a sentence where they cannot compute."""

import importlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pretraining_runs import pretrain
from torch.nn.attention import current_flash_attention_impl

from megatron_plm.benchmark.command import main as benchmark
from megatron_plm.config.options import Config, ModelOptions, ParallelOptions, TrainingOptions
from megatron_plm.config.problems import problems
from megatron_plm.errors import UserError, run_command
from megatron_plm.kernels.accelerators import are_usable, require_accelerators
from megatron_plm.model.attention import PackedAttention
from megatron_plm.parallel.apply import assemble
from megatron_plm.parallel.mesh import joined_world
from megatron_plm.tokenizers import get_tokenizer

STAND_INS = Path(__file__).with_name("stand_ins")
GPU = torch.device("cuda")
CHOICES = {
    "--norm-implementation": ("norm", ("apex", "transformer_engine")),
    "--attention-implementation": ("attention", ("flash_attn", "flash_attn_3")),
    "--optimizer-implementation": ("optimizer", ("apex",)),
}
ALL = [(flag, what, package) for flag, (what, packages) in CHOICES.items() for package in packages]


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """A machine with an H200."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))


def refusal(**chosen):
    with pytest.raises(UserError) as error:
        require_accelerators(GPU, **chosen)
    assert not are_usable(GPU, **chosen)
    return str(error.value)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("what", "package"), [(what, package) for _, what, package in ALL])
def test_what_is_installed_is_found(what, package):
    require_accelerators(GPU, **{what: package})
    assert are_usable(GPU, **{what: package})


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize(("flag", "what", "package"), ALL)
def test_what_is_not_installed_is_told_with_the_way_to_it(flag, what, package):
    said = refusal(**{what: package})
    way = {
        "apex": "https://github.com/NVIDIA/apex",
        "transformer_engine": "pip install",
        "flash_attn": "pip install",
        "flash_attn_3": "https://github.com/Dao-AILab/flash-attention",
    }
    assert said.startswith(f"{flag} {package}: ")
    assert "is not installed; " in said
    assert way[package] in said
    require_accelerators(GPU)  # what was not chosen is not needed


@pytest.mark.parametrize(("flag", "package"), [(flag, package) for flag, _, package in ALL])
def test_without_a_gpu_the_command_refuses_before_it_reads_data(flag, package, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    given = [f"{flag}={package}", "--bf16", f"--save={tmp_path / 'run'}", "--data-path=none/there"]
    assert pretrain(*given) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {flag} {package}: ")
    assert "runs on a GPU only" in said
    assert not (tmp_path / "run").exists()


def test_another_apex_is_told_from_nvidias(installed, tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("import pyramid_that_is_not_there\n")
    installed(tmp_path)
    for what in ("norm", "optimizer"):
        said = refusal(**{what: "apex"})
        assert "not NVIDIA's, which has apex.normalization.FusedLayerNorm" in said
        assert "PyPI" in said


@pytest.mark.parametrize(("what", "module"), [("norm", "fused_layer_norm_cuda"), ("optimizer", "amp_C")])
def test_an_apex_without_its_compiled_part_is_told(what, module, installed, tmp_path, monkeypatch):
    shutil.copytree(STAND_INS / "apex", tmp_path / "apex")
    installed(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(STAND_INS)])
    said = refusal(**{what: "apex"})
    assert f"without its CUDA extensions (no module {module})" in said
    assert "--cuda_ext" in said


def test_a_package_that_does_not_load_is_told_with_the_reason(installed, tmp_path):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise OSError('undefined symbol:\\n _ZN2at')\n")
    installed(tmp_path)
    assert "flash-attn cannot be imported (undefined symbol: _ZN2at)" in refusal(attention="flash_attn")


@pytest.mark.usefixtures("installed")
def test_flash_attention_3_is_refused_on_other_gpus_than_hoppers(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    assert "Hopper GPUs (H100, H200) only, not on NVIDIA A100-SXM4-80GB" in refusal(attention="flash_attn_3")
    require_accelerators(GPU, attention="flash_attn")


@pytest.mark.usefixtures("installed")
def test_a_flash_attention_3_that_torch_cannot_call_is_refused(monkeypatch):
    monkeypatch.setattr(torch.ops, "flash_attn_3", SimpleNamespace(fwd=None))
    assert "has no ops torch.ops.flash_attn_3.fwd and bwd" in refusal(attention="flash_attn_3")


@pytest.mark.usefixtures("installed")
def test_torchs_attention_runs_on_flash_attention_3_until_another_is_chosen():
    model = ModelOptions(num_layers=1, hidden_size=8, num_attention_heads=2)

    def build(implementation):
        training = TrainingOptions(attention_implementation=implementation, bf16=True)
        (model_here,), _ = assemble(Config(model=model, training=training), get_tokenizer("esm2"), world)
        return model_here

    with joined_world(force_group=True) as world:
        for other in ("torch", "flash_attn"):
            built = build("flash_attn_3")
            assert current_flash_attention_impl() == "FA3"
            assert [m.varlen for m in built.modules() if isinstance(m, PackedAttention)] == [None]  # torch's op
            built = build(other)
            assert current_flash_attention_impl() is None
            calls = [m.varlen is not None for m in built.modules() if isinstance(m, PackedAttention)]
            assert calls == [other == "flash_attn"]


@pytest.mark.usefixtures("installed")
def test_an_old_transformer_engine_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.import_module("transformer_engine"), "__version__", "1.13.0")
    assert "TransformerEngine 1.13.0 is too old; pip install" in refusal(norm="transformer_engine")


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"norm_implementation": "apex", "fused_kernels": True}, "--norm-implementation apex: --fused-kernels"),
        ({"norm_implementation": "apex", "compile": True}, "--norm-implementation apex: --compile"),
        (
            {"norm_implementation": "transformer_engine"},
            "--norm-implementation transformer_engine: --sequence-parallel",
        ),
        ({"attention_implementation": "flash_attn"}, "--attention-implementation flash_attn takes 16-bit numbers only"),
        (
            {"attention_implementation": "flash_attn_3", "bf16": True},
            "--attention-implementation flash_attn_3: its kernels have no dropout",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(training, said):
    sequence_parallel = "--sequence-parallel" in said
    parallel = ParallelOptions(tensor_model_parallel_size=2, sequence_parallel=True)
    config = Config(
        model=ModelOptions(attention_dropout=0.1 if "dropout" in said else 0.0),
        training=TrainingOptions(**training),
        parallel=parallel if sequence_parallel else ParallelOptions(),
    )
    (problem,) = problems(config, world_size=2 if sequence_parallel else 1)
    assert problem.startswith(said)
    plain = replace(config.training, norm_implementation="torch", attention_implementation="torch")
    assert problems(replace(config, training=plain), world_size=2 if sequence_parallel else 1) == []


def test_a_side_whose_package_cannot_run_is_refused(pair_data, capsys):
    given = ["train", f"--data-path={pair_data.train}", "--presets", "tiny", "--device", "cpu", "--sides", "apex"]
    assert run_command(benchmark, given) == 2
    assert "error: --sides apex: --norm-implementation apex: " in capsys.readouterr().err
