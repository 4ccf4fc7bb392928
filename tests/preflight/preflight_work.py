"""What the preflight tests run in two processes, on two nodes by what they say: one start, many checks."""

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pretraining_runs import meet_anew

from megatron_plm.errors import run_command
from megatron_plm.preflight import command, facts, meeting, storage

FLAGS = ["--num-layers=2", "--hidden-size=32", "--num-attention-heads=2", "--storage-mebibytes=1"]


def other_version() -> dict[str, str]:
    return {"python": "3.11.0", "torch": "1.0"}


def fast_clock() -> float:
    return time.time() + 5


def little_space(_folder: Path) -> int:
    return 1000


def own_folder(path: Path) -> bool:
    """As if this node had a folder of the same name on a disk of its own."""
    return not path.name.startswith(".preflight.")


def full_disk(folder: Path, num_bytes: int) -> str:
    return f"{folder}: No space left on device for {num_bytes} bytes"


# name: (flags of both processes, flags of the second alone, what is wrong in the second alone)
CASES: dict[str, tuple[list[str], list[str], tuple[Any, str, Any] | None]] = {
    "green": ([], [], None),
    "tensor": (["--tensor-model-parallel-size=2", "--seed=7"], [], None),
    "pipeline": (["--pipeline-model-parallel-size=2"], [], None),
    "version": ([], [], (facts, "package_versions", other_version)),
    "configuration": ([], ["--lr=1e-5", "--min-lr=0"], None),
    "clock": (["--no-bandwidth"], [], (meeting, "now", fast_clock)),
    "space": (["--no-bandwidth"], [], (storage, "free_bytes", little_space)),
    "own_folder": (["--no-bandwidth"], [], (storage, "_appears", own_folder)),
    "full_disk": (["--no-bandwidth"], [], (storage, "_write_and_read", full_disk)),
    "missing": (["--wait-seconds=1"], [], None),
}
# These are the same on both, as only the first process looks.
OF_BOTH = {"space"}


def work(folder: Path) -> None:
    """Each case once; the exit codes go to a file of this process, and the first one's reports beside it."""
    second = os.environ["RANK"] == "1"
    os.environ["LOCAL_RANK"] = "0"
    codes: dict[str, int] = {}
    with patch.object(socket, "gethostname", return_value=f"node{os.environ['RANK']}"):
        for name, (flags, flags_of_second, fault) in CASES.items():
            meet_anew()
            if name == "missing" and second:
                continue
            argv = [*FLAGS, *flags, f"--save={folder / 'run'}", f"--output={folder / name}.json"]
            with contextlib.ExitStack() as stack:
                if fault and (second or name in OF_BOTH):
                    place, attribute, replacement = fault
                    stack.enter_context(patch.object(place, attribute, replacement))
                codes[name] = run_command(command.main, [*argv, *(flags_of_second if second else [])])
    (folder / f"codes_{os.environ['RANK']}.json").write_text(json.dumps(codes))
