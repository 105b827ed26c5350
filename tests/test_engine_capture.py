"""From torch calls to the engine's graph: the same numbers, and a reason for whatever stays with torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import prune

import engine_nets
import numerics
from engine_nets import Function, randomised, relative
from inception_fast.engine import graph as ir
from inception_fast.engine import interpret, optimize
from inception_fast.engine.capture import CaptureError, capture, snapshot

X = numerics.random(2, 4, 9, 9, seed=1)


def captured(function: Callable[..., object], *inputs: Tensor, dynamic: bool = False, **modules: nn.Module) -> ir.Graph:
    """The graph of a small network, checked against eager in float64."""
    module = randomised(Function(function, **modules))
    graph = engine_nets.capture(module, *inputs, dynamic=dynamic)
    flat = module(*inputs)
    with torch.no_grad():
        for found, wanted in zip(
            interpret.run(graph, inputs), flat if isinstance(flat, (tuple, list)) else [flat], strict=True
        ):
            assert found.dtype == wanted.dtype
            assert relative(found, wanted.detach()) <= numerics.NET_MAX
    return graph


def kinds(graph: ir.Graph) -> list[str]:
    skipped = (ir.Input, ir.Constant)
    return [type(n.op).__name__ for n in graph.nodes if not isinstance(n.op, skipped)]


def reasons(graph: ir.Graph) -> list[str]:
    return [n.op.reason for n in graph.nodes if isinstance(n.op, ir.Torch)]


CALLS: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "max pool": (lambda x: F.max_pool2d(x, 3, 2, 1), ["Pool"]),
    "max pool beyond the map": (lambda x: F.max_pool2d(x, (2, 3), 2, ceil_mode=True), ["Pool"]),
    "average beyond the map": (lambda x: F.avg_pool2d(x, 2, 2, 1, ceil_mode=True), ["Pool"]),
    "average without padding": (lambda x: F.avg_pool2d(x, 4, 3, 1, True, False), ["Pool"]),
    "adaptive average": (lambda x: F.adaptive_avg_pool2d(x, 3), ["Pool"]),
    "mean over the map": (lambda x: x.mean((-1, -2), keepdim=True), ["Pool"]),
    "mean to a vector": (lambda x: x.mean([2, 3]), ["Pool", "Reshape"]),
    "flatten": (lambda x: x.flatten(1), ["Reshape"]),
    "view": (lambda x: x.view(x.size(0), -1), ["Reshape"]),
    "arithmetic": (lambda x: (1 - x * 2) / 4 + 0.5, ["Affine"] * 4),
    "scaled sum": (lambda x: torch.add(x, x.relu(), alpha=1), ["Relu", "Add"]),
    "clamp at zero": (lambda x: x.clamp(min=0), ["Relu"]),
    "pad": (lambda x: F.pad(x, (1, 0, 2, 3)), ["Pad"]),
    "pad of width": (lambda x: F.pad(x, (1, 2), value=3.0), ["Pad"]),
    "slice": (lambda x: x[:, 1:-1], ["Slice"]),
    "chunk": (lambda x: torch.cat(x.chunk(3, 1)[::-1], 1), ["Slice", "Slice", "Concat"]),
    "split": (lambda x: torch.cat(torch.split(x, [1, 3], 1)[::-1], 1), ["Slice", "Slice", "Concat"]),
    "one of a concatenation": (lambda x: torch.cat([x], 1).relu(), ["Identity", "Relu"]),
    "in place": (lambda x: (x * 2).relu_().add_(1).mul_(3), ["Affine", "Relu", "Affine", "Affine"]),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str) -> None:
    function, expected = CALLS[name]
    graph = captured(lambda m, x: function(x), X)
    assert [k for k in kinds(graph) if k != "Torch"] == expected
    assert all("sym_size" in r for r in reasons(graph)), reasons(graph)


STAYS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "dilated pool": (lambda x: F.max_pool2d(x, 2, 1, dilation=2), "dilation"),
    "own divisor": (lambda x: F.avg_pool2d(x, 2, divisor_override=3), "divisor"),
    "unequal windows": (lambda x: F.adaptive_avg_pool2d(x, 2), "unequal"),
    "mean of channels": (lambda x: x.mean(1), "mean over dimensions"),
    "concatenated rows": (lambda x: torch.cat([x, x], 2), "along dimension 2"),
    "product": (lambda x: x * x.relu(), "product of two tensors"),
    "difference": (lambda x: x - x.relu(), "difference"),
    "a divisor near zero": (lambda x: x * 1e-3 / 1e-39, "no finite reciprocal"),
    "broadcast sum": (lambda x: x + x.mean((2, 3), keepdim=True), "different shapes"),
    "other activation": (lambda x: F.gelu(x), "no native step for aten.gelu"),
    "other clamp": (lambda x: x.clamp(0, 6), "bounds"),
    "reflection": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), "constant"),
    "cropping": (lambda x: F.pad(x, (-1, 0, 0, 0)), "below zero"),
    "strided slice": (lambda x: x[:, ::2], "step"),
    "rows": (lambda x: x[:, :, 1:], "dimension 2"),
    "another dtype": (lambda x: x.double() + 1, "cast from"),
    "transposed": (lambda x: x.permute(0, 1, 3, 2), "no native step"),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays_with_torch_says_why(name: str) -> None:
    function, word = STAYS[name]
    assert any(word in r for r in reasons(captured(lambda m, x: function(x), X)))


CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 5, 3, 2, 1),
    "grouped": nn.Conv2d(4, 6, (3, 2), groups=2),
    "same": nn.Conv2d(4, 5, (2, 5), padding="same"),
    "valid": nn.Conv2d(4, 5, 3, padding="valid", bias=False),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    assert kinds(captured(lambda m, x: m.conv(x), X, conv=CONVOLUTIONS[name])) == ["Conv"]


@pytest.mark.parametrize(
    "module", [nn.Conv2d(4, 5, 3, dilation=2), nn.ConvTranspose2d(4, 5, 3)], ids=["dilated", "transposed"]
)
def test_other_convolutions_stay(module: nn.Module) -> None:
    assert kinds(captured(lambda m, x: m.conv(x), X, conv=module)) == ["Torch"]


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}])
def test_batch_norm(options: dict[str, bool]) -> None:
    graph = captured(lambda m, x: m.bn(x), X, bn=nn.BatchNorm2d(4, **options))
    expected = "Torch" if "track_running_stats" in options else "Affine"
    assert kinds(graph) == [expected], "statistics of the batch itself are no per-channel arithmetic"


def test_in_place_writes_reach_views() -> None:
    """x is written under one name and read under another: capture must functionalise, not ignore it."""

    def net(m: Function, x: Tensor) -> Tensor:
        y = x * 2
        flat = y.view(2, -1)
        y.relu_()
        return flat + 0

    captured(net, X)


def test_in_place_writes_reach_the_first_name() -> None:
    def net(m: Function, x: Tensor) -> Tensor:
        y = x * 2
        z = y.relu_()
        z.add_(1)
        return y + z

    captured(net, X)


def test_writes_that_torch_cannot_follow_are_refused() -> None:
    module = Function(lambda m, x: (x * 2).flatten(2)[0].fill_diagonal_(3.0))
    with pytest.raises(CaptureError, match="a write in place that torch cannot follow"):
        engine_nets.capture(module, X)


def test_nothing_may_write_to_inputs_or_buffers() -> None:
    with pytest.raises(CaptureError, match="writes to 'inputs_0'"):
        engine_nets.capture(Function(lambda m, x: x.relu_()), X.clone())

    def count(m: Function, x: Tensor) -> Tensor:
        m.bn.running_mean.add_(1)
        return m.bn(x)

    with pytest.raises(CaptureError, match="running_mean"):
        engine_nets.capture(Function(count, bn=nn.BatchNorm2d(4)), X)


def test_what_cannot_be_captured() -> None:
    with pytest.raises(CaptureError, match=r"torch\.export cannot capture Function"):
        engine_nets.capture(Function(lambda m, x: x * 2 if x.sum() > 0 else x), X)
    with pytest.raises(CaptureError, match=r"transforms of functions \(.*_unwrap_for_grad\); allowed: torch.vmap"):
        engine_nets.capture(Function(lambda m, x: torch.func.grad(lambda y: y.square().sum())(x)), X)
    with pytest.raises(CaptureError, match=r"no tensor with a batch dimension among the inputs, Tensor \[\];"):
        capture(Function(lambda m, x: x), (torch.tensor(1.0),), {}, dynamic=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
def test_a_convolution_takes_maps_of_its_own_dtype(conv: type[nn.Module], dtype: torch.dtype) -> None:
    """Without a bias torch.export would take what torch itself refuses to run."""
    rank = 4 if conv is nn.ConvTranspose2d else int(conv.__name__[4]) + 2
    x = torch.ones(2, 4, *[5] * (rank - 2), dtype=dtype)
    with pytest.raises(CaptureError, match=f"conv got a map of dtype {dtype}; allowed: torch.float32, that of its"):
        engine_nets.capture(Function(lambda m, x: m.conv(x).relu(), conv=conv(4, 2, 3, bias=False)), x)


def test_parameters_alone_are_computed_once() -> None:
    def net(m: Function, x: Tensor) -> Tensor:
        scale = m.bn.weight * (m.bn.running_var + m.bn.eps).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (m.bn.bias - m.bn.running_mean * scale).reshape(-1, 1, 1)

    assert kinds(captured(net, X, bn=nn.BatchNorm2d(4))) == ["Affine", "Affine"]


def test_random_numbers_are_drawn_in_every_call() -> None:
    graph = engine_nets.capture(Function(lambda m, x: x + torch.rand(4, 1, 1)), X)
    a, b = (interpret.run(graph, [X])[0] for _ in range(2))
    assert not torch.equal(a, b)


def test_dropout_that_is_on_in_inference_stays() -> None:
    graph = engine_nets.capture(Function(lambda m, x: F.dropout(x, 0.5, True)), X)
    assert reasons(graph) == ["dropout that drops in inference"]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_free_batch(batch: int) -> None:
    module = randomised(Function(lambda m, x: m.fc(m.conv(x).flatten(1)), conv=nn.Conv2d(4, 2, 3), fc=nn.Linear(98, 3)))
    graph = engine_nets.capture(module, X[:1], dynamic=True)
    assert graph.dynamic
    x = numerics.random(batch, 4, 9, 9, seed=batch)
    with torch.no_grad():
        assert relative(interpret.run(graph, [x])[0], module(x)) <= numerics.NET_MAX


@pytest.mark.parametrize("scale", [3.0, numerics.random(2, 4, 1, 1, seed=2)], ids=["number", "tensor"])
def test_keywords_without_a_name(scale: float | Tensor) -> None:
    """Of torch.export's programs with these none has a free batch."""

    class Scaled(nn.Module):
        def forward(self, x: Tensor, **more: float | Tensor) -> Tensor:
            return (x * more["scale"]).relu()

    graph, _ = capture(Scaled(), (X,), {"scale": scale}, dynamic=True)
    given = [X, scale] if isinstance(scale, Tensor) else [X]
    assert not graph.dynamic and torch.equal(interpret.run(graph, given)[0], (X * scale).relu())


