"""Residual blocks whose convolution, sum and ReLU are one operation: which are, and torch's operations elsewhere."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import inception_fast as fast
import numerics
from inception_fast import ops
from inception_fast._residual import ResidualSum
from inception_fast.models.blocks import BasicConv2d
from inception_fast.models.inception_resnet import Block17
from plain_layers import Plain, randomise

C = 24
X = numerics.random(2, C, 9, 8, seed=9).contiguous(memory_format=torch.channels_last)


class Block(nn.Module):
    """As facenet-pytorch and timm have it."""

    def __init__(self, relu: bool = True, scale: float = 0.17) -> None:
        super().__init__()
        self.scale = scale
        self.branch0 = Plain(C, 8, 1)
        self.branch1 = nn.Sequential(Plain(C, 8, (1, 7), padding=(0, 3)), Plain(8, 16, (7, 1), padding=(3, 0)))
        self.conv2d = nn.Conv2d(24, C, 1)
        self.relu = nn.ReLU(inplace=True) if relu else None

    def joined(self, x: Tensor) -> Tensor:
        return torch.cat((self.branch0(x), self.branch1(x)), 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2d(self.joined(x)) * self.scale + x
        return out if self.relu is None else self.relu(out)


class Functional(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(
            torch.add(x, torch.mul(self.scale, self.conv2d(torch.cat([self.branch0(x), self.branch1(x)], dim=1))))
        )


def ours() -> nn.Module:
    return Block17(BasicConv2d, C, 8, (8, 8, 16))


FORMS: dict[str, Callable[[], nn.Module]] = {
    "with a ReLU": Block,
    "without one": lambda: Block(relu=False),
    "functional": Functional,
    "our own": ours,
}


def blocks(name: str) -> tuple[nn.Module, Any]:
    """A block in evaluation as it is, and swapped."""
    block = randomise(FORMS[name]()).to(memory_format=torch.channels_last).eval()
    taken = copy.deepcopy(block)
    assert fast.replace_layers(taken) is taken
    return block, taken


@pytest.fixture
def residuals(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The residual of every call of the operator."""
    found: list[Any] = []
    operator = ops.conv_bn_relu

    def noted(*args: Any, **options: Any) -> Tensor:
        found.append(options.get("residual"))
        return operator(*args, **options)

    monkeypatch.setattr(ops, "conv_bn_relu", noted)
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", FORMS)
def test_inference_is_one_operation(name: str, residuals: list[Any]) -> None:
    plain, block = blocks(name)
    assert type(block) is ResidualSum and list(block.state_dict()) == list(plain.state_dict())
    assert block.replacement_report.swapped[-1].became == "ResidualSum"
    assert [(row.name, "with the sum" in row.reason) for row in block.replacement_report.left] == [("conv2d", True)]
    exact = copy.deepcopy(plain).double()(X.double())
    for x in (X, X.contiguous(), X[:1]):
        residuals.clear()
        y = block(x)
        assert sum(r is x for r in residuals) == 1 and y.stride() == x.stride()
        assert numerics.rel_l2(y, exact[: len(x)]) <= 3 * numerics.FP32_REL_L2
        residuals.clear()
        assert torch.equal(block(x), y) and not any(r is x for r in residuals)
    narrow, half = X.bfloat16(), copy.deepcopy(plain).bfloat16()
    exact = copy.deepcopy(half).double()(narrow.double())
    assert numerics.rel_l2(fast.replace_layers(half)(narrow), exact) <= numerics.BF16_REL_L2 * 4**0.5


@pytest.mark.parametrize("name", FORMS)
def test_training_is_torchs(name: str, residuals: list[Any]) -> None:
    plain, block = blocks(name)
    for training in (True, False):
        grads = []
        for net in (plain, block):
            x = X.clone().requires_grad_()
            net.train(training)(x).square().sum().backward()
            grads.append(x.grad)
        assert not any(r is not None for r in residuals)
        assert numerics.rel_l2(grads[1], grads[0]) <= 1e-4
    assert all(p.grad is not None for p in block.parameters())


