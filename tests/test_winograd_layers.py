"""Operators and layers by Winograd's tiles in inference: the bits of the engine's plans, where they were asked for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from inception_fast.kernels import cpu
from torch import Tensor, nn

import inception_fast as fast
import numerics
from inception_fast import ops
from inception_fast.backends import native_cpu
from numerics import NET_WINOGRAD_MAX, winograd_budget
from plain_layers import Plain, randomise

LAST = torch.channels_last
KERNELS = [(3, 3), (5, 5), (1, 3), (3, 1), (1, 7), (7, 1)]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """The tiles of every convolution that is compiled."""
    found: list[tuple[int, int]] = []
    original = cpu.compile

    def compiled(plan: Any, *rest: Any, **options: Any) -> Any:
        for step in plan.steps:
            parts = (step.first, step.second) if hasattr(step, "first") else (step,)
            found.extend(part.tile for part in parts if hasattr(part, "tile"))
        return original(plan, *rest, **options)

    native_cpu.plans.clear()
    monkeypatch.setattr(native_cpu.cpu, "compile", compiled)
    yield found
    native_cpu.plans.clear()


@pytest.fixture
def no_tile_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best tier on which bfloat16 takes tiles."""
    monkeypatch.setenv(cpu.ISA_VARIABLE, [tier for tier in cpu.tiers() if not tier.startswith("amx")][-1])


def conv(kernel: tuple[int, int], cin: int = 48, cout: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    weight = numerics.random(cout, cin, *kernel, seed=1)
    return weight, numerics.random(cout, seed=2, low=0.5), numerics.random(cout, seed=3)


def sides(kernel: tuple[int, int]) -> tuple[int, int]:
    return kernel[0] // 2, kernel[1] // 2


def layer(weight: Tensor, scale: Tensor, shift: Tensor) -> nn.Module:
    """Plain torch whose folded batch norm is exactly this scale and shift."""
    kernel: Any = tuple(weight.shape[2:])
    block = Plain(weight.shape[1], weight.shape[0], kernel, padding=sides(kernel)).eval()
    block.conv.weight.data.copy_(weight)
    block.bn.eps = 0.0
    block.bn.weight.data.copy_(scale)
    block.bn.bias.data.copy_(shift)
    return block


@pytest.mark.parametrize(
    "kernel, dtype", [*((k, torch.float32) for k in KERNELS), *((k, torch.bfloat16) for k in KERNELS[:2])], ids=str
)
def test_an_operator_has_the_bits_of_the_plan(
    kernel: tuple[int, int], dtype: torch.dtype, taken: list[Any], no_tile_unit: None
) -> None:
    x = numerics.random(2, 48, 23, 22).contiguous(memory_format=LAST)
    weight, scale, shift = conv(kernel)
    weight = weight.to(dtype).float()  # an operator's weights are of x's dtype; a plan rounds none that a tile takes
    planned = fast.optimize(layer(weight, scale, shift), x, dtype=dtype, winograd=True)(x.to(dtype).float())
    taken.clear()
    call = {"stride": 1, "padding": sides(kernel)}
    arguments = x.to(dtype), weight.to(dtype), scale, shift
    y = ops.conv_bn_relu(*arguments, **call, winograd=True)
    (tile,) = taken
    assert any(tile) and y.dtype is dtype and torch.equal(y.float(), planned.to(dtype).float())
    direct = ops.conv_bn_relu(*arguments, **call)
    assert taken == [tile, (0, 0)] and not torch.equal(y, direct)
    again = ops.conv_bn_relu(*arguments, **call, winograd=True)
    assert len(taken) == 2 and torch.equal(again, y), "both forms are kept, each for itself"


@pytest.mark.parametrize("kind", ["chain", "split"])
def test_a_pair_has_the_bits_of_its_two_convolutions(kind: str, taken: list[Any]) -> None:
    x = numerics.random(3, 48, 23, 22).contiguous(memory_format=LAST)
    first, second = conv((1, 7), 48, 40), conv((7, 1), 40 if kind == "chain" else 48, 32)
    y = (ops.asymmetric_pair if kind == "chain" else ops.parallel_split)(x, *first, *second, winograd=True)
    assert len(taken) == 2 and all(map(any, taken))
    middle = ops.conv_bn_relu(x, *first, stride=1, padding=(0, 3), winograd=True)
    last = ops.conv_bn_relu(middle if kind == "chain" else x, *second, stride=1, padding=(3, 0), winograd=True)
    assert torch.equal(y, last if kind == "chain" else torch.cat((middle, last), 1))


def test_a_residual_and_no_relu(taken: list[Any]) -> None:
    weight, scale, shift = conv((3, 3))
    x, residual = numerics.random(2, 48, 23, 22), numerics.random(2, 32, 23, 22, seed=4)
    call = {"stride": 1, "padding": 1, "relu": False, "residual_scale": 0.3}
    y = ops.conv_bn_relu(x, weight, scale, shift, residual=residual, **call, winograd=True)
    wide = [a.double() for a in (x, weight, scale, shift)]
    exact = ops.conv_bn_relu(*wide, residual=residual.double(), **call)
    assert any(taken[0]) and numerics.rel_l2(y, exact) <= winograd_budget((3, 3), taken[0])[0]


def test_bits_depend_on_neither_batch_nor_threads() -> None:
    x = numerics.random(5, 48, 23, 22).contiguous(memory_format=LAST)
    first, second, threads = conv((1, 7), 48, 40), conv((7, 1), 40, 32), torch.get_num_threads()

    def call(x: Tensor) -> Tensor:
        return ops.asymmetric_pair(x, *first, *second, winograd=True)

    whole = call(x)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(torch.cat([call(x[:1]), call(x[1:])]), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", ["stride", "pointwise", "backend", "double"])
def test_what_has_no_tiles_stays_what_it_was(case: str) -> None:
    dtype = torch.float64 if case == "double" else torch.float32
    kernel = (1, 1) if case == "pointwise" else (3, 3)
    call: dict[str, Any] = {"stride": 2 if case == "stride" else 1, "padding": sides(kernel)}
    call |= {"backend": "torch"} if case == "backend" else {}
    arguments = [a.to(dtype) for a in (numerics.random(2, 48, 23, 22), *conv(kernel))]
    assert torch.equal(ops.conv_bn_relu(*arguments, **call, winograd=True), ops.conv_bn_relu(*arguments, **call))


def test_float16_is_float32_rounded_once(taken: list[Any]) -> None:
    weight, scale, shift = conv((3, 3))
    half = numerics.random(2, 48, 23, 22).half(), weight.half()
    call: dict[str, Any] = {"stride": 1, "padding": 1, "winograd": True}
    y = ops.conv_bn_relu(*half, scale, shift, **call)
    assert any(taken[0]) and torch.equal(
        y, ops.conv_bn_relu(half[0].float(), half[1].float(), scale, shift, **call).half()
    )


def test_gradients_are_those_of_direct_sums() -> None:
    x, parameters = numerics.random(2, 16, 9, 8), conv((3, 3), 16, 8)
    leaves = [a.requires_grad_() for a in (x, *parameters)]

    def gradients(winograd: bool) -> tuple[Tensor, ...]:
        y = ops.conv_bn_relu(*leaves, stride=1, padding=1, relu=False, winograd=winograd)
        return torch.autograd.grad(y, leaves, numerics.random(*y.shape, seed=7))

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(a, b)


def test_operators_check_and_compile() -> None:
    x, own = numerics.random(1, 16, 9, 8), torch.ops.inception_fast
    square, row, column = conv((3, 3), 16, 8), conv((1, 3), 16, 8), conv((3, 1), 8, 8)
    leaves = [a.requires_grad_() for a in (x, *square)]
    torch.library.opcheck(own.conv_bn_relu.default, (*leaves, None, [1, 1], [1] * 4, True, 1.0, None, True))
    torch.library.opcheck(own.asymmetric_pair.default, (x, *row, *column, None, True))
    torch.library.opcheck(own.parallel_split.default, (x, *row, *conv((3, 1), 16, 4), None, True))

    def call(x: Tensor) -> Tensor:
        return ops.conv_bn_relu(x, *square, stride=1, padding=1, winograd=True)

    with torch.no_grad():
        assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))


