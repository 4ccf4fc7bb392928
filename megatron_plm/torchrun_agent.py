"""torchrun as launch/pretrain.sh runs it: `python -m megatron_plm.torchrun_agent` takes torchrun's arguments.

torchrun ends a signalled run with a traceback of its own, although the workers have saved and said so, and one with a
process that died with a table; here one sentence names the process.
"""

import os
import signal
import socket
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def run() -> int:
    """Run torchrun's agent; returns its exit code. Workers that ended in order wrote theirs elsewhere."""
    # A shell starts what it sends to the background deaf to it. First of all, as importing torch takes a while.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    # It leaves the shell's process group, so that Ctrl-C and `timeout`, which signal all of it, reach it once.
    os.setpgrp()
    try:
        main()
    except SignalException:
        return 1
    except ChildFailedError as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 1
    return 0


def sentence(error: "ChildFailedError") -> str:
    """Which process failed first, and how."""
    rank, failure = error.get_first_failure()
    who = f"process {rank} on {socket.gethostname()}"
    if failure.exitcode >= 0:
        return f"{who} ended with exit code {failure.exitcode}; what it said is above"
    name = failure.signal_name()
    why = " (by hand, or as memory ran out)" if name == "SIGKILL" else ""
    return f"{who} was ended by {name}{why}, and so were the others; go on from the last checkpoint with --load"


if __name__ == "__main__":
    sys.exit(run())
