"""Processes that find each other through a key-value store alone: it works where collectives would hang or crash."""

import json
import os
import socket
import time
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore

from megatron_plm.errors import RunFailed
from megatron_plm.parallel.mesh import local_rank, world_size
from megatron_plm.parallel.store import come, open_store, who_came

_POLL_SECONDS = 0.1
_PINGS = 5
_SECONDS_TO_ANSWER = 600.0  # of those that came; slow storage is written in them


class Meeting:
    """All processes of the run, and what they tell each other.

    Attributes:
        missing: ranks that did not come in time.
        hosts: the machine of each rank that came.
        seconds: how long the last one that came was waited for.
        first_of_node: the rank of the first process on each node.
        speaker: the rank of the one that reports.
    """

    def __init__(self, wait_seconds: float) -> None:
        """Call the roll; returns when all are here, or time is up. Raises RunFailed where nobody can be reached."""
        self.rank, self.size = int(os.environ.get("RANK", "0")), world_size()
        self._store = PrefixStore("preflight", open_store(self.rank, self.size, timedelta(seconds=wait_seconds)))
        self._store.set_timeout(timedelta(seconds=_SECONDS_TO_ANSWER))
        started = time.monotonic()
        self.tell("here", [socket.gethostname(), local_rank()])
        come(self._store, self.rank)
        here: set[int] = set()
        self.seconds = 0.0
        while len(here) < self.size and (waited := time.monotonic() - started) < wait_seconds:
            if here != (here := who_came(self._store)):
                self.seconds = waited
            if len(here) < self.size:
                time.sleep(_POLL_SECONDS)
        self.missing = sorted(set(range(self.size)) - here)
        present = sorted(here)
        told = self._store.multi_get([f"here/{rank}" for rank in present])
        places = {rank: json.loads(place) for rank, place in zip(present, told, strict=True)}
        self.hosts = {rank: place[0] for rank, place in places.items()}
        self.first_of_node = [rank for rank, place in places.items() if place[1] == 0]
        self.speaker = present[0]

    def tell(self, topic: str, value: Any) -> None:
        """Tell all others something that JSON can hold."""
        self._store.set(f"{topic}/{self.rank}", json.dumps(value))

    def heard(self, topic: str, rank: int) -> Any:
        """What `rank` tells about `topic`; waits for it, and raises RunFailed where it doesn't come."""
        try:
            return json.loads(self._store.get(f"{topic}/{rank}"))
        except RuntimeError as error:
            raise RunFailed(
                f"rank {rank} on {self.hosts.get(rank, 'an unknown node')} came and then said nothing about {topic}; "
                "look for its own message"
            ) from error

    def gather(self, topic: str, value: Any, ranks: list[int] | None = None) -> dict[int, Any]:
        """What each of `ranks` (all, if None) has for `value`, in every process; the others' value is not asked for."""
        asked = range(self.size) if ranks is None else ranks
        if self.rank in asked:
            self.tell(topic, value)
        return {rank: self.heard(topic, rank) for rank in asked}

    def leave(self, verdict: bool) -> bool:
        """The speaker's verdict, so that all end alike. Nobody goes before it is heard by all: one holds the store."""
        agreed = bool(self.gather("verdict", verdict, ranks=[self.speaker])[self.speaker])
        self.tell("left", True)
        if self.rank == self.speaker:
            for rank in self.hosts:
                self.heard("left", rank)
        return agreed

    def clock_offsets(self) -> dict[int, tuple[float, float]]:
        """Seconds that each node's clock is ahead of rank 0's, and how uncertain that is, by its first process's rank.

        As NTP does: a ping leaves at t0 and comes back at t1, with rank 0's time, which was read in between. The
        quickest of some pings is the surest, to half of its way there and back. Collective.
        """
        others = [rank for rank in self.first_of_node if rank != 0]
        if self.rank == 0:
            for rank in others:
                for number in range(_PINGS):
                    self.heard(f"ping/{number}", rank)
                    self._store.set(f"pong/{rank}/{number}", repr(now()))
            return self._offsets(others)
        if self.rank in others:
            pings = []
            for number in range(_PINGS):
                t0 = now()
                self.tell(f"ping/{number}", True)
                theirs = float(self._store.get(f"pong/{self.rank}/{number}"))
                t1 = now()
                pings.append(((t1 - t0) / 2, (t0 + t1) / 2 - theirs))
            uncertain, ahead = min(pings)
            self.tell("clock", [ahead, uncertain])
        return self._offsets(others)

    def _offsets(self, ranks: list[int]) -> dict[int, tuple[float, float]]:
        return {rank: tuple(self.heard("clock", rank)) for rank in ranks}


def now() -> float:
    """Seconds since the epoch by this machine's clock."""
    return time.time()
