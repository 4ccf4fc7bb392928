"""The store where the processes of a run meet: one key-value server, reached at MASTER_ADDR and MASTER_PORT."""

import contextlib
import hashlib
import os
import socket
import threading
from datetime import timedelta

from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from megatron_plm.errors import RunFailed

STORE_ERRORS = (RuntimeError, ValueError)  # of a request: the store is gone, or time is up, each store in its own type
_SECONDS_TO_ANSWER = 5.0


def open_store(rank: int, size: int, timeout: timedelta) -> Store:
    """The store at MASTER_ADDR and MASTER_PORT; under torchrun the agent holds it, else process 0.

    torchrun's `--max-restarts` starts anew with the same store: each attempt has keys of its own. That serves one node:
    of several, those where nothing failed count no attempt, and the processes don't meet. Raises RunFailed where the
    store cannot be reached.
    """
    if "RANK" not in os.environ:
        return HashStore()
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    try:
        store = TCPStore(host, int(port), size, holds_store(rank), timeout, wait_for_workers=False, multi_tenant=True)
    except STORE_ERRORS as error:
        raise RunFailed(
            f"rank {rank} on {socket.gethostname()} did not reach MASTER_ADDR {host or 'missing'}, MASTER_PORT "
            f"{port or 'missing'} within {timeout.total_seconds():g} s ({str(error).splitlines()[0]}); is rank 0 "
            "running there, and the port open between the nodes?"
        ) from None
    return PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def agent_holds_store() -> bool:
    """Whether torchrun's agent holds the store, beside the processes."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def holds_store(rank: int) -> bool:
    """Whether this process holds the store: it should leave last."""
    return rank == 0 and not agent_holds_store()


def come(store: Store, rank: int) -> int:
    """Put this process down as one who has come; returns how many have."""
    store.append("came", f"{rank} ")  # type: ignore[attr-defined]
    return store.add("number", 1)


def is_first(store: Store, what: str) -> bool:
    """Whether no other process has asked this about `what`; so it is where the store has gone, or doesn't answer."""
    answers: list[int] = []

    def ask() -> None:
        with contextlib.suppress(*STORE_ERRORS):
            answers.append(store.add(f"first/{hashlib.sha256(what.encode()).hexdigest()}", 1))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(timeout=_SECONDS_TO_ANSWER)
    return answers in ([1], [])


def who_came(store: Store) -> set[int]:
    """The ranks of those who have come so far, by one request for any number; at least one has."""
    return {int(rank) for rank in store.get("came").split()}
