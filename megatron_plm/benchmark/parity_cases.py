"""The layouts and models of `tools/benchmark.py parity`."""

import shlex
from dataclasses import dataclass

# 20 heads, as ESM-2's smaller models have, and layers that four stages don't divide.
SHAPE = (
    "--num-layers 6 --hidden-size 80 --num-attention-heads 20 --ffn-hidden-size 160 --seq-length 128 "
    "--packing-window 64 --micro-batch-size 8 --global-batch-size 8 --lr 1e-3 --min-lr 1e-4 --lr-warmup-iters 5 "
    "--num-workers 0"
)

# The models of docs/models.md that differ most; with ESM-2's vocabulary, as all train on one dataset. Without dropout
# of attention weights, which draws from torch's generator, and with the other one, which is a function of the row.
MODELS = {
    "ESM-2": "",
    "TAPE": "--preset tape-transformer --tokenizer esm2 --max-position-embeddings 128 --attention-dropout 0",
    "AMPLIFY": "--preset amplify-120m --tokenizer esm2",
}


@dataclass(frozen=True)
class Case:
    """One layout: its number of processes and its flags. `again`: of parts that other cases have too; the tests leave
    these to the benchmark."""

    name: str
    processes: int
    flags: str
    again: bool = False
    model: str = "ESM-2"

    @property
    def words(self) -> list[str]:
        return shlex.split(f"{MODELS[self.model]} {self.flags}")


