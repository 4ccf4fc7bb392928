"""Where other packages' kernels are chosen, they compute what torch's own do, with the same parameters and checkpoints.

By the modules of stand_ins/ (see conftest.py).
"""

import importlib
from dataclasses import replace

import pytest
import torch
from pretraining_runs import checkpoint, largest_relative_difference, pretrain, read_tensors, records
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_plm.benchmark.device import preset_config
from megatron_plm.benchmark.kernels_cases import cases_of, package_norm
from megatron_plm.benchmark.train_sides import is_default, values_of
from megatron_plm.config.options import Config, ModelOptions, TrainingOptions
from megatron_plm.parallel.apply import build_model
from megatron_plm.parallel.mesh import joined_world
from megatron_plm.parallel.tensor import local_tensor
from megatron_plm.tokenizers import get_tokenizer
from megatron_plm.training import pretrain as pretrain_module
from megatron_plm.training.optimizer import build_optimizer, set_learning_rate

GPU = torch.device("cuda")
TOKENIZER = get_tokenizer("esm2")
SHAPE = ModelOptions(num_layers=2, hidden_size=32, num_attention_heads=2, embedding_layernorm=True)
RMS = replace(SHAPE, normalization="RMSNorm")


def rows():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 24, (2, 16), generator=generator)
    cuts = torch.tensor([0, 5, 16, 25, 32, 32], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in cuts.diff().tolist()]).view(2, 16)
    segments = torch.cat([torch.full((n,), s) for n, s in ((5, 1), (11, 2), (9, 1), (7, 2))]).view(2, 16)
    return tokens, positions, segments, cuts


def outcome(shape, training, *, force_group=False, evaluate=False):
    """Logits, each gradient, and the model, of which every parameter has been moved from its initial value."""
    with joined_world(force_group=force_group) as world:
        (model,) = build_model(Config(model=shape, training=training), TOKENIZER, world).parts
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                values = 0.1 * torch.sin(torch.arange(parameter.numel()) + number)
                local_tensor(parameter.data).add_(values.view(parameter.shape))
        model.train(not evaluate)
        torch.manual_seed(0)
        logits = model(*rows()).float()
        logits.square().mean().backward()
        found = {name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                 for name, p in model.named_parameters()}  # fmt: skip
        return {"logits": logits.detach(), **found}, model


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("package", ["apex", "transformer_engine"])
@pytest.mark.parametrize("shape", [SHAPE, RMS], ids=["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("bf16", [False, True], ids=["one process", "FSDP2, bf16"])
def test_a_packages_norms_stand_in_every_place_with_the_same_parameters(package, shape, bf16):
    training = TrainingOptions(bf16=bf16)
    expected, plain = outcome(shape, training, force_group=bf16)
    found, model = outcome(shape, replace(training, norm_implementation=package), force_group=bf16)
    assert list(found) == list(expected)  # parameters by name, which checkpoints go by
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=lambda text, n=name: f"{n}: {text}")
    kinds = [type(module).__module__ for module in model.modules() if type(module).__name__.endswith("Norm")]
    assert len(kinds) == len([m for m in plain.modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm)]) == 7
    assert {kind.partition(".")[0] for kind in kinds} == {package}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("objective", ["mlm", "clm"])
@pytest.mark.parametrize("granularity", ["none", "selective"])
def test_flash_attn_attends_in_every_block(objective, granularity):
    shape = replace(SHAPE, objective=objective, token_dropout=False)
    training = TrainingOptions(recompute_granularity=granularity)
    expected, _ = outcome(shape, training)
    found, _ = outcome(shape, replace(training, attention_implementation="flash_attn"))
    calls = importlib.import_module("flash_attn").CALLS
    assert calls == [0.0] * shape.num_layers * (1 if granularity == "none" else 2)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.usefixtures("installed")
def test_flash_attn_drops_in_training_only_and_all_proteins_at_once():
    shape = replace(SHAPE, attention_dropout=0.5)
    training = TrainingOptions(attention_implementation="flash_attn")
    calls = importlib.import_module("flash_attn").CALLS
    trained, model = outcome(shape, training)
    assert calls == [0.5, 0.5]
    assert not any(block.attention_dropout.is_active for block in model.encoder.blocks.values())
    calls.clear()
    evaluated, _ = outcome(shape, training, evaluate=True)
    assert calls == [0.0, 0.0]
    assert not torch.equal(trained["logits"], evaluated["logits"])


