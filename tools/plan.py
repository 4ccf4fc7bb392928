"""Which layouts of a number of GPUs fit a model, and how fast each would be; see `--help` and docs/parallelism.md."""

import sys

from megatron_plm.errors import run_command
from megatron_plm.plan.command import main

if __name__ == "__main__":
    sys.exit(run_command(main))
