"""Where the processes of a run meet, and who is still there: one that has gone is told by name.

That a collective fails, or takes too long, doesn't tell whose fault it is. So each process leaves signs of life in the
store where all met, from a thread that goes on while the process waits, and its reason where it ends before the others.
Who finds that somebody has gone leaves a verdict there, which all others read and end by; one of them tells it.
"""

import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import NamedTuple, Self

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from megatron_plm.errors import RunFailed, UserError, tell

_BEAT = 1.0  # seconds between two signs
_SILENT = 5  # own beats without another's sign after which, when a collective has failed, that one has gone
_PATIENCE = 10  # beats in which all others have noticed what one of them has
_NAMED = 8  # processes that a message names
_ALL_CAME = "all came"
_GO_ON = "; go on from the last checkpoint with --load"

_HERE, _WAITED, _LEFT = "here", "waited in vain", "left"


def open_store(rank: int, size: int, timeout: timedelta) -> Store:
    """The store at MASTER_ADDR and MASTER_PORT; under torchrun the agent holds it, else process 0.

    torchrun's `--max-restarts` starts anew with the same store: each attempt has keys of its own. Raises RunFailed
    where the store cannot be reached.
    """
    if "RANK" not in os.environ:
        return HashStore()
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    try:
        store = TCPStore(host, int(port), size, _holds_store(rank), timeout, wait_for_workers=False, multi_tenant=True)
    except (RuntimeError, ValueError) as error:
        raise RunFailed(
            f"rank {rank} on {socket.gethostname()} did not reach MASTER_ADDR {host or 'missing'}, MASTER_PORT "
            f"{port or 'missing'} within {timeout.total_seconds():g} s ({str(error).splitlines()[0]}); is rank 0 "
            "running there, and the port open between the nodes?"
        ) from None
    return PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def is_broken_connection(error: BaseException | None) -> bool:
    """Whether a collective failed as another process was gone or late, by the error or what it came from."""
    return any(
        isinstance(each, dist.DistError) or (isinstance(each, RuntimeError) and "gloo/transport" in str(each))
        for each in _with_causes(error)
    )


def _took_too_long(error: BaseException | None) -> bool:
    """Whether it failed by the time it took, as gloo, NCCL and the store say it, each in its words."""
    return any(re.search(r"tim(e|ed|ing) ?out", str(each), re.IGNORECASE) for each in _with_causes(error))


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class _Sign(NamedTuple):
    """What a process leaves: how many signs so far, where it runs, and how it is."""

    beats: int
    host: str
    state: str


