"""Turning JSON values into typed records: the dataclass is the schema, and every mismatch names its place."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from megatron_plm.errors import JSON_ERRORS, UserError, json_fault

Record = TypeVar("Record")

# a number that may not exist, such as the correlation of equal values: JSON has null for it, a record not-a-number
MaybeUndefined = Annotated[float, "null in JSON where undefined"]

_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "null",
    MaybeUndefined: "a number or null",
}


def read_bytes(path: Path, way_out: str) -> bytes:
    """Return a file's bytes; raise UserError with `way_out` where it is missing or unreadable."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {way_out}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {way_out}") from None


def read_text(path: Path, way_out: str) -> str:
    """Return a file's text; raise UserError with `way_out` where it is missing, unreadable or not UTF-8."""
    try:
        return read_bytes(path, way_out).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); {way_out}") from None


def read_object(cls: type[Record], path: Path, way_out: str) -> Record:
    """Return the record of dataclass `cls` that a JSON file holds.

    Raises UserError naming the file, and line or key, where it is missing, is no JSON, or doesn't fit `cls`.
    """
    try:
        value = json.loads(read_text(path, way_out))
    except JSON_ERRORS as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}{line}: not valid JSON ({json_fault(error)}); {way_out}") from None
    return parse_object(cls, value, str(path))


def parse_object(cls: type[Record], value: object, where: str) -> Record:
    """Return `value` as a record of dataclass `cls`; keys that `cls` doesn't name are left alone.

    Args:
        cls: a dataclass whose fields are int, float, MaybeUndefined, str, another such dataclass, `X | None` or
            `dict[str, X]`; the key of a field with a default may be missing.
        value: what `json.loads` returned.
        where: file, and line or key, that an error names.

    Raises:
        UserError: a key is missing or its value has another type than its field.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {_shown(value)}")
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = dataclasses.fields(typing.cast(Any, cls))
    missing = [field.name for field in fields if field.name not in value and field.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"{where}: the key {missing[0]!r} is missing; it must hold {_describe(hints[missing[0]])}")
    names = [field.name for field in fields if field.name in value]
    return cls(**{name: _convert(value[name], hints[name], f"{where}, key {name!r}") for name in names})


def _convert(value: object, hint: Any, where: str) -> object:
    """Return `value` as `hint` asks, or raise UserError naming `where`."""
    if hint is MaybeUndefined and (value is None or type(value) in (int, float)):
        return math.nan if value is None else float(typing.cast(float, value))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return parse_object(typing.cast(type, hint), value, where)
    if origin is types.UnionType:
        return None if value is None else _convert(value, arguments[0], where)
    if origin is dict and isinstance(value, Mapping):
        return {key: _convert(item, arguments[1], f"{where}, key {key!r}") for key, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    # `type is`, not isinstance: JSON's true is a Python int
    if origin is None and type(value) is hint:
        return value
    raise UserError(f"{where}: expected {_describe(hint)}, found {_shown(value)}")


def _describe(hint: Any) -> str:
    """Return what a field's type asks for, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return " or ".join(_NAMES[argument] for argument in arguments)
    return _NAMES.get(hint, "an object")


def _shown(value: object) -> str:
    """Return a JSON value cut to a length that fits a message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
