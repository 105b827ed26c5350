"""Pools in training: kernels of every tier against the slow forms, and the layers that use them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from inception_fast.kernels import cpu
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import inception_fast as fast
import numerics
from inception_fast.backends import train_pool
from inception_fast.backends.window import Window

# Kernel, stride, padding and the risk: the stem's; every pixel under one window of a border; pixels under none; rows
# and columns unlike; windows apart from each other.
WINDOWS = {
    "stem": ((3, 3), (2, 2), (0, 0)),
    "same": ((3, 3), (1, 1), (1, 1)),
    "padded": ((3, 3), (2, 2), (1, 1)),
    "uneven": ((2, 5), (1, 3), (1, 2)),
    "apart": ((1, 2), (3, 4), (0, 1)),
}
# A whole vector and a tail of one; fewer than a vector.
CHANNELS = (33, 3)
each_window = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
each_tier = pytest.mark.parametrize("tier", cpu.tiers())
each_kind = pytest.mark.parametrize("kind", ["max", "mean", "mean_with_padding"])


def torchs(kind: str, window: Any) -> nn.Module:
    kernel, stride, padding = window
    if kind == "max":
        return nn.MaxPool2d(kernel, stride, padding)
    return nn.AvgPool2d(kernel, stride, padding, count_include_pad=kind == "mean_with_padding")


def integers(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Small ones, so that a maximum often has equals."""
    drawn = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(dtype).contiguous(memory_format=torch.channels_last)


