"""The drop-in layers and the losses."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import inception_fast as fast
import numerics
from inception_fast import _fold, layers, losses, ops
from inception_fast.backends import native_cpu
from inception_fast.backends.casts import casts
from plain_layers import Plain, randomise


class PlainChain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Plain(8, 12, (1, 7), 1, (0, 3)), Plain(12, 10, (7, 1), 1, (3, 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class PlainSplit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Plain(8, 12, (1, 3), 1, (0, 1)), Plain(8, 10, (3, 1), 1, (1, 0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.first(x), self.second(x)), 1)


class PlainPool(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], str]] = {
    "conv": (lambda: fast.ConvBNReLU(8, 10, 3, 2, 1), lambda: Plain(8, 10, 3, 2, 1), "conv_bn_relu"),
    "pair": (lambda: fast.AsymmetricPair(8, 12, 10, 7), PlainChain, "asymmetric_pair"),
    "split": (lambda: fast.ParallelSplit(8, 12, 10), PlainSplit, "parallel_split"),
    "pool": (lambda: fast.PoolProject(8, 10), lambda: PlainPool(8, 10, 1), "pool_project"),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def twins(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The layer and its plain form with the same state, and an input."""
    layer, plain = LAYERS[name][0](), LAYERS[name][1]()
    plain.load_state_dict(randomise(layer).state_dict())
    return layer, plain, numerics.random(2, 8, 20, 21, seed=99)


def exact(plain: nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(plain).double()(x.double())


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the fused operations that run."""
    names: list[str] = []
    for name in ops.__all__:
        monkeypatch.setattr(ops, name, noted(names, name, getattr(ops, name)))
    return names


def noted(names: list[str], name: str, operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        names.append(name)
        return operation(*args, **kwargs)

    return run


@pytest.fixture
def swaps() -> Iterator[None]:
    """Conversions swap the insides of parameters, which torch refuses where something refers to one weakly."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@each_layer
def test_a_layer_that_ran_is_converted_by_swapping(name: str, swaps: None) -> None:
    layer, plain, x = twins(name)
    with torch.no_grad():
        before = layer.eval()(x)
        after = layer.to(torch.float64)(x.double())
        expected = plain.eval().double()(x.double())
    assert before.dtype is torch.float32 and after.dtype is torch.float64
    numerics.assert_close_budget(after, expected)


@each_layer
def test_evaluation_is_one_fused_operation(name: str, called: list[str]) -> None:
    layer, plain, x = twins(name)
    layer.eval(), plain.eval()
    for layout in numerics.LAYOUTS:
        with torch.no_grad():
            y = layer(numerics.as_layout(x, layout))
        # The intermediate of a pair is a float32 activation: one rounding more.
        numerics.assert_close_budget(y, exact(plain, x), roundings=2)
    assert called == [LAYERS[name][2]] * 4


@each_layer
@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("learns", [False, True])
def test_weights_are_packed_once(name: str, half: bool, learns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, plain, x = twins(name)
    layer.eval(), plain.eval().double()
    packed: list[int] = []
    compile_plan = native_cpu.cpu.compile
    monkeypatch.setattr(native_cpu.cpu, "compile", lambda plan: packed.append(1) or compile_plan(plan))
    for factor in (1.0, 1.5):
        with torch.no_grad():
            for weight in (*layer.parameters(), *plain.parameters()):
                weight.mul_(factor)
        packed.clear()
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=half), torch.set_grad_enabled(learns):
                y = layer(x)
        assert packed == [1]
        expected = plain(x.double())
        assert numerics.rel_l2(y.detach().double(), expected.detach()) <= (1e-2 if half else 1e-6)
        if learns:
            wanted = torch.autograd.grad(expected.sum(), list(plain.parameters()))
            for mine, exact_one in zip(torch.autograd.grad(y.sum(), list(layer.parameters())), wanted, strict=True):
                assert mine.dtype is torch.float32
                assert numerics.rel_l2(mine, exact_one) <= (0.1 if half else numerics.GRAD_REL_L2)


def test_casts_of_weights_live_as_long_as_these() -> None:
    layer, _, x = twins("pair")
    kept = len(casts)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer.eval()(x)
    assert len(casts) == kept + 2
    del layer
    assert len(casts) == kept


@each_layer
def test_training_is_plain_torch_with_its_statistics(name: str, called: list[str]) -> None:
    layer, plain, x = twins(name)
    ys = [module(x) for module in (layer, plain)]
    assert torch.equal(*ys) and not called
    for y in ys:
        y.square().sum().backward()
    for (key, mine), (_, theirs) in zip(layer.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), key
    for key, value in plain.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value), key
    layer.eval(), plain.eval()
    with torch.no_grad():
        numerics.assert_close_budget(layer(x), exact(plain, x), roundings=2)