def test_a_batch_that_the_module_fixes() -> None:
    assert not engine_nets.capture(Function(lambda m, x: x.view(2, 4, 81, 1).relu()), X, dynamic=True).dynamic


def test_snapshot_shares_parameters_and_touches_nothing() -> None:
    module = nn.Sequential(nn.Conv2d(4, 5, 3), nn.Dropout())
    module.train()
    twin = snapshot(module)
    assert not twin.training and not twin[1].training and module.training and module[1].training
    assert twin[0].weight is module[0].weight and twin[0] is not module[0]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:The tensor attribute:UserWarning")
@pytest.mark.parametrize("made", [nn.utils.weight_norm, lambda conv: prune.l1_unstructured(conv, "weight", 0.5)])
def test_weights_made_of_parameters_are_captured(made: Callable[[nn.Module], nn.Module]) -> None:
    """Old weight norm and pruning keep the weight with its history, which `copy.deepcopy` refuses."""
    module = nn.Sequential(made(nn.Conv2d(4, 8, 3)), nn.ReLU()).eval()
    kept = module[0].weight
    fast = optimize(module, X)
    for x in (X, X[:1, :, :7]):
        assert relative(fast(x), module(x).detach()) <= numerics.NET_MAX
    module(X).sum().backward()
    assert kept.grad_fn is not None and all(p.grad is not None for p in module[0].parameters())