class Presence:
    """This process among all of the run, which come together on entering it.

    Leaving by an error of its own, a process tells the others its reason. Leaving as a collective has failed, it raises
    RunFailed with the name of the process that is to blame, where one is. A process that goes on waiting when somebody
    was found to have gone is ended, with exit code 1. Entering raises RunFailed where not all come in time.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        # A connection of its own, which never waits behind the other one's requests.
        self._store = PrefixStore("presence", store.clone())  # type: ignore[attr-defined]
        self._rank, self._size, self._timeout = rank, size, timeout
        self._host = socket.gethostname()
        self._beats, self._state, self._reason = 0, _HERE, ""
        self._seen: dict[int, tuple[int, int]] = {}  # by rank: its last beat, and ours when it was new
        self._asked_at: int | None = None  # our beat when a collective had failed
        self._too_late = False  # it failed by the time it took
        self._verdict, self._verdict_at, self._tells = "", 0, False
        self._is_alone = False  # the store has gone, or doesn't answer
        self._judged, self._stop, self._wake = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._live, name="presence", daemon=True)

    def __enter__(self) -> Self:
        try:
            word = self._meet()
        except (RuntimeError, ValueError):
            raise self._lost_store("has gone") from None
        if word != _ALL_CAME:
            failure = RunFailed(word)
            failure.told = self._store.add("told", 1) > 1
            if _holds_store(self._rank):
                time.sleep(_BEAT)  # the others read it too
            raise failure
        self._thread.start()
        return self

    def _meet(self) -> str:
        """Wait for all to come; returns the first word about it: that they have, or who has not."""
        self._sign()
        if self._store.add("number", 1) == self._size:
            self._store.compare_set("all", "", _ALL_CAME)
        begin = time.monotonic()
        # No long wait within the store, which is deaf to Ctrl-C.
        while not self._store.check(["all"]) and (waited := time.monotonic() - begin) < self._timeout.total_seconds():
            time.sleep(min(0.05 + waited / 10, 0.5))
        if not self._store.check(["all"]):
            absent = [rank for rank in range(self._size) if not self._store.check([str(rank)])]
            self._store.compare_set(
                "all",
                "",
                f"{_named(absent)} did not come within {_minutes(self._timeout)} (--distributed-timeout-minutes); look "
                "for its own message, and whether all were started",
            )
        return self._store.get("all").decode()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        failure = None
        if is_broken_connection(error):
            failure = self._blame(too_late=_took_too_long(error))
        elif error is not None and not isinstance(error, UserError):  # which all find alike
            cause = (error.__context__ if isinstance(error, SystemExit) else None) or error
            self._reason = f"{type(cause).__name__}: {cause}".splitlines()[0].rstrip(": ")
        self._state = _LEFT
        self._stop.set()
        self._wake.set()
        if not self._is_alone:
            self._thread.join(timeout=2 * _PATIENCE * _BEAT)
        if failure is not None:
            raise failure from None

    def _blame(self, *, too_late: bool) -> RunFailed | None:
        """Whose fault it is that a collective has failed; None where nobody seems to be missing."""
        self._too_late, self._state, self._asked_at = too_late, _WAITED, self._beats
        self._wake.set()
        if not self._judged.wait(timeout=2 * _PATIENCE * _BEAT) or self._is_alone:
            self._is_alone = True
            if not self._verdict:
                return self._lost_store(f"has gone or hangs{_GO_ON}")
        if not self._verdict:
            return None
        failure = RunFailed(self._verdict)
        failure.told = not self._tells
        return failure

    def _lost_store(self, how: str) -> RunFailed:
        """Nothing can be asked: one process of each node tells."""
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        holder = f"the node of MASTER_ADDR {os.environ.get('MASTER_ADDR')}" if _agent_holds_store() else "process 0"
        is_beside_it = not _agent_holds_store() and local_rank == self._rank
        failure = RunFailed(f"{holder}, which holds the store where all meet, {how}")
        failure.told = local_rank != (1 if is_beside_it else 0)
        return failure

    def _live(self) -> None:
        """Leave signs, and look for the others', until told to stop."""
        try:
            while not self._stop.is_set():
                self._wake.wait(_BEAT)
                self._wake.clear()
                self._sign()
                if not self._verdict and self._store.check(["verdict"]):
                    self._hear()
                if not self._verdict:
                    self._look()
                elif self._beats - self._verdict_at > _PATIENCE and not self._stop.is_set():
                    self._end_the_process()
                if self._verdict:
                    self._judged.set()
            self._leave()
        except (RuntimeError, ValueError):
            self._is_alone = True
            self._judged.set()

    def _sign(self) -> None:
        self._beats += 1
        self._store.set(str(self._rank), json.dumps([self._beats, self._host, self._state]))

    def _signs(self, ranks: Iterable[int]) -> dict[int, _Sign]:
        asked = list(ranks)
        found = self._store.multi_get([str(rank) for rank in asked])
        signs = {rank: _Sign(*json.loads(value)) for rank, value in zip(asked, found, strict=True)}
        for rank, sign in signs.items():
            if rank not in self._seen or self._seen[rank][0] != sign.beats:
                self._seen[rank] = sign.beats, self._beats
        return signs

    def _look(self) -> None:
        """Look for who has gone: when a collective has failed, or once in a while, the first process for all others and
        the second one for it."""
        if self._asked_at is not None:
            waited = self._beats - self._asked_at
            self._judge(self._signs(range(self._size)), silent=_SILENT, stuck=self._too_late and waited > _PATIENCE)
            # Whose connection broke as a late one's neighbour gave up waits for its verdict, which takes as long.
            if waited > _PATIENCE + (0 if self._too_late else _SILENT) and not self._verdict:
                self._judged.set()
        elif self._rank < 2 and self._beats % _SILENT == 0:
            watched = range(1, self._size) if self._rank == 0 else [0]
            # A process that hangs as a whole fails no collective on a GPU before torch's own end comes, without a name.
            self._judge(self._signs(watched), silent=int(self._timeout.total_seconds() / 2 / _BEAT), stuck=False)

    def _judge(self, signs: dict[int, _Sign], *, silent: int, stuck: bool) -> None:
        """Pronounce who has gone, where one was silent for longer than `silent` beats; or else, with `stuck`, who has
        not noticed that a collective failed."""
        places = {rank: sign.host for rank, sign in signs.items()}
        gone = [rank for rank, sign in signs.items() if sign.state != _LEFT and self._silence(rank) > silent]
        late = [rank for rank, sign in signs.items() if sign.state == _HERE]
        if gone:
            seconds = min(map(self._silence, gone)) * _BEAT
            self._pronounce(
                f"{_named(gone, places)} gave no sign of life for {seconds:.0f} s: killed (by hand, or as memory ran "
                "out), stopped, or lost with its machine"
            )
            self._hear()
        elif stuck and late:
            self._pronounce(
                f"{_named(late, places)} did not come, though alive, to where the others waited for "
                f"{_minutes(self._timeout)} (--distributed-timeout-minutes)"
            )
            self._hear()

    def _silence(self, rank: int) -> int:
        return self._beats - self._seen[rank][1]

    def _pronounce(self, verdict: str) -> None:
        self._store.compare_set("verdict", "", verdict + _GO_ON)  # the first one stays

    def _hear(self) -> None:
        self._verdict = self._store.get("verdict").decode()
        self._verdict_at = self._beats
        self._tells = self._store.add("told", 1) == 1

    def _leave(self) -> None:
        """Leave the own reason, for one of the others to tell; who holds the store goes last, where they leave soon."""
        if self._reason and not self._verdict:
            self._pronounce(f"{_named([self._rank], {self._rank: self._host})} has ended: {self._reason}")
        self._sign()
        if not _holds_store(self._rank):
            return
        for turn in range(20 * (_PATIENCE + 2)):
            if turn % 20 == 19:
                self._sign()  # the others' silence is counted in our own beats
            signs = self._signs(range(1, self._size))
            if all(sign.state == _LEFT or self._silence(rank) > _SILENT for rank, sign in signs.items()):
                break
            time.sleep(_BEAT / 20)

    def _end_the_process(self) -> None:
        """The last resort: the process waits in a collective that torch will end late, and without a name."""
        failure = RunFailed(self._verdict)
        failure.told = not self._tells
        tell(failure)
        os._exit(failure.exit_code)


def _agent_holds_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _holds_store(rank: int) -> bool:
    return rank == 0 and not _agent_holds_store()


def _named(ranks: list[int], places: dict[int, str] | None = None) -> str:
    """As in "process 3 on node7" and "processes 4 on node8, 5 on node8"."""
    names = [f"{rank} on {places[rank]}" if places else str(rank) for rank in ranks[:_NAMED]]
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(names)}{more}"


def _minutes(time: timedelta) -> str:
    minutes = time.total_seconds() / 60
    return f"{minutes:g} minute{'s' if minutes != 1 else ''}"