def net() -> nn.Module:
    pair = nn.Sequential(Plain(48, 48, (1, 7), padding=(0, 3)), Plain(48, 32, (7, 1), padding=(3, 0)))
    run = nn.Sequential(nn.Conv2d(48, 48, 5, padding=2, bias=False), nn.BatchNorm2d(48), nn.ReLU(), nn.Identity())
    last = Plain(32, 32, (7, 1), padding=(3, 0))
    return randomise(nn.Sequential(Plain(32, 48, 3), run, pair, last).to(memory_format=LAST)).eval()


def test_layers_take_the_option(taken: list[Any]) -> None:
    model, x = net(), numerics.random(2, 32, 26, 25).contiguous(memory_format=LAST)
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(x.double())
        plain = fast.replace_layers(copy.deepcopy(model))(x)
        assert len(taken) == 5 and not any(map(any, taken))
        layers = fast.replace_layers(copy.deepcopy(model), winograd=True)
        y = layers(x)
        assert len(taken) == 10 and all(map(any, taken[5:]))
        assert not torch.equal(y, plain) and numerics.max_error(y, exact) <= NET_WINOGRAD_MAX
        for twin in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
            assert torch.equal(twin(x), y)
        assert torch.equal(torch.compile(layers, fullgraph=True, backend="aot_eager")(x), y)
        assert torch.equal(fast.replace_layers(layers)(x), plain), "the last call says whether"
        with fast.use_backend("torch"):
            assert torch.equal(fast.replace_layers(layers, winograd=True)(x), fast.replace_layers(layers)(x))


def test_layers_in_bfloat16_take_it_too(taken: list[Any], no_tile_unit: None) -> None:
    model, x = net().bfloat16(), numerics.random(2, 32, 26, 25, dtype=torch.bfloat16).contiguous(memory_format=LAST)
    layers = fast.replace_layers(copy.deepcopy(model), winograd=True)
    with torch.inference_mode():
        y, exact = layers(x), model.double()(x.double())
    assert any(map(any, taken)) and numerics.rel_l2(y, exact) <= numerics.BF16_REL_L2 * 5**0.5


def test_what_is_no_flag_is_refused() -> None:
    x, row, column = numerics.random(1, 16, 9, 8), conv((1, 3), 16, 8), conv((3, 1), 8, 8)
    said = "winograd 'yes'; allowed: True or False"
    with pytest.raises(TypeError, match=said):
        ops.conv_bn_relu(x, *row, stride=1, padding=0, winograd="yes")  # type: ignore[arg-type]
    for operator in (ops.asymmetric_pair, ops.parallel_split):
        with pytest.raises(TypeError, match=said):
            operator(x, *row, *column, winograd="yes")  # type: ignore[arg-type]
