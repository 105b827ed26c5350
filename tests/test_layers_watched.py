"""Drop-in layers do what the modules they replace do under transforms, checkpoints, hooks and later changes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import aot_module, nop
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import numerics
from engine_nets import randomised, relative
from inception_fast import ConvBNReLU, ops, replace_layers
from inception_fast.backends import native_cpu

X = numerics.random(2, 3, 9, 9, seed=4).contiguous(memory_format=torch.channels_last)


class Inside(Tensor):
    """Holds another tensor, as DTensor does, and has rules for torch's own operations alone."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Inside:
        form = {"strides": inner.stride(), "dtype": inner.dtype, "requires_grad": inner.requires_grad}
        found: Inside = Tensor._make_wrapper_subclass(cls, inner.shape, **form)
        found.inner = inner.detach()
        return found

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func.namespace == "aten", f"no rule for {func}"
        args, kwargs = tree_map_only(Inside, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, Inside, func(*args, **kwargs))


class Block(nn.Module):
    """A block as model packages have it, its ReLU a child."""

    def __init__(self, cin: int = 3, cout: int = 4, kernel: tuple[int, int] = (3, 3)) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, padding=tuple(k // 2 for k in kernel), bias=False)
        self.bn = nn.BatchNorm2d(cout)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


def plain_nets() -> dict[str, nn.Module]:
    return {
        "block": nn.Sequential(Block()),
        "in a sequential": nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        "pair": nn.Sequential(Block(3, 4, (1, 3)), Block(4, 5, (3, 1))),
        "pools": nn.Sequential(Block(), nn.MaxPool2d(3, 2), nn.AvgPool2d(2)),
    }


def both(name: str, training: bool) -> tuple[nn.Module, nn.Module]:
    """The plain network, and its copy with layers of ours."""
    plain = randomised(plain_nets()[name]).train(training)
    swapped = replace_layers(copy.deepcopy(plain))
    assert swapped.replacement_report.swapped
    return plain, swapped


def tangent_by_func(net: nn.Module) -> Tensor:
    return torch.func.jvp(net, (X,), (torch.ones_like(X),))[1]


def tangent_by_duals(net: nn.Module) -> Tensor:
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(net(forward_ad.make_dual(X, torch.ones_like(X)))).tangent
        assert found is not None
        return found


def gradient_by_func(net: nn.Module) -> Tensor:
    parameters = dict(net.named_parameters())
    grads = torch.func.grad(lambda p: torch.func.functional_call(net, p, (X,)).square().mean())(parameters)
    return torch.cat([grads[name].flatten() for name in parameters])


def over_stacked_parameters(net: nn.Module) -> Tensor:
    stacked = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in net.named_parameters()}
    return torch.vmap(lambda p: torch.func.functional_call(net, p, (X,)), randomness="error")(stacked)


def checkpointed(net: nn.Module) -> Tensor:
    x = X.clone().requires_grad_()
    checkpoint(net, x, use_reentrant=False).square().mean().backward()
    return torch.cat([x.grad.flatten(), *(p.grad.flatten() for p in net.parameters())])


TRANSFORMS: dict[str, tuple[Callable[[nn.Module], Tensor], tuple[bool, ...]]] = {
    "jvp": (tangent_by_func, (False,)),
    "dual numbers": (tangent_by_duals, (False, True)),
    "func.grad": (gradient_by_func, (False,)),
    "vmap over parameters": (over_stacked_parameters, (False,)),
    "checkpoint": (checkpointed, (False, True)),
}


@pytest.mark.parametrize("name", plain_nets())
@pytest.mark.parametrize(
    ("transform", "training"), [(key, mode) for key, (_, modes) in TRANSFORMS.items() for mode in modes]
)
def test_transforms_give_what_the_plain_network_gives(transform: str, training: bool, name: str) -> None:
    wanted, found = (TRANSFORMS[transform][0](net).detach() for net in both(name, training))
    assert relative(found, wanted) <= 1e-4


