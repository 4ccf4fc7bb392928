"""What a process knows of its machine, and what must be the same everywhere."""

import hashlib
import os
import resource
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from megatron_plm.config.load import to_toml
from megatron_plm.config.options import Config
from megatron_plm.machine import package_versions
from megatron_plm.parallel.mesh import local_rank
from megatron_plm.preflight.page import Check

# Differences in these make collectives hang or crash, so nothing is measured with them.
DECIDE_COLLECTIVES = ("versions", "configuration")
_PACKAGE = Path(__file__).resolve().parents[1]
_SHARED_MEMORY = Path("/dev/shm")
_NEEDED_SHARED_MEMORY = 2**30  # bytes of a node; NCCL's processes on one node talk through it, containers have 64 MiB
_FREE_GPU_MEMORY = 0.9  # share of a GPU; what another program left running there, a run would miss


def own_facts(config: Config) -> dict[str, Any]:
    """The facts of this process, in values that JSON can hold: groups of what must be equal, then numbers."""
    gpu = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(local_rank()) if gpu else None
    free = torch.cuda.mem_get_info(local_rank()) if gpu else None
    return {
        "equal": {
            "versions": {
                **package_versions(),
                "code": _code_hash(),
                "cuda": torch.version.cuda,
                "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpu else None,
                "driver": _read(Path("/sys/module/nvidia/version")),
            },
            "configuration": {"sha256": hashlib.sha256(to_toml(config).encode()).hexdigest()[:12]},
            "devices": {
                "gpu": properties.name if properties else None,
                "gpu memory": properties.total_memory if properties else None,
                "gpus of the node": torch.cuda.device_count(),
            },
            "variables": {
                name: value
                for name, value in sorted(os.environ.items())
                if name.startswith(("NCCL_", "TORCH_NCCL_", "GLOO_"))
            },
        },
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "shared_memory": shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else None,
        "free_gpu_memory": free[0] / free[1] if free else None,
    }


def check_equal(group: str, facts: dict[int, dict[str, Any]], hosts: dict[int, str]) -> Check:
    """Whether a group of facts is the same in all processes; names those that differ from most."""
    ranks_by_value: dict[str, dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
    names = sorted({name for fact in facts.values() for name in fact["equal"][group]})
    for rank, fact in facts.items():
        for name in names:
            ranks_by_value[name][fact["equal"][group].get(name)].append(rank)
    differences = []
    for name, values in ranks_by_value.items():
        common, *others = sorted(values, key=lambda value: -len(values[value]))
        differences += [
            f"{name} is {value} on {_ranks(values[value], hosts)} and {common} on {_ranks(values[common], hosts)}"
            for value in others
        ]
    if differences:
        return Check(group, False, "; ".join(differences))
    same = ", ".join(f"{name} {values}" for name, (values,) in ranks_by_value.items() if values is not None)
    return Check(group, True, f"the same in all processes: {same}" if same else "none set in any process")


def check_limits(facts: dict[int, dict[str, Any]], hosts: dict[int, str], local_size: int) -> list[Check]:
    """Open files, shared memory and free GPU memory of all processes."""
    # Rank 0's store has some connections to each process, and so have NCCL's rings and trees to their neighbours.
    needed_files = 512 + 8 * len(facts)
    fewest = min(facts, key=lambda rank: _unlimited(facts[rank]["open_files"]))
    files = facts[fewest]["open_files"]
    checks = [
        Check(
            "open files",
            _unlimited(files) >= needed_files,
            f"{'any number' if files < 0 else files} in a process at least, {needed_files} needed"
            + ("" if _unlimited(files) >= needed_files else f" (rank {fewest} on {hosts[fewest]}); raise ulimit -n"),
        )
    ]
    with_gpus = facts[0]["equal"]["devices"]["gpu"] is not None
    shared = {rank: fact["shared_memory"] for rank, fact in facts.items() if fact["shared_memory"] is not None}
    if shared:
        least = min(shared, key=lambda rank: shared[rank])
        enough = shared[least] >= _NEEDED_SHARED_MEMORY or not with_gpus or local_size == 1
        text = f"{shared[least] / 2**30:.2f} GiB free in /dev/shm at least"
        if not enough:
            text += f" (on {hosts[least]}), and NCCL needs 1 GiB; in a container give --shm-size 16g"
        checks.append(Check("shared memory", enough, text))
    if with_gpus:
        least = min(facts, key=lambda rank: facts[rank]["free_gpu_memory"])
        free = facts[least]["free_gpu_memory"]
        text = f"{free:.0%} of a GPU free at least"
        if free < _FREE_GPU_MEMORY:
            text += f" (rank {least} on {hosts[least]}); another program holds the rest, see nvidia-smi"
        checks.append(Check("gpu memory", free >= _FREE_GPU_MEMORY, text))
    return checks


def _ranks(ranks: list[int], hosts: dict[int, str]) -> str:
    if len(ranks) > 3:
        return f"{len(ranks)} processes"
    return ", ".join(f"rank {rank} ({hosts[rank]})" for rank in ranks)


def _unlimited(limit: int) -> float:
    return float("inf") if limit == resource.RLIM_INFINITY else limit


def _code_hash() -> str:
    """Of the package's sources: nodes may see different copies of one version."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(_PACKAGE)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _read(path: Path) -> str | None:
    return path.read_text().strip() if path.exists() else None
