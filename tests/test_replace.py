"""The swap of the drop-in layers into models people have: what it takes, what it keeps, what it leaves and why."""

from __future__ import annotations

import copy
import importlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import inception_fast as fast
import numerics
import references
from inception_fast.replace import FusedSequential
from plain_layers import Plain, randomise


def swapped(model: nn.Module, x: Tensor) -> tuple[nn.Module, Any]:
    """Replaces and checks what every replacement keeps."""
    randomise(model)
    keys, tensors = list(model.state_dict()), [*model.parameters(), *model.buffers()]
    modes = {name: module.training for name, module in model.eval().named_modules()}
    with torch.no_grad():
        before = copy.deepcopy(model).double()(x.double())
    replaced = fast.replace_layers(model)
    assert list(replaced.state_dict()) == keys
    kept = [*replaced.parameters(), *replaced.buffers()]
    assert len(kept) == len(tensors) and all(a is b for a, b in zip(kept, tensors, strict=True))
    assert all(module.training == modes.get(name, False) for name, module in replaced.named_modules())
    with torch.no_grad():
        numerics.assert_close_budget(replaced(x), before, roundings=4)
    return replaced, replaced.replacement_report


def test_sequentials_are_swapped() -> None:
    def block() -> list[nn.Module]:
        return [nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]

    named = nn.Sequential(OrderedDict(zip(("conv", "norm", "act"), block(), strict=True)))
    long = nn.Sequential(*block(), nn.MaxPool2d(2), *block(), nn.Conv2d(4, 4, 1))
    pair = nn.Sequential(Plain(4, 4, (1, 3), 1, (0, 1)), Plain(4, 4, (3, 1), 1, (1, 0)))
    chain = nn.Sequential(Plain(4, 4, 1), Plain(4, 4, (3, 1), 1, (1, 0)), Plain(4, 4, (1, 3), 1, (0, 1)))
    model = nn.Sequential(nn.Sequential(*block()), named, long, pair, chain)
    model, report = swapped(model, numerics.random(2, 4, 8, 8))
    kinds = [isinstance(model[i], k) for i, k in enumerate((fast.ConvBNReLU,) * 2)]
    assert kinds == [True, True] and isinstance(model[3], fast.AsymmetricPair)
    assert isinstance(model[2], nn.Sequential) and isinstance(model[2][0], nn.Conv2d)
    assert [run.kind for run in model[2].runs()] == ["block", "one", "block", "one"]
    assert [run.kind for run in model[4].runs()] == ["one", "pair"]
    assert [row.name for row in report.left] == ["2.7"]
    assert "10 swapped, 1 left" in str(report)


def test_a_bias_before_the_batch_norm_goes_into_the_shift() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    replaced, report = swapped(model, numerics.random(2, 4, 8, 8))
    assert isinstance(replaced, fast.ConvBNReLU) and not report.left


def test_swapped_models_train() -> None:
    model, x = nn.Sequential(Plain(4, 6, 3), nn.Conv2d(6, 2, 1)), numerics.random(2, 4, 8, 8)
    twin = copy.deepcopy(model)
    fast.replace_layers(model)
    for module in (model, twin):
        module.train()(x).square().sum().backward()
    assert isinstance(model[0], fast.ConvBNReLU) and model[0].training
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    assert torch.equal(model[0].bn.running_var, twin[0].bn.running_var)


class Leaky(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.bn(self.conv(x)))


class Skip(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.relu(self.bn(y)) + y


class OnlyInTraining(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        return F.dropout(y, training=True) if self.training else y


class Branching(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class Twice(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(F.relu(x))))


class WithScale(Plain):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(1))


class WithUnstoredBuffer(Plain):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("seen", torch.zeros(1), persistent=False)


class Called(Plain):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 5


def run_of_three() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def with_forward(block: nn.Module) -> nn.Module:
    block.forward = lambda x: 2 * type(block).forward(block, x)  # type: ignore[method-assign]
    return block


def compiled(block: nn.Module) -> nn.Module:
    block.compile(backend="eager")
    return block


def with_conv(**options: Any) -> nn.Module:
    block = Plain(4, 4, 3)
    block.conv = nn.Conv2d(4, 4, 3, bias=False, **options)
    return block


def with_bn(bn: nn.Module) -> nn.Module:
    block = Plain(4, 4, 3)
    block.bn = bn
    return block


# What must stay as it is, and a word of the reason.
LEFT: dict[str, tuple[nn.Module, str]] = {
    "another activation": (Leaky(4, 4, 3), "not just convolution"),
    "a second reader": (Skip(4, 4, 3), "not just convolution"),
    "more in training": (OnlyInTraining(4, 4, 3), "not just convolution"),
    "a branch on the data": (Branching(4, 4, 3), "cannot be traced"),
    "a step before": (Twice(4, 4, 3), "not just convolution"),
    "another parameter": (WithScale(4, 4, 3), "beside those of conv and bn"),
    "a buffer that is not stored": (WithUnstoredBuffer(4, 4, 3), "beside those of conv and bn"),
    "a forward of its own": (with_forward(Plain(4, 4, 3)), "forward was set on the instance"),
    "a Sequential with one": (with_forward(run_of_three()), "forward was set on the instance"),
    "a call of its own": (Called(4, 4, 3), "overrides __call__"),
    "compiled": (compiled(Plain(4, 4, 3)), "compiled in place"),
    "groups": (with_conv(groups=2), "groups 2"),
    "dilation": (with_conv(dilation=2), "dilation (2, 2)"),
    "reflected padding": (with_conv(padding=1, padding_mode="reflect"), "'reflect'"),
    "padding by name": (with_conv(padding="same"), "'same'"),
    "no statistics": (with_bn(nn.BatchNorm2d(4, track_running_stats=False)), "without running statistics"),
    "other norm": (with_bn(nn.SyncBatchNorm(4)), "follow"),
    "no activation": (nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), "follow"),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), "ConvTranspose2d"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_proved_is_left_with_a_reason(name: str) -> None:
    block, word = LEFT[name]
    model = fast.replace_layers(nn.Sequential(nn.Identity(), block))
    assert model[1] is block
    report = model.replacement_report
    assert not report.swapped and len(report.left) == 1 and word in report.left[0].reason


def test_hooks_move_along_and_can_still_be_removed() -> None:
    model, x = nn.Sequential(Plain(4, 4, 3), nn.Identity()).eval(), numerics.random(1, 4, 6, 6)
    seen: list[str] = []
    handle = model[0].register_forward_hook(lambda module, args, y: seen.append(type(module).__name__))
    inner = model[0].conv.register_forward_hook(lambda module, args, y: seen.append("conv"))
    fast.replace_layers(model)(x)
    assert seen == ["conv", "ConvBNReLU"]
    handle.remove(), inner.remove()
    model(x)
    assert len(seen) == 2


def test_a_hooked_norm_with_its_activation_inside_is_left() -> None:
    """timm's: its hooks see, and may change, what is behind the activation."""
    block = timm_blocks()[0].branch1[0]
    block.bn.register_forward_hook(lambda module, args, y: y - 1)
    x = numerics.random(1, block.conv.in_channels, 6, 6)
    before = block(x)
    assert fast.replace_layers(block) is block and torch.equal(block(x), before)
    assert "has hooks" in block.replacement_report.left[0].reason


def test_hooks_on_a_state_dict_move_along() -> None:
    """Those that see a state dict before it is loaded are bound to their module, the others are handed it."""
    model = nn.Sequential(Plain(4, 4, 3), nn.MaxPool2d(2), nn.Sequential(*run_of_three()))
    seen: list[str] = []
    for module in model:
        module.register_load_state_dict_pre_hook(lambda module, *_: seen.append(f"before {type(module).__name__}"))
        module.register_load_state_dict_post_hook(lambda module, keys: seen.append(f"after {type(module).__name__}"))
    fast.replace_layers(model)
    for net in (model, copy.deepcopy(model)):
        net.load_state_dict(net.state_dict())
        classes = [type(module).__name__ for module in net]
        assert seen == [f"{when} {name}" for name in classes for when in ("before", "after")]
        seen.clear()


@pytest.mark.parametrize(
    "made",
    [
        run_of_three,
        lambda: nn.Sequential(*run_of_three(), nn.Conv2d(4, 4, 1)),
        lambda: nn.Sequential(Plain(4, 4, (1, 3), 1, (0, 1)), Plain(4, 4, (3, 1), 1, (1, 0))),
    ],
)
def test_what_a_sequential_has_of_its_own_stays(made: Callable[[], nn.Sequential]) -> None:
    model = made()
    model.out_channels = 4  # type: ignore[assignment]
    model.register_buffer("steps", torch.zeros(3))
    model.register_buffer("unstored", torch.zeros(3), persistent=False)
    model.register_parameter("gain", nn.Parameter(torch.ones(2)))
    replaced, report = swapped(model, numerics.random(2, 4, 8, 8))
    assert replaced is not model and report.swapped and replaced.out_channels == 4
    assert {"gain", "steps", "unstored"} <= {n for n, _ in [*replaced.named_parameters(), *replaced.named_buffers()]}


def test_attributes_of_a_block_stay() -> None:
    block = Plain(4, 6, 3)
    block.out_channels = 6  # type: ignore[assignment]
    layer = copy.deepcopy(fast.replace_layers(block))
    assert isinstance(layer, fast.ConvBNReLU) and layer.out_channels == 6


def test_a_pool_with_a_forward_of_its_own_keeps_it() -> None:
    pool = nn.MaxPool2d(2)
    pool.forward = lambda x: x  # type: ignore[method-assign, assignment]
    x = numerics.random(1, 4, 6, 6)
    assert fast.replace_layers(nn.Sequential(pool))[0] is pool and torch.equal(pool(x), x)


def test_replaced_models_are_traced_symbolically() -> None:
    model = nn.Sequential(Plain(4, 8, 3), nn.MaxPool2d(2), Plain(8, 8, 1), nn.AvgPool2d(3, 1, 1))
    replaced, _ = swapped(model, x := numerics.random(2, 4, 12, 12))
    traced = torch.fx.symbolic_trace(replaced)
    numerics.assert_close_budget(traced(x), copy.deepcopy(replaced).double()(x.double()), roundings=4)


def test_a_shared_block_stays_shared() -> None:
    block = Plain(4, 4, 3, 1, 1)
    model = fast.replace_layers(nn.Sequential(block, nn.Identity(), block))
    assert model[0] is model[2] and isinstance(model[0], fast.ConvBNReLU)


def test_replacing_twice_changes_nothing_more() -> None:
    model = fast.replace_layers(nn.Sequential(Plain(4, 4, 3), nn.Identity(), nn.Sequential(Plain(4, 4, 3))))
    modules = list(model.modules())
    assert list(fast.replace_layers(model).modules()) == modules
    assert not model.replacement_report.swapped


def test_a_run_that_is_edited_later_is_found_again() -> None:
    model = nn.Sequential(nn.Identity(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    fused, x = fast.replace_layers(model), numerics.random(1, 4, 6, 6)
    fused[3] = nn.Tanh()
    with torch.no_grad():
        assert torch.allclose(fused(x), nn.Sequential(*fused)(x)) and fused(x).min() < 0


def test_only_modules_are_taken() -> None:
    with pytest.raises(TypeError, match="int; allowed"):
        fast.replace_layers(3)  # type: ignore[arg-type]


def timm_blocks() -> nn.Module:
    """v4 chains 1x1, 7x1, 1x7, 7x1, 1x7 in one Sequential; Inception-ResNet-v2 has a biased convolution alone."""
    references.torchvision()
    v4 = importlib.import_module("timm.models.inception_v4").InceptionB()
    resnet = importlib.import_module("timm.models.inception_resnet_v2").Block17()
    return references.randomise(nn.Sequential(v4, nn.Conv2d(1024, 1088, 1), resnet), 0)


def facenet_block() -> nn.Module:
    return references.randomise(importlib.import_module("facenet_pytorch.models.inception_resnet_v1").Block17(0.1), 0)


# name: (model, its input, blocks that become ConvBNReLU, pairs, convolutions left)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int, int]] = {
    "torchvision googlenet": (lambda: references.torchvision_net("googlenet"), (1, 3, 64, 64), 57, 0, 0),
    "timm's blocks": (timm_blocks, (1, 1024, 7, 7), 14, 4, 2),
    "facenet-pytorch's block": (facenet_block, (1, 896, 5, 5), 4, 1, 1),
    "our inception_v1": (lambda: fast.create_model("inception_v1"), (1, 3, 64, 64), 57, 0, 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_people_have_are_swapped_whole(name: str) -> None:
    build, shape, blocks, pairs, left = MODELS[name]
    model = build()
    keys = list(model.state_dict())
    x = numerics.random(*shape)
    with torch.no_grad():
        before = model.eval()(x)
        replaced = fast.replace_layers(model)
        assert replaced is model and list(model.state_dict()) == keys
        assert sum(type(m) is fast.ConvBNReLU for m in model.modules()) == blocks
        runs = [run.kind for m in model.modules() if isinstance(m, FusedSequential) for run in m.runs()]
        alone = [m for m in model.modules() if isinstance(m, fast.AsymmetricPair)]
        assert runs.count("pair") + len(alone) == pairs
        assert len(model.replacement_report.left) == left
        # float32 against float32 through up to 22 layers in a row: their budgets and torch's add in squares.
        assert numerics.rel_l2(model(x), before) <= numerics.FP32_REL_L2 * (2 * 22) ** 0.5
