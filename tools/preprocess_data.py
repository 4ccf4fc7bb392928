"""Turn sequence files into a dataset for pretraining; see `--help` and docs/data.md."""

import sys

from megatron_plm.data.preprocess import main
from megatron_plm.errors import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
