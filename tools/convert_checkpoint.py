"""Convert a checkpoint from one format to another (`--help` lists the flags)."""

import sys

from megatron_plm.convert.command import main
from megatron_plm.errors import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
