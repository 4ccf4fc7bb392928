"""What the tests of four processes run: runs at four layouts, each of which the others go on with."""

from pathlib import Path

from pretraining_runs import checkpoint, meet_anew, pretrain

from megatron_plm.benchmark.parity_cases import MODELS

# Five blocks, which neither two nor four stages share out evenly, and heads that four processes have five each of.
SHAPE = ["--num-layers=5", "--hidden-size=40", "--num-attention-heads=20", "--ffn-hidden-size=80"]
RUN = [*SHAPE, "--train-iters=10", "--save-interval=5", "--eval-interval=5", "--eval-iters=2", "--micro-batch-size=2"]

LAYOUTS = {
    "hsdp": ["--data-parallel-replicate-size=2"],
    "tp_sp": ["--tensor-model-parallel-size=2", "--sequence-parallel", "--micro-batch-size=4"],
    "tp_pp": ["--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=2", "--pipeline-schedule=interleaved"],
    "pp_zbv": ["--pipeline-model-parallel-size=2", "--pipeline-schedule=zbv", "--data-parallel-sharding=zero2"],
    "cp": ["--context-parallel-size=2", "--data-parallel-sharding=none", "--micro-batch-size=4"],
}
GO_ON = [name for name in LAYOUTS if name != "hsdp"]
BEGIN = ["--train-iters=2", "--seed=77"]
IMPORTED = ("tp_pp", "pp_zbv")
OTHER_VOCABULARY = ("hsdp", "tp_pp", "pp_zbv")
# Other models: the layout that saves, and the one that goes on. TAPE's copy of the embedding is elsewhere than its
# original, then beside it; AMPLIFY's MLP, whose first matrix is two, is cut in the second only.
OTHER_MODELS = {"TAPE": ("tp_pp", "pp_zbv"), "AMPLIFY": ("pp_zbv", "tp_sp")}


def other_vocabulary(folder: Path, one_process: Path) -> list[str]:
    """Flags of a step that begins with weights of another vocabulary than that of its dataset, folder/iupac."""
    data = [f"--{name}={folder / 'iupac'}" for name in ("data-path", "valid-data-path")]
    return [*data, "--tokenizer=tape-iupac", f"--pretrained-checkpoint={checkpoint(one_process, 5)}", "--train-iters=1"]


def planned(one_process: Path, imported: Path, folder: Path) -> dict[str, list[str]]:
    """The flags of all runs by name, in their order: runs of ten steps by layout; LAYOUT_from_LAYOUT, which go on at
    step 5, and of other models MODEL and MODEL_on; others go on from one process, with another pipeline, begin with the
    weights of `imported`, a converted checkpoint, have another vocabulary, or are refused for another shape."""
    runs = dict(LAYOUTS)
    for name in GO_ON:
        runs |= {f"{name}_from_{other}": [*LAYOUTS[name], _load(folder / other)] for other in GO_ON}
    for model, (first, second) in OTHER_MODELS.items():
        runs[model] = [*MODELS[model].split(), *LAYOUTS[first]]
        runs[f"{model}_on"] = [*MODELS[model].split(), *LAYOUTS[second], _load(folder / model)]
    runs["pp4_from_one"] = ["--pipeline-model-parallel-size=4", "--pipeline-layout=0,2,3,0", _load(one_process)]
    for name in IMPORTED:
        runs[f"{name}_imported"] = [*LAYOUTS[name], *BEGIN, f"--pretrained-checkpoint={imported}"]
    for name in OTHER_VOCABULARY:
        runs[f"{name}_other_vocabulary"] = [*LAYOUTS[name], *other_vocabulary(folder, one_process)]
    runs["other_shape"] = [*LAYOUTS["tp_pp"], "--num-layers=6", _load(folder / "hsdp")]
    return runs


def _load(run: Path) -> str:
    return f"--load={checkpoint(run, 5)}"


def work(flags: list[str], runs: dict[str, list[str]], folder: Path) -> None:
    """Make the runs below `folder`."""
    for name, more in runs.items():
        meet_anew()
        code = pretrain(*flags, *RUN, *more, f"--save={folder / name}")
        assert code == (2 if name == "other_shape" else 0), name
