"""ProteinLM's converter to its TAPE fork, with its flags (`--help` lists them)."""

import sys

from megatron_plm.convert.megatron_converter import main
from megatron_plm.errors import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
