"""Memory, time and score of the ways to fine-tune one model on one table, each in a process of its own."""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_plm.benchmark.flags import Size, add_size, count
from megatron_plm.benchmark.processes import run_watched
from megatron_plm.config.load import config_from_values
from megatron_plm.config.presets import PRESETS
from megatron_plm.convert.native import write_native
from megatron_plm.convert.weights import Weights
from megatron_plm.errors import UserError
from megatron_plm.model.initialize import initialize
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.tokenizers import get_tokenizer

_PROGRAM = "tape_finetune.tape_train"
_ACCUMULATION = ("--gradient_accumulation_steps", "4")
_CHECKPOINTING = ("--gradient_checkpointing",)
# What is shown, and the flags that make it; the first is what the others are compared with.
WAYS: dict[str, tuple[str, ...]] = {
    "full": (),
    "accumulation": _ACCUMULATION,
    "checkpointing": _CHECKPOINTING,
    "LoRA": (),
    "all three": (*_ACCUMULATION, *_CHECKPOINTING),
    "frozen": ("--freeze",),
}
_WITH_LORA = ("LoRA", "all three")
# Of issue 7: adapters are few, and lose little.
LARGEST_SHARE = 0.02
LEAST_SCORE = 0.95


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this subject."""
    parser.add_argument("--from-pretrained", type=Path, metavar="PATH", help="checkpoint (default: initial weights)")
    text = "shape of a model with initial weights (default: esm2-8m; with --quick: tiny)"
    parser.add_argument("--preset", choices=list(PRESETS), metavar="NAME", help=text)
    default = Path("examples/data/peptides")
    parser.add_argument("--data-dir", type=Path, default=default, metavar="DIR", help=f"(default: {default})")
    parser.add_argument("--sequence-column", default="sequence", metavar="NAME", help="(default: sequence)")
    parser.add_argument("--label-column", default="label", metavar="NAME", help="classes (default: label)")
    add_size(parser, "--epochs", count, Size(3, 1), "passes over the training split")
    add_size(parser, "--batch-size", count, Size(32, 256), "proteins a step")
    add_size(parser, "--max-length", count, Size(512, 64), "residues of a protein, longer ones cropped")
    parser.add_argument("--lora-rank", type=count, default=8, metavar="N", help="of the adapters (default: 8)")
    parser.add_argument("--cores", type=count, default=2, metavar="N", help="cores and threads of each (default: 2)")
    parser.add_argument("--seed", type=int, default=1)


def require_peer() -> None:
    """UserError where peft is missing, which LoRA needs."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UserError("benchmark finetune: LoRA needs peft: run `pip install 'megatron-plm[lora]'`") from None


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Fine-tune in each way, telling `say` of each. Raises UserError where one fails."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-finetune-") as scratch:
        folder = Path(scratch)
        pretrained = options.from_pretrained or _initial_weights(options, folder / "initial")
        lora = ("--lora_rank", options.lora_rank, "--lora_alpha", 16)
        for number, (name, flags) in enumerate(WAYS.items()):
            words: list[object] = [
                "transformer", "csv", "--from_pretrained", pretrained, "--data_dir", options.data_dir,
                "--sequence_column", options.sequence_column, "--label_column", options.label_column,
                "--kind", "classification", "--num_train_epochs", options.epochs, "--batch_size", options.batch_size,
                "--max_length", options.max_length, "--seed", options.seed, "--output_dir", folder,
                "--exp_name", number, *flags, *(lora if name in _WITH_LORA else ()),
            ]  # fmt: skip
            _, peak = run_watched(_PROGRAM, words, cores=options.cores, threads=options.cores, name=name)
            found[name] = {**_figures(folder / str(number)), "peak_memory": peak}
            say(f"{name}: {found[name]['seconds']:.1f} s, {found[name]['metric']} {found[name]['score']:.3f}")
    return {"ways": found}


def missed(result: dict[str, Any]) -> list[str]:
    """The bars that were missed: the share of LoRA's adapters, and its score against that of full fine-tuning."""
    full, lora = result["ways"]["full"], result["ways"]["LoRA"]
    bars = {
        "share of the adapters": lora["num_adapter_parameters"] <= LARGEST_SHARE * full["num_parameters"],
        "score with LoRA": lora["score"] >= LEAST_SCORE * full["score"],
    }
    return [name for name, reached in bars.items() if not reached]


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    ways = result["ways"]
    full = ways["full"]
    where = "GPU memory" if full["peak_gpu_memory"] else "memory"
    lines = [f"{'':<16}{'trained':>12}{'peak ' + where:>18}{'time':>10}{full['split'] + ' ' + full['metric']:>20}"]
    for name, figures in ways.items():
        peak = figures["peak_gpu_memory"] or figures["peak_memory"]
        memory = "unknown" if peak is None else f"{peak / 1e6:,.0f} MB"
        lines.append(
            f"{name:<16}{figures['num_trained_parameters']:>12,}{memory:>18}{figures['seconds']:>8.1f} s"
            f"{figures['score']:>20.3f}"
        )
    share = ways["LoRA"]["num_adapter_parameters"] / full["num_parameters"]
    lines.append(f"{full['num_parameters']:,} parameters; LoRA's adapters are {share:.2%} of them")
    machine = result["machine"]
    lines.append(f"{machine['processor']}, {result['options']['cores']} cores, {machine['versions']}")
    return "\n".join(lines)


def _initial_weights(options: argparse.Namespace, directory: Path) -> Path:
    preset = options.preset or ("tiny" if options.quick else "esm2-8m")
    model_options = config_from_values(dict(PRESETS[preset])).model
    tokenizer = get_tokenizer(model_options.tokenizer)
    model = MaskedLanguageModel(model_options, tokenizer)
    initialize(model, model_options, options.seed)
    directory.mkdir()
    write_native(Weights(model_options, tokenizer, model.state_dict()), directory)
    return directory


def _figures(run: Path) -> dict[str, Any]:
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    split = list(results["splits"])[-1]
    metric = results["primary_metric"]
    names = ("seconds", "num_parameters", "num_trained_parameters", "num_adapter_parameters", "peak_gpu_memory")
    return {
        **{name: results[name] for name in names},
        "split": split,
        "metric": metric,
        "score": results["splits"][split]["metrics"][metric]["value"],
    }
