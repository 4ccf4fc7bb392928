"""How fast the processes of each dim of the mesh talk to each other.

Two figures as in nccl-tests (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md), for S bytes in t seconds among n
processes. Algorithm bandwidth is S/t, where S is a process's buffer for all-reduce and send, and what all buffers hold
together for all-gather. Bus bandwidth is what the links carry and doesn't depend on n: S/t times 2(n−1)/n for
all-reduce, (n−1)/n for all-gather, 1 for send. Both in GB/s, of 10⁹ bytes.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist

from megatron_plm.parallel.mesh import World
from megatron_plm.preflight.page import Check

# The buffer of one operation, large enough for the links and not their latency to decide, and how often it is sent.
_BYTES = {"cuda": 2**28, "cpu": 2**22}
_TIMES = {"cuda": 20, "cpu": 3}
# Its older name is deprecated since torch 2.13, and alone in 2.11.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_SLOW = 0.5  # of the median group's speed: one bad cable or switch holds up all


def check_bandwidth(world: World) -> Iterator[Check]:
    """Measure each dim that has more than one process, all of its groups at once as in training. Collective."""
    for dim, group in _groups(world).items():
        size = dist.get_world_size(group)
        num_floats = _BYTES[world.device.type] // 4 // size * size
        buffer, share = (torch.zeros(length, device=world.device) for length in (num_floats, num_floats // size))
        num_bytes = buffer.nbytes
        operations: dict[str, tuple[Callable[[], object], int, float]] = {
            "all-reduce": (partial(dist.all_reduce, buffer, group=group), num_bytes, 2 * (size - 1) / size),
            "all-gather": (partial(_all_gather, buffer, share, group=group), num_bytes, (size - 1) / size),
        }
        if dim == "pp":
            # A process in the middle receives one buffer and sends one.
            operations["send"] = (partial(_send_onwards, buffer, group), num_bytes * min(2, size - 1), 1.0)
        for name, (operation, moved, on_links) in operations.items():
            yield _check(world, dim, name, moved / _seconds(world, operation), on_links, group)


def _groups(world: World) -> dict[str, dist.ProcessGroup]:
    """The group of this process in each dim that has several."""
    if world.mesh is None:
        return {}
    names = world.mesh.mesh_dim_names or ()
    groups = {name: world.mesh.get_group(name) for name in names if world.mesh[name].size() > 1}
    return groups | ({"cp": world.cp_group} if world.cp_group is not None else {})


def _seconds(world: World, operation: Callable[[], object]) -> float:
    """Mean time of an operation, after one that sets up connections."""
    operation()
    _wait(world)
    world.barrier()
    started = time.perf_counter()
    times = _TIMES[world.device.type]
    for _ in range(times):
        operation()
    _wait(world)
    return (time.perf_counter() - started) / times


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def _send_onwards(buffer: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Each stage of a pipeline to the next: first those in even places, then the others."""
    ranks, place = dist.get_process_group_ranks(group), dist.get_rank(group)
    for sender in (place, place - 1) if place % 2 == 0 else (place - 1, place):
        if sender == place and place + 1 < len(ranks):
            dist.send(buffer, dst=ranks[place + 1], group=group)
        elif sender == place - 1 >= 0:
            dist.recv(buffer, src=ranks[sender], group=group)


def _check(world: World, dim: str, name: str, speed: float, on_links: float, group: dist.ProcessGroup) -> Check:
    """The groups of a dim compared; a group, named by its first rank, is as fast as its slowest process."""
    first = min(dist.get_process_group_ranks(group))
    mine = [0.0] * (2 * world.size)
    mine[world.rank], mine[world.size + world.rank] = speed, float(first)
    told = world.sum(*mine)
    slowest: dict[int, float] = {}
    for theirs, group_first in zip(told[: world.size], map(int, told[world.size :]), strict=True):
        slowest[group_first] = min(theirs, slowest.get(group_first, theirs))
    return compare_groups(f"{dim} {name}", slowest, size=dist.get_world_size(group), on_links=on_links)


def compare_groups(name: str, speeds: dict[int, float], *, size: int, on_links: float) -> Check:
    """Whether one group of a dim holds up the others.

    Args:
        speeds: algorithm bandwidth of each group in bytes a second, by the group's first rank.
        size: processes of a group.
        on_links: bus bandwidth over algorithm bandwidth.
    """
    worst = min(speeds, key=lambda rank: speeds[rank])
    median = statistics.median(speeds.values())
    good = speeds[worst] >= _SLOW * median
    text = f"{median / 1e9:.2f} GB/s ({median * on_links / 1e9:.2f} on the links) among {size} processes"
    if len(speeds) > 1:
        text += f" in the median of {len(speeds)} groups, {speeds[worst] / 1e9:.2f} GB/s in the slowest"
    if not good:
        text += f", that of rank {worst}; look for a bad link or another program there"
    return Check(name, good, text, {"GB/s": {str(rank): speed / 1e9 for rank, speed in speeds.items()}})
