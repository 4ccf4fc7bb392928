"""Checks a cluster before a long run: `torchrun ... tools/preflight.py` with the flags of the run."""

import sys

from megatron_plm.errors import run_command
from megatron_plm.preflight.command import main

if __name__ == "__main__":
    sys.exit(run_command(main))
