"""What autograd keeps of a forward pass."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor


def saved_bytes(run: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Bytes of this process's storages that autograd keeps while `run` computes, without those of `known`: parameters
    and inputs, which are there anyway."""
    stored, found = {_local(tensor).untyped_storage().data_ptr() for tensor in known}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = _local(tensor).untyped_storage()
        if storage.data_ptr() not in stored:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(found.values())


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return tensor.wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor
