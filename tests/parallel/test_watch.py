"""Who is found to have gone, by processes that beat by hand: a real store, no clock, and as many of them as we like."""

import itertools
import random
import re
from datetime import timedelta

import pytest
from torch.distributed import PrefixStore, TCPStore

from megatron_plm.errors import RunFailed
from megatron_plm.parallel.presence import Presence
from megatron_plm.parallel.store import come
from megatron_plm.parallel.watch import CUT, LATE, LEFT, PATIENCE, SILENT, Watch

QUIET = 20
FOUND = 3 * SILENT  # beats that taking over, listening and judging take at most, beside the silence that has to pass


class Counted:
    """A store that notes what is asked of it, and by whom it is held."""

    def __init__(self, store):
        self.store, self.requests = store, []

    def __getattr__(self, name):
        def request(*arguments):
            self.requests.append((name, *arguments))
            return getattr(self.store, name)(*arguments)

        return request

    def reads_signs(self) -> bool:
        return any(name == "multi_get" and "sign/0" in arguments[0] for name, *arguments in self.requests)


class Processes:
    """So many processes, four a machine, that beat in turn, each round in another order."""

    def __init__(self, server, size, folder):
        store = PrefixStore(folder, server)
        self.stores = [Counted(store) for _ in range(size)]
        self.watches = [
            Watch(counted, rank, size, f"node{rank // 4}", quiet=QUIET, limit="10 minutes")
            for rank, counted in enumerate(self.stores)
        ]
        for watch in self.watches:
            watch.sign()
        Watch.prepare(store)
        self.order = random.Random(size)

    def beat(self, times, *, without=()):
        """Let all beat, except for some; returns the verdicts that they have then, one where all agree."""
        living = [rank for rank in range(len(self.watches)) if rank not in without]
        for _ in range(times):
            for rank in self.order.sample(living, len(living)):
                self.watches[rank].beat()
        return {self.watches[rank].verdict for rank in living}

    def ask(self, state, *, without=()):
        for rank, watch in enumerate(self.watches):
            if rank not in without:
                watch.state = state

    def forget_requests(self):
        for store in self.stores:
            store.requests.clear()

    def judges(self):
        return [rank for rank, store in enumerate(self.stores) if store.reads_signs()]


@pytest.fixture(scope="module")
def server():
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def processes(server, request):
    return lambda size: Processes(server, size, f"{request.node.name} {size}")


