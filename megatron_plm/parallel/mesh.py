"""Processes and the mesh they form."""

import contextlib
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _abort_process_group

from megatron_plm.config.layout import DIMS, Layout
from megatron_plm.config.options import ParallelOptions
from megatron_plm.errors import UserError, tell
from megatron_plm.parallel.presence import Presence, is_broken_connection
from megatron_plm.parallel.store import STORE_ERRORS, is_first, open_store

ONE_PROCESS = Layout(1, 1, 1, 1, 1)
_DEFAULT_TIMEOUT = timedelta(minutes=10)
# What NCCL finds late ends the process without a name; what gloo does, which the loop waits in at every step, raises.
_LATER_ON_GPUS = timedelta(minutes=1)
_SECONDS_TO_ABORT = 10.0
_SECONDS_TO_AGREE = 10.0
MESH_DIMS = ("pp", "dp_replicate", "dp_shard_cp", "tp")


@dataclass(frozen=True)
class World:
    """This process among all: its rank, its device, its place in the layout, and the groups it belongs to.

    Attributes:
        mesh: dims (pp, dp_replicate, dp_shard_cp, tp), ranks as `layout` counts them; the third is what FSDP2 shards
            over, as context-parallel processes add up gradients too. None for a single process without a group.
        cp_group: the processes that share rows with this one; None where it has its rows to itself.
        store: where the processes of the group met.
        timeout: after which waiting for another process fails.
        presence: who is still there; None for a single process.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None
    layout: Layout = ONE_PROCESS
    cp_group: dist.ProcessGroup | None = None
    store: Store | None = None
    timeout: timedelta = _DEFAULT_TIMEOUT
    presence: Presence | None = None

    def coordinate(self, dim: str) -> int:
        """Where this process is in a dim of the layout."""
        behind = self.layout.sizes[DIMS.index(dim) + 1 :]
        return self.rank // math.prod(behind) % getattr(self.layout, dim)

    @property
    def dp_rank(self) -> int:
        """Which of the data-parallel processes this one is: it computes their rows of this number."""
        return self.coordinate("dp_replicate") * self.layout.dp_shard + self.coordinate("dp_shard")

    @property
    def counts_scores(self) -> bool:
        """Whether this process speaks for the labels that it scores, which its tensor-parallel neighbours score too."""
        return self.coordinate("tp") == 0

    @property
    def counts_rows(self) -> bool:
        """Whether this process speaks for its rows, which its tensor, context and pipeline neighbours have too."""
        return not any(self.coordinate(dim) for dim in ("pp", "cp", "tp"))

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

    def barrier(self, group: dist.ProcessGroup | None = None) -> None:
        """Wait for all processes, on the host; those of `group`, if given."""
        if self.mesh is not None:
            dist.all_reduce(torch.zeros(1), group=group)

    def group_of_a_thread(self) -> dist.ProcessGroup | None:
        """Make a group of all processes on their hosts, for what a second thread does beside the first's collectives.

        Collective; None for a single process without a group.
        """
        return None if self.mesh is None else dist.new_group(backend="gloo", timeout=self.timeout)

    def is_first(self, what: str) -> bool:
        """Whether no other process has asked this about `what`; so it is where nobody can be asked. No collective."""
        store = self.presence.store if self.presence else self.store
        if store is None or (self.presence and self.presence.is_alone):
            return True
        return is_first(store, what)

    def at_failure(self, act: Callable[[], None]) -> None:
        """Have one of the processes call `act` when some have gone, hang, or ended by an error of their own."""
        if self.presence is not None:
            self.presence.at_failure = act

    def all_come(self, where: str, *, seconds: float) -> bool:
        """Wait for all processes to ask this about `where`; returns whether they did in so many seconds.

        No collective: it never hangs where some of the processes went elsewhere.
        """
        if self.store is None:
            return True
        if self.store.add(f"come/{where}", 1) == self.size:
            self.store.set(f"come/{where}/all", "")
            return True
        try:
            self.store.wait([f"come/{where}/all"], timedelta(seconds=seconds))
        except STORE_ERRORS:
            return False
        return True


def world_size() -> int:
    """How many processes torchrun started; 1 outside of torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Which of this machine's processes this one is; 0 outside of torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def device(*, use_gpu: bool = True) -> torch.device:
    """This process's GPU where there is one and `use_gpu` doesn't forbid it, else the CPU."""
    return torch.device("cuda", local_rank()) if use_gpu and torch.cuda.is_available() else torch.device("cpu")


def process_rank() -> int:
    """Which of all processes this one is; 0 outside of torchrun."""
    return int(os.environ.get("RANK", "0"))


def check_devices() -> None:
    """Raise UserError where this machine's processes are more than its GPUs, if it has any."""
    processes, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if devices and processes > devices:
        raise UserError(f"{processes} processes on a machine with {devices} GPUs; start at most one a GPU")


class OtherOptions(UserError):
    """A process was started with other options than the first one; all processes raise it."""


