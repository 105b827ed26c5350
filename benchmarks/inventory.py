"""What the six networks are made of: every distinct convolution, pair and block, with how often each network runs it.

Read from the networks themselves, by running them on shapes alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import inception_fast as fast
from conv_shapes import ConvShape
from inception_fast.models.blocks import SamePad2d


@dataclass(frozen=True)
class Pair:
    """Two convolutions of kernels 1xn and nx1: "chain", the second reads the first, or "split", both read x."""

    kind: str
    first: ConvShape
    second: ConvShape

    def __str__(self) -> str:
        a, b = self.first, self.second
        return f"{self.kind}-{a.h}x{a.w}x{a.c}-{a.kh}x{a.kw}-{a.oc}-{b.kh}x{b.kw}-{b.oc}"


@dataclass(frozen=True)
class Block:
    """A block of a network and the map that it reads; `key` is equal for blocks that do the same work."""

    model: str
    path: str
    shape: tuple[int, ...]
    key: tuple[Any, ...] = field(repr=False)

    def __str__(self) -> str:
        c, h, w = self.shape
        return f"{self.model}-{self.path}-{h}x{w}x{c}"


@dataclass
class Parts:
    """Of one network, in order."""

    convs: list[ConvShape] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)  # the tensor that each convolution reads
    blocks: list[Block] = field(default_factory=list)

    def pairs(self) -> list[Pair]:
        found, i = [], 0
        while i + 1 < len(self.convs):
            a, b = self.convs[i : i + 2]
            crossed = (a.kh, a.kw) == (b.kw, b.kh) and 1 in (a.kh, a.kw) and a.kh != a.kw
            together = self.inputs[i] == self.inputs[i + 1]
            if crossed and (together or a.oc == b.c):
                found.append(Pair("split" if together else "chain", a, b))
                i += 1
            i += 1
        return found


def sizes_of(name: str) -> tuple[int, int, int]:
    """[c, h, w] that the network was made for."""
    with torch.device("meta"):
        model: Any = fast.create_model(name)
    c, h, w = model.data_config.input_size
    return c, h, w


@cache
def parts(name: str) -> Parts:
    """The parts of one network at its native size, heads for training left out."""
    with torch.device("meta"):
        model: Any = fast.create_model(name).eval()
        x = torch.empty(1, *model.data_config.input_size)
    found, alive = Parts(), []
    padded: dict[int, tuple[Tensor, tuple[int, int, int, int]]] = {}
    chosen = _blocks(model)

    def pad(module: nn.Module, arguments: tuple[Tensor, ...], y: Tensor) -> None:
        before = arguments[0]
        rows, columns = y.shape[2] - before.shape[2], y.shape[3] - before.shape[3]
        alive.append(y)
        padded[id(y)] = before, (rows // 2, rows - rows // 2, columns // 2, columns - columns // 2)

    def conv(module: Any, arguments: tuple[Tensor, ...], y: Tensor) -> None:
        read, sides = padded.get(id(arguments[0]), (arguments[0], _sides(module)))
        alive.append(read)
        found.inputs.append(id(read))
        c, h, w = read.shape[1:]
        found.convs.append(
            ConvShape(c, module.out_channels, *module.kernel_size, module.stride[0], sides, h, w, module.groups)
        )

    def linear(module: Any, arguments: tuple[Tensor, ...], y: Tensor) -> None:
        found.inputs.append(-len(found.inputs))
        shape = ConvShape(module.in_features, module.out_features, 1, 1, 1, (0, 0, 0, 0), 1, 1, 1)
        found.convs.append(shape)

    def block(path: str) -> Callable[..., None]:
        def note(module: nn.Module, arguments: tuple[Tensor, ...], y: Tensor) -> None:
            shape = tuple(arguments[0].shape[1:])
            key = (type(module).__name__, shape, tuple(tuple(p.shape) for p in module.parameters()))
            found.blocks.append(Block(name, path, shape, key))

        return note

    for path, module in model.named_modules():
        hook: Any = {SamePad2d: pad, nn.Conv2d: conv, nn.Linear: linear}.get(type(module))
        if hook is not None:
            module.register_forward_hook(hook)
        if path in chosen:
            module.register_forward_hook(block(path))
    with torch.no_grad():
        model(x)
    return found


def _sides(module: nn.Conv2d) -> tuple[int, int, int, int]:
    vertical, horizontal = (int(p) for p in module.padding)
    return vertical, vertical, horizontal, horizontal


def _blocks(model: nn.Module) -> set[str]:
    """The largest modules with two convolutions or more that are not mere chains of others."""
    chosen: list[str] = []
    for path, module in model.named_modules():
        convs = sum(isinstance(child, nn.Conv2d) for child in module.modules())
        inside = any(path.startswith(f"{other}.") for other in chosen)
        if path and convs > 1 and not inside and not isinstance(module, (nn.Sequential, nn.ModuleList)):
            chosen.append(path)
    return set(chosen)


def convs() -> dict[ConvShape, Counter[str]]:
    """Every distinct convolution, with how often each network runs it."""
    found: dict[ConvShape, Counter[str]] = {}
    for name in fast.list_models():
        for shape in parts(name).convs:
            found.setdefault(shape, Counter())[name] += 1
    return found


def pairs() -> dict[Pair, Counter[str]]:
    """Every distinct pair, with how often each network runs it."""
    found: dict[Pair, Counter[str]] = {}
    for name in fast.list_models():
        for pair in parts(name).pairs():
            found.setdefault(pair, Counter())[name] += 1
    return found


def blocks() -> dict[Block, int]:
    """The first of each kind of block, with how often its network runs it."""
    first: dict[tuple[Any, ...], Block] = {}
    count: Counter[Block] = Counter()
    for name in fast.list_models():
        for block in parts(name).blocks:
            count[first.setdefault((name, block.key), block)] += 1
    return dict(count)
