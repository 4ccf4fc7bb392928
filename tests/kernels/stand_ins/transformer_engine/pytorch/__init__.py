"""The norms; like the real ones they are made on the GPU where no device is named."""

import torch
import torch.nn.functional as F
from torch import nn


class LayerNorm(nn.Module):
    def __init__(self, normalized_shape, *, eps=1e-5, device="cuda", dtype=None, zero_centered_gamma=False):
        super().__init__()
        assert not zero_centered_gamma
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(normalized_shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(normalized_shape, device=device, dtype=dtype))

    def forward(self, input):
        assert type(self.weight) in (torch.Tensor, nn.Parameter)
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    def __init__(self, normalized_shape, *, eps=1e-5, device="cuda", dtype=None, zero_centered_gamma=False):
        super().__init__()
        assert not zero_centered_gamma
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(normalized_shape, device=device, dtype=dtype))

    def forward(self, input):
        assert type(self.weight) in (torch.Tensor, nn.Parameter)
        return F.rms_norm(input, self.weight.shape, self.weight, self.eps)
