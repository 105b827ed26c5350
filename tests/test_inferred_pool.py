"""Pools of swapped models in inference: the kernels of plans, exact, and torch's where somebody looks on."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from inception_fast.kernels import cpu
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import inception_fast as fast
import numerics
from inception_fast.backends import native_cpu
from test_train_pool import WINDOWS, drawn, torchs
from watching import Watching, WatchingCalls

LAST = torch.channels_last
each_kind = pytest.mark.parametrize("kind", ["max", "mean", "mean_with_padding"])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The sizes of the maps that the native kernel pooled."""
    sizes: list[torch.Size] = []
    pool = native_cpu.pool
    monkeypatch.setattr(native_cpu, "pool", lambda x, window: sizes.append(x.shape) or pool(x, window))
    return sizes


@torch.no_grad()
@pytest.mark.parametrize("tier", cpu.tiers())
@each_kind
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_torchs(
    tier: str, kind: str, window: Any, dtype: torch.dtype, calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maxima bit for bit, averages within the budget, in torch's strides, from memory that nothing was written to."""
    monkeypatch.setenv(cpu.ISA_VARIABLE, tier)
    native_cpu._pool_plan.cache_clear()
    plain = torchs(kind, window)
    ours = fast.replace_layers(copy.deepcopy(plain))
    for n, channels in ((1, 33), (2, 3)):
        x = drawn(kind, n, channels, 7, 9, seed=1, dtype=dtype)
        with numerics.poisoned_memory():
            y = ours(x)
        assert y.dtype is dtype and y.stride() == plain(x).stride()
        if kind == "max":
            assert torch.equal(y, plain(x))
        else:
            numerics.assert_close_budget(y, plain(x.double()), roundings=2)
    assert len(calls) == 2
    native_cpu._pool_plan.cache_clear()


@torch.no_grad()
@each_kind
def test_the_bits_of_plans_in_any_batch_and_of_any_threads(kind: str) -> None:
    net = fast.replace_layers(nn.Sequential(torchs(kind, WINDOWS["same"]), torchs(kind, WINDOWS["padded"])))
    x = drawn(kind, 3, 40, 13, 11, seed=2, dtype=torch.float32)
    y = net(x)
    assert torch.equal(y, fast.optimize(net.eval(), x)(x))
    assert torch.equal(y, torch.cat([net(image[None].contiguous(memory_format=LAST)) for image in x]))
    torch.set_num_threads(1)
    assert torch.equal(y, net(x))


@torch.no_grad()
def test_values_that_are_no_numbers() -> None:
    x = drawn("max", 1, 5, 6, 6, seed=3, dtype=torch.float32)
    x[0, 1, 2, 2], x[0, 2], x[0, 3, 0, 0] = math.nan, -math.inf, math.inf
    for plain in (nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1)):
        y, wanted = fast.replace_layers(copy.deepcopy(plain))(x), plain(x)
        assert torch.equal(y.isnan(), wanted.isnan()) and torch.equal(y.isinf(), wanted.isinf())


@each_kind
def test_torchs_where_somebody_looks_on_or_wants_more(kind: str, calls: list[torch.Size]) -> None:
    plain = torchs(kind, WINDOWS["padded"])
    ours, x = fast.replace_layers(copy.deepcopy(plain)), drawn(kind, 2, 8, 9, 7, seed=4, dtype=torch.float32)
    name = "aten.max_pool2d_with_indices.default" if kind == "max" else "aten.avg_pool2d.default"
    wanted = plain(x)
    assert torch.equal(ours(x), wanted), "outside of no_grad, of a map without a gradient"
    with torch.no_grad():
        for watching in (Watching(), WatchingCalls()):
            with watching:
                assert torch.equal(ours(x), wanted)
        with Watching() as seen:
            ours(x)
        assert name in seen.seen
        with profile(activities=[ProfilerActivity.CPU]):
            assert torch.equal(ours(x), wanted)
        with fast.use_backend("torch"):
            assert torch.equal(ours(x), wanted)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ours(x), plain(x))
        assert torch.equal(torch.func.vmap(ours)(x[None])[0], wanted)
        assert torch.equal(torch.compile(ours, backend="aot_eager", fullgraph=True)(x), wanted)
        others: list[Tensor] = [x.contiguous(), x[0], x.double(), x[:0], x.to("meta"), x[:, :, :, :1].contiguous()]
        for other in others:
            y, theirs = ours(other), plain(other)
            assert y.shape == theirs.shape and (y.is_meta or torch.equal(y, theirs)) and y.stride() == theirs.stride()
    assert not calls
    with torch.no_grad():
        ours(x)
    assert len(calls) == 1


@torch.no_grad()
def test_pools_with_more_to_them_are_torchs(calls: list[torch.Size]) -> None:
    x = drawn("max", 1, 4, 8, 8, seed=5, dtype=torch.float32)
    odd = [nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(3, dilation=2), nn.AvgPool2d(3, divisor_override=2)]
    odd += [nn.AvgPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(2, return_indices=True)]
    for plain in odd:
        y, wanted = fast.replace_layers(copy.deepcopy(plain))(x), plain(x)
        pairs = zip(y, wanted, strict=True) if isinstance(wanted, tuple) else [(y, wanted)]
        assert all(torch.equal(a, b) for a, b in pairs)
    for too_large in (nn.MaxPool2d(9), nn.AvgPool2d(9)):
        with pytest.raises(RuntimeError, match="Output size is too small"):
            fast.replace_layers(copy.deepcopy(too_large))(x)
    assert not calls


@torch.no_grad()
def test_hooks_run(calls: list[torch.Size]) -> None:
    ours, x = fast.replace_layers(nn.MaxPool2d(2)), drawn("max", 1, 4, 8, 8, seed=6, dtype=torch.float32)
    ours.register_forward_hook(lambda module, args, y: y + 1)
    assert torch.equal(ours(x), nn.MaxPool2d(2)(x) + 1) and len(calls) == 1


@torch.no_grad()
def test_a_net_is_pooled_by_them(calls: list[torch.Size]) -> None:
    """v1 has nine pools at stride 1 in its blocks; those at stride 2 round up."""
    net = fast.create_model("inception_v1", num_classes=7, convention="torch").eval()
    x = numerics.random(1, 3, 64, 64).contiguous(memory_format=LAST)
    wanted = net(x)
    y = fast.replace_layers(net.to(memory_format=LAST))(x)
    assert numerics.rel_l2(y, wanted) <= numerics.NET_MAX and len(calls) == 9
