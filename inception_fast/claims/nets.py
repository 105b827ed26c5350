"""The contestants: the same map transformed in the two or three ways that a claim compares."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models.blocks import BasicConv2d, Branches, SamePad2d

GRID, WIDTH = 17, 192  # of the medium grids on which the paper finds asymmetric pairs to work
PAIR_SIZES = (3, 5, 7)
REDUCTION = (320, 35, 35)  # channels, height, width of the article's example: to 640 channels on 17x17


def _conv(cin: int, cout: int, kernel: tuple[int, int], stride: int = 1) -> nn.Module:
    return BasicConv2d(cin, cout, kernel, stride, (kernel[0] // 2, kernel[1] // 2))


def square(n: int, c: int = WIDTH) -> nn.Module:
    """One n x n convolution, [1, c, h, w] -> [1, c, h, w]."""
    return _conv(c, c, (n, n))


def asymmetric(n: int, c: int = WIDTH) -> nn.Module:
    """A 1 x n and an n x 1 convolution in its place."""
    return nn.Sequential(_conv(c, c, (1, n)), _conv(c, c, (n, 1)))


def stacked(count: int, n: int, c: int) -> nn.Module:
    """`count` n x n convolutions in a row, each padded to keep the map's size."""
    if n % 2:
        return nn.Sequential(*(_conv(c, c, (n, n)) for _ in range(count)))
    return nn.Sequential(*(nn.Sequential(SamePad2d(n, 1), BasicConv2d(c, c, n)) for _ in range(count)))


def pool_then_conv(c: int = REDUCTION[0]) -> nn.Module:
    """Halves the map, then doubles the channels: [n, c, 35, 35] -> [n, c, 17, 17] -> [n, 2c, 17, 17]."""
    return nn.Sequential(nn.MaxPool2d(3, 2), _conv(c, 2 * c, (3, 3)))


def conv_then_pool(c: int = REDUCTION[0]) -> nn.Module:
    """Doubles the channels on the large map, then halves it: [n, c, 35, 35] -> [n, 2c, 35, 35] -> [n, 2c, 17, 17]."""
    return nn.Sequential(_conv(c, 2 * c, (3, 3)), nn.MaxPool2d(3, 2))


def parallel_reduction(c: int = REDUCTION[0]) -> nn.Module:
    """A strided convolution beside a pool: [n, c, 35, 35] -> [n, 2c, 17, 17] in one step."""
    return Branches(conv=BasicConv2d(c, c, 3, 2), pool=nn.MaxPool2d(3, 2))


REDUCTIONS = {
    "parallel": parallel_reduction,
    "pool, then convolution": pool_then_conv,
    "convolution, then pool": conv_then_pool,
}


def wide(c: int = 384) -> nn.Module:
    """v3's last blocks: 1x3 beside 3x1, [n, c, 8, 8] -> [n, 2c, 8, 8]."""
    return Branches(row=_conv(c, c, (1, 3)), column=_conv(c, c, (3, 1)))


def deep(c: int = 384) -> nn.Module:
    """The same two kernels in a row: the map between them has half of the channels that come out."""
    return nn.Sequential(_conv(c, c, (1, 3)), _conv(c, 2 * c, (3, 1)))


def settled(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in eval mode with the same random weights every time and batch norms as after some training."""
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            depth = child.weight[0].numel()
            child.weight.data = torch.randn(child.weight.shape, generator=generator) / depth**0.5
        elif isinstance(child, nn.BatchNorm2d):
            child.weight.data = torch.rand(child.weight.shape, generator=generator) + 0.5
            child.bias.data = 0.1 * torch.randn(child.bias.shape, generator=generator)
    return module.eval()


def images(c: int, h: int, w: int, batch: int = 1) -> Tensor:
    """[batch, c, h, w] as a ReLU leaves it, always the same."""
    return torch.randn(batch, c, h, w, generator=torch.Generator().manual_seed(1)).relu()