@pytest.mark.parametrize("transform", ["func.grad", "vmap over parameters"])
@pytest.mark.parametrize("name", ["block", "pair"])
def test_compiled_transforms_give_what_the_plain_network_gives(transform: str, name: str) -> None:
    plain, swapped = both(name, False)
    call = TRANSFORMS[transform][0]
    found = torch.compile(lambda: call(swapped), backend="aot_eager")()
    assert relative(found.detach(), call(plain).detach()) <= 1e-4
    torch._dynamo.reset()


@pytest.mark.parametrize("again", [False, True], ids=["once", "to be differentiated again"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", plain_nets())
def test_a_batch_of_gradients_is_the_gradient_of_each(name: str, training: bool, again: bool) -> None:
    """What `torch.autograd.functional` does where it vectorises."""
    _, swapped = both(name, training)
    x = X.clone(memory_format=torch.preserve_format).requires_grad_()
    y = swapped(x)
    inputs = [x, *swapped.parameters()]
    grads = torch.stack([numerics.random(*y.shape, seed=seed) for seed in (1, 2)])
    found = torch.autograd.grad(y, inputs, grads, is_grads_batched=True, retain_graph=True, create_graph=again)
    for place, grad in enumerate(grads):
        for mine, wanted in zip(found, torch.autograd.grad(y, inputs, grad, retain_graph=True), strict=True):
            assert relative(mine[place].detach(), wanted) <= numerics.GRAD_REL_L2 * 10


@pytest.mark.parametrize("again", [False, True], ids=["once", "to be differentiated again"])
@pytest.mark.parametrize("training", [False, True])
def test_autocast_in_a_backward_alone_rounds_nothing(training: bool, again: bool) -> None:
    _, swapped = both("pair", training)
    found = []
    for cast in (False, True):
        x = X.clone(memory_format=torch.preserve_format).requires_grad_()
        loss = swapped(x).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            found.append(torch.autograd.grad(loss, (x, *swapped.parameters()), create_graph=again))
    assert all(torch.equal(mine, wanted) for wanted, mine in zip(*found, strict=True))


CHANGES: dict[str, Callable[[Any], object]] = {
    "append": lambda net: net.append(nn.Flatten()),
    "another activation": lambda net: net.__setitem__(2, nn.SiLU()),
    "pop": lambda net: net.pop(len(net) - 1),
    "insert": lambda net: net.insert(0, nn.ReflectionPad2d(1)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["in a sequential", "pair"])
def test_changed_children_are_what_runs(name: str, change: str, training: bool) -> None:
    plain, swapped = both(name, training)
    if name == "pair" and change == "another activation":
        change = "append"
    for net in (plain, swapped):
        CHANGES[change](net)
    assert relative(swapped(X).detach(), plain(X).detach()) <= numerics.NET_MAX


@pytest.mark.parametrize("name", ["in a sequential", "pair"])
def test_a_slice_is_a_sequential_of_these_children(name: str) -> None:
    plain, swapped = both(name, False)
    assert list(swapped[:1].state_dict()) == list(plain[:1].state_dict())
    assert relative(swapped[:1](X).detach(), plain[:1](X).detach()) <= numerics.NET_MAX


@pytest.mark.parametrize("training", [False, True])
def test_children_that_are_set_by_the_names_of_a_layer_run(training: bool) -> None:
    """In a Sequential that became a layer too, where their places are numbers."""
    for name, attributes in (("in a sequential", ("conv", "bn")), ("pair", ("first", "second"))):
        plain, swapped = both(name, training)
        for place, attribute in enumerate(attributes):
            changed = randomised(copy.deepcopy(plain[place]), seed=1)  # type: ignore[index]
            plain[place] = changed  # type: ignore[index, operator]
            setattr(swapped, attribute, changed)
            assert getattr(swapped, attribute) is changed
        assert list(swapped.state_dict()) == list(plain.state_dict())
        assert relative(swapped(X).detach(), plain(X).detach()) <= numerics.NET_MAX


def test_statistics_stay_while_they_are_switched_off() -> None:
    for net in both("block", True):
        bn: Any = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d))
        before = bn.running_mean.clone(), int(bn.num_batches_tracked)
        bn.track_running_stats = False
        net(X)
        assert torch.equal(bn.running_mean, before[0]) and int(bn.num_batches_tracked) == before[1]


def uncounted(bn: Any) -> None:
    bn.num_batches_tracked = None


def without_shift(bn: Any) -> None:
    bn.bias = None


@pytest.mark.parametrize("change", [uncounted, without_shift])
def test_a_batch_norm_without_one_of_its_tensors(change: Callable[[Any], None]) -> None:
    nets = both("block", True)
    for net in nets:
        change(next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)))
    wanted, found = (net(X).detach() for net in nets)
    assert relative(found, wanted) <= numerics.NET_MAX


