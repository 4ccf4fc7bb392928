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


class _DType:
    """A dtype of plain numbers or text. NumPy's own would let a pickle set its flags, and so make pointers of bytes."""

    __slots__ = ("value",)

    def __init__(self, name: str) -> None:
        self.value = np.dtype(name)
        if self.value.kind not in "biufcSU":
            raise RefusedPickle(f"it holds an array of {self.value}, which no record needs")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, byte_order, *structure = state
        if byte_order not in ("<", ">", "=", "|") or any(part is not None for part in structure[:3]):
            raise RefusedPickle("it holds an array of structures, which no record needs")
        self.value = self.value.newbyteorder(byte_order)


class _MakeDType:
    __slots__ = ()

    def __call__(self, name: str, *_: Any) -> _DType:
        return _DType(str(name))


class _Array:
    """An array of a pickle: made of bytes by ourselves, as NumPy's own constructors trust what they are given."""

    __slots__ = ("value",)

    def __init__(self, value: np.ndarray | None = None) -> None:
        self.value = value

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, content = state
        content = content.encode("latin1") if isinstance(content, str) else content
        self.value = np.frombuffer(content, dtype.value).reshape(shape, order="F" if is_fortran else "C").copy()


class _NewArray:
    """`_reconstruct`: an array whose content follows as its state."""

    __slots__ = ()

    def __call__(self, kind: Any, *_: Any) -> _Array:
        if kind is not _NDARRAY:
            raise RefusedPickle("it makes an array in a way that no record needs")
        return _Array()


class _FromBuffer:
    """An array from its bytes, as pickles of protocol 5 hold them."""

    __slots__ = ()

    def __call__(self, buffer: Any, dtype: _DType, shape: Any, order: str) -> _Array:
        return _Array(np.frombuffer(buffer, dtype=dtype.value).reshape(shape, order="F" if order == "F" else "C"))


class _Scalar:
    """A number of NumPy's from its bytes."""

    __slots__ = ()

    def __call__(self, dtype: _DType, content: Any) -> np.generic:
        content = content.encode("latin1") if isinstance(content, str) else content
        return np.frombuffer(content, dtype.value)[0]


class _Name:
    """What a pickle may name but not call."""

    __slots__ = ()


_NDARRAY = _Name()


def _allowed() -> dict[tuple[str, str], Any]:
    """What may be named: (module, name) to what stands for it here."""
    # Of the others pickles have their own marks.
    plain = {"set": set, "frozenset": frozenset, "complex": complex, "bytes": _Bytes()}
    allowed: dict[tuple[str, str], Any] = {
        **{(module, name): kind for module in ("builtins", "__builtin__") for name, kind in plain.items()},
        ("numpy", "ndarray"): _NDARRAY,
        ("numpy", "dtype"): _MakeDType(),
        ("_codecs", "encode"): _Latin1(),
    }
    for core in ("numpy.core", "numpy._core"):  # before NumPy 2 and since
        allowed[f"{core}.multiarray", "_reconstruct"] = _NewArray()
        allowed[f"{core}.multiarray", "scalar"] = _Scalar()
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
        return _with_arrays(_RecordUnpickler(io.BytesIO(content)).load())
    except RefusedPickle:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise RefusedPickle(f"its pickle is damaged ({type(error).__name__}: {error})") from None


def _with_arrays(value: Any) -> Any:
    """The value with NumPy's arrays in place of those that stood for them."""
    if isinstance(value, _Array):
        if value.value is None:
            raise RefusedPickle("its pickle is damaged (an array has no content)")
        return value.value
    if isinstance(value, dict):
        return {key: _with_arrays(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_arrays(item) for item in value)
    return value


def _check_places(content: bytes) -> None:
    """Refuse a pickle that stores a value at a far place: all places before it would be allocated."""
    for mark, place, _ in pickletools.genops(content):
        if mark.name in ("PUT", "LONG_BINPUT") and isinstance(place, int) and place > len(content):
            raise RefusedPickle(f"its pickle is damaged (it numbers {place:,} values in {len(content):,} bytes)")
