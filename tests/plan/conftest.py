"""The planner counts for GPUs, where attention in float32 goes protein by protein, and the rotation is torch's."""

import pytest

from megatron_plm.kernels import cpu


@pytest.fixture(autouse=True)
def _without_the_cpus_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "compiled", None)
