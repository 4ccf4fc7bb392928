"""Show what a dataset holds, and whether it is whole; see `--help` and docs/data.md."""

import sys

from megatron_plm.data.inspect.command import main
from megatron_plm.errors import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
