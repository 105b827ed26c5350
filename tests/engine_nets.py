"""The networks that the engine is held to.

The last two are kept as they were built and captured: tests over all of them take names for a module, so that pytest
runs those of one network together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

import references
from inception_fast import create_model
from inception_fast.engine import OptimizedModule, optimize
from inception_fast.engine import graph as ir


@dataclass(frozen=True)
class Net:
    """`size`: of the square images; `convolutions`: how many it has, and how many the passes leave."""

    build: Callable[[], nn.Module]
    size: int
    convolutions: tuple[int, int]


def ours(name: str, **options: object) -> nn.Module:
    return references.randomise(create_model(name, **options), 0)


def transforming(name: str) -> nn.Module:
    """torchvision's net as its published weights set it up: the input goes from ImageNet's scaling to [-1, 1] first."""
    net = references.torchvision_net(name)
    net.transform_input = True
    return net


NETS = {
    "inception_v1": Net(partial(ours, "inception_v1"), 64, (57, 39)),
    "inception_v2": Net(partial(ours, "inception_v2"), 64, (70, 45)),
    "inception_v3": Net(partial(ours, "inception_v3"), 75, (94, 66)),
    "inception_v4": Net(partial(ours, "inception_v4"), 75, (149, 105)),
    "inception_resnet_v1": Net(partial(ours, "inception_resnet_v1"), 75, (132, 104)),
    "inception_resnet_v2": Net(partial(ours, "inception_resnet_v2"), 75, (244, 189)),
    "timm_v3": Net(partial(references.timm_net, "inception_v3"), 75, (94, 66)),
    "timm_v4": Net(partial(references.timm_net, "inception_v4"), 75, (149, 105)),
    "timm_resnet_v2": Net(partial(references.timm_net, "inception_resnet_v2"), 75, (244, 189)),
    "torchvision_v3": Net(partial(transforming, "inception_v3"), 75, (94, 66)),
    "torchvision_googlenet": Net(partial(transforming, "googlenet"), 64, (57, 39)),
}


@lru_cache(maxsize=2)
def built(name: str) -> nn.Module:
    return NETS[name].build()


def images(name: str, batch: int = 2) -> Tensor:
    return references.images(NETS[name].size, batch)


@lru_cache(maxsize=2)
def optimised(name: str) -> OptimizedModule:
    """Optimised for two images, so that its one capture serves every batch but one."""
    return optimize(built(name), images(name))


def graphs(name: str) -> tuple[ir.Graph, ir.Graph, dict[str, int]]:
    """The graph as captured, as rewritten, and how often each pass fired."""
    (captured,) = {id(c): c for c in optimised(name)._session._captured.values()}.values()
    return captured.raw, captured.graph, captured.fired


def capture(module: nn.Module, *inputs: Tensor, dynamic: bool = False) -> ir.Graph:
    """The graph of a small module, in eval mode."""
    from inception_fast.engine.capture import capture as capture_module
    from inception_fast.engine.capture import snapshot

    return capture_module(snapshot(module), inputs, {}, dynamic=dynamic)[0]


class Function(nn.Module):
    """A function as a module, with submodules that it may use."""

    def __init__(self, function: Callable[..., object], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs: Tensor) -> object:
        return self.function(self, *inputs)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    return references.randomise(module, seed)


def relative(y: Tensor, expected: Tensor) -> float:
    """max|y - expected| / max|expected| in float64."""
    expected = expected.double()
    assert y.shape == expected.shape, (y.shape, expected.shape)
    assert expected.abs().max() > 0, "a vacuous comparison"
    return ((y.double() - expected).abs().max() / expected.abs().max()).item()


def eager(module: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return module.eval()(*inputs)
