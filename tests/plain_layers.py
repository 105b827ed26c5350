"""The plain modules that the drop-in layers stand for, and states as after training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import numerics


class Plain(nn.Module):
    """What ConvBNReLU stands for."""

    def __init__(self, cin: int, cout: int, kernel_size: Any, stride: Any = 1, padding: Any = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Siblings(nn.Module):
    """Four 1x1 convolutions of one input, which become one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Conv2d(channels, channels // 4, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x).relu() for part in self.parts], 1)


def randomise(module: nn.Module) -> nn.Module:
    """Statistics and parameters as after training, so that a forgotten one shows."""
    for place, (name, tensor) in enumerate(sorted(module.state_dict().items())):
        if tensor.is_floating_point():
            low = 0.5 if name.endswith("running_var") else -1.0
            tensor.copy_(numerics.random(*tensor.shape, seed=place, dtype=tensor.dtype, low=low))
    return module
