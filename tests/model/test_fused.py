"""The fused blocks are the plain ones: same parameters, output and gradients, whatever the options."""

from dataclasses import replace

import pytest
import torch
from packing import SHAPE, TOKENIZER, build, pack, random_proteins
from pretraining_runs import pretrain

from megatron_plm.errors import UserError
from megatron_plm.kernels.library import load_cuda_kernels, require_kernels
from megatron_plm.model.fused import FusedBlock
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.parallel.apply import recompute

LEARNED = {"position_embedding_type": "learned_absolute", "max_position_embeddings": 60, "token_dropout": False}
RMS = {"normalization": "RMSNorm", "add_bias_linear": False}
FAMILY = {
    "esm2": SHAPE,
    "proteinlm": replace(SHAPE, **LEARNED, activation="gelu_tanh", hidden_dropout=0.2),
    "tape": replace(SHAPE, **LEARNED, norm_placement="post", embedding_layernorm=True, hidden_dropout=0.2),
    "amplify": replace(SHAPE, **RMS, activation="swiglu", ffn_hidden_size=72),
    "rotary and dropout": replace(SHAPE, hidden_dropout=0.3, activation="gelu_tanh"),
    "no biases": replace(SHAPE, add_bias_linear=False, norm_placement="post"),
    "swiglu with biases": replace(SHAPE, activation="swiglu", norm_placement="post", normalization="RMSNorm"),
}
ROWS = pack([random_proteins([17, 9, 20]), random_proteins([30], seed=1)], 60)
ROW_KEYS = torch.tensor([11, 2**40 + 12])


def fused(model, options):
    """The same model with fused blocks."""
    twin = MaskedLanguageModel(options, TOKENIZER, FusedBlock).double()
    twin.load_state_dict(model.state_dict())
    return twin


def outcome(model):
    """Logits, and the gradient of every parameter for the same random gradient of the logits."""
    model.zero_grad()
    logits = model(*ROWS, None, ROW_KEYS)
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    return {"logits": logits.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()}}


@pytest.fixture(params=FAMILY, scope="module")
def pair(request):
    options = FAMILY[request.param]
    plain = build(options)
    return plain, fused(plain, options)


def assert_alike(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


def test_output_and_every_gradient_are_those_of_the_plain_blocks(pair):
    assert_alike(outcome(pair[1]), outcome(pair[0]))


def test_evaluation_is_that_of_the_plain_blocks(pair):
    plain, ours = (model.eval() for model in pair)
    torch.testing.assert_close(ours(*ROWS), plain(*ROWS), rtol=1e-9, atol=1e-9)
    plain.train()
    ours.train()


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputing_changes_nothing(granularity):
    options = FAMILY["rotary and dropout"]
    ours = fused(build(options), options)
    expected = outcome(ours)
    for block in ours.encoder.blocks.values():
        recompute(block, granularity, draws=False)
    assert_alike(outcome(ours), expected)


@pytest.mark.parametrize("name", ["rotary and dropout", "tape"])
def test_compiled_blocks_break_nowhere_else_and_compute_the_same(name):
    """Attention by protein breaks the graph on the CPU, as it does in the plain block; the ops must not."""
    breaks = []
    for kind in (lambda model: model, lambda model: fused(model, FAMILY[name])):
        torch._dynamo.reset()
        model = kind(build(FAMILY[name]))
        expected = outcome(model)
        counts = torch._dynamo.utils.counters["graph_break"]
        counts.clear()
        for block in model.encoder.blocks.values():
            block.compile(backend="aot_eager")
        assert_alike(outcome(model), expected)
        breaks.append(set(counts))
    assert breaks[0] == breaks[1]


def test_values_do_not_keep_the_joint_map_alive():
    """What the backward pass keeps of attention: q, k and v, and not the joint tensor that they come from."""
    options = SHAPE
    sizes = {}
    for label, model in (("plain", build(options)), ("fused", fused(build(options), options))):
        kept = {}

        def pack_hook(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
            logits = model(*ROWS, None, ROW_KEYS)
        sizes[label] = sum(kept.values())
        del logits
    joint = ROWS.tokens.numel() * 3 * options.hidden_size * 8
    assert sizes["plain"] - sizes["fused"] >= options.num_layers * joint // 3


def test_without_a_library_a_gpu_is_refused_and_a_cpu_is_not():
    if load_cuda_kernels():
        pytest.skip("this torch has CUDA, and the kernels are built")
    require_kernels(torch.device("cpu"))
    with pytest.raises(UserError, match="make kernels"):
        require_kernels(torch.device("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would run the kernels, or refuse")
def test_a_run_tells_that_its_fused_ops_are_references(pair_data, tmp_path, capfd):
    assert pretrain(*pair_data.flags, "--train-iters=1", "--fused-kernels", f"--save={tmp_path}") == 0
    assert "fused ops: their references" in "".join(capfd.readouterr())
    assert "fused_kernels = true" in (tmp_path / "config.toml").read_text()
