"""Turn PDB and mmCIF files into TAPE's records; see --help."""

import sys

from megatron_plm.errors import run_command
from tape_finetune.structures_to_tape import main

if __name__ == "__main__":
    sys.exit(run_command(main))
