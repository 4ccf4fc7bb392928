"""What goes to the device and comes back while it computes: batches ahead of their step, values a step behind."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_plm.data.loader import Batch, Step


def on_device(steps: Iterator[Step], device: torch.device) -> Iterator[Step]:
    """The steps with their batches on `device`.

    A GPU copies them in a stream of its own, from the loader's pinned memory: when the host asks for a step it has
    queued the one before and not waited for it, so the copies run beside that one's compute.
    """
    if device.type != "cuda":
        yield from steps
        return
    copies = torch.cuda.Stream(device)
    for step in steps:
        with torch.cuda.stream(copies):
            batches = [batch.to(device) for batch in step.micro_batches]
        compute = torch.cuda.current_stream(device)
        compute.wait_stream(copies)
        for batch in batches:
            _keep_until_used(batch, compute)
        yield replace(step, micro_batches=batches)


def _keep_until_used(batch: Batch, stream: torch.cuda.Stream) -> None:
    """Let the memory of the batch, which another stream allocated, be used again only behind `stream`'s work."""
    for value in vars(batch).values():
        if isinstance(value, Tensor):
            value.record_stream(stream)


class DeviceValues:
    """Scalars of the device on their way to the host; reading them waits for what was queued before them only.

    Attributes:
        on_device: whether they come from a GPU.
        seconds: when they were there, by `time.perf_counter`; on a GPU known once they were read.
    """

    def __init__(self, values: Sequence[Tensor]) -> None:
        self._values = torch.stack([value.double() for value in values])
        self.on_device = self._values.is_cuda
        self.seconds = time.perf_counter()
        if self.on_device:
            self._values = self._values.to("cpu", non_blocking=True)  # torch takes pinned memory for it
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """The values."""
        if self.on_device:
            self._arrived.synchronize()
            self.seconds = time.perf_counter()
        return self._values.tolist()
