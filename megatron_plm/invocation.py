"""How this program was started: commands that it prints or records can be typed as they stand."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

# verb of `megatron-plm VERB`: the file of a checkout that opens the same function
_FILES = {
    "preprocess-data": "tools/preprocess_data.py",
    "train-tokenizer": "tools/train_tokenizer.py",
    "inspect-data": "tools/inspect_data.py",
    "merge-datasets": "tools/merge_datasets.py",
    "plan": "tools/plan.py",
    "preflight": "tools/preflight.py",
    "convert-checkpoint": "tools/convert_checkpoint.py",
    "megatron-converter": "tools/megatron_converter.py",
    "embed": "tools/embed.py",
    "score": "tools/score.py",
    "download-tape": "tools/download_tape.py",
    "structures-to-tape": "tools/structures_to_tape.py",
    "benchmark": "tools/benchmark.py",
    "report": "tools/report.py",
    "tape-train": "tape_finetune/tape_train.py",
    "tape-eval": "tape_finetune/tape_eval.py",
    "tape-predict": "tape_finetune/tape_predict.py",
    "tape-report": "tape_finetune/report.py",
}
_LAUNCHER = "launch/pretrain.sh"
_PRETRAIN_MODULE = "megatron_plm.training.pretrain"
_TRAIN_MODULE = "tape_finetune.tape_train"
EXIT_CODE_FILE = "MEGATRON_PLM_EXIT_CODE_FILE"  # set by launch/pretrain.sh around torchrun


def command_line(verb: str, argv: Sequence[object]) -> str:
    """The shell command that runs `verb` with `argv` by the door this program came through.

    From a checkout that is the verb's file, relative to its root; installed by pip, or started as `megatron-plm`, it
    is `megatron-plm VERB`. For `pretrain` and `tape-train` it also says how many processes there are.
    """
    words = [str(word) for word in argv]
    if verb == "pretrain":
        return " ".join([_pretrain_program(), *map(shlex.quote, words)])
    if verb == "tape-train" and _num_processes() > 1 and words != ["--help"]:
        return f"{_torchrun()} {_FILES[verb] if _from_checkout() else f'-m {_TRAIN_MODULE}'} {shlex.join(words)}"
    program = ["python", _FILES[verb]] if _from_checkout() else ["megatron-plm", verb]
    return shlex.join([*program, *words])


def typeable(verb: str, argv: Sequence[object]) -> str:
    """`command_line` for the working directory: outside of the checkout's root, with the way to its file."""
    command = command_line(verb, argv)
    if not _from_checkout() or Path.cwd() == _root():
        return command
    file = _FILES.get(verb, _LAUNCHER)
    return command.replace(file, shlex.quote(os.path.relpath(_root() / file)), 1)


def _pretrain_program() -> str:
    if _num_processes() == 1:
        return _LAUNCHER if _from_checkout() else "megatron-plm pretrain"
    if EXIT_CODE_FILE in os.environ:
        processes, nodes = _processes_and_nodes()
        return (f"NNODES={nodes} " if nodes > 1 else "") + f"NPROC_PER_NODE={processes} {_LAUNCHER}"
    program = _LAUNCHER if _from_checkout() else f"-m {_PRETRAIN_MODULE}"
    return f"{_torchrun()} {program}"


def _torchrun() -> str:
    processes, nodes = _processes_and_nodes()
    return "torchrun " + (f"--nnodes {nodes} " if nodes > 1 else "") + f"--nproc-per-node {processes}"


def _num_processes() -> int:
    processes, nodes = _processes_and_nodes()
    return processes * nodes


def _processes_and_nodes() -> tuple[int, int]:
    """Of this start: processes of a node, and nodes."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def _from_checkout() -> bool:
    started_as_verb = Path(sys.argv[0]).name.startswith("megatron-plm")
    return not started_as_verb and (_root() / _LAUNCHER).is_file()


def _root() -> Path:
    return Path(__file__).resolve().parents[1]
