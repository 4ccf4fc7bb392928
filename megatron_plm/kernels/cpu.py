"""The compiled kernels for the CPU, from csrc/cpu, where they were built: in float32, in the threads of torch."""

import torch

try:
    from megatron_plm.kernels import _cpu
except ModuleNotFoundError:  # one that is there but doesn't load is an error
    _cpu = None  # type: ignore[assignment]

compiled = _cpu


def has_cpu_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels compute over `dtype` on `device`."""
    return compiled is not None and device.type == "cpu" and dtype == torch.float32