@contextmanager
def told_once(world: World) -> Iterator[None]:
    """Let one process tell a UserError that all of them raise alike.

    Where only some raise it, the others know nothing of it and would wait: it is told, and this process crashes, which
    makes torchrun end them.
    """
    try:
        yield
    except UserError as error:
        if is_broken_connection(error):
            raise
        error.told = error.told or not world.is_first(str(error))
        if world.all_come("an error", seconds=_SECONDS_TO_AGREE):
            raise
        tell(error)
        raise SystemExit(error.exit_code) from None


@contextmanager
def joined_world(
    options: ParallelOptions | None = None,
    *,
    use_gpu: bool = True,
    force_group: bool = False,
    timeout_minutes: float = 10.0,
    description: str = "",
) -> Iterator[World]:
    """Join the processes that torchrun started in the layout that `options` ask for, and leave them at the end.

    A single process gets no process group, unless `force_group`: FSDP2, which carries the mixed-precision policy,
    needs a mesh even for one. Without `use_gpu` the device is the CPU, also where there is a GPU. A process that waits
    for another longer than the timeout fails. Raises OtherOptions where `description`, lines of "option = value", is
    not that of the first process, and RunFailed with the name of a process that doesn't come or goes before the others.
    """
    own_device = device(use_gpu=use_gpu)
    if own_device.type == "cuda":
        torch.cuda.set_device(own_device)
    if world_size() == 1 and not force_group:
        yield World(0, 1, own_device, None)
        return
    backend = "cpu:gloo,cuda:nccl" if own_device.type == "cuda" else "gloo"
    rank, size, timeout = process_rank(), world_size(), timedelta(minutes=timeout_minutes)
    store = open_store(rank, size, timeout)
    failed = True
    try:
        with Presence(store, rank, size, timeout) if size > 1 else contextlib.nullcontext() as presence:
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
            _check_same(store, rank, size, description, timeout)
            yield replace(arranged_world(options or ParallelOptions(), own_device, store, timeout), presence=presence)
        failed = False
    finally:
        if dist.is_initialized():
            _leave_groups(failed=failed)


def _leave_groups(*, failed: bool) -> None:
    """Leave all groups; where the run has `failed`, without waiting for what NCCL was given, which may never end."""
    if not (failed and torch.cuda.is_available()):
        dist.destroy_process_group()
        return
    # torch's own end of a failed process leaves this out, as it may hang too.
    abort = threading.Thread(target=_abort_process_group, name="abort", daemon=True)
    abort.start()
    abort.join(timeout=_SECONDS_TO_ABORT)


def arranged_world(
    options: ParallelOptions,
    device: torch.device,
    store: Store | None = None,
    timeout: timedelta = _DEFAULT_TIMEOUT,
) -> World:
    """The processes of the group that was joined, in the layout that `options` ask for. Collective."""
    rank, size = dist.get_rank(), dist.get_world_size()
    layout = Layout.of(options, size)
    pp, dp_replicate, dp_shard, cp, tp = layout.sizes
    mesh = init_device_mesh(device.type, (pp, dp_replicate, dp_shard * cp, tp), mesh_dim_names=MESH_DIMS)
    assert dist.group.WORLD is not None
    groups = [dist.group.WORLD, *(mesh.get_group(name) for name in MESH_DIMS)]
    cp_group = None
    if cp > 1:
        ranks = torch.arange(size).view(-1, cp, tp).transpose(1, 2).reshape(-1, cp)
        cp_group, _ = dist.new_subgroups_by_enumeration(ranks.tolist())
        groups.append(cp_group)
    for group in groups:  # torch gives its own default to the groups of a mesh
        set_timeout(group, timeout)
    return World(rank, size, device, mesh, layout, cp_group, store, timeout)


def set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Let waiting in the group's collectives fail after `timeout`; on GPUs a minute later."""
    if dist.get_backend(group) == "fake":  # the planner's, in which nobody waits
        return
    for device in group._device_types:
        later = _LATER_ON_GPUS if device.type == "cuda" else timedelta()
        torch.distributed.ProcessGroup._get_backend(group, device)._set_default_timeout(timeout + later)


def _check_same(store: Store, rank: int, size: int, description: str, timeout: timedelta) -> None:
    """Compare with the first process, by no collective: where options differ, groups may too. All raise alike."""
    if rank == 0:
        store.set("description", description)
    elif (first := store.get("description").decode()) != description:
        lines = itertools.zip_longest(first.splitlines(), description.splitlines(), fillvalue="nothing")
        there, here = next(pair for pair in lines if pair[0] != pair[1])
        store.set(
            "other_options",
            f"process {rank} was started with other options than process 0: {here} here, {there} there; start all with "
            "the same command, files and version",
        )
    if store.add("compared", 1) == size:
        store.set("all_compared", "")
    store.wait(["all_compared"], timeout)
    if not store.check(["other_options"]):
        return
    raise OtherOptions(store.get("other_options").decode())