def trained(implementation, *, force_group):
    """The weights and the optimizer's state after five steps of a model whose parameters decay differently."""
    with joined_world(force_group=force_group) as world:
        training = TrainingOptions(bf16=force_group)
        (model,) = build_model(Config(model=SHAPE, training=training), TOKENIZER, world).parts
        frozen = model.head.bias.requires_grad_(False)
        parameters = dict(model.named_parameters())
        scales = {parameters["head.dense.weight"]: 0.1}
        optimizer = build_optimizer(
            parameters.values(), lr=1e-2, weight_decay=0.3, lr_scales=scales, implementation=implementation
        )
        generator = torch.Generator().manual_seed(0)
        for step in range(5):
            model(*rows()).float().square().mean().backward()
            for parameter in parameters.values():
                if parameter.grad is not None:  # others of the same kind, that no rounding before them has moved
                    local_tensor(parameter.grad).normal_(generator=generator)
            set_learning_rate(optimizer, 1e-2 / (1 + step))
            optimizer.step()
            optimizer.zero_grad()
        assert frozen not in optimizer.state
        assert all(p.grad is None for p in parameters.values())
        whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parameters.items()}
        state = {name: optimizer.state[p] for name, p in parameters.items() if p.requires_grad}
        return {name: p.detach() for name, p in whole.items()}, state


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("force_group", [False, True], ids=["one process", "FSDP2, bf16"])
def test_apexs_adamw_is_torchs_with_the_same_state(force_group):
    expected, states = trained("torch", force_group=force_group)
    found, others = trained("apex", force_group=force_group)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}")
    for name, state in states.items():
        assert state.keys() == others[name].keys()
        assert state["step"] == others[name]["step"] == 5
        for key, value in state.items():
            assert (type(value), value.dtype, value.shape) == (
                type(others[name][key]), others[name][key].dtype, others[name][key].shape
            )  # fmt: skip


@pytest.mark.usefixtures("installed")
def test_a_checkpoint_of_one_adamw_is_one_of_the_other(pair_data, tmp_path, monkeypatch, capsys):
    """Four steps: by torch's, by apex's, and two by each in both orders."""
    monkeypatch.setattr(pretrain_module, "require_accelerators", lambda *_, **__: None)  # it would want a GPU
    flags = [*pair_data.flags, "--train-iters=4", "--save-interval=2", "--lr-warmup-iters=1", "--clip-grad=0"]
    apex = "--optimizer-implementation=apex"
    for name, more in {"torch": [], "apex": [apex]}.items():
        assert pretrain(*flags, *more, f"--save={tmp_path / name}") == 0
        other = [] if more else [apex]
        begun = f"--load={checkpoint(tmp_path / name, 2)}"
        assert pretrain(*flags, *other, begun, f"--save={tmp_path / f'{name} first'}") == 0
    assert "AdamW: apex" in capsys.readouterr().out
    assert "AdamW: apex" in records(tmp_path / "apex", "start")[0]["kernels"]
    expected = read_tensors(checkpoint(tmp_path / "torch"))
    assert expected["optimizer.state.head.bias.step"] == 4
    for name in ("apex", "torch first", "apex first"):
        found = read_tensors(checkpoint(tmp_path / name))
        assert largest_relative_difference(found, expected, "") < 1e-4, name


@pytest.mark.usefixtures("installed")
def test_the_start_of_a_run_tells_whose_kernels_compute(pair_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain_module, "require_accelerators", lambda *_, **__: None)
    flags = ["--train-iters=1", "--bf16", "--norm-implementation=apex", "--attention-implementation=flash_attn"]
    assert pretrain(*pair_data.flags, *flags, f"--save={tmp_path}") == 0
    said = capsys.readouterr().out
    assert "attention: flash_attn, all proteins at once; " in said
    assert "; norms: apex\n" in said
    assert "AdamW" not in said
    assert 'norm_implementation = "apex"' in (tmp_path / "config.toml").read_text()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("package", ["apex", "transformer_engine"])
def test_the_benchmarks_side_of_a_package_computes_what_the_plain_blocks_do(package):
    keys = torch.randint(0, 2**32, (12,), generator=torch.Generator().manual_seed(0))
    for case in cases_of(SHAPE, 12, torch.float64, torch.device("cpu")):
        assert not case.packages  # not on a CPU
        if not case.name.startswith("sum + "):
            continue
        kind = case.name.removeprefix("sum + ")
        sides = [case.peer, package_norm(package, kind, keys, SHAPE.hidden_size, 0.0)]
        results = [side(*case.peer_given) for side in sides]
        gradients = [torch.autograd.grad(sum(r.cos().sum() for r in each), case.peer_given) for each in results]
        torch.testing.assert_close([*results[1], *gradients[1]], [*results[0], *gradients[0]], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("side", ["apex", "transformer_engine", "flash_attn", "flash_attn_3"])
def test_a_side_of_the_training_benchmark_is_a_run_by_its_package(side, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    config = preset_config("tiny", bf16=True, **values_of(side))
    chosen = {"norm": config.training.norm_implementation, "attention": config.training.attention_implementation,
              "optimizer": config.training.optimizer_implementation}  # fmt: skip
    assert set(chosen.values()) == {"torch", side}
    assert is_default(side, GPU, torch.bfloat16)
    assert not is_default(side, GPU, torch.float32)
    assert not is_default(side, torch.device("cpu"), torch.bfloat16)
    assert values_of("ours") == {"compile": False, "fused_kernels": False}