_TP, _PP, _CP = (f"--{kind}-parallel-size" for kind in ("tensor-model", "pipeline-model", "context"))
_DP, _ROWS = "--data-parallel-sharding", "--micro-batch-size"
_ESM2 = (
    Case("accumulation", 1, f"{_ROWS} 2"),
    Case("full recomputation", 1, "--recompute-granularity full"),
    Case("selective recomputation", 1, "--recompute-granularity selective", again=True),
    Case("fused", 1, "--fused-kernels"),
    Case("DP2", 2, f"{_DP} none {_ROWS} 4"),
    Case("ZeRO-2, 2 shards", 2, f"{_DP} zero2 {_ROWS} 2"),
    Case("FSDP2, 2 shards", 2, f"{_DP} zero3 {_ROWS} 2"),
    Case("TP2", 2, f"{_TP} 2 {_ROWS} 4"),
    Case("TP2+SP", 2, f"{_TP} 2 --sequence-parallel"),
    Case("TP2+SP, full recomputation", 2, f"{_TP} 2 --sequence-parallel --recompute-granularity full", again=True),
    Case("TP2+SP, selective recomputation", 2, f"{_TP} 2 --sequence-parallel --recompute-granularity selective"),
    Case("CP2", 2, f"{_CP} 2"),
    Case("PP2 gpipe", 2, f"{_PP} 2 --pipeline-schedule gpipe {_ROWS} 2"),
    Case("PP2 1f1b", 2, f"{_PP} 2 {_ROWS} 2"),
    Case("PP2 1f1b, full recomputation", 2, f"{_PP} 2 {_ROWS} 2 --recompute-granularity full", again=True),
    Case("PP2 interleaved", 2, f"{_PP} 2 --pipeline-schedule interleaved {_ROWS} 2"),
    Case("PP2 zbv", 2, f"{_PP} 2 --pipeline-schedule zbv {_ROWS} 2"),
    Case("FSDP2, 2 shards, compiled", 2, f"{_DP} zero3 {_ROWS} 4 --compile"),
    Case("TP2+SP, compiled", 2, f"{_TP} 2 --sequence-parallel {_ROWS} 4 --compile"),
    Case("CP2, compiled", 2, f"{_CP} 2 {_ROWS} 4 --compile", again=True),
    Case("PP2 1f1b, compiled", 2, f"{_PP} 2 {_ROWS} 4 --compile"),
    Case("FSDP2, 2 shards, fused", 2, f"{_DP} zero3 {_ROWS} 4 --fused-kernels"),
    Case("TP2+SP, fused", 2, f"{_TP} 2 --sequence-parallel {_ROWS} 4 --fused-kernels"),
    Case("CP2, fused, full recomputation", 2, f"{_CP} 2 --fused-kernels --recompute-granularity full"),
    Case("PP2 zbv, fused", 2, f"{_PP} 2 --pipeline-schedule zbv {_ROWS} 2 --fused-kernels"),
    Case("PP2 interleaved, fused", 2, f"{_PP} 2 --pipeline-schedule interleaved {_ROWS} 2 --fused-kernels", again=True),
    Case("PP2 1f1b, fused, compiled", 2, f"{_PP} 2 {_ROWS} 4 --fused-kernels --compile"),
    Case("DP4", 4, f"{_DP} none {_ROWS} 2"),
    Case("HSDP 2 x 2", 4, f"--data-parallel-replicate-size 2 {_ROWS} 2"),
    Case("TP4", 4, f"{_TP} 4"),
    Case("TP4+SP", 4, f"{_TP} 4 --sequence-parallel", again=True),
    Case("PP4 1f1b", 4, f"{_PP} 4 {_ROWS} 1"),
    Case("CP4", 4, f"{_CP} 4", again=True),
    Case("TP2 x PP2", 4, f"{_TP} 2 {_PP} 2 {_ROWS} 4"),
    Case("TP2+SP x PP2 interleaved", 4,
         f"{_TP} 2 --sequence-parallel {_PP} 2 --pipeline-schedule interleaved {_ROWS} 4", again=True),
    Case("TP2+SP x FSDP2", 4, f"{_TP} 2 --sequence-parallel {_ROWS} 2"),
    Case("TP2 x DP2", 4, f"{_TP} 2 {_DP} none {_ROWS} 2", again=True),
    Case("PP2 x FSDP2", 4, f"{_PP} 2 {_ROWS} 2"),
    Case("PP2 zbv x ZeRO-2", 4, f"{_PP} 2 --pipeline-schedule zbv {_DP} zero2 {_ROWS} 2", again=True),
    Case("PP2 interleaved x FSDP2", 4, f"{_PP} 2 --pipeline-schedule interleaved {_ROWS} 2", again=True),
    Case("PP2 x ZeRO-2", 4, f"{_PP} 2 {_DP} zero2 {_ROWS} 2", again=True),
    Case("CP2 x FSDP2", 4, f"{_CP} 2 {_ROWS} 2", again=True),
    Case("TP2+SP x CP2", 4, f"{_TP} 2 --sequence-parallel {_CP} 2"),
    Case("CP2 x PP2", 4, f"{_CP} 2 {_PP} 2 {_ROWS} 4", again=True),
)  # fmt: skip

# What every model is trained at: each kind of parallelism, alone and beside others.
EVERY_MODEL = (
    "accumulation", "full recomputation", "fused", "TP2+SP, fused",
    "DP2", "FSDP2, 2 shards", "TP2", "TP2+SP", "CP2", "PP2 1f1b", "PP2 interleaved", "PP2 zbv",
    "DP4", "HSDP 2 x 2", "TP4", "PP4 1f1b", "TP2 x PP2", "TP2+SP x FSDP2", "PP2 x FSDP2", "TP2+SP x CP2",
)  # fmt: skip
# What the tests train other models than ESM-2's at: TAPE's at all of these; AMPLIFY's where it takes another way than
# both, without a copy of the embedding in a pipeline, and with an MLP of two matrices in one.
_TESTED = {"TAPE": EVERY_MODEL, "AMPLIFY": ("TP2+SP", "PP2 interleaved", "TP2+SP, fused")}


def _as(model: str, case: Case) -> Case:
    return Case(f"{model}: {case.name}", case.processes, case.flags, case.name not in _TESTED[model], model)


_NAMED = {case.name: case for case in _ESM2}
CASES = (*_ESM2, *(_as(model, _NAMED[name]) for model in _TESTED for name in EVERY_MODEL))
ALONE = {
    model: Case("one process" if model == "ESM-2" else f"{model}: one process", 1, "", model=model) for model in MODELS
}