def named(verdict):
    """The ranks that a verdict names, and how it goes on."""
    who, how = re.fullmatch(r"process(?:es)? ((?:\d+ on node\d+(?:, )?)+) (.*)", verdict).groups()
    assert all(int(machine) == int(rank) // 4 for rank, machine in re.findall(r"(\d+) on node(\d+)", who))
    return {int(rank) for rank in re.findall(r"(\d+) on", who)}, how


@pytest.mark.parametrize("size", [8, 1000])
def test_a_beat_is_two_requests_of_all_but_the_judge_among_any_number(processes, size):
    run = processes(size)
    run.beat(SILENT)
    assert run.judges() == [0]
    for rank, store in enumerate(run.stores[1:], 1):
        assert len(store.requests) == 1 + 2 * SILENT, f"process {rank}, with its sign before the first beat"
    assert len(run.stores[0].requests) <= 1 + 4 * SILENT
    assert max(len(words[0]) for store in run.stores[1:] for name, *words in store.requests if name == "multi_get") <= 3

    run.forget_requests()
    gone = size // 2
    run.watches[1].state = CUT
    (verdict,) = run.beat(FOUND, without=[gone])
    assert named(verdict)[0] == {gone}
    assert run.judges() == [0]
    for rank, store in enumerate(run.stores):
        assert len(store.requests) <= {0: 5, 1: 2}.get(rank, 2) * FOUND + (rank == 1)


def test_the_judges_office_is_one_request_of_all_where_it_has_gone(processes):
    run = processes(500)
    run.beat(1)
    run.forget_requests()
    run.watches[1].state = CUT
    (verdict,) = run.beat(FOUND, without=[0])
    assert named(verdict)[0] == {0}
    (judge,) = run.judges()
    for rank, store in enumerate(run.stores):
        if rank not in (0, 1, judge):
            # Who comes too late for the office tries once.
            assert len(store.requests) <= 2 * FOUND + 1


def test_who_does_not_come_is_found_by_one_request(server):
    store, size, absent = PrefixStore("absent", server), 1000, [3, 500, 999]
    presence = Presence(store, 0, size, timedelta(seconds=0.3))
    for rank in set(range(1, size)) - set(absent):
        come(PrefixStore("presence", store), rank)
    presence.store = Counted(presence.store)
    with pytest.raises(RunFailed, match=r"processes 3, 500, 999 did not come within 0\.005 minutes"):
        presence.__enter__()
    names = [name for name, *_ in presence.store.requests]
    assert names.count("get") == 2, "who came, and the word about it"
    assert len([name for name in names if name != "check"]) < 10
    assert {len(words[0]) for name, *words in presence.store.requests if name == "check"} == {1}


@pytest.mark.parametrize("asked", [True, False])
def test_whichever_processes_go_at_once_they_are_named_and_nobody_else(server, asked):
    size = 5
    for number in range(1, size):
        for gone in itertools.combinations(range(size), number):
            run = Processes(server, size, f"{asked} {gone}")
            assert run.beat(SILENT + 1) == {""}
            if asked:
                run.ask(CUT, without=gone)
            else:
                assert run.beat(QUIET - SILENT, without=gone) == {""}, "they may be busy"
            (verdict,) = run.beat(FOUND + (0 if asked else QUIET), without=gone)
            ranks, how = named(verdict)
            assert ranks == set(gone)
            assert re.match(r"gave no sign of life for \d+ s: killed ", how)
            assert how.endswith("; go on from the last checkpoint with --load")


def test_a_machine_that_is_lost_with_the_judge_is_named_as_a_whole_though_its_processes_end_a_beat_apart(processes):
    run = processes(12)
    run.beat(7)
    run.beat(1, without=[1])
    run.ask(CUT, without=range(4))
    (verdict,) = run.beat(FOUND, without=range(4))
    assert named(verdict)[0] == {0, 1, 2, 3}


def test_a_successor_that_goes_too_is_succeeded(processes):
    run = processes(6)
    run.beat(3)
    run.forget_requests()
    run.beat(QUIET + 4, without=[0])
    (second,) = run.judges()
    assert second != 0
    (verdict,) = run.beat(3 * QUIET, without=[0, second])
    assert {second} <= named(verdict)[0] <= {0, second}


def test_a_judge_that_comes_back_has_lost_its_office_and_takes_nobody_for_dead(processes):
    run = processes(6)
    run.beat(3)
    run.beat(QUIET + 2, without=[0])
    run.forget_requests()
    assert run.beat(3 * QUIET) == {""}
    (judge,) = run.judges()
    assert judge != 0


def test_a_process_that_was_paused_takes_nobody_for_dead_and_is_not_itself_where_nobody_asked(processes):
    run = processes(6)
    run.beat(3)
    run.beat(QUIET - SILENT, without=[0, 4])  # the judge too
    assert run.beat(3 * QUIET) == {""}


@pytest.mark.parametrize("late", [0, 1, 5])
def test_who_does_not_come_though_alive_is_named_when_all_others_could_notice(processes, late):
    run = processes(6)
    run.beat(4)
    run.watches[(late + 1) % 6].state = LATE
    assert run.beat(PATIENCE - 1) == {""}
    run.ask(CUT, without=[(late + 1) % 6, late])
    (verdict,) = run.beat(FOUND)
    ranks, how = named(verdict)
    assert ranks == {late}
    assert how.startswith("did not come, though alive, to where the others waited for 10 minutes (--distributed-")


def test_nobody_is_blamed_for_a_lost_connection_where_all_are_alive_or_have_left(processes):
    run = processes(6)
    run.beat(6)
    run.watches[2].state = run.watches[0].state = LEFT
    run.beat(1)
    run.ask(CUT, without=[0, 2, 5])
    assert run.beat(3 * QUIET, without=[0, 2]) == {""}


def test_the_first_verdict_stays(processes):
    run = processes(3)
    run.beat(1)
    run.watches[2].pronounce("process 2 has ended: a reason")
    run.watches[1].pronounce("process 1 has ended: another")
    (verdict,) = run.beat(1)
    run.ask(CUT, without=[0])
    assert run.beat(3 * QUIET, without=[0]) == {verdict}
    assert verdict == "process 2 has ended: a reason; go on from the last checkpoint with --load"


def test_who_holds_the_store_knows_when_all_others_have_left_or_gone(processes):
    run = processes(3)
    run.beat(1)
    assert not run.watches[0].all_others_left()
    run.watches[1].state = LEFT
    run.beat(SILENT, without=[2])
    assert not run.watches[0].all_others_left()
    run.beat(2, without=[1, 2])
    assert run.watches[0].all_others_left()
