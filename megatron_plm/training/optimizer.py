"""AdamW with the usual parameter groups, and the gradient norm."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_plm.kernels.accelerators import TORCH, adam_kernel
from megatron_plm.parallel.mesh import World
from megatron_plm.parallel.tensor import local_tensor


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
    lr_scales: Mapping[nn.Parameter, float] | None = None,
    implementation: str = TORCH,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over the trainable parameters; biases and norms, the parameters of one dim,
    have no weight decay. `lr_scales` multiply the learning rate of some parameters. `implementation`: torch's, or
    apex's, with the same state."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    # The fused step takes tensors of one mesh at a time: some parameters may be cut by tensor parallelism, others not.
    groups: dict[tuple[object, float, float], list[nn.Parameter]] = {}
    for parameter in trained:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        scale = (lr_scales or {}).get(parameter, 1.0)
        groups.setdefault((mesh, weight_decay if parameter.dim() > 1 else 0.0, scale), []).append(parameter)
    options = [
        {"params": members, "weight_decay": decay, "lr": lr * scale} | ({"lr_scale": scale} if scale != 1 else {})
        for (_, decay, scale), members in groups.items()
    ]
    if implementation == TORCH:
        return torch.optim.AdamW(options, lr=lr, betas=betas, eps=eps, fused=True)
    return ApexAdamW(options, lr=lr, betas=betas, eps=eps)


class ApexAdamW(torch.optim.Optimizer):
    """AdamW by the kernel of apex's FusedAdam, with the groups and the state of torch's AdamW: a checkpoint of one is
    one of the other.

    FusedAdam itself knows no DTensor, and counts the steps of a group, not of a parameter. The kernel gets what this
    process holds. The counts are on the host, where reading one makes no GPU wait.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._adam = adam_kernel()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter.data),
                    "exp_avg_sq": torch.zeros_like(parameter.data),
                }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of the parameters that have a gradient."""
        assert closure is None, "nothing here evaluates a loss anew"
        for group in self.param_groups:
            present = [p for p in group["params"] if p.grad is not None]
            steps = {int(self.state[p]["step"]) for p in present}
            assert len(steps) <= 1, "the kernel takes one count of steps for all"
            for parameter in present:
                self.state[parameter]["step"] += 1
            # A list that ends with an empty tensor would be left undone.
            held = [p for p in present if local_tensor(p.data).numel()]
            if held:
                moments = [[local_tensor(self.state[p][key]) for p in held] for key in ("exp_avg", "exp_avg_sq")]
                lists = [[local_tensor(p.grad) for p in held], [local_tensor(p.data) for p in held], *moments]
                beta1, beta2 = group["betas"]
                self._adam(lists, group["lr"], beta1, beta2, group["eps"], steps.pop() + 1, group["weight_decay"])


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` for every parameter group, by its scale, from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, world: World | None = None, *, copies: Sequence[Tensor] = ()
) -> Tensor:
    """Scale the gradients so that their global L2 norm is at most `max_norm` (0 leaves them); returns the norm before,
    a scalar on the device.

    With a `world` of several processes the norm is that of the whole model: each of them knows what it holds, its
    shards, and how many others hold the same. `copies` are parameters that another one has and counts. Collective.
    """
    present = [p for p in parameters if p.grad is not None]
    for parameter in present:
        _complete_gradient(parameter)
    pieces = [local_tensor(p.grad) for p in present if p.grad is not None]
    if world is None or world.size == 1:
        norm = nn.utils.get_total_norm(pieces)
    else:
        copied = {id(copy) for copy in copies}
        norms = torch.stack(torch._foreach_norm(pieces)).double()
        shares = [0.0 if id(p) in copied else 1 / _num_holders(p, world) for p in present]
        squared = (norms.square() * torch.tensor(shares, dtype=torch.float64).to(norms.device, non_blocking=True)).sum()
        dist.all_reduce(squared)
        norm = squared.sqrt().float()
    if max_norm > 0:
        # As torch's clip_grads_with_norm_, on what is here.
        torch._foreach_mul_(pieces, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _complete_gradient(parameter: nn.Parameter) -> None:
    """Add up a gradient of which each process has a part: of a norm whose tokens are divided among them."""
    gradient = parameter.grad
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor) and gradient.placements != parameter.placements:
        parameter.grad = gradient.redistribute(placements=parameter.placements)


def _num_holders(parameter: Tensor, world: World) -> int:
    """How many processes hold the piece of the parameter that this one does: of its stage, those beside its shards."""
    num_pieces = 1
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        cut = [dim for dim, place in enumerate(parameter.placements) if not place.is_replicate()]
        num_pieces = math.prod(map(mesh.size, cut))
    return world.size // world.layout.pp // num_pieces
