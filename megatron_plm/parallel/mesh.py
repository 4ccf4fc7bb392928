"""Processes and the mesh they form."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class World:
    """This process among all: its rank, its device, and the mesh (None for a single process without a group)."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes, in float64, on the host: no GPU waits for it."""
        if self.mesh is None:
            return list(values)
        totals = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(totals)
        return totals.tolist()

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on any process; all processes get the same answer."""
        return self.sum(float(flag))[0] > 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.mesh is not None:
            dist.barrier()


def world_size() -> int:
    """How many processes torchrun started; 1 outside of torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined_world(*, force_group: bool = False) -> Iterator[World]:
    """Join the processes that torchrun started, and leave them at the end.

    A single process gets no process group, unless `force_group`: FSDP2, which carries the mixed-precision policy,
    needs a mesh even for one.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size() == 1 and not force_group:
        yield World(0, 1, device, None)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
        yield World(dist.get_rank(), dist.get_world_size(), device, mesh)
    finally:
        dist.destroy_process_group()
