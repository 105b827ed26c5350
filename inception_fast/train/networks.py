"""The network of a run: one of the package's models, or a small one on which a claim can be tried in a minute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._data_config import DataConfig

TINY = "tiny_inception"
REDUCTIONS = ("parallel", "pool_conv", "conv_pool")
ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}


class Unit(nn.Sequential):
    """Convolution that keeps the map's size (or halves it, by stride), batch norm or a bias, activation."""

    def __init__(
        self, cin: int, cout: int, kernel: int | tuple[int, int], norm: bool, activation: str, stride: int = 1
    ) -> None:
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, (kernel[0] // 2, kernel[1] // 2), bias=not norm)
        if norm:
            self.bn = nn.BatchNorm2d(cout, eps=1e-3)
        self.act = ACTIVATIONS[activation]()


class TinyBlock(nn.Module):
    """1x1, 3x3, asymmetric pair and pooled branches: [n, c, h, w] -> [n, c, h, w]; with `residual`, relu(x +
    branches).
    """

    def __init__(self, c: int, norm: bool, activation: str, residual: bool) -> None:
        super().__init__()
        q = c // 4
        unit = dict(norm=norm, activation=activation)
        self.branch0 = Unit(c, q, 1, **unit)  # type: ignore[arg-type]
        self.branch1 = nn.Sequential(Unit(c, q, 1, **unit), Unit(q, q, 3, **unit))  # type: ignore[arg-type]
        self.branch2 = nn.Sequential(Unit(c, q, 1, **unit), Unit(q, q, (1, 5), **unit), Unit(q, q, (5, 1), **unit))  # type: ignore[arg-type]
        self.branch3 = nn.Sequential(nn.AvgPool2d(3, 1, 1), Unit(c, q, 1, **unit))  # type: ignore[arg-type]
        self.up = nn.Conv2d(c, c, 1) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([branch(x) for branch in (self.branch0, self.branch1, self.branch2, self.branch3)], 1)
        return y if self.up is None else torch.relu(x + 0.3 * self.up(y))


class TinyReduction(nn.Module):
    """[n, c, h, w] -> [n, 2c, h / 2, w / 2] in the three ways of arXiv:1512.00567, figures 9 and 10.

    pool_conv: pool, then the expanding 3x3; the narrow map between the two is a bottleneck. conv_pool: the 3x3 on the
    large map, then the pool: no bottleneck, four times the work. parallel: a strided 3x3 beside the pool, half the work
    of the first.
    """

    def __init__(self, c: int, kind: str, norm: bool, activation: str) -> None:
        super().__init__()
        self.kind = kind
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.conv = Unit(
            c, c if kind == "parallel" else 2 * c, 3, norm, activation, stride=2 if kind == "parallel" else 1
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "parallel":
            return torch.cat([self.conv(x), self.pool(x)], 1)
        return self.conv(self.pool(x)) if self.kind == "pool_conv" else self.pool(self.conv(x))


class TinyInception(nn.Module):
    """[n, in_chans, h, w] -> [n, num_classes], h and w at least 16. `depth` blocks on each of two map sizes.

    norm: batch norm, or biases. activation: "relu" or "sigmoid". reduction: see `TinyReduction`. residual: see
    `TinyBlock`.
    """

    smallest = 16

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        width: int = 16,
        depth: int = 1,
        norm: bool = True,
        activation: str = "relu",
        reduction: str = "parallel",
        residual: bool = False,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("reduction", reduction, REDUCTIONS),
            ("activation", activation, tuple(ACTIVATIONS)),
            ("norm", norm, (True, False)),
            ("residual", residual, (True, False)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} {value!r}; allowed: {', '.join(map(str, allowed))}")
        if width < 4 or width % 4 or depth < 1:
            raise ValueError(f"width {width}, depth {depth}; allowed: a multiple of 4, and at least 1")
        self.data_config = DataConfig((0.5,) * in_chans, (0.5,) * in_chans, (in_chans, 32, 32))
        self.stem = Unit(in_chans, width, 3, norm, activation, stride=2)
        stages: list[nn.Module] = []
        for c in (width, 2 * width):
            stages += [TinyBlock(c, norm, activation, residual) for _ in range(depth)]
            stages.append(TinyReduction(c, reduction, norm, activation))
        self.stages = nn.Sequential(*stages)
        self.dropout = nn.Dropout(drop_rate)
        self.fc = nn.Linear(4 * width, num_classes)
        # torch's own habit shrinks activations layer by layer: without batch norm, an opponent made of straw.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < self.smallest:
            raise ValueError(
                f"{TINY} got an image of {x.shape[2]}x{x.shape[3]}; allowed: {self.smallest}x{self.smallest} or larger"
            )
        return self.fc(self.dropout(self.stages(self.stem(x)).mean((2, 3))))


def build(name: str, num_classes: int, options: dict[str, Any], weights: str | None, aux: bool) -> nn.Module:
    """The network `name`; raises ValueError for one that does not exist and for options it does not have."""
    if name == TINY:
        if weights is not None or aux:
            raise ValueError(f"weights or auxiliary heads for {TINY}; allowed: neither, it has none")
        try:
            return TinyInception(num_classes, **options)
        except TypeError as error:
            raise ValueError(f"options {options} of {TINY}: {error}") from error
    from .. import create_model
    from ..models._registry import find_family

    find_family(name, (TINY,))
    model: nn.Module = create_model(name, num_classes=num_classes, weights=weights, aux_logits=aux, **options)
    return model


@torch.no_grad()
def scale_weights(model: nn.Module, factor: float) -> None:
    """Multiplies the weights of every convolution and linear layer."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.mul_(factor)


def native_size(name: str) -> int:
    """The image size that the network `name` was designed for; raises ValueError for one that does not exist."""
    if name == TINY:
        return 32
    from .. import create_model
    from ..models._registry import find_family

    find_family(name, (TINY,))
    with torch.device("meta"):
        model: Any = create_model(name)
    return int(model.data_config.input_size[1])
