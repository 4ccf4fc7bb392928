"""The file `status` of a run that one process begins and another may have to end: one word, written once."""

import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import PrefixStore, TCPStore

from megatron_plm.config.options import Config, TrainingOptions
from megatron_plm.parallel.mesh import World
from megatron_plm.parallel.presence import Presence
from megatron_plm.training import run_directory
from megatron_plm.training.run_directory import RunStatus


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The status as two processes have it, and what they do when the other one is found to have gone."""
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    presences = [Presence(PrefixStore("run", server), rank, 2, timedelta(minutes=1)) for rank in range(2)]
    config = Config(training=TrainingOptions(save=str(tmp_path)))
    worlds = [World(rank, 2, torch.device("cpu"), None, presence=presences[rank]) for rank in range(2)]
    written, write = [], run_directory.write_status
    monkeypatch.setattr(run_directory, "write_status", lambda *words: (written.append(words[1]), write(*words)))
    main, other = (RunStatus(config, world) for world in worlds)
    with other:
        yield SimpleNamespace(
            main=main,
            finds_failure=presences[1].at_failure,
            written=written,
            file=tmp_path / "status",
            lose_store=lambda: monkeypatch.setattr(presences[1], "store", unreachable()),
        )


def unreachable():
    """A connection to a store that has gone."""
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    store = server.clone()
    del server
    return store


@pytest.mark.parametrize("loses_store", [False, True])
@pytest.mark.parametrize("word", ["finished", "interrupted"])
def test_what_the_main_process_says_at_its_end_stays(run, word, loses_store):
    with run.main:
        assert run.file.read_text() == "running\n"
        run.main.end(word)
    if loses_store:
        run.lose_store()
    run.finds_failure()
    assert run.file.read_text() == f"{word}\n"
    assert run.written == ["running", word]


def test_what_another_process_had_to_say_for_it_stays_where_it_fails_too(run):
    run.main.__enter__()
    run.finds_failure()
    assert run.file.read_text() == "failed\n"
    run.main.__exit__(LookupError, LookupError(), None)
    assert run.file.read_text() == "failed\n"
    assert run.written == ["running", "failed"]


@pytest.mark.parametrize("word", ["finished", "interrupted"])
@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_a_main_process_that_was_only_slow_has_the_last_word_where_it_ends_well(run, monkeypatch, word, seconds):
    write, is_about_to = run_directory.write_status, threading.Event()

    def slowly(directory, status):
        if status == "failed":
            is_about_to.set()
            time.sleep(seconds)
        write(directory, status)

    monkeypatch.setattr(run_directory, "write_status", slowly)
    with run.main:
        found = threading.Thread(target=run.finds_failure)
        found.start()
        assert is_about_to.wait(timeout=60)
        run.main.end(word)
    found.join()
    assert run.file.read_text() == f"{word}\n"
    assert run.written == ["running", "failed", word]


def test_where_the_store_has_gone_another_process_writes_unasked(run):
    run.main.__enter__()
    run.lose_store()
    run.finds_failure()
    assert run.file.read_text() == "failed\n"


def test_an_error_of_the_main_process_is_a_failure_even_after_the_last_step(run):
    with pytest.raises(LookupError), run.main:  # noqa: PT012
        run.main.end("finished")
        raise LookupError
    run.finds_failure()
    assert run.file.read_text() == "failed\n"
    assert run.written == ["running", "failed"]


def test_a_run_that_has_not_begun_leaves_the_word_of_the_one_before(run):
    run.file.write_text("interrupted\n")
    run.finds_failure()
    assert run.file.read_text() == "interrupted\n"
    with run.main:
        run.main.end("finished")
    assert run.file.read_text() == "finished\n"
