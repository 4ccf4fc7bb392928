"""Train a sentencepiece tokenizer on sequence files; see `--help` and docs/tokenizers.md."""

import sys

from megatron_plm.data.train_tokenizer import main
from megatron_plm.errors import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
