"""A layer's inference past its operator: the same bits while nothing changed, and the operator where something did."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.profiler import ProfilerActivity, profile

import inception_fast as fast
import numerics
from checkout import ROOT
from inception_fast import _inferred_layer, ops
from inception_fast.backends import native_cpu
from plain_layers import Plain, randomise
from watching import Watching, WatchingCalls

LAST = torch.channels_last
X = numerics.random(2, 16, 12, 11).contiguous(memory_format=LAST)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A name for every call of an operator."""
    names: list[str] = []

    def noted(name: str, operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **options: Any) -> Tensor:
            names.append(name)
            return operator(*args, **options)

        return call

    for name in ("conv_bn_relu", "asymmetric_pair", "parallel_split"):
        monkeypatch.setattr(ops, name, noted(name, getattr(ops, name)))
    return names


def layer() -> fast.ConvBNReLU:
    made: Any = randomise(fast.ConvBNReLU(16, 24, 3, padding=1)).eval()
    return made  # type: ignore[no-any-return]


def in_a_row(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(Plain(16, 20, (1, 3), padding=(0, 1)), Plain(20, 24, (3, 1), padding=(1, 0)), *more)


PAIRS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "chain": (lambda: fast.AsymmetricPair(16, 20, 24, 3), "asymmetric_pair"),
    "split": (lambda: fast.ParallelSplit(16, 20, 24), "parallel_split"),
    "a sequential": (lambda: fast.replace_layers(in_a_row()), "asymmetric_pair"),
    "in a sequential": (lambda: fast.replace_layers(in_a_row(nn.ReLU())), "asymmetric_pair"),
}


def pair(kind: str) -> Any:
    return randomise(PAIRS[kind][0]()).eval()


def half(two: Any, place: int) -> Any:
    """One of a pair's two layers."""
    return two[place] if isinstance(two, nn.Sequential) else (two.first, two.second)[place]


def plainly(module: nn.Module, x: Tensor) -> Tensor:
    """The same by a layer that never ran."""
    with torch.no_grad():
        return copy.deepcopy(module)(x)


@torch.no_grad()
def test_a_second_call_goes_past_the_operator(called: list[str]) -> None:
    for block in (layer(), fast.replace_layers(nn.Sequential(*Plain(16, 24, 3).children(), nn.ReLU()).eval())):
        called.clear()
        wanted = block(X)
        for guard in (torch.no_grad, torch.inference_mode):
            with guard():
                y = block(X)
            assert (
                torch.equal(y, wanted)
                and y.stride() == wanted.stride()
                and y.is_inference() == (guard is not torch.no_grad)
            )
        assert called == ["conv_bn_relu"]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_maps_are_told_apart_by_size_strides_and_dtype(dtype: torch.dtype, called: list[str]) -> None:
    block = layer().to(dtype)
    wide = torch.cat((X, X), 1).to(dtype)
    maps = [X.to(dtype), X.to(dtype).contiguous(), X[:1].to(dtype), X[..., :9].to(dtype), wide[:, 16:]]
    assert len({(x.shape, x.stride()) for x in maps}) == len(maps)
    first = [block(x) for x in maps]
    assert len(called) == len(maps)
    for x, wanted in zip(maps, first, strict=True):
        y = block(x)
        assert torch.equal(y, wanted) and y.stride() == wanted.stride() and torch.equal(y, plainly(block, x))
    assert len(called) == 2 * len(maps), "those of the last line alone"


@torch.no_grad()
def test_sizes_that_are_kept_are_bounded(called: list[str]) -> None:
    block, sizes = layer(), range(3, 4 + _inferred_layer.SIZES)
    for size in sizes:
        block(X[..., :size])
    assert block._fold.memo is not None and len(block._fold.memo._calls) <= _inferred_layer.SIZES
    called.clear()
    assert torch.equal(block(X[..., : sizes[-1]]), plainly(block, X[..., : sizes[-1]])) and len(called) == 1


def fresh(block: Any) -> None:
    block.conv.weight = nn.Parameter(block.conv.weight.detach() * 2)


def elsewhere(block: Any) -> None:
    block.conv = copy.deepcopy(block.conv)
    block.conv.weight.data.mul_(2)


