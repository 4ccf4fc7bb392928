"""The benchmark of the fused ops runs everywhere, and its peers compute the same."""

import json

import pytest
import torch

from megatron_plm.benchmark import kernels as subject
from megatron_plm.benchmark.command import main
from megatron_plm.benchmark.kernels_cases import cases_of
from megatron_plm.config.options import ModelOptions
from megatron_plm.errors import run_command

SHAPE = ModelOptions(hidden_size=48, num_attention_heads=4, ffn_hidden_size=64)
CPU = torch.device("cpu")
CASES = list(cases_of(SHAPE, 12, torch.float64, CPU))


def outcome(function, given):
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    results = function(*leaves)
    return [*results, *torch.autograd.grad(results, leaves, [torch.cos(r.detach()) for r in results])]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_op_its_peer_and_the_exact_one_compute_the_same(case):
    fused, peer = outcome(case.fused, case.given), outcome(case.peer, case.peer_given)
    for one, other, exact in zip(fused, peer, outcome(case.exact, case.given), strict=True):
        torch.testing.assert_close(one, exact, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(other, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiled_the_peer_computes_the_same(case):
    torch.compiler.reset()
    compiled = torch.compile(case.peer, fullgraph=True, backend="aot_eager")
    for one, other in zip(outcome(compiled, case.peer_given), outcome(case.peer, case.peer_given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_traffic_counts_every_tensor_once_each_way():
    gelu = next(case for case in CASES if case.name == "bias + gelu")
    x = 12 * 64 * 8
    assert gelu.traffic() == (2 * x + 64 * 8, 3 * x + 64 * 8)


def test_the_command_writes_times_and_errors_and_no_verdict_on_a_cpu(tmp_path, capsys):
    output = tmp_path / "kernels.json"
    assert main(["kernels", "--quick", "--device", "cpu", "--check", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["fused_is"] == "references"
    assert len(result["cases"]) == 2 * len(CASES)
    for case in result["cases"]:
        assert case["seconds"]["fused"]["forward"] > 0
        assert case["gigabytes_per_second"] > 0
        assert case["error"]["fused"] < {"fp32": 2e-6, "bf16": 2**-6}[case["dtype"]]
        assert case["beats_compile"] is None
    assert "say nothing of the kernels" in capsys.readouterr().out


def test_what_does_not_beat_compile_is_missed():
    case = {"op": "bias + gelu", "preset": "tiny", "dtype": "bf16", "error": {"fused": 2**-8}}
    found = [{**case, "beats_compile": verdict} for verdict in (True, False, None)]
    assert subject.missed({"cases": found}) == ["bias + gelu, tiny, bf16"]


@pytest.mark.parametrize(("dtype", "error"), [("bf16", 2**-5), ("fp32", 2**-8), ("fp32", float("nan"))])
def test_what_computes_something_else_is_missed(dtype, error):
    case = {"op": "bias + gelu", "preset": "tiny", "dtype": dtype, "beats_compile": True, "error": {"fused": error}}
    assert subject.missed({"cases": [case]}) == [f"bias + gelu, tiny, {dtype}: error {error:.1e}"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--presets", "esm3"], "--presets esm3: no such preset"),
        (["--device", "cuda"], "--device cuda: torch sees no GPU"),
    ],
)
def test_what_cannot_be_measured_is_told(flags, expected, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert run_command(main, ["kernels", "--quick", *flags]) == 2
    assert expected in capsys.readouterr().err
