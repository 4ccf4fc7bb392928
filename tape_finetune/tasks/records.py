"""Checked fields of TAPE's records that several tasks share."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_plm.errors import UserError
from tape_finetune.data import field


def check_length(record: str, value: dict[str, Any], sequence: str) -> None:
    """Raise UserError where `protein_length` is given and is not the sequence's."""
    stated = value.get("protein_length", len(sequence))
    if stated != len(sequence):
        raise UserError(f"{record}: protein_length is {stated!r}, but 'primary' has {len(sequence)} residues")


def valid_mask(record: str, value: dict[str, Any], sequence: str) -> NDArray[np.bool_]:
    """`valid_mask`, bool [L]; all true where the record has none. Raises UserError if it doesn't fit."""
    if "valid_mask" not in value:
        return np.ones(len(sequence), dtype=bool)
    mask = _array(record, value, "valid_mask", sequence)
    if mask.shape != (len(sequence),) or not np.isin(mask, (0, 1)).all():
        raise UserError(f"{record}: valid_mask must hold one 0 or 1 (false or true) for each residue")
    return mask.astype(bool)


def residue_labels(record: str, value: dict[str, Any], name: str, sequence: str) -> NDArray[np.int64]:
    """A field of whole numbers, one a residue: int64 [L]. Raises UserError if it doesn't fit."""
    labels = _array(record, value, name, sequence)
    if labels.shape != (len(sequence),) or not np.isfinite(labels).all() or (labels != np.floor(labels)).any():
        raise UserError(f"{record}: {name} must hold one whole number for each residue")
    return labels.astype(np.int64)


def coordinates(record: str, value: dict[str, Any], name: str, sequence: str) -> NDArray[np.float32]:
    """A field of points in Å, one a residue: float32 [L, 3], not checked for NaN. Raises UserError if it doesn't
    fit."""
    points = _array(record, value, name, sequence)
    if points.shape != (len(sequence), 3):
        raise UserError(f"{record}: {name} must hold three coordinates for each residue")
    return points.astype(np.float32)


def _array(record: str, value: dict[str, Any], name: str, sequence: str) -> NDArray[np.float64]:
    """A field as float64 with one row a residue; null becomes NaN."""
    values = field(record, value, name)
    if not isinstance(values, list):
        raise UserError(f"{record}: {name} must be a list with one entry for each residue")
    if len(values) != len(sequence):
        raise UserError(
            f"{record}: {name} has {len(values)} entries for {len(sequence)} residues; they must be as many"
        )
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{record}: {name} holds something other than numbers") from None
