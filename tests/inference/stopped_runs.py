"""Runs that are stopped half-way, and what they leave."""

import json
import signal
import subprocess
import sys
from pathlib import Path

from processes import environment, wait_for

# One row a group and a commit after each, and time enough between them to be killed in.
SLOW = """
import sys, time
from megatron_plm.errors import run_command
from megatron_plm.inference import contacts, resumable, runner
resumable.COMMIT_SECONDS = 0
for owner, name in (runner.Runner, "hidden_states"), (runner.Runner, "log_probabilities"), (contacts, "contact_map"):
    def slow(*arguments, plain=getattr(owner, name)):
        time.sleep(0.05)
        return plain(*arguments)
    setattr(owner, name, slow)
import importlib
from megatron_plm.cli import VERBS
sys.exit(run_command(importlib.import_module(VERBS[sys.argv[1]][0]).main, sys.argv[2:]))
"""


def journal(output: Path) -> dict:
    path = output.with_name(f"{output.name}.partial") / "journal.json"
    return json.loads(path.read_text()) if path.exists() else {"records": 0}


def killed(argv: list[str], output: Path, records: int, how: signal.Signals = signal.SIGKILL) -> str:
    """Run the command until so many records are certain, and stop it; returns what it said on standard error."""
    process = subprocess.Popen([sys.executable, "-c", SLOW, *argv], env=environment(), stderr=subprocess.PIPE)
    try:
        wait_for(lambda: journal(output)["records"] >= records, "work", process=process, seconds=200)
    finally:
        process.send_signal(how)
        told = process.communicate(timeout=100)[1].decode()
    assert not output.exists()
    return told
