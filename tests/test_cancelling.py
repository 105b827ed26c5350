"""The budgets of gradients that cancel: torch's float32 keeps them, and what is wrong does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

import cancelling
import numerics
from plain_layers import Plain, randomise

Case = tuple[cancelling.Net, dict[str, Tensor], dict[str, float]]


def images() -> Tensor:
    return cancelling.images().double()


@pytest.fixture(scope="module")
def case() -> Case:
    """A net in float64, its gradients and their budgets."""
    net = cancelling.Net(Plain)
    randomise(net)
    wide = net.double()
    return wide, cancelling.gradients(copy.deepcopy(wide), images()), cancelling.budgets(wide, images())


def rounded(x: Tensor) -> Tensor:
    """To TF32: eleven significant bits, half a unit away from zero."""
    bits = (x.float().view(torch.int32) + 0x1000) & ~0x1FFF
    return bits.view(torch.float32).double()


class _Conv(Function):
    """A convolution in float64, some of whose three products take TF32 operands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Plain, narrow: str) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.call = layer.conv.stride, layer.conv.padding, narrow
        operands = map(rounded, (x, weight)) if narrow == "forward" else (x, weight)
        return F.conv2d(*operands, None, *ctx.call[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        stride, padding, narrow = ctx.call
        found: list[Tensor | None] = []
        for which, name in enumerate(("input gradient", "weight gradient")):
            operands = (grad, *ctx.saved_tensors)
            g, x, weight = map(rounded, operands) if narrow == name else operands
            backward = torch.ops.aten.convolution_backward
            mask = [which == 0, which == 1, False]
            call = (g, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, mask)
            found.append(backward(*call)[which])
        return (*found, None, None)


def narrow(layer: Plain, x: Tensor, product: str) -> Tensor:
    return F.relu(layer.bn(_Conv.apply(x, layer.conv.weight, layer, product)))


def other(layer: Plain, x: Tensor, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """With a mean and a variance that `change` makes of the right ones."""
    z = layer.conv(x)
    var, mean = torch.var_mean(z, (0, 2, 3), correction=0, keepdim=True)
    mean, var = change(mean, var)
    weight, bias = (value.reshape(1, -1, 1, 1) for value in (layer.bn.weight, layer.bn.bias))
    return F.relu((z - mean) * (weight * torch.rsqrt(var + layer.bn.eps)) + bias)


# What is wrong, and in which layer: 75 values a channel.
FAULTS: dict[str, tuple[str, Callable[..., Tensor], Any]] = {
    "TF32 forward": ("c", narrow, "forward"),
    "TF32 input gradient": ("c", narrow, "input gradient"),
    "TF32 weight gradient": ("c", narrow, "weight gradient"),
    "variance over n - 1": ("a", other, lambda mean, var: (mean, var * 75 / 74)),
    "epsilon 1 % off": ("b", other, lambda mean, var: (mean, var + 1e-5)),
    "no gradient through the mean": ("b", other, lambda mean, var: (mean.detach(), var)),
    "no gradient through the variance": ("c", other, lambda mean, var: (mean, var.detach())),
    "mean in float16": ("c", other, lambda mean, var: (mean.half().double(), var)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_over_budget(case: Case, fault: str) -> None:
    wide, exact, allowed = case
    name, forward, how = FAULTS[fault]
    twin = copy.deepcopy(wide)
    layer = twin.get_submodule(name)
    layer.forward = lambda x: forward(layer, x, how)  # type: ignore[method-assign]
    said = cancelling.verdict({"faulty": cancelling.gradients(twin, images())}, exact, allowed)
    assert "over " in said and "gradients are off, relative to float64" in said


@pytest.mark.parametrize("forward", [narrow, other])
def test_the_same_without_a_fault_is_float64(case: Case, forward: Callable[..., Tensor]) -> None:
    wide, exact, _ = case
    twin = copy.deepcopy(wide)
    for layer in (twin.a, twin.b, twin.c):
        how = "nothing" if forward is narrow else lambda mean, var: (mean, var)
        layer.forward = lambda x, layer=layer, how=how: forward(layer, x, how)
    found = cancelling.gradients(twin, images())
    assert all(numerics.rel_l2(found[name], exact[name]) <= 10 * numerics.FP64_REL_L2 for name in exact)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_torch_is_within(case: Case, memory_format: torch.memory_format) -> None:
    wide, exact, allowed = case
    net = copy.deepcopy(wide).float().to(memory_format=memory_format)
    x = images().float().contiguous(memory_format=memory_format)
    assert cancelling.verdict({"torch": cancelling.gradients(net, x)}, exact, allowed) == ""


def test_budgets_leave_the_net_alone_and_are_not_wide(case: Case) -> None:
    """TF32 errs by 1e-4 and more; a tensor that does not cancel has the plain budget."""
    wide, exact, allowed = case
    before = copy.deepcopy(wide.state_dict())
    assert cancelling.budgets(wide, images()) == allowed, "not the same for each call"
    assert all(torch.equal(value, before[name]) for name, value in wide.state_dict().items())
    assert set(allowed) == set(exact) and max(allowed.values()) < 2e-5
    assert allowed["b.bn.bias"] < 2 * numerics.GRAD_REL_L2


def test_a_verdict_names_tensors_errors_and_budgets(case: Case) -> None:
    _, exact, allowed = case
    mine = {**exact, "c.conv.weight": exact["c.conv.weight"] * 1.001, "a.bn.bias": exact["a.bn.bias"] * float("nan")}
    found = {"ours": mine, "torch": exact}
    said = cancelling.verdict(found, exact, allowed).splitlines()
    assert said[0] == "2 of 9 gradients are off, relative to float64:" and len(said) == 10
    over = [line.split() for line in said if line.startswith("over ")]
    assert [line[1] for line in over] == ["a.bn.bias", "c.conv.weight"]
    assert "ours 1.00e-03  torch 0.00e+00" in said[7] and "ours nan" in said[3] and "allowed 1." in said[7]


def test_a_verdict_needs_every_gradient(case: Case) -> None:
    _, exact, allowed = case
    less = {name: value for name, value in exact.items() if name != "a.bn.bias"}
    with pytest.raises(
        ValueError, match=r"gradients of .'a.bn.weight', 'a.conv.weight'.*; allowed: those of .'a.bn.bias'"
    ):
        cancelling.verdict({"ours": less}, exact, allowed)
    with pytest.raises(ValueError, match="none of them zero"):
        cancelling.verdict({"ours": exact}, {**exact, "a.bn.bias": torch.zeros(24)}, allowed)
