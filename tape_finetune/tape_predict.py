"""Predict with a fine-tuned model what no one has measured yet; see --help."""

import sys

from megatron_plm.errors import run_command
from tape_finetune.predict import main

if __name__ == "__main__":
    sys.exit(run_command(main))