CHANGES: dict[str, Callable[[Any], object]] = {
    "weight in place": lambda b: b.conv.weight.mul_(2),
    "weight past its counter": lambda b: b.conv.weight.data.mul_(2),
    "weight by numpy": lambda b: b.conv.weight.detach().numpy().__imul__(2),
    "another parameter": fresh,
    "another convolution": elsewhere,
    "scale": lambda b: b.bn.weight.data.mul_(2),
    "shift": lambda b: b.bn.bias.add_(1),
    "mean": lambda b: b.bn.running_mean.add_(1),
    "variance": lambda b: b.bn.running_var.mul_(2),
    "no scale": lambda b: setattr(b.bn, "weight", None),
    "a bias": lambda b: setattr(b.conv, "bias", nn.Parameter(torch.ones(b.conv.out_channels))),
    "epsilon": lambda b: setattr(b.bn, "eps", 1.0),
    "stride": lambda b: setattr(b.conv, "stride", (2, 2)),
    "padding": lambda b: setattr(b.conv, "padding", (0, 1)),
    "dilation": lambda b: setattr(b.conv, "dilation", (2, 2)),
    "padding mode": lambda b: setattr(b.conv, "padding_mode", "reflect"),
    "training": lambda b: b.train(),
    "a hook": lambda b: b.conv.register_forward_hook(lambda m, a, y: y * 2),
    "a hook of batch norm": lambda b: b.bn.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "a forward of its own": lambda b: setattr(b.bn, "forward", lambda x: x * 3),
    "another class": lambda b: setattr(b.bn, "__class__", nn.SyncBatchNorm),
    "tiles": lambda b: fast.replace_layers(b, winograd=True),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change: str) -> None:
    block, x = layer(), numerics.random(2, 16, 26, 25).contiguous(memory_format=LAST)
    before = block(x)
    assert block._fold.memo is not None and torch.equal(block(x), before)
    CHANGES[change](block)
    if change == "padding mode":
        block.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
    wanted = copy.deepcopy(block)(x)
    for _ in range(2):
        state = copy.deepcopy(block.bn.state_dict())
        y = block(x)
        assert torch.equal(y, wanted) and not torch.equal(y, before)
        block.bn.load_state_dict(state)


@torch.no_grad()
@pytest.mark.parametrize("kind", PAIRS)
def test_a_second_call_of_a_pair_goes_past_its_operator(kind: str, called: list[str]) -> None:
    two = pair(kind)
    for x in (X, X.contiguous(), X.bfloat16(), X[..., :9]):
        two, wanted = two.to(x.dtype), None
        called.clear()
        for _ in range(3):
            y = two(x)
            assert wanted is None or (torch.equal(y, wanted) and y.stride() == wanted.stride())
            wanted = y
        assert called == [PAIRS[kind][1]]
    for twin in (copy.deepcopy(two), pickle.loads(pickle.dumps(two))):
        assert torch.equal(twin(x), wanted) and len(called) == 2
        called.pop()


def wider(block: Any) -> None:
    block.conv.dilation, block.conv.padding = (2, 2), tuple(2 * p for p in block.conv.padding)


def twice(self: fast.ConvBNReLU, x: Tensor) -> Tensor:
    return 2 * fast.ConvBNReLU.forward(self, x)


PAIR_CHANGES = {
    name: change for name, change in CHANGES.items() if name not in ("stride", "padding", "dilation", "tiles")
} | {
    "dilation": wider,
    "another layer": lambda b: setattr(b, "__class__", type("Twice", (fast.ConvBNReLU,), {"forward": twice})),
    "a hook of a layer": lambda b: b.register_forward_hook(lambda m, a, y: y * 2),
}


@torch.no_grad()
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("change", PAIR_CHANGES)
@pytest.mark.parametrize("kind", ["chain", "split", "in a sequential"])
def test_every_change_to_a_pair_is_seen(kind: str, change: str, place: int) -> None:
    two = pair(kind)
    before = two(X)
    assert torch.equal(two(X), before)
    PAIR_CHANGES[change](half(two, place))
    if change == "padding mode":
        conv = half(two, place).conv
        conv._reversed_padding_repeated_twice = [p for p in conv.padding[::-1] for _ in range(2)]
    wanted = copy.deepcopy(two)(X)
    for _ in range(2):
        state = copy.deepcopy(two.state_dict())
        y = two(X)
        assert torch.equal(y, wanted) and not torch.equal(y, before)
        two.load_state_dict(state)


@torch.no_grad()
def test_tiles_that_a_pair_is_asked_for_later_are_taken() -> None:
    two, x = pair("chain"), numerics.random(2, 16, 26, 25).contiguous(memory_format=LAST)
    before = two(x), two(x)
    y = fast.replace_layers(nn.Sequential(two), winograd=True)(x)
    assert not torch.equal(y, before[1]) and torch.equal(y, copy.deepcopy(two)(x))


@torch.no_grad()
def test_two_layers_in_a_row_and_side_by_side_are_told_apart() -> None:
    chain, split = fast.AsymmetricPair(16, 16, 16, 3).eval(), fast.ParallelSplit(16, 16).eval()
    split.first, split.second = chain.first, chain.second
    for _ in range(3):
        assert chain(X).shape[1] == 16 and split(X).shape[1] == 32 and chain.first(X).shape[1] == 16


@torch.no_grad()
def test_a_hook_on_all_modules_is_seen() -> None:
    block = layer()
    before = block(X)
    handle = register_module_forward_hook(lambda module, args, y: y * 2 if isinstance(module, nn.Conv2d) else None)
    try:
        assert not torch.equal(block(X), before)
    finally:
        handle.remove()
    assert torch.equal(block(X), before)


