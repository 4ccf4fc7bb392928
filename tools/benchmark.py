"""Measures this code against its peers: `tools/benchmark.py SUBJECT --help`."""

import sys

from megatron_plm.benchmark.command import main
from megatron_plm.errors import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
