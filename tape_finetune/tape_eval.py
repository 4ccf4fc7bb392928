"""Score a fine-tuned model on a split; see --help."""

import sys

from megatron_plm.errors import run_command
from tape_finetune.evaluate import main

if __name__ == "__main__":
    sys.exit(run_command(main))