def test_a_hook_on_the_activation_leaves_the_block() -> None:
    seen: list[str] = []
    plain = nn.Sequential(Block())
    plain[0].relu.register_forward_hook(lambda *_: seen.append("relu"))
    swapped = replace_layers(plain)
    swapped(X)
    assert seen == ["relu"]
    assert "a child beside conv and bn has hooks" in str(swapped.replacement_report)


@pytest.mark.parametrize("training", [False, True])
def test_what_a_hook_on_the_batch_norm_keeps_is_not_written(training: bool) -> None:
    nets, seen = both("block", training), []
    for net in nets:
        net[0].bn.register_forward_hook(lambda module, args, y: seen.append(y))
        net(X)
    assert seen[0].min() < 0
    assert relative(seen[1].detach(), seen[0].detach()) <= numerics.NET_MAX


def test_a_batch_norm_of_another_class_may_need_its_result_for_its_gradient() -> None:
    _, swapped = both("block", True)
    layer: Any = swapped[0]
    layer.bn = nn.Sequential(layer.bn, nn.Sigmoid())
    swapped(X).sum().backward()
    assert layer.conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("training", [False, True])
def test_who_watches_all_modules_sees_the_children(training: bool) -> None:
    _, swapped = both("pair", training)
    seen: list[type[nn.Module]] = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        swapped(X)
    finally:
        handle.remove()
    assert seen.count(nn.Conv2d) == seen.count(nn.BatchNorm2d) == 2


def test_saved_tensors_may_come_back_in_another_layout() -> None:
    """As from hooks that keep them compressed, on a disk or as NumPy's arrays."""
    net = replace_layers(nn.Sequential(Block(), nn.MaxPool2d(3, 2))).to(memory_format=torch.channels_last).train()
    hooks = torch.autograd.graph.saved_tensors_hooks
    strided = hooks(lambda kept: torch.stack((kept, kept), -1), lambda kept: kept[..., 0])
    found: list[list[Tensor]] = []
    for watching in (contextlib.nullcontext(), strided, hooks(lambda kept: kept.contiguous(), lambda kept: kept)):
        x = X.clone(memory_format=torch.preserve_format).requires_grad_()
        with watching:
            y = net(x)
        inputs = (x, *net.parameters())
        found.append([part.clone() for part in torch.autograd.grad(y.square().sum(), inputs)])  # type: ignore[arg-type]
    for other in found[1:]:
        assert all(relative(mine, wanted) <= numerics.GRAD_REL_L2 for mine, wanted in zip(other, found[0], strict=True))


@pytest.mark.parametrize("training", [False, True])
def test_a_forward_of_its_own_is_called(training: bool) -> None:
    _, swapped = both("block", training)
    conv: Any = swapped[0].conv
    inner, calls = conv.forward, []

    def wrapped(x: Tensor) -> Tensor:
        calls.append(1)
        return inner(x)

    conv.forward = wrapped
    swapped(X)
    assert calls == [1]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["block", "pair"])
def test_what_stands_for_a_convolution_is_called(name: str, training: bool) -> None:
    """Several modules in its place have neither a weight nor a padding of their own."""
    nets = both(name, training)
    for net in nets:
        torch.manual_seed(0)
        net[0].conv = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.Conv2d(3, 4, 1))  # type: ignore[index]
    wanted, found = (net(X).detach() for net in nets)
    assert relative(found, wanted) <= numerics.NET_MAX


