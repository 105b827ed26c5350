"""torch.compile(backend="inception_fast")."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import engine_nets
import numerics
from engine_nets import Function, images, randomised, relative
from inception_fast.engine import compile_backend as backend_module
from inception_fast.engine.compile_backend import compile_backend

X = numerics.random(2, 3, 12, 12, seed=2)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.bn(self.conv(x)).relu()
        return {"logits": self.fc(y.mean((2, 3)).view(x.size(0), -1)), "map": y}


def small() -> nn.Module:
    return randomised(Small())


def check(compiled: Any, module: nn.Module, x: Tensor) -> None:
    found, wanted = compiled(x), module(x)
    assert list(found) == list(wanted)
    for key in wanted:
        assert relative(found[key], wanted[key]) <= numerics.NET_MAX


def test_found_by_name() -> None:
    assert "inception_fast" in torch._dynamo.list_backends()


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_same_results(guard: Any) -> None:
    module = small()
    compiled = torch.compile(module, backend="inception_fast", fullgraph=True)
    with guard():
        check(compiled, module, X)


@pytest.mark.parametrize("dynamic", [None, True])
def test_batches_do_not_compile_again_and_again(dynamic: bool | None) -> None:
    module, counter = small(), CompileCounterWithBackend(compile_backend)
    counter.backend = compile_backend
    compiled = torch.compile(module, backend=counter, dynamic=dynamic)
    with torch.no_grad():
        for batch in (2, 3, 5, 8, 4, 2, 7):
            check(compiled, module, numerics.random(batch, 3, 12, 12, seed=batch))
    assert counter.frame_count <= (2 if dynamic is None else 1)


def test_any_size_that_dynamo_has_free() -> None:
    """Lengths of sequences too, and batches beside weights that are handed over in front of them."""

    def net(weight: Tensor, x: Tensor) -> Tensor:
        return (x @ weight).relu()

    weight, compiled = torch.randn(3, 4), torch.compile(net, backend="inception_fast")
    with torch.no_grad():
        for batch, length in ((2, 5), (2, 6), (5, 7), (4, 8), (2, 6), (3, 7), (2, 5)):
            x = numerics.random(batch, length, 3, seed=length)
            assert relative(compiled(weight, x), net(weight, x)) <= numerics.NET_MAX


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("free", [(0,), (2, 3), (0, 2, 3)])
def test_results_lie_as_torch_lays_them_where_no_size_is_an_example(free: tuple[int, ...], format: Any) -> None:
    module = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    compiled = torch.compile(module, backend="inception_fast")
    with torch.no_grad():
        for n, h in ((2, 12), (2 + (0 in free), 12 + (2 in free))):
            x = numerics.random(n, 3, h, 12, seed=n).contiguous(memory_format=format)
            torch._dynamo.decorators.mark_unbacked(x, free)
            assert compiled(x).stride() == module(x).stride()
            assert relative(compiled(x), module(x)) <= numerics.NET_MAX


def test_sizes_seen_before_are_not_planned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made, session = [], backend_module.Session
    monkeypatch.setattr(backend_module, "Session", lambda *args: made.append(1) or session(*args))
    weight = torch.randn(3, 4)
    compiled = torch.compile(lambda x, weight: x @ weight, backend="inception_fast", dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 5), (5, 6), (4, 5), (6, 6), (6, 7), (2, 6), (2, 7)):
            x = numerics.random(batch, length, 3, seed=length)
            assert relative(compiled(x, weight), x @ weight) <= numerics.NET_MAX
    assert len(made) == 3


def test_parts_of_larger_maps_go_into_what_writes_in_place() -> None:
    """torch.export, which writes such a module out anew, asks a view among its inputs for the map that it is of."""

    def write(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        y[:, :2].relu_()
        return y * 2

    module = randomised(Function(write, conv=nn.Conv2d(3, 4, 3)))
    compiled = torch.compile(module, backend="inception_fast")
    with torch.no_grad():
        for batch in (2, 5, 3):
            x = numerics.random(batch, 4, 13, 14, seed=batch)[:, 1:, 1:, 1:-1]
            assert relative(compiled(x), module(x)) <= numerics.NET_MAX


def test_a_whole_network() -> None:
    module, x = engine_nets.built("inception_v1"), images("inception_v1")
    compiled = torch.compile(module, backend="inception_fast", fullgraph=True)
    with torch.no_grad():
        assert relative(compiled(x), module(x)) <= numerics.NET_MAX


def test_a_graph_break() -> None:
    def net(m: Function, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        torch._dynamo.graph_break()
        return m.b(y)

    module = randomised(Function(net, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 3)))
    compiled = torch.compile(module, backend="inception_fast")
    with torch.no_grad():
        assert relative(compiled(X), module(X)) <= numerics.NET_MAX


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_lie_as_those_of_torch(layout: str) -> None:
    def net(m: Function, x: Tensor) -> Any:
        y = m.a(x).relu()
        torch._dynamo.graph_break()
        z = y.view(y.shape[0], -1) if y.is_contiguous() else y.permute(0, 2, 3, 1).view(y.shape[0], -1)
        return m.a(x), m.a(x).transpose(1, 3), z * 2

    module = randomised(Function(net, a=nn.Conv2d(3, 8, 3)))
    compiled = torch.compile(module, backend="inception_fast")
    with torch.no_grad():
        for batch in (2, 1, 3):
            x = numerics.as_layout(numerics.random(batch, 3, 12, 12, seed=batch), layout)
            for y, wanted in zip(compiled(x), module(x), strict=True):
                assert y.stride() == wanted.stride() and relative(y, wanted) <= numerics.NET_MAX


def test_a_part_of_a_result_is_viewed_as_that_of_torch() -> None:
    module = randomised(Function(lambda m, x: (m.a(x)[:, :2], m.a(x)[:, 3:4]), a=nn.Conv2d(3, 8, 3)))
    compiled = torch.compile(module, backend="inception_fast")
    with torch.no_grad():
        for batch in (2, 1, 3):
            x = numerics.random(batch, 3, 12, 12, seed=batch)
            for y, wanted in zip(compiled(x), module(x), strict=True):
                assert relative(y.view(batch, -1), wanted.view(batch, -1)) <= numerics.NET_MAX


def test_a_part_between_breaks_that_reads_no_batch() -> None:
    def net(m: Function, x: Tensor) -> Tensor:
        y = m.conv(x)
        torch._dynamo.graph_break()
        scale = m.bn.weight * 2 + 1
        torch._dynamo.graph_break()
        return y * scale.view(1, -1, 1, 1)

    module = randomised(Function(net, conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)))
    compiled = torch.compile(module, backend="inception_fast")
    with torch.no_grad():
        assert relative(compiled(X), module(X)) <= numerics.NET_MAX


def test_written_and_replaced_parameters_count() -> None:
    module = small()
    compiled = torch.compile(module, backend="inception_fast")
    with torch.no_grad():
        check(compiled, module, X)
        module.conv.weight.mul_(-1)
        module.bn.running_mean.add_(0.5)
        check(compiled, module, X)
        module.fc.weight = nn.Parameter(torch.randn(5, 8))
        check(compiled, module, X)
        module.conv.weight.data.mul_(2)  # which torch does not count
        check(compiled, module, X)


def test_parameters_whose_planning_was_interrupted_are_planned_in_the_next_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    module = small()
    compiled = torch.compile(module, backend="inception_fast")
    with torch.no_grad():
        check(compiled, module, X)
        module.conv.weight.mul_(-1)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(backend_module, "Session", interrupted)
            compiled(X)
        check(compiled, module, X)


def test_parameters_are_not_planned_again_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    session = backend_module.Session
    monkeypatch.setattr(backend_module, "Session", lambda *args: made.append(1) or session(*args))
    compiled = torch.compile(small(), backend="inception_fast")
    with torch.no_grad():
        for _ in range(3):
            compiled(X)
    assert len(made) == 1


def test_numbers_that_become_inputs_count() -> None:
    """With free sizes Dynamo hands over float attributes too, as tensors; they may change without a new graph."""
    module = small()
    compiled = torch.compile(module, backend="inception_fast", dynamic=True)
    with torch.no_grad():
        check(compiled, module, X)
        module.bn.eps = 0.75
        check(compiled, module, X)


@pytest.mark.parametrize("outside", [False, True])
def test_results_have_the_formats_that_autocast_gives_them(outside: bool) -> None:
    """Regions inside are kept; the caller's only rounds what is returned."""

    def net(m: Function, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            y = m.a(x)
            with torch.autocast("cpu", enabled=False):
                z = m.b(y.float())
            y = m.b(y).float() + z
            y = m.b(y)
        return y, m.b(z), z + y.float()

    module = randomised(Function(net, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 8, 3, padding=1)))
    compiled = torch.compile(module, backend="inception_fast", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=outside):
        found, wanted = compiled(X), module(X)
        assert torch.is_autocast_enabled("cpu") is outside
    assert [y.dtype for y in found] == [y.dtype for y in wanted]
    errors = [numerics.rel_l2(y, right) for y, right in zip(found, wanted, strict=True)]
    assert max(errors) <= numerics.NET_BF16_REL_L2, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_autocast_goes_on_behind_a_graph_break(bias: bool, dtype: torch.dtype) -> None:
    """The caller's autocast leaves maps of half precision beside float32 weights at the break, or the other way."""

    def net(m: Function, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        torch._dynamo.graph_break()
        return m.fc(m.b(y).relu().mean((2, 3))) + y.mean()

    layers = {"a": nn.Conv2d(3, 8, 3, bias=bias), "b": nn.Conv2d(8, 8, 3, bias=bias), "fc": nn.Linear(8, 5)}
    module = randomised(Function(net, **layers)).to(dtype)
    compiled = torch.compile(module, backend="inception_fast")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, wanted = compiled(X), module(X)
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert numerics.rel_l2(found, wanted) <= numerics.NET_BF16_REL_L2


def test_checkpointed_parts_are_called() -> None:
    """One inside of another, with a region of autocast in it; numbers that Dynamo leaves open reach it."""

    def inner(m: Function, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.a(x).relu().float()

    def outer(m: Function, x: Tensor) -> Tensor:
        return m.bn(checkpoint(partial(inner, m), x, use_reentrant=False)) * 2

    def net(m: Function, x: Tensor) -> Tensor:
        return m.b(checkpoint(partial(outer, m), x, use_reentrant=False))

    layers = {"a": nn.Conv2d(3, 8, 3), "bn": nn.BatchNorm2d(8), "b": nn.Conv2d(8, 5, 1)}
    module = randomised(Function(net, **layers)).eval()
    compiled = torch.compile(module, backend="inception_fast", fullgraph=True)
    with torch.no_grad():
        for eps in (1e-3, 0.75, 0.5):  # a constant of the graph, then an input of it
            module.bn.eps = eps
            assert numerics.rel_l2(compiled(X), module(X)) <= numerics.NET_BF16_REL_L2


def test_a_tensor_of_one_number_stays_one_in_a_checkpointed_part() -> None:
    def net(m: Function, x: Tensor, by: Tensor) -> Tensor:
        return checkpoint(lambda x, by: m.a(x) * by, x, by, use_reentrant=False)

    module = randomised(Function(net, a=nn.Conv2d(3, 8, 3)))
    compiled = torch.compile(module, backend="inception_fast", fullgraph=True)
    with torch.no_grad():
        for by in (torch.tensor(3.0), torch.tensor(-2.0)):
            assert relative(compiled(X, by), module(X, by)) <= numerics.NET_MAX


def test_parameters_as_attributes() -> None:
    """A graph module that holds its own parameters, as older versions of Dynamo hand over."""
    gm = torch.fx.symbolic_trace(randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())))
    with torch.no_grad():
        run = compile_backend(gm, [X])
        assert relative(run(X), gm(X)) <= numerics.NET_MAX


