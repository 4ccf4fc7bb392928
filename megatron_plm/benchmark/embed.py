"""Embedding speed against transformers' EsmModel: same shape, proteins, threads and machine.

Counted are useful tokens a second: of proteins with their <cls> and <eos>, never padding. Both sides start from
sequences in memory, in the order of the file, compute in fp32 on the CPU and end with the mean over each protein's
residues. The peer runs as its users run it: its own tokenizer, batches padded to their longest protein (`padded`), or
one protein at a time, without padding (`single`).
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from megatron_plm.benchmark.checks import missed_checks as missed
from megatron_plm.benchmark.flags import Size, add_size, count
from megatron_plm.benchmark.peer import peer_config, require_peer
from megatron_plm.benchmark.rounds import (
    Step,
    add_round_flags,
    fastest_size,
    machine_line,
    ratio_checks,
    ratios,
    speed_lines,
    timed_in_turn,
)
from megatron_plm.config.load import config_from_values
from megatron_plm.config.options import ModelOptions
from megatron_plm.config.presets import PRESETS
from megatron_plm.convert.pretrained import Pretrained
from megatron_plm.data.readers import open_inputs
from megatron_plm.errors import UserError
from megatron_plm.inference.embedding import Embedder, Plan
from megatron_plm.inference.groups import grouped
from megatron_plm.inference.proteins import Protein, ProteinReader
from megatron_plm.inference.runner import Runner
from megatron_plm.model.initialize import initialize
from megatron_plm.model.transformer import MaskedLanguageModel
from megatron_plm.tokenizers import Tokenizer, get_tokenizer

__all__ = ["add_flags", "measure", "missed", "require_peer", "table"]

BARS = {"padded": 1.5}  # ratios without one are told, too
_SPECIALS = 2
_PRESETS = [name for name in PRESETS if name == "tiny" or name.startswith("esm2")]
_LABELS = {
    "ours": "megatron-plm, packed rows",
    "padded": "EsmModel, padded batches",
    "single": "EsmModel, one at a time",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this subject."""
    parser.add_argument("--input", required=True, metavar="FILE", help="sequence file with the proteins to embed")
    parser.add_argument("--preset", default="esm2-8m", choices=_PRESETS, help="model shape of both sides")
    parser.add_argument("--max-length", type=count, default=1024, help="tokens; longer proteins are left out")
    parser.add_argument("--batch-tokens", type=count, default=4096, help="tokens of one of our packed rows")
    sizes, text = Size([4, 8, 16, 32], [8]), "the peer's padded batches are of the fastest of these"
    add_size(parser, "--peer-batch-sizes", count, sizes, text, nargs="+")
    add_round_flags(parser)
    parser.add_argument("--seed", type=int, default=1)


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Time ours and the peer's in turn for `options.rounds` rounds, telling `say` of each.

    Returns tokens a second of each side and round, and the ratios round by round, so that a machine whose speed drifts
    slows both sides of a ratio. Raises UserError, before anything is measured, where no protein is left.
    """
    tokenizer = get_tokenizer("esm2")
    model_options = config_from_values(dict(PRESETS[options.preset])).model
    proteins = _proteins(options, tokenizer)
    sequences = [tokenizer.decode(protein.tokens.tolist()) for protein in proteins]
    ours = _our_step(model_options, tokenizer, proteins, options)
    model = _peer_model(model_options, tokenizer, options.seed)
    size, padded = fastest_size(
        _LABELS["padded"],
        options.peer_batch_sizes,
        lambda tried: _peer_step(model, tokenizer, sequences, tried),
        options.seconds / 2,
        say,
    )
    sides = {"ours": ours, "padded": padded, "single": _peer_step(model, tokenizer, sequences, 1)}
    speeds = timed_in_turn(sides, options.rounds, options.seconds, say)
    found = ratios(speeds, BARS)
    return {
        "num_proteins": len(proteins),
        "tokens_per_second": speeds,
        "peer_batch_size": {"padded": size, "single": 1},
        "ratios": found,
        "checks": ratio_checks(found, _LABELS, f"embedding, {options.preset}"),
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    labels = {**_LABELS, "padded": f"{_LABELS['padded']} of {result['peer_batch_size']['padded']}"}
    lines = speed_lines(result["tokens_per_second"], result["ratios"], labels)
    lines.append(f"{result['num_proteins']:,} proteins, {result['options']['preset']}")
    return "\n".join([*lines, machine_line(result)])


def _proteins(options: argparse.Namespace, tokenizer: Tokenizer) -> list[Protein]:
    if options.batch_tokens < options.max_length:
        raise UserError(
            f"--batch-tokens {options.batch_tokens}: one protein may have {options.max_length}; raise it, or lower "
            "--max-length"
        )
    reader = ProteinReader(open_inputs([options.input]), tokenizer, numbered=True)
    found = [protein for protein in reader.read() if len(protein.tokens) + _SPECIALS <= options.max_length]
    if not found:
        raise UserError(f"--max-length {options.max_length}: every protein of {options.input} is longer; raise it")
    return found


def _our_step(
    model_options: ModelOptions, tokenizer: Tokenizer, proteins: Sequence[Protein], options: argparse.Namespace
) -> Step:
    model = MaskedLanguageModel(model_options, tokenizer)
    initialize(model, model_options, options.seed)
    runner = Runner(Pretrained(model, model_options, tokenizer), torch.device("cpu"), torch.float32)
    plan = Plan(
        layers=(model_options.num_layers,),
        poolings=("mean",),
        dtype=np.dtype(np.float32),
        max_tokens=options.max_length,
        overlap=0,
        batch_tokens=options.batch_tokens,
    )
    groups = grouped(itertools.cycle(proteins), lambda p: len(p.tokens) + _SPECIALS, options.batch_tokens)
    embedded = Embedder(runner, plan).compute(groups)

    def step() -> int:
        group, _ = next(embedded)
        return group.num_tokens + _SPECIALS * len(group.proteins)

    return step


def _peer_model(model_options: ModelOptions, tokenizer: Tokenizer, seed: int) -> Any:
    from transformers import AutoModel

    torch.manual_seed(seed)
    config = peer_config(model_options, tokenizer)
    return AutoModel.from_config(config, add_pooling_layer=False, attn_implementation="sdpa").eval()


def _peer_step(model: Any, tokenizer: Tokenizer, sequences: Sequence[str], batch_size: int) -> Step:
    encode = _peer_tokenizer(tokenizer)
    batches = _batches(sequences, batch_size)

    @torch.inference_mode()
    def step() -> int:
        inputs = encode(next(batches), padding=True, return_tensors="pt")
        states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"]
        useful = int(mask.sum())
        ids = inputs["input_ids"]
        residues = mask * (ids != tokenizer.cls_id) * (ids != tokenizer.eos_id)
        ((states * residues[..., None]).sum(1) / residues.sum(1, keepdim=True)).numpy()
        return useful

    return step


def _peer_tokenizer(tokenizer: Tokenizer) -> Any:
    """transformers' own, of a vocabulary in a file."""
    import tempfile
    from pathlib import Path

    from transformers import EsmTokenizer

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.txt"
        path.write_text("\n".join(tokenizer.tokens), encoding="utf-8")
        return EsmTokenizer(vocab_file=str(path))


def _batches(sequences: Sequence[str], size: int) -> Iterator[list[str]]:
    """Endless, in the order of the file."""
    while True:
        for begin in range(0, len(sequences), size):
            yield list(sequences[begin : begin + size])