def by_make_fx(net: nn.Module) -> object:
    return make_fx(net, tracing_mode="fake", _allow_non_fake_inputs=True)(X)


def in_fake_mode(net: nn.Module) -> object:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return net(mode.from_tensor(X))


def beside_fake_mode(net: nn.Module) -> object:
    stand_in = FakeTensorMode().from_tensor
    return torch.func.functional_call(net, {name: stand_in(t) for name, t in net.state_dict().items()}, (stand_in(X),))


def by_aot_autograd(net: nn.Module) -> object:
    return aot_module(copy.deepcopy(net), nop)(X)


@pytest.mark.parametrize("call", [by_make_fx, in_fake_mode, beside_fake_mode, by_aot_autograd])
@pytest.mark.parametrize("name", plain_nets())
def test_stand_ins_for_tensors_are_taken_and_not_kept(name: str, call: Callable[[nn.Module], object]) -> None:
    plain, swapped = both(name, False)
    with torch.no_grad():
        call(swapped)
        assert relative(swapped(X), plain(X)) <= numerics.NET_MAX


@pytest.mark.parametrize("held", ["map", "weights"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", plain_nets())
def test_tensors_with_rules_of_their_own_get_torchs_operations(name: str, training: bool, held: str) -> None:
    plain, swapped = both(name, training)
    wanted = plain(X.clone().requires_grad_())
    if held == "weights":
        for conv in (module for module in swapped.modules() if isinstance(module, nn.Conv2d)):
            conv.weight = nn.Parameter(Inside(conv.weight.detach()))
    found = swapped(Inside(X.clone().requires_grad_()) if held == "map" else X)
    assert relative(found.inner, wanted.detach()) <= 1e-5
    found.square().sum().backward()


OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "conv_bn_relu": lambda x: ops.conv_bn_relu(
        x, torch.ones(4, 3, 1, 1), torch.ones(4), torch.ones(4), stride=1, padding=0
    ),
    "convolution": lambda x: ops.convolution(x, torch.ones(4, 3, 1, 1), stride=1, padding=0),
    "batch_norm_relu": lambda x: ops.batch_norm_relu(x, torch.ones(3), torch.ones(3), eps=1e-3)[0],
}
AROUND: dict[str, Callable[[Callable[[Tensor], Tensor]], object]] = {
    "jvp": lambda call: torch.func.jvp(call, (X,), (X,)),
    "compiled jvp": lambda call: torch.compile(lambda x: torch.func.jvp(call, (x,), (x,)), backend="aot_eager")(X),
    "vmap": lambda call: torch.vmap(call)(X[None]),
    "grad": lambda call: torch.func.grad(lambda x: call(x).sum())(X),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_refuse_what_they_have_no_rules_for(name: str, around: str) -> None:
    with pytest.raises(RuntimeError, match=f"{name} inside of torch.func or forward mode; allowed"):
        AROUND[around](OPERATORS[name])


def test_operators_run_beside_tangents_of_others() -> None:
    with forward_ad.dual_level():
        forward_ad.make_dual(X, X)
        assert OPERATORS["conv_bn_relu"](X).shape == (2, 4, 9, 9)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_layers_made_in_inference_mode_are_packed_once(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As all are where a script decorates its main function."""
    count: list[int] = []
    compile_plan = native_cpu.cpu.compile
    monkeypatch.setattr(native_cpu.cpu, "compile", lambda plan: count.append(1) or compile_plan(plan))
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        layer, x = ConvBNReLU(64, 96, 3).eval(), numerics.random(1, 64, 6, 6)
        before = layer(x)
        assert torch.equal(layer(x), before) and len(count) == 1
        layer.conv.weight[3, 5, 1, 1] += 1
        assert not torch.equal(layer(x), before) and len(count) == 2
        layer.bn.running_mean += 1
        assert layer(x) is not None and len(count) == 3
