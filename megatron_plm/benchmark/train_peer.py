"""The peer's sides of the training benchmark: transformers' EsmForMaskedLM, padded, length-bucketed or packed.

`packed`: transformers has no packing of its own for ESM-2 but on FlashAttention, to which it hands `cu_seq_lens`
through; its masks for other attention know no packed rows. So on a GPU the packed side takes flash_attention_2 where
the package flash-attn is installed. Everywhere else it takes an attention function of ours through transformers'
AttentionInterface, as a user of transformers could: torch's variable-length attention on a GPU, protein by protein on
a CPU. Rows, positions and masks are those of our loader; the head works on every position, as transformers' does.
"""

import argparse
import contextlib
import itertools
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_plm.benchmark.peer import peer_config
from megatron_plm.benchmark.rounds import Step
from megatron_plm.config.options import Config
from megatron_plm.data.indexed import IndexedDataset
from megatron_plm.data.loader import IGNORED_LABEL, Batch, Loader
from megatron_plm.tokenizers import Tokenizer
from megatron_plm.training.state import Datasets

_BUCKET_BATCHES = 50  # batches whose proteins are sorted by length together, as length-grouped samplers do
_BATCHES_ON_A_GPU = 64
_PACKED = "megatron_plm_packed"


def padded_step(
    config: Config,
    dataset: IndexedDataset,
    tokenizer: Tokenizer,
    kind: str,
    batch_size: int,
    options: argparse.Namespace,
    device: torch.device,
) -> Step:
    """A step on rows of one protein each, padded to the longest of the batch: `padded` or `bucketed`."""
    train = _Trainer(config, tokenizer, "sdpa", device)
    batches = padded_batches(dataset, tokenizer, kind, batch_size, options)
    if device.type == "cuda":  # made before: a user's would come from processes of a DataLoader
        batches = itertools.cycle(list(itertools.islice(batches, _BATCHES_ON_A_GPU)))

    def step() -> int:
        tokens, attention_mask, labels = next(batches)
        useful = int(attention_mask.sum())  # on the host: no GPU waits
        train.step(input_ids=tokens, attention_mask=attention_mask, labels=labels)
        return useful

    return step


def packed_step(config: Config, datasets: Datasets, device: torch.device) -> Step:
    """A step on our packed rows, laid end to end in one."""
    train = _Trainer(config, datasets.tokenizer, packed_attention_name(device), device)
    loader = Loader(
        datasets.train.datasets,
        datasets.train.weights,
        config.data,
        datasets.tokenizer,
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=config.training.global_batch_size,
        seed=config.training.seed,
        name="train",
    )
    steps = loader.steps(loader.start())

    def step() -> int:
        (batch,) = next(steps).micro_batches
        cuts = batch.cu_seqlens
        lengths = cuts.diff()
        tensors = {"cu_seq_lens_q": _without_empty(cuts), "cu_seq_lens_k": _without_empty(cuts)}
        longest = int(lengths.max())
        others: dict[str, Any] = {"max_length_q": longest, "max_length_k": longest}
        if device.type == "cpu":
            others["lengths"] = [n for n in lengths.tolist() if n]
        flat = {"input_ids": batch.tokens, "position_ids": batch.positions, "labels": every_label(batch)}
        train.step(**{name: each.reshape(1, -1) for name, each in flat.items()}, **tensors, **others)
        return batch.num_tokens

    return step


def every_label(batch: Batch) -> Tensor:
    """The labels of all positions, int64 [B, L], as transformers wants them."""
    labels = torch.full_like(batch.tokens, IGNORED_LABEL)
    row, entry = (batch.label_id != IGNORED_LABEL).nonzero(as_tuple=True)
    labels[row, batch.label_index[row, entry]] = batch.label_id[row, entry]
    return labels


def _without_empty(cu_seqlens: Tensor) -> Tensor:
    return torch.cat([cu_seqlens[:1], cu_seqlens[1:][cu_seqlens.diff() > 0]])


def packed_attention_name(device: torch.device) -> str:
    """What computes the packed side's attention, by transformers' name for it, which is made known."""
    if device.type == "cuda" and find_spec("flash_attn") is not None:
        return "flash_attention_2"
    from transformers import AttentionInterface

    AttentionInterface.register(_PACKED, _packed_attention)
    return _PACKED


def _packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **packing: Any
) -> tuple[Tensor, None]:
    """Attention inside each protein of one packed row; [1, N, T, H] each, the result [1, T, N, H]."""
    assert mask is None
    assert query.shape[0] == 1
    assert not module.is_decoder
    if query.device.type == "cuda":
        # Imported here: the module exists only in builds of torch that have the CUDA kernel.
        from torch.nn.attention.varlen import varlen_attn

        cuts, longest = packing["cu_seq_lens_q"], packing["max_length_q"]
        query = query * (scaling * query.shape[-1] ** 0.5)  # the kernel scales by H^-½
        # Rotation leaves queries and keys in fp32 under autocast.
        q_TNH, k_TNH, v_TNH = (each[0].transpose(0, 1).to(value.dtype) for each in (query, key, value))
        out = varlen_attn(q_TNH, k_TNH, v_TNH, cuts, cuts, longest, longest)
        assert isinstance(out, Tensor)
        return out.unsqueeze(0), None
    parts = (each.split(packing["lengths"], dim=2) for each in (query, key, value))
    outs = [F.scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous(), None


class _Trainer:
    """The model with its optimizer, as transformers' Trainer would step it: fused AdamW, clipping, and with bf16
    autocast over fp32 weights."""

    def __init__(self, config: Config, tokenizer: Tokenizer, attention: str, device: torch.device) -> None:
        from transformers import AutoModelForMaskedLM

        torch.manual_seed(config.training.seed)
        esm_config = peer_config(config.model, tokenizer)
        with device:
            self._model = AutoModelForMaskedLM.from_config(esm_config, attn_implementation=attention).train()
        self._model.to(device)
        self._device, self._bf16 = device, config.training.bf16
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=4e-4, fused=True)

    def step(self, **inputs: Any) -> None:
        inputs = {name: self._here(each) if isinstance(each, Tensor) else each for name, each in inputs.items()}
        half = torch.autocast(self._device.type, torch.bfloat16) if self._bf16 else contextlib.nullcontext()
        with half:
            loss = self._model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _here(self, tensor: Tensor) -> Tensor:
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)


def padded_batches(
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