def test_every_call_is_listed() -> None:
    graph = captured(lambda m, x: (m.conv(x).relu(), x.chunk(2, 1)[0]), X, conv=nn.Conv2d(4, 5, 3))
    names = {n for node in graph.nodes for n in node.sources} | set(graph.notes)
    assert set(graph.captured) <= names
    assert graph.captured["conv2d"].path == "conv" and graph.captured["conv2d"].shape == (2, 5, 7, 7)


def test_captures_at_the_same_time() -> None:
    """torch.export keeps what it is at in globals: two at once fail with errors of its own."""
    nets = [randomised(nn.Sequential(*[nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()] * 3)) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        graphs = list(pool.map(lambda net: engine_nets.capture(net, X), nets))
    for net, graph in zip(nets, graphs, strict=True):
        assert relative(interpret.run(graph, [X])[0], net(X).detach()) <= numerics.NET_MAX


def test_a_capture_leaves_the_settings_of_torch() -> None:
    """And nothing else: torch keeps for good the source of each graph that it makes, and what it finds of stand-ins."""
    before = getattr(torch.fx.config, "do_not_emit_stack_traces", False)
    sources = torch.fx.graph_module._loader.eval_cache
    many, known = len(sources), set(FakeTensorMode.cache)
    captured(lambda _, x: x.relu(), numerics.random(3, 4, 9, 61, seed=1))
    assert len(sources) == many and set(FakeTensorMode.cache) == known
    with pytest.raises(CaptureError, match="data-dependent"):
        engine_nets.capture(Function(lambda _, x: x.relu() if x.sum() > 0 else x), X)
    assert getattr(torch.fx.config, "do_not_emit_stack_traces", False) == before
    torch.fx.symbolic_trace(nn.ReLU())
    assert len(sources) == many + 1


def test_what_others_trace_during_a_capture_keeps_its_source() -> None:
    def relu(_: nn.Module, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            traced = pool.submit(torch.fx.symbolic_trace, nn.ReLU()).result()
        assert "def forward" in inspect.getsource(traced.forward)
        return x.relu()

    assert kinds(captured(relu, X)) == ["Relu"]
