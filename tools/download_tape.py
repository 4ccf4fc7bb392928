"""Download TAPE's labelled data from its public archive (`--help` lists the flags)."""

import sys

from megatron_plm.errors import run_command
from tape_finetune.download import main

if __name__ == "__main__":
    sys.exit(run_command(main))
