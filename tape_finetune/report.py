"""Report all tasks of some models beside the published values; see --help."""

import sys

from megatron_plm.errors import run_command
from tape_finetune.reporting.command import main

if __name__ == "__main__":
    sys.exit(run_command(main))
