"""Embeddings of the proteins of any sequence file, from any checkpoint (`--help` lists the flags)."""

import sys

from megatron_plm.errors import run_command
from megatron_plm.inference.embed import main

if __name__ == "__main__":
    sys.exit(run_command(main))
