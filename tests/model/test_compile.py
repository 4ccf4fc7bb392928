"""A block whose attention is one call is one graph, and stays it for batches of other lengths and for other blocks.

torch's flash attention runs on GPUs only: a stand-in under its name, by the definition, lets the path run here.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from megatron_plm.config.options import Config, ModelOptions, TrainingOptions
from megatron_plm.kernels.cpu import has_cpu_kernels
from megatron_plm.model import attention
from megatron_plm.model.attention import Sequences
from megatron_plm.model.layers import RotaryEmbedding
from megatron_plm.model.transformer import Block
from megatron_plm.parallel.apply import build_model
from megatron_plm.parallel.mesh import joined_world
from megatron_plm.tokenizers import get_tokenizer

varlen = pytest.importorskip("torch.nn.attention.varlen")
OPTIONS = ModelOptions(num_layers=2, hidden_size=32, num_attention_heads=2)
LENGTH = 24
CUTS = ([0, 10, 24, 24, 24], [0, 3, 9, 17, 24], [0, 24, 24, 24, 24])


def weights(q, k, cuts):
    """Of attention inside the sequences that `cuts` gives, [N, T, T], by its definition."""
    which = torch.bucketize(torch.arange(len(q)), cuts[1:], right=True)
    scores = torch.einsum("qnh,knh->nqk", q, k) / q.shape[-1] ** 0.5
    return scores.masked_fill(which[:, None] != which, float("-inf")).softmax(-1)


def forward(q, k, v, cuts, _cuts, _longest, _same, *_more):
    out = torch.einsum("nqk,knh->qnh", weights(q.float(), k.float(), cuts), v.float()).to(q.dtype)
    return out, q.new_empty(q.shape[1], len(q), dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)


def backward(gradient, q, k, v, _out, _lse, cuts, *_more):
    dout, q32, k32, v32 = (x.float() for x in (gradient, q, k, v))
    shares = weights(q32, k32, cuts)
    dshares = torch.einsum("qnh,knh->nqk", dout, v32)
    dscores = shares * (dshares - (dshares * shares).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
    dq, dk = torch.einsum("nqk,knh->qnh", dscores, k32), torch.einsum("nqk,qnh->knh", dscores, q32)
    return tuple(x.to(q.dtype).contiguous() for x in (dq, dk, torch.einsum("nqk,qnh->knh", shares, dout)))


@pytest.fixture
def flash_calls():
    """Flash attention on the CPU; one entry a call."""
    calls = []

    def noted(*given):
        calls.append(len(given))
        return forward(*given)

    with torch.library._scoped_library("torch_attn", "IMPL") as library:
        library.impl("_varlen_attn", noted, "CPU")
        library.impl("_varlen_attn_backward", backward, "CPU")
        yield calls


def inputs(cuts, one_call, *, seed=0):
    torch.manual_seed(seed)
    cuts = torch.tensor(cuts, dtype=torch.int32)
    lengths = () if one_call else tuple(n for n in cuts.diff().tolist() if n)
    positions = torch.arange(LENGTH)[None]
    rotary = RotaryEmbedding(OPTIONS.head_dim)(positions, torch.float32)
    sequences = Sequences(cuts, LENGTH, lengths, one_call)
    return torch.randn(1, LENGTH, 32, requires_grad=True), rotary, sequences


@pytest.mark.parametrize("kind", ["flash", "cpu"])
def test_blocks_are_one_graph_for_all_lengths(kind, flash_calls):
    if kind == "cpu" and not has_cpu_kernels(torch.device("cpu"), torch.float32):
        pytest.skip("csrc/cpu was not built")
    torch.manual_seed(1)
    blocks = [Block(OPTIONS) for _ in range(3)]
    counter = CompileCounter()
    torch._dynamo.reset()
    # With fullgraph a break of the graph is an error, and so is compiling anew.
    compiled = [torch.compile(block, backend=counter, fullgraph=True) for block in blocks]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for cuts in CUTS:
            for block, fast in zip(blocks, compiled, strict=True):
                results = []
                for call, one_call in ((block, None), (fast, kind)):
                    x, rotary, sequences = inputs(cuts, one_call)
                    out = call(x, rotary, sequences)
                    out.square().sum().backward()
                    results.append((out.detach(), x.grad))
                for got, expected in zip(results[1], results[0], strict=True):
                    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    assert len(flash_calls) == (len(CUTS) * len(blocks) if kind == "flash" else 0)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_run_in_bf16_compiles_one_graph_and_one_more_where_the_room_for_proteins_changes(
    fused, flash_calls, monkeypatch
):
    """As on a GPU: FSDP2 around blocks that were compiled one by one, batches as the loader makes them."""
    counter = CompileCounter()

    def compile_block(block):
        block._compiled_call_impl = torch.compile(block._call_impl, backend=counter, fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_block)
    monkeypatch.setattr(attention, "_has_flash_attention", lambda _, dtype: dtype == torch.bfloat16)
    torch._dynamo.reset()
    training = TrainingOptions(bf16=True, compile=True, fused_kernels=fused)
    config = Config(model=OPTIONS, training=training)
    graphs = []
    with joined_world(force_group=True) as world:
        (model,) = build_model(config, get_tokenizer("esm2"), world).parts
        tokens = torch.randint(4, 24, (1, LENGTH))
        positions, ids, index = torch.arange(LENGTH)[None], torch.ones_like(tokens), torch.arange(3)[None]
        for cuts in (*CUTS, *([*cuts, *[LENGTH] * 4] for cuts in CUTS), *CUTS, [*CUTS[0], *[LENGTH] * 12]):
            logits = model(tokens, positions, ids, torch.tensor(cuts, dtype=torch.int32), index)
            logits.float().square().sum().backward()
            graphs.append(counter.frame_count)
    assert graphs == [1, 1, 1, 2, 2, 2, 2, 2, 2, 2]
    assert len(flash_calls) == len(graphs) * OPTIONS.num_layers
