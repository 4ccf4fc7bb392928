"""Write the HTML report of a pretraining run and its downstream results (`--help` lists the flags)."""

import sys

from megatron_plm.errors import run_command
from megatron_plm.report.command import main

if __name__ == "__main__":
    sys.exit(run_command(main))
