"""Loading pickled TAPE records: plain values and NumPy arrays, nothing that runs."""

import io
import pickle
import pickletools
from typing import Any

import numpy as np


class RefusedPickle(Exception):
    """A pickle that names something no record needs, or that is damaged: one sentence without the file."""


class _Latin1:
    """`_codecs.encode` as old pickles of arrays use it, and no other encoding.

    An object without attributes: a pickle may set attributes of what it was handed.
    """

    __slots__ = ()

    def __call__(self, text: str, encoding: str = "latin1") -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise RefusedPickle("it encodes text in a way that no array needs")
        return text.encode("latin1")


class _Bytes:
    """`bytes` as old pickles use it for an empty text; called with a number it would fill memory."""

    __slots__ = ()

    def __call__(self) -> bytes:
        return b""


class _FromBuffer:
    """An array from its bytes, as pickles of protocol 5 hold them."""

    __slots__ = ()

    def __call__(self, buffer: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
        return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


def _allowed() -> dict[tuple[str, str], Any]:
    """What may be named: (module, name) to what stands for it here."""
    # Of the others pickles have their own marks.
    plain = {"set": set, "frozenset": frozenset, "complex": complex, "bytes": _Bytes()}
    allowed: dict[tuple[str, str], Any] = {
        **{(module, name): kind for module in ("builtins", "__builtin__") for name, kind in plain.items()},
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _Latin1(),
    }
    reconstruct = np.empty(0).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    for core in ("numpy.core", "numpy._core"):  # before NumPy 2 and since
        allowed[f"{core}.multiarray", "_reconstruct"] = reconstruct
        allowed[f"{core}.multiarray", "scalar"] = scalar
        allowed[f"{core}.numeric", "_frombuffer"] = _FromBuffer()
    return allowed


class _RecordUnpickler(pickle.Unpickler):
    _allowed = _allowed()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise RefusedPickle(f"its pickle names {module}.{name}, which no record needs and which may run code")
        return self._allowed[module, name]


def load_record(content: bytes) -> Any:
    """Return the pickled value. Raises RefusedPickle where it needs more than data, which is not run, or is damaged."""
    try:
        _check_places(content)
        return _RecordUnpickler(io.BytesIO(content)).load()
    except RefusedPickle:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise RefusedPickle(f"its pickle is damaged ({type(error).__name__}: {error})") from None


def _check_places(content: bytes) -> None:
    """Refuse a pickle that stores a value at a far place: all places before it would be allocated."""
    for mark, place, _ in pickletools.genops(content):
        if mark.name in ("PUT", "LONG_BINPUT") and isinstance(place, int) and place > len(content):
            raise RefusedPickle(f"its pickle is damaged (it numbers {place:,} values in {len(content):,} bytes)")
