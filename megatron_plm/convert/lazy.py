"""Tensors by name that stay in their files until they are asked for."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor


class LazyTensors(Mapping[str, Tensor]):
    """A read-only mapping from name to tensor. Every look-up reads the tensor anew, and none is kept.

    `meta` has a tensor of the meta device for each name: shapes and types are known before anything is read.
    """

    def __init__(self, meta: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
        self.meta = dict(meta)
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.meta:  # before `read` looks for it in a file
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.meta  # the one of Mapping would read it

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta)

    def __len__(self) -> int:
        return len(self.meta)


def meta_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without their values: of the meta device. Nothing is read."""
    if isinstance(tensors, LazyTensors):
        return dict(tensors.meta)
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> LazyTensors:
    """The tensors under other names, which map to the present ones; those not named are left out."""
    meta = meta_of(tensors)
    return LazyTensors({new: meta[old] for new, old in names.items()}, lambda new: tensors[names[new]])


def joined(*parts: Mapping[str, Tensor]) -> LazyTensors:
    """The tensors of all `parts`; where two hold the same name, the last one's."""
    place = {name: part for part in parts for name in part}
    meta = {name: tensor for part in parts for name, tensor in meta_of(part).items()}
    return LazyTensors(meta, lambda name: place[name][name])


def compact(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, with no more memory behind it than its own.

    `torch.save` writes all that a tensor is a view of: of one in a file that is mapped into memory, the file.
    """
    tensor = tensor.detach().cpu()
    owns_all = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous()
    return tensor if owns_all else tensor.clone(memory_format=torch.contiguous_format)


def empty_meta(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of the meta device."""
    return torch.empty(shape, dtype=dtype, device="meta")
