"""Write several datasets, end to end, as one; see `--help` and docs/data.md."""

import sys

from megatron_plm.data.merge import main
from megatron_plm.errors import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
