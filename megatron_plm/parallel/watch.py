"""Signs of life, and who judges by them: what the processes of a run leave for each other in the store, beat by beat.

Each process leaves a sign at every beat. One of them, the judge, reads them all; the others read no more than the
verdict, the judge's last term, and whether somebody asks for a verdict: two requests a beat, among any number of
processes. Where the judge gives no sign, one of the others takes its office.

Nothing here reads a clock. Silence is counted in beats of the one who listens, so that clocks may differ, and a process
that was paused doesn't take the others for dead.
"""

import json
from typing import NamedTuple

from torch._C._distributed_c10d import Store

SILENT = 5  # beats without another's sign after which, when a collective has failed, that one has gone
PATIENCE = 10  # beats in which all others have noticed what one of them has
_NAMED = 8  # processes that a message names
GO_ON = "; go on from the last checkpoint with --load"

HERE, LATE, CUT, LEFT = "here", "waited in vain", "lost a connection", "left"
_BOARD = ["verdict", "judge", "asked"]


class _Sign(NamedTuple):
    """What a process leaves: how many signs so far, where it runs, and how it is."""

    beats: int
    host: str
    state: str


class Watch:
    """This process's part in watching over all of them.

    Attributes:
        state: how this process is, which its next sign says: HERE; LATE, as a collective failed by the time it took, or
            CUT, as one failed otherwise, and in both cases it asks who is to blame; LEFT.
        beats: how many there have been.
        verdict: who is to blame for the end of the run, once that is known; the first one stays.
    """

    def __init__(self, store: Store, rank: int, size: int, host: str, *, quiet: int, limit: str) -> None:
        """`quiet` is after how many silent beats one has gone, where no collective has failed; `limit` says in words
        how long a collective waits."""
        self._store, self._rank, self._size, self._host = store, rank, size, host
        self._quiet, self._limit = quiet, limit
        self.state, self.beats, self.verdict = HERE, 0, ""
        self._asked = False
        self._judge, self._judge_since = _term(0, 0), 0  # the term on the board, and our beat when it was new
        self._own_term = _term(0, 0) if rank == 0 else ""
        self._office_since = 0
        self._seen: dict[int, tuple[int, int]] = {}  # by rank: its last beat, and ours when it was new
        self._late_since: int | None = None

    @staticmethod
    def prepare(store: Store) -> None:
        """Put up the board, with process 0 as the judge, before anybody reads it."""
        for key, word in zip(_BOARD, ("", _term(0, 0), ""), strict=True):
            store.set(key, word)

    def beat(self) -> None:
        """Leave a sign and read the board; as the judge, look for who has gone."""
        self.beats += 1
        self.sign()
        if self.state in (LATE, CUT) and not self._asked:
            self._store.set("asked", "yes")
            self._asked = True
        verdict, judge, asked = (word.decode() for word in self._store.multi_get(_BOARD))
        if verdict:
            self.verdict = verdict
        elif self._is_judge(judge, hurry=bool(asked)):
            self._look(hurry=bool(asked))

    def sign(self) -> None:
        """Leave a sign, and no more."""
        self._store.set(_key(self._rank), json.dumps([self.beats, self._host, self.state]))

    def pronounce(self, verdict: str) -> None:
        """Put a verdict on the board, if there is none."""
        self._store.compare_set("verdict", "", verdict + GO_ON)

    def all_others_left(self) -> bool:
        """Whether no other process gives signs that it is still there."""
        signs = self._signs()
        return all(
            rank == self._rank or sign.state == LEFT or self._silence(rank) > SILENT for rank, sign in signs.items()
        )

    def _is_judge(self, term: str, *, hurry: bool) -> bool:
        """Whether this process is the judge, by the `term` on the board. It stays so by renewing that at every beat;
        else it becomes so where the other one's is too old, of all that try the quickest."""
        if term != self._judge:
            self._judge, self._judge_since = term, self.beats
        is_own = term == self._own_term
        if not is_own and self.beats - self._judge_since <= (SILENT if hurry else self._quiet):
            return False
        renewed = _term(self._rank, self.beats)
        if self._store.compare_set("judge", term, renewed).decode() != renewed:
            return False  # another one was quicker, or took over while this one was paused
        if not is_own:
            predecessor, its_beat = map(int, term.split())
            self._seen = {predecessor: (its_beat, self._judge_since)}
            self._office_since = self.beats
        self._own_term = renewed
        return True

    def _look(self, *, hurry: bool) -> None:
        """Pronounce who has gone, where one was silent for too long; or else, where some waited in vain, who has not
        noticed. `hurry`: somebody asks."""
        if not hurry and self.beats % SILENT:
            return
        signs = self._signs()
        if self.beats - self._office_since <= SILENT:
            return  # too new to know who is silent
        places = {rank: sign.host for rank, sign in signs.items()}
        # A machine's processes go together, but a beat or so apart.
        gone = [rank for rank, sign in signs.items() if sign.state != LEFT and self._silence(rank) >= SILENT - 1]
        late = [rank for rank, sign in signs.items() if sign.state == HERE]
        if self._late_since is None and any(sign.state == LATE for sign in signs.values()):
            self._late_since = self.beats
        if max(map(self._silence, gone), default=0) > (SILENT if hurry else self._quiet):
            self.pronounce(
                f"{named(gone, places)} gave no sign of life for {min(map(self._silence, gone))} s: killed (by hand, "
                "or as memory ran out), stopped, or lost with its machine"
            )
        elif late and self._late_since is not None and self.beats - self._late_since > PATIENCE:
            self.pronounce(
                f"{named(late, places)} did not come, though alive, to where the others waited for {self._limit} "
                "(--distributed-timeout-minutes)"
            )

    def _signs(self) -> dict[int, _Sign]:
        found = self._store.multi_get([_key(rank) for rank in range(self._size)])
        signs = {rank: _Sign(*json.loads(value)) for rank, value in enumerate(found)}
        for rank, sign in signs.items():
            if rank not in self._seen or self._seen[rank][0] != sign.beats:
                self._seen[rank] = sign.beats, self.beats
        return signs

    def _silence(self, rank: int) -> int:
        return self.beats - self._seen[rank][1]


def named(ranks: list[int], places: dict[int, str] | None = None) -> str:
    """As in "process 3 on node7" and "processes 4 on node8, 5 on node8"."""
    names = [f"{rank} on {places[rank]}" if places else str(rank) for rank in ranks[:_NAMED]]
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(names)}{more}"


def _key(rank: int) -> str:
    return f"sign/{rank}"


def _term(rank: int, beats: int) -> str:
    return f"{rank} {beats}"