@each_layer
def test_frozen_statistics_in_training_are_respected(name: str, called: list[str]) -> None:
    layer, plain, x = twins(name)
    for module in [*layer.modules(), *plain.modules()]:
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    before = {key: value.clone() for key, value in layer.named_buffers()}
    y, wide = layer(x), copy.deepcopy(plain).double()
    assert called == [LAYERS[name][2]]
    expected = wide(x.double())
    numerics.assert_close_budget(y, expected, roundings=2)
    y.square().sum().backward()
    expected.square().sum().backward()
    for (key, mine), (_, theirs) in zip(layer.named_parameters(), wide.named_parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None, key
        assert numerics.rel_l2(mine.grad, theirs.grad) <= 2 * numerics.GRAD_REL_L2, key
    assert all(torch.equal(value, before[key]) for key, value in layer.named_buffers())


@each_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    layer, plain, x = twins(name)
    layer, plain, x = layer.eval().to(dtype), plain.eval().to(dtype), x.to(dtype)
    with torch.no_grad():
        y = layer(x)
        numerics.assert_close_budget(y, exact(plain, x), roundings=2)  # a pair's intermediate is rounded too
    assert y.dtype is dtype


def test_a_change_of_any_statistic_or_parameter_is_seen() -> None:
    layer, x = randomise(fast.ConvBNReLU(8, 10, 3)).eval(), numerics.random(1, 8, 6, 6)
    with torch.no_grad():
        for tensor in (layer.bn.running_mean, layer.bn.running_var, layer.bn.weight, layer.bn.bias, layer.conv.weight):
            for write in (lambda t: t.mul_(1.5), lambda t: t.data.mul_(1.5)):
                before = layer(x)
                write(tensor)
                after = layer(x)
                assert not torch.equal(before, after)
                assert torch.equal(after, copy.deepcopy(layer)(x))
        before = layer(x)
        layer.bn.eps = 0.5
        assert not torch.equal(layer(x), before)


def test_scale_and_shift_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = fast.ConvBNReLU(8, 10, 3).eval(), numerics.random(1, 8, 6, 6)
    count: list[int] = []
    fold = _fold.scale_and_shift
    monkeypatch.setattr(_fold, "scale_and_shift", lambda *a: count.append(1) or fold(*a))
    with torch.inference_mode():
        layer(x)
    with torch.no_grad():
        layer(x)
    assert len(count) == 1
    layer(x).sum().backward()
    assert len(count) == 2 and layer.bn.weight.grad is not None


@pytest.mark.parametrize("name", LAYERS)
def test_memory_of_parameters_can_be_freed_and_come_back_elsewhere(name: str) -> None:
    """As FSDP does between two calls of a sharded layer."""
    layer, _, x = twins(name)
    layer.eval()
    with torch.no_grad():
        wanted = layer(x)
        state = [*layer.parameters(), *layer.buffers()]
        kept = [t.clone() for t in state]
        sizes = [t.untyped_storage().size() for t in state]
        for t in state:
            t.untyped_storage().resize_(0)
        for t, values, size in zip(state, kept, sizes, strict=True):
            t.untyped_storage().resize_(size)
            t.copy_(values)
        assert torch.equal(layer(x), wanted)


def test_what_inference_mode_cached_serves_training_of_the_input() -> None:
    layer, x = fast.ConvBNReLU(8, 10, 3).eval().requires_grad_(False), numerics.random(1, 8, 6, 6)
    with torch.inference_mode():
        layer(x)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_hooked_and_parametrised_children_are_called(called: list[str]) -> None:
    layer, plain, x = twins("conv")
    layer.eval(), plain.eval()
    handle = layer.conv.register_forward_hook(lambda module, args, y: y * 2)
    plain.conv.weight.data.mul_(2)
    with torch.no_grad():
        numerics.assert_close_budget(layer(x), exact(plain, x), roundings=2)
        handle.remove()
        assert not called
        layer.conv.weight.mul_(4)
        parametrize.register_parametrization(layer.conv, "weight", Halved())
        numerics.assert_close_budget(layer(x), exact(plain, x), roundings=2)
    assert not called


class Doubled(fast.ConvBNReLU):
    """Takes the place of plain layers too."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.relu(self.bn(self.conv(x)))


RESHAPED: dict[str, tuple[str, Callable[[Any], object]]] = {
    "a stride in a pair": ("pair", lambda net: setattr(net.second.conv, "stride", (2, 2))),
    "no padding in a pair": ("pair", lambda net: setattr(net.first.conv, "padding", (0, 0))),
    "a kernel in a pair": ("pair", lambda net: setattr(net.first, "conv", nn.Conv2d(8, 12, 3, padding=1))),
    "a class of a pair": ("pair", lambda net: setattr(net.first, "__class__", Doubled)),
    "a child of a pair": ("pair", lambda net: setattr(net, "first", nn.Conv2d(8, 12, 1))),
    "strides in a split": ("split", lambda net: [setattr(m.conv, "stride", (2, 2)) for m in (net.first, net.second)]),
    "a stride in a projection": ("pool", lambda net: setattr(net.conv, "stride", (2, 1))),
    "a kernel in a projection": ("pool", lambda net: setattr(net, "conv", nn.Conv2d(8, 10, 3, padding=1))),
}


@pytest.mark.parametrize("change", RESHAPED)
def test_changed_convolutions_run_as_they_stand(change: str, called: list[str]) -> None:
    """The operations of two layers and of a projection have one geometry; that of the convolutions may be another."""
    name, alter = RESHAPED[change]
    layer, plain, x = twins(name)
    for net in (layer, plain):
        torch.manual_seed(0)
        alter(net)
        net.eval()
    with torch.no_grad():
        numerics.assert_close_budget(layer(x), exact(plain, x), roundings=2)
    assert LAYERS[name][2] not in called


SET: dict[str, Callable[[Any], object]] = {
    "a number for a stride": lambda conv: setattr(conv, "stride", 2),
    "a number for a padding": lambda conv: setattr(conv, "padding", 0),
    "a weight of fewer channels": lambda conv: setattr(
        conv, "weight", nn.Parameter(conv.weight.detach()[:, 5:].clone())
    ),
    "how it is computed": lambda conv: setattr(conv, "_conv_forward", lambda x, weight, bias: F.conv2d(x, 2 - weight)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", SET)
def test_what_is_set_on_a_convolution_counts(change: str, training: bool) -> None:
    layer, plain = fast.ConvBNReLU(8, 10, 3, padding=1), Plain(8, 10, 3, 1, 1)
    plain.load_state_dict(randomise(layer).state_dict())
    for net in (layer, plain):
        SET[change](net.train(training).conv)
    x = numerics.random(2, layer.conv.weight.shape[1], 9, 9).contiguous(memory_format=torch.channels_last)
    assert numerics.rel_l2(layer(x).detach(), exact(plain, x).detach()) <= numerics.GRAD_REL_L2


def test_a_changed_pair_in_a_longer_sequential_runs_as_it_stands() -> None:
    pair = fast.AsymmetricPair(8, 12, 10, 7)
    net = fast.replace_layers(nn.Sequential(pair.first, pair.second, nn.Flatten())).eval()
    x = numerics.random(2, 8, 20, 21, seed=99)
    assert net(x).shape == (2, 10 * 20 * 21)
    pair.first.conv.stride = (2, 2)
    assert net(x).shape == (2, 10 * 10 * 11)


@each_layer
def test_layers_copy_and_pickle_after_use(name: str) -> None:
    layer, _, x = twins(name)
    layer.eval()
    with torch.no_grad():
        y, file = layer(x), io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
            assert torch.equal(twin(x), y)


@each_layer
def test_layers_compile_whole_and_export_as_plain_torch(name: str) -> None:
    layer, plain, x = twins(name)
    layer.eval(), plain.eval()
    with torch.no_grad():
        y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        numerics.assert_close_budget(y, exact(plain, x), roundings=2)
        program = torch.export.export(layer, (x,))
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("inception_fast" in target for target in targets) and "aten.conv2d.default" in targets


@pytest.mark.parametrize(
    "build",
    [
        lambda: fast.AsymmetricPair(4, 4, 4, 4),
        lambda: fast.AsymmetricPair(4, 4, 4, "3"),
        lambda: fast.AsymmetricPair(4, 0, 4, 3),
        lambda: fast.ConvBNReLU(0, 4, 3),
        lambda: fast.ConvBNReLU(4, 4.0, 3),
        lambda: fast.ConvBNReLU(4, 4, 0),
        lambda: fast.ConvBNReLU(4, 4, (3, 3, 3)),
        lambda: fast.ConvBNReLU(4, 4, 3, stride=(1, 0)),
        lambda: fast.ConvBNReLU(4, 4, 3, padding=-1),
        lambda: fast.ConvBNReLU(4, 4, 3, eps=-1e-3),
        lambda: fast.ConvBNReLU(4, 4, 3, eps="a"),
        lambda: fast.ConvBNReLU(4, 4, 3, momentum=2.0),
        lambda: fast.ConvBNReLU(4, 4, 3, momentum="a"),
        lambda: layers.PoolProject(4, 4, kernel_size=0),
        lambda: layers.PoolProject(4, 4, padding=2),
        lambda: layers.PoolProject(4, 4, padding="same"),
        lambda: layers.PoolProject(4, 4, count_include_pad="no"),
        lambda: fast.ParallelSplit(4, 4, n=2),
        lambda: fast.AsymmetricPair(4, 4, 4, 3, order="nxn"),
    ],
)
def test_impossible_layers_raise(build: Callable[[], nn.Module]) -> None:
    with pytest.raises((ValueError, TypeError), match="allowed"):
        build()


def test_a_wrong_number_of_channels_is_called_by_its_name() -> None:
    with pytest.raises(ValueError, match="mid=0; allowed: an integer >= 1"):
        fast.AsymmetricPair(4, 0, 4, 3)
    with pytest.raises(ValueError, match="cout2=0; allowed: an integer >= 1"):
        fast.ParallelSplit(4, 4, 0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_traced_layers_are_plain() -> None:
    """TorchScript has no place for the operations' Python; what it gets are the convolution and batch norm."""
    x = numerics.random(1, 8, 9, 9)
    for layer in (fast.ConvBNReLU(8, 10, 3), fast.AsymmetricPair(8, 6, 10, 3), layers.PoolProject(8, 10)):
        layer = randomise(layer).eval()
        with torch.no_grad():
            traced = torch.jit.trace(layer, x)
            assert "inception_fast::" not in str(traced.inlined_graph)
            numerics.assert_close_budget(traced(x[:, :, 1:]), layer(x[:, :, 1:]).double(), roundings=2)


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


SCRIPTED: dict[str, Callable[[], nn.Module]] = {name: made for name, (made, _, _) in LAYERS.items()}
SCRIPTED["network"] = lambda: fast.create_model("inception_v1", num_classes=2)
SCRIPTED["optimised"] = lambda: fast.optimize(nn.Conv2d(3, 4, 3), torch.ones(1, 3, 8, 8))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", SCRIPTED)
def test_scripting_says_to_trace(name: str) -> None:
    """TorchScript's compiler ends in a line of our code or torch's, and says nothing of the way that is left."""
    for module in (SCRIPTED[name](), Holder(SCRIPTED[name]())):
        with pytest.raises(TypeError, match=r"script.*trace"):
            torch.jit.script(module)


def test_symbolic_traces_are_plain() -> None:
    x = numerics.random(1, 8, 9, 9)
    made = (
        fast.ConvBNReLU(8, 10, 3), fast.AsymmetricPair(8, 6, 10, 3), fast.ParallelSplit(8, 6), layers.PoolProject(8, 10)
    )  # fmt: skip
    for layer in map(randomise, made):
        with torch.no_grad():
            y = layer.eval()(x)
            numerics.assert_close_budget(torch.fx.symbolic_trace(layer)(x), y.double(), roundings=2)


def test_the_other_order_of_a_pair() -> None:
    pair = randomise(fast.AsymmetricPair(8, 12, 10, 3, order="nx1_1xn")).eval()
    assert pair.first.conv.kernel_size == (3, 1) and pair.second.conv.kernel_size == (1, 3)
    x = numerics.random(1, 8, 5, 5)
    with torch.no_grad():
        numerics.assert_close_budget(pair(x), pair.second(pair.first(x)).double(), roundings=2)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_what_a_layer_cannot_take_raises(training: bool) -> None:
    for layer in (fast.ConvBNReLU(8, 10, 3), fast.AsymmetricPair(8, 6, 10, 3), layers.PoolProject(8, 10)):
        layer.train(training)
        with pytest.raises(ValueError, match=r"empty batch, x of shape \[0, 8, 6, 6\]; allowed: n >= 1"):
            layer(torch.zeros(0, 8, 6, 6))
        with pytest.raises(ValueError, match=r"7 .*channels.*; allowed: 8"):
            layer(torch.zeros(2, 7, 6, 6))
        with pytest.raises(ValueError, match="allowed: four dimensions"):
            layer(torch.zeros(8, 6, 6))
        with pytest.raises(TypeError, match=r"dtype torch\.float\d\d.*; allowed"):
            layer(torch.zeros(2, 8, 6, 6, dtype=torch.float64))
        with pytest.raises(TypeError, match=r"x is a ndarray; allowed: torch\.Tensor"):
            layer(torch.zeros(2, 8, 6, 6).numpy())
        with pytest.raises(ValueError, match=r"x is of layout torch\.sparse_coo; allowed: .* torch\.strided"):
            layer(torch.zeros(2, 8, 6, 6).to_sparse())


def test_label_smoothing_is_torchs() -> None:
    logits, target = numerics.random(5, 7), torch.tensor([0, 3, 6, 1, 1])
    expected = -(0.9 * F.one_hot(target, 7) + 0.1 / 7).mul(logits.log_softmax(1)).sum(1).mean()
    assert torch.allclose(fast.LabelSmoothingCrossEntropy()(logits, target), expected)
    assert torch.allclose(fast.LabelSmoothingCrossEntropy(0.0)(logits, target), F.cross_entropy(logits, target))
    with pytest.raises(ValueError, match="allowed: 0 <= smoothing"):
        fast.LabelSmoothingCrossEntropy(1.5)
    with pytest.raises(ValueError, match=r"smoothing .0\.1.; allowed: 0 <= smoothing"):
        fast.LabelSmoothingCrossEntropy("0.1")
    with pytest.raises(ValueError, match=r"reduction 'avg'; allowed: mean, sum, none"):
        fast.LabelSmoothingCrossEntropy(reduction="avg")
    with pytest.raises(TypeError, match=r"loss 'x'; allowed: a function"):
        losses.AuxiliaryLoss("x")  # type: ignore[arg-type]


def test_auxiliary_heads_count_for_less() -> None:
    main, aux, target = numerics.random(5, 7), numerics.random(5, 7, seed=1), torch.tensor([0, 3, 6, 1, 1])
    loss = fast.LabelSmoothingCrossEntropy()
    combined = losses.AuxiliaryLoss()
    assert torch.equal(combined(main, target), loss(main, target))
    assert torch.allclose(combined((main, aux), target), loss(main, target) + 0.4 * loss(aux, target))
