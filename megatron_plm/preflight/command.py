"""The preflight command: started as the training would be, with its flags, it says green or red in a minute or two."""

import json
import os
import sys
import time
from argparse import BooleanOptionalAction
from collections.abc import Sequence
from pathlib import Path

from megatron_plm.arguments import ArgumentParser
from megatron_plm.config.layout import Layout
from megatron_plm.config.load import load_config
from megatron_plm.config.options import Config
from megatron_plm.config.problems import problems
from megatron_plm.errors import UserError, tell
from megatron_plm.files import atomic_file
from megatron_plm.invocation import EXIT_CODE_FILE
from megatron_plm.parallel.mesh import check_devices, joined_world, local_rank, world_size
from megatron_plm.preflight.bandwidth import check_bandwidth
from megatron_plm.preflight.facts import DECIDE_COLLECTIVES, check_equal, check_limits, own_facts
from megatron_plm.preflight.meeting import Meeting
from megatron_plm.preflight.page import Check, is_green, page
from megatron_plm.preflight.storage import check_storage

_LARGEST_CLOCK_SKEW = 1.0  # seconds; beyond it times in logs and on files of several nodes mislead


def main(argv: Sequence[str]) -> int:
    """Check the machines; returns 0 for green and 1 for red, in every process. Raises UserError for wrong flags.

    Under launch/pretrain.sh the code goes to the file that it names, as torchrun would report it as a crash.
    """
    path = os.environ.get(EXIT_CODE_FILE)
    try:
        code = _preflight(argv)
    except UserError as error:
        if error.told is None:
            error.told = local_rank() > 0  # all processes of a machine find it alike
        if path is None:
            raise
        tell(error)
        code = error.exit_code
    if path is None:
        return code
    if local_rank() == 0:
        Path(path).write_text(str(code))
    return 0


def _preflight(argv: Sequence[str]) -> int:
    parser = ArgumentParser(
        prog="tools/preflight.py",
        description=__doc__,
        epilog="All other flags are launch/pretrain.sh's: give those of the run.",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all that was found as JSON")
    parser.add_argument(
        "--wait-seconds", type=float, default=120.0, help="how long a process is waited for (default: 120)"
    )
    parser.add_argument(
        "--storage-mebibytes", type=int, default=1024, help="written and read by each node (default: 1024)"
    )
    parser.add_argument(
        "--bandwidth", action=BooleanOptionalAction, default=True, help="measure the dims of the mesh (default: yes)"
    )
    options, training_flags = parser.parse_known_args(argv)
    for name in ("wait_seconds", "storage_mebibytes"):
        if getattr(options, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {getattr(options, name)}")
    config, _ = load_config(training_flags, prog=parser.prog)
    found = problems(config, world_size=world_size())
    if found:
        raise UserError("\n       ".join(found))
    check_devices()
    meeting = Meeting(options.wait_seconds)
    checks = [_check_processes(meeting)]
    if is_green(checks):
        checks += _checks(config, meeting, options.storage_mebibytes * 2**20, options.bandwidth)
    if meeting.rank == meeting.speaker:
        layout = Layout.of(config.parallel, meeting.size)
        nodes = len(meeting.first_of_node)
        title = f"Preflight of {_count(meeting.size, 'process')} on {_count(nodes, 'node')}: {layout}"
        print(page(title, checks, colour=sys.stdout.isatty()))
        if options.output:
            _write(options.output, title, checks)
    return 0 if meeting.leave(is_green(checks)) else 1


def _checks(config: Config, meeting: Meeting, storage_bytes: int, bandwidth: bool) -> list[Check]:
    """Everything but the roll call. Collective."""
    hosts = meeting.hosts
    facts = meeting.gather("facts", own_facts(config))
    checks = [check_equal(group, facts, hosts) for group in facts[0]["equal"]]
    may_talk = all(check.good for check in checks if check.name in DECIDE_COLLECTIVES)
    checks += check_limits(facts, hosts, max(1, meeting.size // len(meeting.first_of_node)))
    checks.append(_check_clocks(meeting))
    checks += check_storage(config, meeting, num_bytes=storage_bytes)
    if meeting.size > 1:
        if bandwidth and may_talk:
            with joined_world(config.parallel, timeout_minutes=config.training.distributed_timeout_minutes) as world:
                checks += check_bandwidth(world)
        else:
            reason = "--no-bandwidth was given" if may_talk else "the processes differ"
            checks.append(Check("bandwidth", None, f"not measured, as {reason}"))
    return checks


def _check_processes(meeting: Meeting) -> Check:
    if not meeting.missing:
        return Check("processes", True, f"all {meeting.size} came within {meeting.seconds:.1f} s")
    shown = ", ".join(map(str, meeting.missing[:16])) + (", ..." if len(meeting.missing) > 16 else "")
    present = ", ".join(sorted(set(meeting.hosts.values()))[:16])
    return Check(
        "processes",
        False,
        f"{len(meeting.missing)} of {meeting.size} did not come: rank {shown}; those that came run on {present}",
    )


def _check_clocks(meeting: Meeting) -> Check:
    offsets = meeting.clock_offsets()
    values = {meeting.hosts[rank]: ahead for rank, (ahead, _) in offsets.items()}
    if not offsets:
        return Check("clocks", None, "one node, one clock")
    worst = max(offsets, key=lambda rank: abs(offsets[rank][0]))
    ahead, uncertain = offsets[worst]
    # Only what the way of the pings cannot explain counts.
    good = abs(ahead) - uncertain <= _LARGEST_CLOCK_SKEW
    text = f"{meeting.hosts[worst]} is {abs(ahead):.3f} s {'ahead of' if ahead > 0 else 'behind'} rank 0's node"
    text += f" (± {uncertain:.3f} s), the most of all"
    if not good:
        text += f"; at most {_LARGEST_CLOCK_SKEW:g} s: see whether NTP runs there"
    return Check("clocks", good, text, {"seconds_ahead": values})


def _write(path: Path, title: str, checks: Sequence[Check]) -> None:
    report = {
        "title": title,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "green": is_green(checks),
        "checks": [check._asdict() for check in checks],
    }
    with atomic_file(path) as aside:
        aside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number} {noun if number == 1 else plural}"
