"""The GPUs that a run can be planned for: figures of NVIDIA's data sheets, and assumptions, which are marked as such.

A gigabyte is 10^9 bytes here, as in the data sheets of the newer ones. Of most GPUs the driver reports some per cent
more; that difference is the room left for what an allocator loses between its blocks.
"""

from dataclasses import dataclass

from megatron_plm.errors import UserError, suggestion


@dataclass(frozen=True)
class Gpu:
    """One type of GPU, in the machine it is usually sold in.

    Attributes:
        memory: bytes.
        bf16_flops: dense multiply-adds in bfloat16, counted as two, a second; None where there is no such unit.
        fp32_flops: the same in float32, without TF32, as torch multiplies by default.
        memory_bandwidth: bytes a second.
        link: bytes a second that one GPU sends to another of its machine, one way.
        network: bytes a second that one GPU sends to another machine, one way.
        matmul_efficiency: share of the peak that matrix products of a Transformer reach; an assumption.
    """

    memory: float
    bf16_flops: float | None
    fp32_flops: float
    memory_bandwidth: float
    link: float
    network: float
    matmul_efficiency: float
    source: str

    def peak_flops(self, bf16: bool) -> float:
        """Dense operations a second in the number format of a run."""
        if not bf16:
            return self.fp32_flops
        assert self.bf16_flops is not None, "the command refuses bfloat16 where there is none"
        return self.bf16_flops


GB, TERA = 1e9, 1e12

# Link: half of the data sheet's figure, which adds up both ways. Network: of a DGX of this type, its InfiniBand ports
# over its GPUs (V100: 4 x 100 Gb/s over 8, A100 8 x 200, H100, H200 and B200 8 x 400); of cards without a DGX 100 Gb/s.
GPUS: dict[str, Gpu] = {
    "v100": Gpu(
        32 * GB, None, 15.7 * TERA, 900 * GB, 150 * GB, 6.25 * GB, 0.80, "NVIDIA V100 data sheet, SXM2 32 GB; DGX-1"
    ),
    "a100-40gb": Gpu(
        40 * GB, 312 * TERA, 19.5 * TERA, 1555 * GB, 300 * GB, 25 * GB, 0.80, "NVIDIA A100 data sheet, SXM 40 GB"
    ),
    "a100-80gb": Gpu(
        80 * GB, 312 * TERA, 19.5 * TERA, 2039 * GB, 300 * GB, 25 * GB, 0.80, "NVIDIA A100 data sheet, SXM 80 GB"
    ),
    "h100": Gpu(80 * GB, 989 * TERA, 67 * TERA, 3350 * GB, 450 * GB, 50 * GB, 0.70, "NVIDIA H100 data sheet, SXM"),
    "h200": Gpu(141 * GB, 989 * TERA, 67 * TERA, 4800 * GB, 450 * GB, 50 * GB, 0.70, "NVIDIA H200 data sheet, SXM"),
    "b200": Gpu(180 * GB, 2250 * TERA, 75 * TERA, 7700 * GB, 900 * GB, 50 * GB, 0.65, "NVIDIA HGX B200 data sheet"),
    "l40s": Gpu(
        48 * GB, 362 * TERA, 91.6 * TERA, 864 * GB, 32 * GB, 12.5 * GB, 0.60, "NVIDIA L40S data sheet, PCIe 4.0 x16"
    ),
    "l4": Gpu(
        24 * GB, 121 * TERA, 30.3 * TERA, 300 * GB, 32 * GB, 12.5 * GB, 0.60, "NVIDIA L4 data sheet, PCIe 4.0 x16"
    ),
}

# Taken by the CUDA context, the libraries' workspaces and NCCL's buffers before the first tensor; an assumption.
RESERVED = 2.5 * GB


def gpu_named(name: str) -> Gpu:
    """The GPU of that name; raises UserError for an unknown one."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu {name}: unknown; known are {', '.join(GPUS)}{suggestion(name.lower(), GPUS)}")
    return GPUS[name.lower()]
