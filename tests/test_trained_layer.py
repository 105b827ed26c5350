"""A layer in eager training as one node of autograd: the same as its operators, and out of the way of who watches."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import inception_fast as fast
import numerics
from inception_fast import _trained_layer
from plain_layers import Plain, randomise
from watching import Watching


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each layer that ran as one node."""
    found: list[int] = []
    train = _trained_layer.train
    monkeypatch.setattr(_trained_layer, "train", lambda *a: found.append(1) or train(*a))
    return found


def case(kernel: tuple[int, int] = (3, 3), stride: int = 1) -> tuple[fast.ConvBNReLU, Tensor]:
    layer = fast.ConvBNReLU(16, 24, kernel, stride, (kernel[0] // 2, kernel[1] // 2))
    x = numerics.random(4, 16, 9, 11, seed=1).contiguous(memory_format=torch.channels_last)
    return randomise(layer).to(memory_format=torch.channels_last).train(), x


def trained(layer: nn.Module, x: Tensor, half: bool, *modes: TorchDispatchMode) -> list[Tensor]:
    """y and every gradient, forward and backward under the modes."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    for mode in modes:
        mode.__enter__()
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = layer(x)
        y.float().square().mean().backward()
    finally:
        for mode in reversed(modes):
            mode.__exit__(None, None, None)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("kernel", "stride"), [((3, 3), 1), ((1, 7), 1), ((1, 1), 1), ((3, 3), 2)])
def test_one_node_is_the_operators_bit_for_bit(
    half: bool, kernel: tuple[int, int], stride: int, nodes: list[int]
) -> None:
    layer, x = case(kernel, stride)
    twin, watching = copy.deepcopy(layer), Watching()
    alone = trained(layer, x, half)
    assert nodes == [1]
    watched = trained(twin, x, half, watching)
    assert nodes == [1] and "inception_fast.batch_norm_relu.default" in watching.seen
    for mine, theirs in zip(alone, watched, strict=True):
        assert mine.dtype is theirs.dtype and mine.stride() == theirs.stride() and torch.equal(mine, theirs)
    for name, value in twin.named_buffers():  # one rounding for torch's three
        numerics.assert_close_budget(layer.get_buffer(name).float(), value.double(), dtype=torch.float32)
    assert layer.bn.num_batches_tracked == 1


def test_running_statistics_are_the_references(nodes: list[int]) -> None:
    layer, x = case()
    plain = Plain(16, 24, (3, 3), 1, (1, 1))
    plain.load_state_dict(layer.state_dict())
    plain.double()
    for step in range(3):
        layer(x + step)
        plain(x.double() + step)
    assert len(nodes) == 3 and layer.bn.num_batches_tracked == 3
    for name in ("running_mean", "running_var"):
        numerics.assert_close_budget(getattr(layer.bn, name), getattr(plain.bn, name))


def test_a_step_is_seen_by_what_was_folded(nodes: list[int]) -> None:
    """The statistics are written behind torch's back; their versions say so."""
    layer, x = case()
    with torch.no_grad():
        before = layer.eval()(x)
    layer.train()(x)
    with torch.no_grad():
        after = layer.eval()(x)
        assert nodes and torch.equal(after, copy.deepcopy(layer)(x)) and not torch.equal(before, after)


def test_operations_are_counted_in_both_directions(nodes: list[int]) -> None:
    layer, x = case()
    x.requires_grad_()
    with FlopCounterMode(display=False) as forward:
        watched = layer(x)
    once = 2 * watched.numel() * 16 * 9
    assert forward.get_total_flops() == once and not nodes
    y = layer(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert nodes == [1] and backward.get_total_flops() == 2 * once


def test_second_derivatives(nodes: list[int]) -> None:
    layer, x = case()
    wide = copy.deepcopy(layer).double()
    found = []
    for module, image in ((layer, x), (wide, x.double())):
        image = image.clone(memory_format=torch.preserve_format).requires_grad_()
        (dx,) = torch.autograd.grad(module(image).square().sum(), image, create_graph=True)
        dx.square().mean().backward()
        found.append([image.grad, *(p.grad for p in module.parameters())])
    assert nodes == [1]
    for mine, exact in zip(*found, strict=True):
        assert numerics.rel_l2(mine, exact) <= numerics.GRAD_REL_L2 * 10


@pytest.mark.parametrize("watched", [False, True], ids=["one node", "operators"])
def test_a_layer_that_reads_its_own_result_has_the_gradients_of_torch(watched: bool, nodes: list[int]) -> None:
    """Its second input depends on its weights, which a graph of gradients must not count twice."""
    layer = randomise(fast.ConvBNReLU(16, 16, 3, padding=1)).to(memory_format=torch.channels_last).train()
    x = numerics.random(4, 16, 9, 11, seed=1).contiguous(memory_format=torch.channels_last)
    found = []
    for module, image in ((layer, x), (copy.deepcopy(layer).double(), x.double())):
        image = image.clone(memory_format=torch.preserve_format).requires_grad_()
        with Watching() if watched else contextlib.nullcontext():
            y = module(module(image))
        inputs = [image, *module.parameters()]
        once = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        found.append([*once, *torch.autograd.grad(sum(part.square().mean() for part in once), inputs)])  # type: ignore[arg-type]
    assert len(nodes) == (0 if watched else 2)
    for mine, exact in zip(*found, strict=True):
        assert numerics.rel_l2(mine.detach(), exact.detach()) <= numerics.GRAD_REL_L2 * 10


def test_what_needs_no_gradient_gets_none(nodes: list[int]) -> None:
    layer, x = case()
    layer.bn.requires_grad_(False)
    layer(x).sum().backward()
    assert nodes == [1] and x.grad is None and layer.bn.weight.grad is None and layer.conv.weight.grad is not None


def test_one_value_a_channel_raises(nodes: list[int]) -> None:
    layer = fast.ConvBNReLU(16, 24, (3, 3)).to(memory_format=torch.channels_last)
    x = numerics.random(1, 16, 3, 3).contiguous(memory_format=torch.channels_last)
    before = layer.bn.running_var.clone()
    with pytest.raises(ValueError, match="more than one, for a variance"):
        layer(x)
    assert nodes == [1] and torch.equal(layer.bn.running_var, before) and layer.bn.num_batches_tracked == 0


def test_parameters_of_another_size_raise_and_are_not_read(nodes: list[int]) -> None:
    layer, x = case()
    layer.bn = nn.BatchNorm2d(8)
    with pytest.raises(ValueError, match="weight of shape"):
        layer(x)
    assert not nodes


class Noted(Tensor):
    """A subclass, as tools make them."""


def test_who_has_tensors_of_its_own_gets_the_operators(nodes: list[int]) -> None:
    layer, x = case()
    expected = layer(x)
    assert nodes == [1] and torch.equal(layer(x.as_subclass(Noted)), expected)
    with fast.use_backend("torch"):
        numerics.assert_close_budget(layer(x), expected.double(), roundings=2)
    with torch.no_grad():
        layer(x)
    layer(x.contiguous()), layer(x.double()) if layer.double() else None
    assert nodes == [1]


def test_views_that_note_a_sign_are_read_with_it(nodes: list[int]) -> None:
    """Maps and gradients, of layers and pools, whose memory holds the opposite, as imag of a conjugate's does."""
    layer, x = case()
    pools = fast.replace_layers(nn.ModuleList([nn.MaxPool2d(3, 2), nn.AvgPool2d(3, 1, 1)]))
    grads = []
    for module in (layer, *pools):
        for noted in (False, True):
            given = (torch._neg_view(-x) if noted else x.clone()).requires_grad_()
            y = module(given)
            grad = numerics.random(*y.shape, seed=2).contiguous(memory_format=torch.channels_last)
            wanted = [given, *module.parameters()]
            grads.append([y, *torch.autograd.grad(y, wanted, torch._neg_view(-grad) if noted else grad)])
    for plain, noted in zip(grads[::2], grads[1::2], strict=True):
        assert all(
            numerics.rel_l2(mine, right) <= numerics.GRAD_REL_L2 for mine, right in zip(noted, plain, strict=True)
        )
    layer(x.requires_grad_()).sum().backward()
    assert nodes == [1, 1]


def test_a_default_device_is_not_taken_for_the_maps(nodes: list[int]) -> None:
    layer, x = case()
    last = fast.ConvBNReLU(24, 8, 1)
    model = fast.replace_layers(nn.Sequential(layer, nn.MaxPool2d(3, 2), last, nn.AvgPool2d(3, 1, 1)))
    plain = trained(model, x, False)
    model.zero_grad()
    with torch.device("meta"):
        assert all(map(torch.equal, trained(model, x, False), plain))
        y = model(x.requires_grad_())
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        first.square().sum().backward()
    assert nodes == [1] * 6 and x.grad is not None and x.grad.device.type == "cpu"