def other_scale(block: Any) -> None:
    block.scale = 0.5


CHANGES: dict[str, Callable[[Any], object]] = {
    "scale": other_scale,
    "weight": lambda b: b.conv2d.weight.mul_(2),
    "bias": lambda b: b.conv2d.bias.data.add_(1),
    "no bias": lambda b: setattr(b.conv2d, "bias", None),
    "a hook of the convolution": lambda b: b.conv2d.register_forward_hook(lambda m, a, y: y * 2),
    "a hook of the ReLU": lambda b: b.relu.register_forward_hook(lambda m, a, y: y * 2),
    "another activation": lambda b: setattr(b, "relu", nn.Sigmoid()),
    "another convolution": lambda b: setattr(b, "conv2d", nn.Conv2d(24, C, 3, padding=1)),
    "a branch": lambda b: setattr(b, "branch0", nn.Conv2d(C, 8, 1)),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change: str) -> None:
    plain, block = blocks("with a ReLU")
    before = block(X)
    for net in (plain, block):
        torch.manual_seed(0)
        CHANGES[change](net)
    wanted = copy.deepcopy(plain).double()(X.double())
    for _ in range(2):
        y = block(X)
        assert not torch.equal(y, before) and numerics.rel_l2(y, wanted) <= 1e-5


@torch.no_grad()
def test_compiled_traced_cast_and_copied() -> None:
    block = blocks("with a ReLU")[1]
    y = block(X)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), fast.replace_layers(block)):
        assert type(twin) is ResidualSum and torch.equal(twin(X), y)
    exported = torch.export.export(block, (X,)).graph
    assert not any("inception_fast" in str(node.target) for node in exported.nodes)
    assert numerics.rel_l2(torch.fx.symbolic_trace(block)(X), y) <= 1e-5
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for other in (compiled, torch.jit.trace(block, X), fast.optimize(block, X), copy.deepcopy(block).double()):
        found = other(X.double()) if other is not compiled and isinstance(other, ResidualSum) else other(X)
        assert numerics.rel_l2(found, y) <= 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert numerics.rel_l2(block(X), y) <= 2e-2
    with fast.use_backend("torch"):
        assert numerics.rel_l2(block(X), y) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 8, 9, 8), (C, 9, 8), (0, C, 9, 8)])
def test_what_a_fresh_block_refuses_is_refused(shape: tuple[int, ...]) -> None:
    _, block = blocks("with a ReLU")
    block(X)
    said = []
    for net in (block, blocks("with a ReLU")[1]):
        with pytest.raises(Exception) as fault:
            net(torch.zeros(shape))
        said.append((type(fault.value), str(fault.value)))
    assert said[0] == said[1]


class Twice(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2d(self.joined(x))
        return self.relu(out * self.scale + x) + out


class OtherAxis(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2d(torch.cat((self.branch0(x), self.branch1(x)), 2)) * self.scale + x)


class OtherFactor(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2d(self.joined(x)) * 0.3 + x)


class InTraining(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2d(self.joined(x)) * self.scale + x
        return out if self.training else self.relu(out)


class Negative(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x - self.conv2d(self.joined(x)) * self.scale)


class Chained(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(
            self.conv2d(torch.cat((self.branch0(x), self.branch1(self.branch0(x) * 0 + x)), 1)) * self.scale + x
        )


@pytest.mark.parametrize("kind", [Twice, OtherAxis, OtherFactor, InTraining, Negative, Chained])
def test_other_blocks_are_left(kind: type[nn.Module]) -> None:
    block = fast.replace_layers(kind())
    assert type(block) is kind and [row.name for row in block.replacement_report.left] == ["conv2d"]


def test_a_call_of_its_own_is_kept() -> None:
    block = Block()
    block.forward = block.forward  # type: ignore[method-assign]
    assert type(fast.replace_layers(block)) is Block