def test_who_watches_operations_sees_the_operator(called: list[str]) -> None:
    block = layer()
    with torch.no_grad():
        wanted = block(X)
        for watching in (Watching(), WatchingCalls()):
            with watching:
                assert torch.equal(block(X), wanted)
            assert "inception_fast.conv_bn_relu.default" in watching.seen
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            assert torch.equal(block(X), wanted)
        assert "inception_fast::conv_bn_relu" in {event.name for event in seen.events()}
        assert len(called) == 4
        with torch.autocast("cpu", torch.bfloat16):
            assert block(X).dtype is torch.bfloat16
        with fast.use_backend("torch"):
            other = block(X)
            assert not torch.equal(other, wanted) and numerics.rel_l2(other, wanted) <= numerics.NET_MAX
        assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(X), wanted)
        mapped = torch.func.vmap(block)(X[None])
        assert numerics.rel_l2(mapped[0], wanted) <= numerics.NET_MAX
        traced = torch.jit.trace(block, X)
        assert "conv" in str(traced.inlined_graph) and numerics.rel_l2(traced(X), wanted) <= numerics.NET_MAX
    x = X.clone().requires_grad_()
    block(x).sum().backward()
    assert x.grad is not None and block.conv.weight.grad is not None and block.bn.weight.grad is not None


@pytest.mark.parametrize("kind", PAIRS)
def test_who_watches_operations_sees_the_operator_of_a_pair(kind: str) -> None:
    two, name = pair(kind), PAIRS[kind][1]
    with torch.no_grad():
        wanted = two(X)
        for watching in (Watching(), WatchingCalls()):
            with watching:
                assert torch.equal(two(X), wanted)
            assert f"inception_fast.{name}.default" in watching.seen
        with torch.autocast("cpu", torch.bfloat16):
            assert two(X).dtype is torch.bfloat16
        with fast.use_backend("torch"):
            other = two(X)
            assert not torch.equal(other, wanted) and numerics.rel_l2(other, wanted) <= numerics.NET_MAX
        assert torch.equal(torch.compile(two, fullgraph=True, backend="aot_eager")(X), wanted)
    two(X).sum().backward()
    assert all(half(two, place).conv.weight.grad is not None for place in range(2))


@torch.no_grad()
def test_what_the_operator_refuses_is_refused_after_a_call_too() -> None:
    block = layer()
    block(X), block(torch.ones(1).expand(X.shape))  # whose strides a sparse tensor would name too
    bad: list[tuple[Any, str]] = [(X[:, :8], "channels"), (X[0], "shape"), (X.double(), "dtype|type"), (X[:0, :3], "")]
    bad += [(X.to_sparse(), ""), (X.to("meta"), ""), (X.numpy(), "")]
    for x, said in bad:
        with pytest.raises(Exception, match=said) as fault:
            block(x)
        with pytest.raises(type(fault.value), match=said) as first:
            copy.deepcopy(block)(x)
        assert str(first.value) == str(fault.value)


@torch.no_grad()
@pytest.mark.parametrize("whole", [True, False], ids=["fullgraph", "parts"])
def test_compiled_after_a_call_it_is_what_a_fresh_one_is(whole: bool) -> None:
    """Where Dynamo runs a frame in Python that it gave up, it compiles what the frame calls, one by one."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = layer(), randomise(fast.ConvBNReLU(24, 16, 1)).eval()

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            if not whole:
                torch._dynamo.graph_break()
            y: Tensor = self.second(y)
            return y

    nets = Broken().eval(), Broken().eval()
    nets[0](X)
    said, found = [], []
    for net in nets:
        torch._dynamo.reset()
        compiled = torch.compile(net, fullgraph=whole, backend="aot_eager")
        for bad in (X[:, :8], X[0], X.double()):
            with pytest.raises(Exception) as fault:
                compiled(bad)
            said.append((type(fault.value), str(fault.value).splitlines()[0]))
        found.append([compiled(X), compiled(X), compiled(X[:1])])
    assert said[:3] == said[3:]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_what_is_kept_dies_with_the_layer_and_with_the_cache() -> None:
    native_cpu.plans.clear()
    block = layer()
    wanted = block(X)
    assert len(native_cpu.plans) == 1
    native_cpu.plans.clear()
    assert torch.equal(block(X), wanted) and len(native_cpu.plans) == 1
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert twin._fold.memo is None and torch.equal(twin(X), wanted)
    del block, twin
    gc.collect()
    assert len(native_cpu.plans) == 0


def test_without_native_kernels_layers_are_torchs() -> None:
    code = """
import sys
sys.modules["inception_fast.kernels.cpu._native"] = None
import torch
import inception_fast as fast
layer, x = fast.ConvBNReLU(4, 8, 3).eval(), torch.rand(1, 4, 9, 9)
with torch.no_grad():
    wanted = layer.bn(layer.conv(x)).relu()
    assert all(torch.allclose(layer(x), wanted, atol=1e-5) for _ in range(3))
assert layer._fold.memo is None and not fast.backend_status()["cpu"]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@torch.inference_mode()
def test_weights_that_count_no_versions_are_watched_too() -> None:
    block = layer()
    before = block(X)
    assert block._fold.memo is not None and block.conv.weight.is_inference()
    block.conv.weight[3, 2, 1, 1] += 1
    assert not torch.equal(block(X), before) and torch.equal(block(X), copy.deepcopy(block)(X))
