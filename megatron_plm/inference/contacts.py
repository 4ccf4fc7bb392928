"""Contact maps of proteins from a model's attention, without any training on structures."""

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from megatron_plm.data.input_flags import add_input_flags, inputs_of
from megatron_plm.errors import UserError
from megatron_plm.files import atomic_directory
from megatron_plm.inference.flags import (
    SPECIALS,
    add_model_flags,
    add_reading_flags,
    check_output,
    load_runner,
    longest_length,
)
from megatron_plm.inference.progress import shown_residues
from megatron_plm.inference.proteins import Protein, ProteinReader
from megatron_plm.inference.rows import pack
from megatron_plm.inference.runner import Runner
from megatron_plm.model.attention import Sequences
from megatron_plm.model.heads import ContactHead
from megatron_plm.model.transformer import Encoder

_LONGEST_NAME = 100  # letters of a protein's name in that of its files
_DOTS_PER_INCH = 150


class AttentionMaps(nn.Module):
    """Attention of one protein, with its weights in the open: `take` is given them, [N, T, T].

    It stands in the place of `PackedAttention`, whose fused kernels never hold them.
    """

    def __init__(self, take: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.take = take

    def forward(self, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, sequences: Sequences) -> Tensor:
        assert len(sequences.cu_seqlens) == 2, "one protein at a time"
        scores_NTT = torch.einsum("qnh,knh->nqk", q_TNH, k_TNH) * q_TNH.shape[-1] ** -0.5
        weights_NTT = scores_NTT.float().softmax(-1)
        self.take(weights_NTT)
        return torch.einsum("nqk,knh->qnh", weights_NTT.to(v_TNH.dtype), v_TNH)


@contextlib.contextmanager
def attention_taken(encoder: Encoder, take: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While it lasts, every layer's attention weights go to `take(layer, weights)`."""
    attentions: list[Any] = [block.attention for block in encoder.blocks.values()]
    fused = [attention.attend for attention in attentions]
    try:
        for layer, attention in enumerate(attentions):
            attention.attend = AttentionMaps(_of_layer(take, layer))
        yield
    finally:
        for attention, attend in zip(attentions, fused, strict=True):
            attention.attend = attend


def _of_layer(take: Callable[[int, Tensor], None], layer: int) -> Callable[[Tensor], None]:
    return lambda weights_NTT: take(layer, weights_NTT)


@torch.inference_mode()
def contact_map(runner: Runner, head: ContactHead, residues: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
    """Probabilities that residues of one protein touch, [L, L], symmetric."""
    tokenizer = runner.tokenizer
    row = pack([np.concatenate([[tokenizer.cls_id], residues, [tokenizer.eos_id]])])
    logits: Tensor = head.regression.bias

    def take(layer: int, weights_NTT: Tensor) -> None:
        nonlocal logits
        logits = logits + head.layer_logits(layer, weights_NTT[:, 1:-1, 1:-1])

    with attention_taken(runner.model.encoder, take):
        runner.model.encoder(*row.to(runner.device), max_length=row.max_length)
    return logits.sigmoid().cpu().numpy()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this subject."""
    add_model_flags(parser)
    add_reading_flags(add_input_flags(parser, names=True))


def run(options: argparse.Namespace) -> None:
    """Write a picture and the numbers of each protein's map into a folder."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            "score contacts: drawing needs the package matplotlib: run `pip install 'megatron-plm[report]'`"
        ) from None
    check_output(options, replaces=_is_folder_of_maps)
    inputs = inputs_of(options)
    runner = load_runner(options)
    head = _contact_head(options, runner)
    longest = longest_length(options.max_length, runner.options)
    proteins = ProteinReader(inputs, runner.tokenizer, numbered=options.numbered, strict=options.strict)
    total = sum(_checked_length(protein, longest) for protein in proteins.read()) if proteins.can_read_twice else None
    num_proteins = 0
    with (
        atomic_directory(options.output, force=options.force) as folder,
        shown_residues(total, "contacts") as advance,
    ):
        for number, protein in enumerate(proteins.read(), start=1):
            advance(_checked_length(protein, longest))
            contacts_LL = contact_map(runner, head, protein.tokens)
            name = f"{number:05d}_{_plain(protein.identifier)}"
            np.savez(folder / f"{name}.npz", id=np.array(protein.identifier), contacts=contacts_LL)
            _draw(folder / f"{name}.png", protein, contacts_LL)
            num_proteins = number
    print(f"wrote {options.output}: the contacts of {num_proteins:,} proteins, a .png and an .npz of each")


def _is_folder_of_maps(path: Path) -> bool:
    return path.is_dir() and all(re.fullmatch(r"\d{5,}_.*\.(npz|png)", entry.name) for entry in path.iterdir())


def _contact_head(options: argparse.Namespace, runner: Runner) -> ContactHead:
    if runner.contact_head is None:
        raise UserError(
            f"{options.checkpoint}: it has no contact head (esm.contact_head), which published ESM-2 checkpoints have; "
            "give one of those, or one converted from it"
        )
    if not runner.tokenizer.one_letter_a_token:
        raise UserError(
            f"{options.checkpoint}: its tokens are pieces of several residues, and contacts are of single ones"
        )
    return runner.contact_head


def _checked_length(protein: Protein, longest: int) -> int:
    """Residues of a protein; raises UserError where they are more than the model takes at once."""
    length = len(protein.tokens)
    if length + SPECIALS > longest:
        raise UserError(
            f"protein {protein.identifier!r} has {length:,} residues, and a map is of whole proteins, of at most "
            f"{longest - SPECIALS:,} residues here; leave it out, or see --max-length"
        )
    return length


def _plain(identifier: str) -> str:
    """A name as a part of a file's name on any system."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", identifier)[:_LONGEST_NAME]


def _draw(path: Path, protein: Protein, contacts_LL: npt.NDArray[np.float32]) -> None:
    """A picture of a map, residues counted from 1."""
    from matplotlib.figure import Figure

    length = len(contacts_LL)
    figure = Figure(figsize=(5.6, 4.8), layout="constrained")
    axes = figure.subplots()
    edges = (0.5, length + 0.5, length + 0.5, 0.5)
    image = axes.imshow(contacts_LL, vmin=0, vmax=1, cmap="Blues", extent=edges, interpolation="nearest")
    axes.set_xlabel("residue")
    axes.set_ylabel("residue")
    axes.set_title(_plain(protein.identifier))
    figure.colorbar(image, ax=axes, label="probability of contact")
    figure.savefig(path, dpi=_DOTS_PER_INCH, metadata={"Software": None})
