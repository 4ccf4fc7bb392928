"""`megatron-plm VERB`: the installed door to the functions behind tools/, launch/ and tape_finetune/."""

import importlib
import sys
from collections.abc import Sequence

from megatron_plm import __version__
from megatron_plm.errors import UserError, run_command, suggestion

# verb: (module with `main(argv)`, one line of help)
VERBS = {
    "preprocess-data": ("megatron_plm.data.preprocess", "sequence files to an indexed dataset"),
    "train-tokenizer": ("megatron_plm.data.train_tokenizer", "a sentencepiece model from sequence files"),
    "inspect-data": ("megatron_plm.data.inspect.command", "what a dataset holds, and whether it is whole"),
    "merge-datasets": ("megatron_plm.data.merge", "several datasets to one"),
    "preflight": ("megatron_plm.preflight.command", "check the machines of a cluster before a long run"),
    "pretrain": ("megatron_plm.training.pretrain", "train a protein language model"),
    "convert-checkpoint": ("megatron_plm.convert.command", "between checkpoint formats"),
    "megatron-converter": ("megatron_plm.convert.megatron_converter", "ProteinLM's checkpoints to its TAPE fork's"),
    "embed": ("megatron_plm.inference.embed", "embeddings of the proteins of a sequence file"),
    "score": ("megatron_plm.inference.score", "likelihoods of proteins and variants, contact maps"),
    "tape-train": ("tape_finetune.train", "fine-tune on a labelled task and score it"),
    "tape-eval": ("tape_finetune.evaluate", "score a fine-tuned model on a split"),
    "tape-predict": ("tape_finetune.predict", "predict with a fine-tuned model, no labels needed"),
    "tape-report": ("tape_finetune.reporting.command", "all tasks of some models beside the published values"),
    "download-tape": ("tape_finetune.download", "TAPE's labelled data from its public archive"),
    "structures-to-tape": ("tape_finetune.structures_to_tape", "PDB and mmCIF files to TAPE records"),
    "benchmark": ("megatron_plm.benchmark.command", "measure the speed against the peers"),
    "plan": ("megatron_plm.plan.command", "layouts of a number of GPUs that fit a model, by estimated speed"),
    "report": ("megatron_plm.report.command", "one HTML page from runs and results"),
}


def main() -> int:
    """Run the verb named on the command line; returns the exit code."""
    return run_command(_dispatch)


def _dispatch(argv: Sequence[str]) -> int | None:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: megatron-plm VERB [FLAGS]   (VERB --help lists the flags of a verb)\n")
        for verb, (_, text) in VERBS.items():
            print(f"  {verb:<20} {text}")
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] not in VERBS:
        raise UserError(f"unknown verb {argv[0]!r}{suggestion(argv[0], VERBS)}; megatron-plm --help lists them")
    return importlib.import_module(VERBS[argv[0]][0]).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
