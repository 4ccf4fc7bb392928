"""The planner counts for GPUs, where attention in float32 goes protein by protein."""

import pytest

from megatron_plm.kernels import attention


@pytest.fixture(autouse=True)
def _attention_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_cpu", None)