@pytest.mark.parametrize("asks", ["parameters", "input"])
def test_torch_runs_what_asks_for_gradients(asks: str) -> None:
    """And says so; without gradients it is native again."""
    module = small().requires_grad_(asks == "parameters")
    compiled, x = torch.compile(module, backend="inception_fast"), X.clone().requires_grad_(asks == "input")
    with pytest.warns(UserWarning, match=r"so torch runs this: call module.eval\(\) and run it under torch.no_grad"):
        found = compiled(x)
    assert torch.equal(found["logits"], module(x)["logits"]) and found["map"].requires_grad
    with torch.no_grad():
        check(compiled, module, x)


def test_a_change_of_weights_made_in_inference_mode_is_noticed() -> None:
    """They count no versions."""
    with torch.inference_mode():
        module, x = nn.Sequential(nn.Conv2d(64, 96, 3), nn.ReLU()).eval(), numerics.random(1, 64, 6, 6)
        compiled = torch.compile(module, backend="inception_fast")
        before = compiled(x)
        module[0].weight[3, 5, 1, 1] += 1
        after = compiled(x)
        assert not torch.equal(before, after) and relative(after, module(x)) <= 1e-5


def test_training_is_refused() -> None:
    compiled = torch.compile(small().train(), backend="inception_fast")
    with torch.no_grad(), pytest.raises(Exception, match="training mode"):
        compiled(X)


def test_options_are_refused() -> None:
    compiled = torch.compile(small(), backend="inception_fast", options={"speed": 11})
    with torch.no_grad(), pytest.raises(Exception, match="speed; backend 'inception_fast' takes options"):
        compiled(X)
