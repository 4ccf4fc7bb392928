"""Files of tensors by name: safetensors, PyTorch's .bin, and either of them in shards with an index.

Formats: safetensors, https://github.com/huggingface/safetensors; transformers' index, {"weight_map": {key: file}}.
Reading leaves the tensors in the files until they are asked for; writing takes them one by one.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megatron_plm.convert.lazy import LazyTensors, empty_meta, joined, meta_of
from megatron_plm.convert.pickles import damaged, read_pickle, tensors_by_name
from megatron_plm.errors import JSON_ERRORS, UserError

PYTORCH_FILE = "pytorch_model.bin"
SAFETENSORS_FILE = "model.safetensors"

_SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_tensors(directory: Path) -> Mapping[str, Tensor]:
    """All tensors of a model directory: model.safetensors or pytorch_model.bin, or the shards that an index lists.

    Raises UserError for missing and damaged files. A .bin file is a pickle: only tensors are unpickled, and one that
    asks for anything else is refused.
    """
    for name, read in ((SAFETENSORS_FILE, _read_safetensors), (PYTORCH_FILE, _read_pytorch)):
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            return read(directory / name)
        if index.is_file():
            return _read_shards({shard: read(shard) for shard in _shards(index)})
    raise UserError(f"{directory}: no weights; expected {SAFETENSORS_FILE} or {PYTORCH_FILE} beside its configuration")


# The pickle that was last looked into, by its path, time and size, until it is read: one of torch before 1.6 is read
# whole each time.
_looked_into: dict[tuple[Path, int, int], Mapping[str, Tensor]] = {}


def holds_tensor(directory: Path, *names: str) -> bool:
    """Whether a model directory has a tensor of one of these names; UserError as of `read_tensors`."""
    tensors = read_tensors(directory)
    path = directory / PYTORCH_FILE
    if isinstance(tensors, dict) and path.is_file():
        _looked_into[_state(path)] = tensors
    return not tensors.keys().isdisjoint(names)


def _state(path: Path) -> tuple[Path, int, int]:
    stat = path.stat()
    return path.resolve(), stat.st_mtime_ns, stat.st_size


def write_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors into one file; OSError if the disk refuses."""
    with _SafetensorsFile(path, meta_of(tensors)) as file:
        for key, tensor in tensors.items():
            file.write(key, tensor)


def write_safetensors_shards(
    meta: Mapping[str, Tensor], stream: Iterable[tuple[str, Tensor]], directory: Path, shard_size: int
) -> None:
    """Write tensors into model.safetensors, or, where they are more than `shard_size` bytes, into shards and an index.

    `meta` says what will come in `stream`, in its order. A shard is larger than `shard_size` only if one tensor is.
    Raises OSError if the disk refuses.
    """
    shards = list(_shards_of(meta, shard_size))
    stem, suffix = SAFETENSORS_FILE.split(".")
    names = [f"{stem}-{i:05d}-of-{len(shards):05d}.{suffix}" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SAFETENSORS_FILE]
    name_of = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    for name, pairs in itertools.groupby(stream, lambda pair: name_of[pair[0]]):
        with _SafetensorsFile(directory / name, {key: meta[key] for key in name_of if name_of[key] == name}) as file:
            for key, tensor in pairs:
                file.write(key, tensor)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(_num_bytes, meta.values()))}, "weight_map": name_of}
        (directory / f"{SAFETENSORS_FILE}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class _SafetensorsFile:
    """A safetensors file whose header is written first, and its tensors as they come, in any order.

    The package's own writer wants all tensors of a file at once.
    """

    def __init__(self, path: Path, meta: Mapping[str, Tensor]) -> None:
        names = {dtype: name for name, dtype in _SAFETENSORS_DTYPES.items()}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
        self._offset: dict[str, int] = {}
        end = 0
        for key in sorted(meta, key=lambda key: -meta[key].element_size()):  # wide types first: all stay aligned
            self._offset[key], end = end, end + _num_bytes(meta[key])
            shape, offsets = list(meta[key].shape), [self._offset[key], end]
            header[key] = {"dtype": names[meta[key].dtype], "shape": shape, "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, key: str, tensor: Tensor) -> None:
        self._file.seek(self._start + self._offset[key])
        self._file.write(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> "_SafetensorsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def _num_bytes(meta: Tensor) -> int:
    return meta.numel() * meta.element_size()


def _shards_of(meta: Mapping[str, Tensor], shard_size: int) -> Iterator[list[str]]:
    keys: list[str] = []
    size = 0
    for key, tensor in meta.items():
        if keys and size + _num_bytes(tensor) > shard_size:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += _num_bytes(tensor)
    yield keys


def _read_pytorch(path: Path) -> dict[str, Tensor]:
    found = _looked_into.get(_state(path))
    _looked_into.clear()
    return tensors_by_name(read_pickle(path), path) if found is None else dict(found)


def _read_safetensors(path: Path) -> LazyTensors:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
        meta = {key: _meta(path, key, part.get_dtype(), part.get_shape()) for key, part in slices.items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise damaged(path, error) from None

    def read(key: str) -> Tensor:
        try:
            return file.get_tensor(key)
        except (OSError, SafetensorError, ValueError) as error:
            raise damaged(path, error) from None

    return LazyTensors(meta, read)


def _meta(path: Path, key: str, dtype: str, shape: list[int]) -> Tensor:
    if dtype not in _SAFETENSORS_DTYPES:
        raise UserError(f"{path}: {key} has type {dtype}; expected one of {', '.join(_SAFETENSORS_DTYPES)}")
    return empty_meta(tuple(shape), _SAFETENSORS_DTYPES[dtype])


def _read_shards(shards: Mapping[Path, Mapping[str, Tensor]]) -> LazyTensors:
    place: dict[str, Path] = {}
    for path, tensors in shards.items():
        for key in tensors:
            if key in place:
                raise UserError(f"{path}: holds {key}, which {place[key].name} holds, too; fetch the shards again")
            place[key] = path
    return joined(*shards.values())


def _shards(index: Path) -> list[Path]:
    """The files that an index of shards names; all lie beside it."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not all(isinstance(name, str) for name in names):
            raise TypeError("weight_map names what is no file")
    except (OSError, *JSON_ERRORS, KeyError, TypeError, AttributeError) as error:
        raise damaged(index, error) from None
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise UserError(f"{index.parent}: shard {name}, which {index.name} lists, is missing; fetch it again")
    return [index.parent / name for name in names]
