"""Contact maps of proteins from a model's attention, without any training on structures."""

import argparse
import contextlib
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from megatron_plm.data.input_flags import add_input_flags, inputs_of
from megatron_plm.errors import UserError
from megatron_plm.files import sync
from megatron_plm.inference.flags import (
    SPECIALS,
    add_model_flags,
    add_reading_flags,
    check_output,
    load_runner,
    longest_length,
)
from megatron_plm.inference.groups import Columns, Group
from megatron_plm.inference.job import Job, print_outcome, run_job
from megatron_plm.inference.names import names_of
from megatron_plm.inference.proteins import Protein, ProteinReader
from megatron_plm.inference.resumable import Column, files_of
from megatron_plm.inference.rows import pack
from megatron_plm.inference.runner import Runner
from megatron_plm.model.attention import Sequences
from megatron_plm.model.heads import ContactHead
from megatron_plm.model.transformer import Encoder

_OURS = re.compile(r"\d{5,}_.*\.(npz|png)")
_LONGEST_NAME = 100  # letters of a protein's name in that of its files
_LONGEST_TITLE = 60
_DOTS_PER_INCH = 150
_INCHES = (5.7, 4.8)
_MAP, _SCALE = (0.7, 0.5, 4.0, 4.0), (4.8, 0.5, 0.2, 4.0)  # left, bottom, width, height


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
    if proteins.can_read_twice:
        for protein in proteins.read():
            _check_length(protein, longest)
    folder = files_of(options.output)

    def compute(groups: Iterator[Group]) -> Iterator[tuple[Group, Columns]]:
        folder.mkdir(exist_ok=True)
        for group in groups:
            (protein,) = group.proteins
            _check_length(protein, longest)
            _write_map(folder, group.end, protein, contact_map(runner, head, protein.tokens))
            yield group, {}

    job = Job(
        what="contacts",
        identity={**runner.identity(), "values": "contacts"},
        dtypes={},
        compute=compute,
        cost=lambda _: 1,
        budget=1,
        write=lambda columns, _: _check_files(columns, folder),
        max_tokens=longest,
    )
    outcome = run_job(job, proteins, options.output, force=options.force)
    print_outcome(outcome, "mapped", "")
    print(f"wrote {options.output}: the contacts of {outcome.num_proteins:,} proteins, a .png and an .npz of each")


def _write_map(folder: Path, number: int, protein: Protein, contacts_LL: npt.NDArray[np.float32]) -> None:
    """The two files of a protein, on the disk."""
    numbers, picture = (folder / name for name in _file_names(number, protein.identifier))
    np.savez(numbers, id=np.array(protein.identifier), contacts=contacts_LL)
    _draw(picture, protein, contacts_LL)
    sync(numbers)
    sync(picture)


def _file_names(number: int, identifier: str) -> tuple[str, str]:
    stem = f"{number:05d}_{_plain(identifier)}"
    return f"{stem}.npz", f"{stem}.png"


def _check_files(columns: Mapping[str, Column], folder: Path) -> None:
    """See to it that a folder holds the files of the proteins and, of ours, no others; raises UserError."""
    names = (name for some in names_of(columns) for name in some)
    left = {path.name for path in folder.iterdir() if _OURS.fullmatch(path.name)}
    for number, identifier in enumerate(names, start=1):
        for name in _file_names(number, identifier):
            if name not in left:
                raise UserError(
                    f"{folder / name}: is missing, which a stopped run had written; remove what is left of it with "
                    f"`rm -r {shlex.quote(str(folder.parent))}`"
                )
            left.remove(name)
    for name in left:  # a stopped run wrote it of a protein that the input has no more
        (folder / name).unlink()


def _is_folder_of_maps(path: Path) -> bool:
    return path.is_dir() and all(_OURS.fullmatch(entry.name) for entry in path.iterdir())


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


def _check_length(protein: Protein, longest: int) -> None:
    """Raise UserError where a protein has more residues than the model takes at once."""
    length = len(protein.tokens)
    if length + SPECIALS > longest:
        raise UserError(
            f"protein {protein.identifier!r} has {length:,} residues, and a map is of whole proteins, of at most "
            f"{longest - SPECIALS:,} residues here; leave it out, or see --max-length"
        )


def _plain(identifier: str) -> str:
    """A name as a part of a file's name on any system."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", identifier)[:_LONGEST_NAME]


def _draw(path: Path, protein: Protein, contacts_LL: npt.NDArray[np.float32]) -> None:
    """A picture of a map, residues counted from 1, each of them at least a pixel wide."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    length = len(contacts_LL)
    name = re.sub(r"[^\x20-\u04ff]", "?", protein.identifier)  # the font has Latin, Greek and Cyrillic letters
    title = name if len(name) <= _LONGEST_TITLE else f"{name[: _LONGEST_TITLE - 1]}…"
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9.0}):
        figure = Figure(figsize=_INCHES)
        axes = figure.add_axes(_in_figure(_MAP))
        edges = (0.5, length + 0.5, length + 0.5, 0.5)
        image = axes.imshow(contacts_LL, vmin=0, vmax=1, cmap="Blues", extent=edges, interpolation="nearest")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
            axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("residue")
        axes.set_ylabel("residue")
        axes.set_title(title, loc="left", fontsize=8)
        figure.colorbar(image, cax=figure.add_axes(_in_figure(_SCALE)), label="probability of contact")
        dots = max(_DOTS_PER_INCH, math.ceil(length / _MAP[2]))
        figure.savefig(path, dpi=dots, metadata={"Software": None})


def _in_figure(box: tuple[float, ...]) -> tuple[float, float, float, float]:
    """Left, bottom, width and height as shares of the figure's size, of those in inches."""
    left, bottom, width, height = box
    return left / _INCHES[0], bottom / _INCHES[1], width / _INCHES[0], height / _INCHES[1]
