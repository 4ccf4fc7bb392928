"""Where the processes of a run come together, and how they end when one of them has gone: it is told by name.

That a collective fails, or takes too long, doesn't tell whose fault it is. So each process takes part in a watch over
all (watch.py) from a thread, which goes on while the process waits, and leaves its reason where it ends before the
others. All end by one verdict, and one of them tells it.
"""

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import Self

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from megatron_plm.errors import RunFailed, UserError, tell
from megatron_plm.parallel.store import STORE_ERRORS, agent_holds_store, come, holds_store, who_came
from megatron_plm.parallel.watch import CUT, GO_ON, LATE, LEFT, PATIENCE, Watch, named

_BEAT = 1.0  # seconds between two signs
_ANSWERED = 2 * PATIENCE  # beats in which who asks has a verdict, if there is one
_ALL_CAME = "all came"


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


class OthersFailed(RunFailed):
    """Another process has gone or hangs; where it hangs, it is still there."""


class Presence:
    """This process among all of the run, which come together on entering it.

    Leaving by an error of its own, a process tells the others its reason. Leaving as a collective has failed, it raises
    OthersFailed with the name of the process that is to blame, where one is. A process that goes on waiting when
    somebody was found to have gone is ended, with exit code 1. Entering raises OthersFailed where not all come in time.

    Attributes:
        store: a connection of its own, which never waits behind the other one's requests; for quick ones alone.
        is_alone: the store has gone, or doesn't answer.
        at_failure: called by the process that tells the verdict, in a thread: it may hang as the run does.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        self.store = PrefixStore("presence", store.clone())  # type: ignore[attr-defined]
        self.at_failure: Callable[[], None] | None = None
        self._rank, self._size, self._timeout = rank, size, timeout
        self._host, self._reason = socket.gethostname(), ""
        # A process that hangs as a whole fails no collective on a GPU before torch's own end comes, without a name.
        quiet = max(PATIENCE, int(timeout.total_seconds() / 2 / _BEAT))
        self._watch = Watch(self.store, rank, size, self._host, quiet=quiet, limit=_minutes(timeout))
        self._asked_at: int | None = None  # our beat when a collective had failed
        self._heard_at: int | None = None  # and when there was a verdict
        self._tells = self.is_alone = False
        self._answered, self._stop, self._wake = threading.Event(), threading.Event(), threading.Event()
        self._acting: threading.Thread | None = None
        self._thread = threading.Thread(target=self._live, name="presence", daemon=True)

    def __enter__(self) -> Self:
        try:
            word = self._meet()
        except STORE_ERRORS:
            raise self._lost_store("has gone") from None
        if word != _ALL_CAME:
            failure = OthersFailed(word)
            failure.told = self.store.add("told", 1) > 1
            if holds_store(self._rank):
                time.sleep(_BEAT)  # the others read it too
            raise failure
        self._thread.start()
        return self

    def _meet(self) -> str:
        """Wait for all to come; returns the first word about it: that they have, or who has not."""
        self._watch.sign()
        if come(self.store, self._rank) == self._size:
            Watch.prepare(self.store)
            self.store.compare_set("all", "", _ALL_CAME)
        begin = time.monotonic()
        # No long wait within the store, which is deaf to Ctrl-C.
        while not self.store.check(["all"]) and (waited := time.monotonic() - begin) < self._timeout.total_seconds():
            time.sleep(min(0.05 + waited / 10, 0.5))
        if not self.store.check(["all"]):
            absent = sorted(set(range(self._size)) - who_came(self.store))
            self.store.compare_set(
                "all",
                "",
                f"{named(absent)} did not come within {_minutes(self._timeout)} (--distributed-timeout-minutes); look "
                "for its own message, and whether all were started",
            )
        return self.store.get("all").decode()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        failure = None
        if is_broken_connection(error):
            failure = self._blame(late=_took_too_long(error))
        elif error is not None and not isinstance(error, UserError):  # which all find alike
            cause = (error.__context__ if isinstance(error, SystemExit) else None) or error
            self._reason = f"{type(cause).__name__}: {cause}".splitlines()[0].rstrip(": ")
        self._watch.state = LEFT
        self._stop.set()
        self._wake.set()
        if not self.is_alone:
            self._thread.join(timeout=2 * PATIENCE * _BEAT)
        self._finish_acting()
        if failure is not None:
            raise failure from None
        if self._tells and error is not None:  # which has nothing to do with it
            tell(RunFailed(self._watch.verdict))

    def _blame(self, *, late: bool) -> OthersFailed | None:
        """Whose fault it is that a collective has failed; None where nobody seems to be missing."""
        self._asked_at, self._watch.state = self._watch.beats, LATE if late else CUT
        self._wake.set()
        if not self._answered.wait(timeout=(_ANSWERED + PATIENCE) * _BEAT) or self.is_alone:
            self.is_alone = True
            if not self._watch.verdict:
                return self._lost_store(f"has gone or hangs{GO_ON}")
        if not self._watch.verdict:
            return None
        failure = OthersFailed(self._watch.verdict)
        failure.told = not self._tells
        return failure

    def _lost_store(self, how: str) -> OthersFailed:
        """Nothing can be asked: one process of each node tells."""
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        holder = f"the node of MASTER_ADDR {os.environ.get('MASTER_ADDR')}" if agent_holds_store() else "process 0"
        is_beside_it = not agent_holds_store() and local_rank == self._rank
        failure = OthersFailed(f"{holder}, which holds the store where all meet, {how}")
        failure.told = local_rank != (1 if is_beside_it else 0)
        if not failure.told:
            self._act()
        return failure

    def _live(self) -> None:
        """Take part in the watch until told to stop."""
        watch = self._watch
        try:
            while not self._stop.is_set():
                self._wake.wait(_BEAT)
                self._wake.clear()
                watch.beat()
                if watch.verdict and self._heard_at is None:
                    self._heard_at = watch.beats
                    self._tells = self.store.add("told", 1) == 1
                    if self._tells:
                        self._act()
                    self._answered.set()
                elif self._heard_at is not None and watch.beats - self._heard_at > PATIENCE:
                    if not self._stop.is_set():
                        self._end_the_process()
                elif self._asked_at is not None and watch.beats - self._asked_at > _ANSWERED:
                    self._answered.set()
            self._leave()
        except STORE_ERRORS:
            self.is_alone = True
            self._answered.set()

    def _leave(self) -> None:
        """Leave the own reason, for one of the others to tell; who holds the store goes last, where they leave soon."""
        if self._reason and not self._watch.verdict:
            self._watch.pronounce(f"{named([self._rank], {self._rank: self._host})} has ended: {self._reason}")
        self._watch.sign()
        count = self.store.add("left", 1)
        if not holds_store(self._rank):
            return
        for turn in range(20 * (PATIENCE + 2)):
            if turn % 20 == 19:
                self._watch.beats += 1  # the others' silence is counted in them
                self._watch.sign()
                if self._watch.all_others_left():
                    break
            if count >= self._size:
                break
            time.sleep(_BEAT / 20)
            count = self.store.add("left", 0)

    def _act(self) -> None:
        if self.at_failure is not None:
            self._acting = threading.Thread(target=self.at_failure, name="at failure", daemon=True)
            self._acting.start()

    def _finish_acting(self) -> None:
        if self._acting is not None:
            self._acting.join(timeout=PATIENCE * _BEAT)

    def _end_the_process(self) -> None:
        """The last resort: the process waits in a collective that torch will end late, and without a name."""
        failure = RunFailed(self._watch.verdict)
        failure.told = not self._tells
        tell(failure)
        self._finish_acting()
        os._exit(failure.exit_code)


def _minutes(time: timedelta) -> str:
    minutes = time.total_seconds() / 60
    return f"{minutes:g} minute{'s' if minutes != 1 else ''}"
