"""Training speed against transformers' EsmForMaskedLM: same shape, proteins, optimizer, threads and machine.

Counted are useful tokens a second: tokens of proteins with their <cls> and <eos>, never padding. Both sides choose
15 % of the residues and train in fp32. The peer runs as its users run it: rows of one protein each, padded to the
longest of the batch (`padded`: random batches; `bucketed`: batches of similar length), the head on every position.
"""

import argparse
import functools
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
from megatron_plm.config.problems import problems
from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.data.loader import IGNORED_LABEL
from megatron_plm.errors import UserError
from megatron_plm.parallel.mesh import World
from megatron_plm.tokenizers import Tokenizer
from megatron_plm.training.loop import train_step
from megatron_plm.training.state import Datasets, build_run, open_datasets

__all__ = ["add_flags", "measure", "missed", "require_peer", "table"]

BARS = {"padded": 2.0, "bucketed": 1.3}
_BUCKET_BATCHES = 50  # batches whose proteins are sorted by length together, as length-grouped samplers do


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this subject."""
    parser.add_argument("--data-path", required=True, metavar="PREFIX", help="dataset to train on")
    parser.add_argument("--preset", default="esm2-8m", choices=list(PRESETS), help="model shape of both sides")
    parser.add_argument("--seq-length", type=count, default=1024, help="tokens of a row; the peer crops to it")
    parser.add_argument("--rows", type=count, default=4, help="packed rows of one of our optimizer steps")
    sizes, text = Size([4, 8, 16], [4, 8]), "the peer runs with the fastest of these; 1 pads nothing"
    add_size(parser, "--peer-batch-sizes", count, sizes, text, nargs="+")
    add_round_flags(parser)
    parser.add_argument("--seed", type=int, default=1)


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Time ours and the peer's in turn for `options.rounds` rounds, telling `say` of each.

    Returns tokens a second of each side and round, and the ratios round by round, so that a machine whose speed drifts
    slows both sides of a ratio. Raises UserError, before anything is measured, for options that describe no model.
    """
    values = {
        **PRESETS[options.preset],
        "data_path": (options.data_path,),
        "seq_length": options.seq_length,
        "num_workers": 0,
    }
    config = config_from_values(
        {**values, "micro_batch_size": options.rows, "global_batch_size": options.rows, "seed": options.seed}
    )
    found = problems(config)
    if found:
        raise UserError(found[0])
    datasets = open_datasets(config)
    run = build_run(config, World(0, 1, torch.device("cpu"), None), datasets)
    steps = run.train_loader.steps(run.progress.cursor)

    def our_step() -> int:
        return train_step(run, next(steps)).num_tokens

    sides: dict[str, Step] = {"ours": our_step}
    batch_sizes = {}
    for kind in BARS:
        batch_sizes[kind], sides[kind] = fastest_size(
            _LABELS[kind],
            options.peer_batch_sizes,
            functools.partial(_peer_step, config.model, datasets, kind, options=options),
            options.seconds / 2,
            say,
        )
    speeds = timed_in_turn(sides, options.rounds, options.seconds, say)
    found = ratios(speeds, BARS)
    return {
        "tokens_per_second": speeds,
        "peer_batch_size": batch_sizes,
        "ratios": found,
        "checks": ratio_checks(found, _LABELS, f"training, {options.preset}"),
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    labels = _LABELS | {side: f"{_LABELS[side]} of {size}" for side, size in result["peer_batch_size"].items()}
    lines = speed_lines(result["tokens_per_second"], result["ratios"], labels)
    tried = result["options"]["peer_batch_sizes"]
    chosen = result["peer_batch_size"]
    lines += [_edge_note(side, size, tried) for side, size in chosen.items() if _at_edge(size, tried)]
    return "\n".join([*lines, machine_line(result)])


def _at_edge(size: int, tried: Sequence[int]) -> bool:
    """Whether a batch size that was not tried could be faster than the fastest tried."""
    return size == max(tried) or 1 < size == min(tried)


def _edge_note(side: str, size: int, tried: Sequence[int]) -> str:
    end = "largest" if size == max(tried) else "smallest"
    return f"note: {_LABELS[side]} were fastest at {size}, the {end} size tried; --peer-batch-sizes names others"


_LABELS = {
    "ours": "megatron-plm, packed rows",
    "padded": "EsmForMaskedLM, random batches",
    "bucketed": "EsmForMaskedLM, length-bucketed",
}


def _peer_step(
    model_options: ModelOptions, datasets: Datasets, kind: str, batch_size: int, options: argparse.Namespace
) -> Step:
    from transformers import AutoModelForMaskedLM

    tokenizer = datasets.tokenizer
    torch.manual_seed(options.seed)
    config = peer_config(model_options, tokenizer)
    model = AutoModelForMaskedLM.from_config(config, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, fused=True)
    batches = _padded_batches(datasets.train.datasets[0], tokenizer, kind, batch_size, options)

    def step() -> int:
        tokens, attention_mask, labels = next(batches)
        model(input_ids=tokens, attention_mask=attention_mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return int(attention_mask.sum())

    return step


def _padded_batches(
    dataset: IndexedDataset, tokenizer: Tokenizer, kind: str, batch_size: int, options: argparse.Namespace
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Endless (tokens, attention mask, labels), int64 [B, longest of the batch]."""
    rng = np.random.default_rng(options.seed)
    while True:
        order = rng.permutation(len(dataset))
        if kind == "bucketed":
            size = batch_size * _BUCKET_BATCHES
            parts = [order[i : i + size] for i in range(0, len(order), size)]
            order = np.concatenate([part[np.argsort(dataset.lengths[part], kind="stable")] for part in parts])
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        if kind == "bucketed":
            batches = [batches[i] for i in rng.permutation(len(batches))]
        for batch in batches:
            rows = [_cropped(dataset[int(i)], tokenizer, options.seq_length, rng) for i in batch]
            longest = max(map(len, rows))
            tokens = np.full((len(rows), longest), tokenizer.pad_id, dtype=np.int64)
            for b, row in enumerate(rows):
                tokens[b, : len(row)] = row
            yield _masked(tokens, tokenizer, rng)


def _cropped(residues: np.ndarray, tokenizer: Tokenizer, length: int, rng: np.random.Generator) -> np.ndarray:
    tokens = np.concatenate([[tokenizer.cls_id], residues, [tokenizer.eos_id]])
    start = rng.integers(0, max(len(tokens) - length, 0) + 1)
    return tokens[start : start + length]


def _masked(
    tokens: np.ndarray, tokenizer: Tokenizer, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    attention_mask = tokens != tokenizer.pad_id
    chosen = np.isin(tokens, tokenizer.residue_ids) & (rng.random(tokens.shape) < 0.15)
    labels = np.where(chosen, tokens, IGNORED_LABEL)
    action = rng.random(tokens.shape)
    random_tokens = rng.choice(tokenizer.standard_ids, tokens.shape)
    corrupted = np.where(chosen & (action < 0.8), tokenizer.mask_id, tokens)
    corrupted = np.where(chosen & (action >= 0.8) & (action < 0.9), random_tokens, corrupted)
    arrays = (corrupted.astype(np.int64), attention_mask.astype(np.int64), labels)
    tokens_t, mask_t, labels_t = (torch.from_numpy(array) for array in arrays)
    return tokens_t, mask_t, labels_t