def drawn(kind: str, *shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Integers for maxima; for averages, whose ninths of integers would all round the same way, values of any kind."""
    if kind == "max":
        return integers(*shape, seed=seed, dtype=dtype)
    return numerics.random(*shape, seed=seed, dtype=dtype).contiguous(memory_format=torch.channels_last)


def by_torch(kind: str, window: Any, x: Tensor, grad: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = x.double().requires_grad_()
    y = torchs(kind, window)(wide)
    y.backward(torch.ones_like(y) if grad is None else grad.double())
    assert wide.grad is not None
    return y.detach(), wide.grad


@each_tier
@each_kind
@each_window
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_torchs(
    tier: str, kind: str, window: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maxima and their gradients on integers bit for bit, first of equals included; averages within the budget."""
    monkeypatch.setenv(cpu.ISA_VARIABLE, tier)
    for channels in CHANNELS:
        x = drawn(kind, 2, channels, 7, 9, seed=1, dtype=dtype)
        asked = Window(kind, *window)
        with numerics.poisoned_memory():
            y, taps = train_pool.forward(x, asked)
            grad = drawn(kind, *y.shape, seed=2, dtype=dtype)
            dx = train_pool.backward(grad, taps, asked, 7, 9)
        expected, gradient = by_torch(kind, window, x, grad)
        assert (taps is not None) == (kind == "max") and y.dtype is dx.dtype is dtype
        if kind == "max":
            assert torch.equal(y.double(), expected) and torch.equal(dx.double(), gradient)
        elif dtype is torch.float32:
            numerics.assert_close_budget(y, expected)
            numerics.assert_close_budget(dx, gradient)
        else:  # what float32 has, rounded once
            wide, _ = train_pool.forward(x.float(), asked)
            assert torch.equal(y, wide.to(dtype))
            assert torch.equal(dx, train_pool.backward(grad.float(), None, asked, 7, 9).to(dtype))
        assert dx.is_contiguous(memory_format=torch.channels_last)


def test_not_a_number_and_infinities_are_torchs() -> None:
    x = integers(1, 20, 7, 7, seed=3, dtype=torch.float32)
    x[0, ::2, 2, 3], x[0, ::3, 4, 4], x[0, 5] = torch.nan, torch.inf, -torch.inf
    asked = Window("max", (3, 3), (2, 2), (1, 1))
    y, taps = train_pool.forward(x, asked)
    grad = integers(*y.shape, seed=2, dtype=torch.float32)
    expected, gradient = by_torch("max", asked[1:], x, grad)
    assert torch.equal(y.double().nan_to_num(7), expected.nan_to_num(7))
    assert torch.equal(train_pool.backward(grad, taps, asked, 7, 7).double(), gradient)


@each_kind
def test_maps_inside_wider_maps_are_read_where_they_lie(kind: str) -> None:
    wide = integers(2, 40, 7, 9, seed=1, dtype=torch.float32)
    asked = Window(kind, (3, 3), (1, 1), (1, 1))
    y, taps = train_pool.forward(wide[:, 11:31], asked)
    dense, _ = train_pool.forward(wide[:, 11:31].contiguous(memory_format=torch.channels_last), asked)
    assert torch.equal(y, dense)
    expected, gradient = by_torch(kind, asked[1:], wide[:, 11:31], wide[:, 3:23])
    numerics.assert_close_budget(train_pool.backward(wide[:, 3:23], taps, asked, 7, 9), gradient)
    numerics.assert_close_budget(y, expected)
    ones = torch.ones(()).expand(2, 20, 7, 9)
    numerics.assert_close_budget(
        train_pool.backward(ones, taps, asked, 7, 9), by_torch(kind, asked[1:], wide[:, 11:31], None)[1]
    )


@pytest.mark.parametrize(
    ("sizes", "window", "words"),
    [
        ((1, 5, 5, 4, 3, 3), (17, 17, 1, 1, 8, 8), "17x17 places; allowed: at most 256"),
        ((1, 5, 5, 4, 4, 3), (3, 3, 2, 2, 0, 0), "5 rows with kernel 3, stride 2, padding 0 and 4 results"),
        ((1, 5, 5, 4, 3, 3), (3, 3, 2, 2, 2, 0), "padding 2"),
        ((0, 5, 5, 4, 3, 3), (3, 3, 2, 2, 0, 0), "a pool of 0 images"),
    ],
)
def test_impossible_pools_raise(sizes: Any, window: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cpu.pool_in_training(cpu.default_tier(), "float32", "max", False, sizes, window, (0, 4), 0, 0, 1)
    with pytest.raises(ValueError, match="pool 'median'; allowed: max"):
        cpu.pool_in_training(cpu.default_tier(), "float32", "median", False, sizes, window, (0, 4), 0, 0, 1)


class Net(nn.Module):
    """Pools between convolutions and at the end of a branch, as in v3."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.max = nn.Conv2d(3, 20, 3), nn.MaxPool2d(3, 2)
        self.mean, self.other, self.last = nn.AvgPool2d(3, 1, 1), nn.Conv2d(20, 8, 1), nn.MaxPool2d((3, 3), stride=[2])

    def forward(self, x: Tensor) -> Tensor:
        y = self.max(self.conv(x))
        return torch.cat([self.last(self.other(self.mean(y))), self.last(y)], 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    for name in ("forward", "backward"):
        kernel = getattr(train_pool, name)
        monkeypatch.setattr(train_pool, name, lambda *a, kernel=kernel, name=name: names.append(name) or kernel(*a))
    return names


def nets() -> tuple[nn.Module, nn.Module, Tensor]:
    plain = Net().to(memory_format=torch.channels_last)
    image = numerics.random(2, 3, 23, 25, seed=5).contiguous(memory_format=torch.channels_last)
    return fast.replace_layers(copy.deepcopy(plain)), plain, image


def test_swapped_pools_train_as_torchs(calls: list[str]) -> None:
    ours, plain, x = nets()
    assert type(ours.max) is not nn.MaxPool2d and isinstance(ours.max, nn.MaxPool2d)
    assert isinstance(ours.mean, nn.AvgPool2d) and repr(ours) == repr(plain)
    for model in (ours, plain):
        model(x).square().sum().backward()
    assert calls == ["forward"] * 4 + ["backward"] * 4
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert numerics.rel_l2(mine.grad, theirs.grad) <= numerics.GRAD_REL_L2


def test_what_is_watched_is_torchs_and_inference_within_the_budget(calls: list[str]) -> None:
    ours, plain, x = nets()
    with torch.no_grad():
        numerics.assert_close_budget(ours(x), plain(x).double(), roundings=2)
    with fast.use_backend("torch"):
        assert torch.equal(ours(x), plain(x))
    with FlopCounterMode(display=False):
        ours(x)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    numerics.assert_close_budget(compiled(x), plain(x).double(), roundings=2)
    exported = torch.export.export(ours, (x,)).graph
    assert {"aten.max_pool2d.default", "aten.avg_pool2d.default"} <= {str(node.target) for node in exported.nodes}
    odd = [nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(3, dilation=2), nn.AvgPool2d(3, divisor_override=2)]
    wanted = [module(x.requires_grad_()) for module in odd]
    found = [module(x) for module in fast.replace_layers(nn.ModuleList(odd))]
    assert not calls and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", ["max", "mean", "mean_with_padding"])
@each_window
def test_second_derivatives_are_torchs(kind: str, window: Any, calls: list[str]) -> None:
    """The gradient of a gradient's square, which the native backward leaves to torch."""
    found = []
    for swapped in (True, False):
        module = torchs(kind, window)
        module = fast.replace_layers(module) if swapped else module
        x = numerics.random(2, 4, 7, 9, seed=6).contiguous(memory_format=torch.channels_last).requires_grad_()
        (dx,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
        dx.square().sum().backward()
        assert x.grad is not None
        found.append((dx.detach(), x.grad))
    assert calls == ["forward", "backward"]  # of the cube, whose own gradient is a function of y
    for mine, theirs in zip(*found, strict=True):
        assert numerics.rel_l2(mine, theirs) <= numerics.GRAD_REL_L2


def test_a_maximum_keeps_a_byte_a_result() -> None:
    kept: list[Tensor] = []
    x = numerics.random(2, 20, 21, 21, seed=1).contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = fast.replace_layers(nn.MaxPool2d(3, 2))(x)
    assert sum(t.untyped_storage().nbytes() for t in kept) == y.numel()
