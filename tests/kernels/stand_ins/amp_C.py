"""Stands in for the compiled module behind apex's optimizers."""

import torch


def multi_tensor_adam(
    chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, decay
):
    """Loshchilov & Hutter 2019, algorithm 2, on plain fp32 tensors."""
    assert chunk_size > 0
    assert (noop_flag.dtype, noop_flag.tolist()) == (torch.int32, [0])
    assert (type(step), step > 0, mode, bias_correction) == (int, True, 1, 1)
    gradients, parameters, first, second = tensor_lists
    assert gradients
    for g, p, m, v in zip(gradients, parameters, first, second, strict=True):
        assert {type(x) for x in (g, p, m, v)} == {torch.Tensor}
        assert {x.dtype for x in (g, p, m, v)} == {torch.float32}
        assert p.numel()
        m.mul_(beta1).add_((1 - beta1) * g)
        v.mul_(beta2).add_((1 - beta2) * g * g)
        root = (v / (1 - beta2**step)).sqrt() + epsilon
        p.sub_(lr * (m / (1 - beta1**step) / root + decay * p))
