"""Fine-tune a base model on a labelled task and score it; see --help."""

import sys

from megatron_plm.errors import run_command
from tape_finetune.train import main

if __name__ == "__main__":
    sys.exit(run_command(main))
