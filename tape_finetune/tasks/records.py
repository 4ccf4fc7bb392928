"""Checked fields of records that several tasks share, as any format holds them: lists (JSON), NumPy's arrays (LMDB) or
text (CSV), in which a list is written as JSON, with spaces
between its entries, or as one character a residue."""

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_plm.errors import JSON_ERRORS, UserError
from tape_finetune.data import field


def check_length(record: str, value: dict[str, Any], sequence: str) -> None:
    """Raise UserError where `protein_length` is given and is not the sequence's."""
    stated = value.get("protein_length", len(sequence))
    if class_name(stated) != str(len(sequence)):
        raise UserError(f"{record}: protein_length is {stated!r}, but 'primary' has {len(sequence)} residues")


def label_value(record: str, value: dict[str, Any], name: str) -> Any:
    """The label of a whole protein: the field, or the one entry of a list. UserError if it is missing or NaN."""
    label = value.get(name)
    if isinstance(label, str) and label.startswith("["):
        label = _listed(label)
    if isinstance(label, list | np.ndarray) and np.size(label) == 1:
        label = np.asarray(label, dtype=object).item()
    is_nan = isinstance(label, float | np.floating) and np.isnan(label)
    if label is None or is_nan or (isinstance(label, str) and label.strip().lower() in ("", "nan")):
        raise UserError(f"{record}: the label {name!r} is missing; give it or leave the record out")
    return label


def class_name(value: Any) -> str:
    """A class as text; whole numbers alike whether a format holds them as 3, 3.0 or "3"."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    return str(value).strip()


def residue_names(record: str, value: dict[str, Any], name: str, sequence: str) -> list[str]:
    """A field with the name of a class for each residue. Raises UserError if it doesn't fit."""
    values = field(record, value, name)
    if isinstance(values, str):
        values = values.split() if any(letter.isspace() for letter in values) else list(values)
    return [class_name(item) for item in _entries(record, values, name, sequence)]


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
    if isinstance(values, str):
        values = _listed(values)
    try:
        return np.array(_entries(record, values, name, sequence), dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{record}: {name} holds something other than numbers") from None


def _entries(record: str, values: Any, name: str, sequence: str) -> Any:
    """The list or array itself; UserError if it hasn't an entry for each residue."""
    if not isinstance(values, list | tuple | np.ndarray):
        raise UserError(f"{record}: {name} must be a list with one entry for each residue")
    if len(values) != len(sequence):
        raise UserError(
            f"{record}: {name} has {len(values)} entries for {len(sequence)} residues; they must be as many"
        )
    return values


def _listed(text: str) -> Any:
    """A list that a table holds as text: JSON, numbers between spaces, or digits without any between."""
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except JSON_ERRORS:
            return text
    return text.split() if any(letter.isspace() for letter in text) else list(text)
