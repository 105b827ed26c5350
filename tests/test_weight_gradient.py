"""The weight gradient of a convolution in training: kernels of every tier, the operator, and the layers that use it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from inception_fast.kernels import cpu
from torch import Tensor
from torch.nn import functional as F

import inception_fast as fast
import numerics
from inception_fast import ops
from inception_fast.backends import weight_gradient as native
from plain_layers import Plain, randomise

# x [n, c, h, w], oc, kernel, stride, padding and the risk: a 3x3 over two images; channels beyond whole vectors, output
# channels beyond whole tiles; a stride that leaves a row out; padding on one axis; more pixels than a stretch; more
# than one meeting of the workers; pixels shared out in chunks; a panel of one vector last; padding that no pixel of a
# row escapes; a single pixel.
CASES = {
    "square": ((2, 16, 9, 7), 20, (3, 3), (1, 1), (1, 1)),
    "tails": ((2, 51, 6, 5), 17, (3, 3), (1, 1), (1, 1)),
    "stride": ((3, 24, 10, 9), 15, (3, 3), (2, 2), (0, 1)),
    "row": ((2, 33, 5, 8), 14, (1, 7), (1, 1), (0, 3)),
    "column": ((2, 33, 8, 5), 14, (7, 1), (1, 1), (3, 0)),
    "stretches": ((3, 32, 15, 15), 30, (1, 1), (1, 1), (0, 0)),
    "meetings": ((2, 16, 60, 60), 33, (5, 5), (1, 1), (2, 2)),
    "chunks": ((3, 17, 27, 27), 13, (1, 3), (1, 1), (0, 1)),
    "vectors": ((1, 48, 11, 11), 24, (3, 3), (1, 1), (1, 1)),
    "narrow": ((3, 16, 4, 1), 11, (2, 5), (1, 2), (1, 4)),
    "pixel": ((1, 16, 1, 1), 3, (1, 1), (1, 1), (0, 0)),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_tier = pytest.mark.parametrize("tier", cpu.tiers())
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture
def on_tier(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda tier: monkeypatch.setenv(cpu.ISA_VARIABLE, tier)


def maps(case: tuple, dtype: torch.dtype, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x, grad and the float64 gradient of the weight; `whole`: of small integers."""
    shape, oc, kernel, stride, padding = case
    weight = torch.zeros((oc, shape[1], *kernel), dtype=torch.float64, requires_grad=True)
    x = numerics.random(*shape, seed=1).mul(3 if whole else 1)
    y_shape = F.conv2d(x.double(), weight.detach(), None, stride, padding).shape
    grad = numerics.random(*y_shape, seed=2).mul(3 if whole else 1)
    x, grad = (t.round() if whole else t for t in (x, grad))
    x, grad = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, grad))
    F.conv2d(x.double(), weight, None, stride, padding).backward(grad.double())
    assert weight.grad is not None
    return x, grad, weight.grad


def ours(case: tuple, grad: Tensor, x: Tensor) -> Tensor:
    _, _, kernel, stride, padding = case
    assert native.reasons(grad, x) == []
    with numerics.poisoned_memory():
        return native.weight_gradient(grad, x, list(kernel), list(stride), list(padding))


@each_tier
@each_dtype
@each_case
def test_integers_are_exact(tier: str, dtype: torch.dtype, case: tuple, on_tier: Callable[[str], None]) -> None:
    on_tier(tier)
    x, grad, expected = maps(case, dtype, whole=True)
    assert torch.equal(ours(case, grad, x).double(), expected)


@each_tier
@each_case
def test_random_stays_in_the_budget(tier: str, case: tuple, on_tier: Callable[[str], None]) -> None:
    on_tier(tier)
    x, grad, expected = maps(case, torch.float32, whole=False)
    numerics.assert_close_gradient(ours(case, grad, x), expected)


@each_dtype
@pytest.mark.parametrize("name", ["stretches", "meetings", "chunks"])
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype, name: str) -> None:
    case = CASES[name]
    x, grad, _ = maps(case, dtype, whole=False)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ours(case, grad, x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_slice_of_a_concatenation_is_read_in_place() -> None:
    case = CASES["square"]
    x, grad, expected = maps(case, torch.float32, whole=True)
    wide = torch.full((2, 60, 9, 7), torch.nan).contiguous(memory_format=torch.channels_last)
    wide[:, 11:31] = grad
    assert torch.equal(ours(case, wide[:, 11:31], x).double(), expected)


@each_tier
@each_dtype
def test_a_nan_spoils_what_reads_it_alone(tier: str, dtype: torch.dtype, on_tier: Callable[[str], None]) -> None:
    on_tier(tier)
    case = CASES["stride"]
    x, grad, expected = maps(case, dtype, whole=True)
    x[1, 5, 3, 3] = torch.nan  # row 3 is odd: taps 1 of the rows alone; column 3 with padding 1: taps 0 and 2
    found = ours(case, grad, x)
    touched = torch.zeros_like(expected, dtype=torch.bool)
    touched[:, 5, 1, 0::2] = True
    assert torch.equal(found.isnan(), touched)
    assert torch.equal(found[~touched].double(), expected[~touched])


def test_an_empty_batch_has_no_gradient() -> None:
    weight = numerics.random(4, 16, 3, 3, seed=4).requires_grad_()
    x = torch.zeros(0, 16, 5, 5).contiguous(memory_format=torch.channels_last)
    grad = torch.zeros(0, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    assert native.reasons(grad, x) == ["an empty map"]
    ops.convolution(x, weight, stride=1, padding=0).backward(grad)
    assert weight.grad is not None and not weight.grad.any()


def test_reasons_name_what_the_kernels_do_not_take() -> None:
    x, grad, _ = maps(CASES["square"], torch.float32, whole=True)
    assert native.reasons(grad, x.contiguous()) == ["x of another layout than channels_last"]
    assert native.reasons(grad.bfloat16(), x) == ["a gradient of dtype torch.bfloat16 for a map of torch.float32"]
    assert native.reasons(grad, x[:, :8])[-1] == "8 channels; the kernels are for 16 or more"
    assert "dtype torch.float64" in native.reasons(grad.double(), x.double())[0]


def test_a_bad_call_is_refused_before_anything_is_written() -> None:
    with pytest.raises(ValueError, match="over 0 pixels"):
        cpu.conv_weight_gradient(
            cpu.default_tier(), "float32", (0, 1, 1, 1, 1, 1, 1, 1, 1), (1, 1), (0, 0), (0, 0), ((1, 1), (1, 1)), 1, 1
        )


def test_operator_differentiates_twice_and_checks() -> None:
    x = numerics.random(2, 3, 5, 4, seed=3, dtype=torch.float64).requires_grad_()
    weight = numerics.random(4, 3, 3, 3, seed=4, dtype=torch.float64).requires_grad_()

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return ops.convolution(x, weight, stride=2, padding=1)

    assert torch.autograd.gradcheck(call, (x, weight))
    assert torch.autograd.gradgradcheck(call, (x, weight))


def test_opcheck() -> None:
    x = numerics.random(2, 16, 5, 4, seed=3).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = numerics.random(4, 16, 3, 3, seed=4).requires_grad_()
    torch.library.opcheck(torch.ops.inception_fast.convolution.default, (x, weight, [1, 1], [1, 1]))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layer_learns_with_the_native_gradient(layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer's weight gradient is torch's within the budget, and the native kernels made it."""
    calls: list[int] = []
    original = native.weight_gradient
    monkeypatch.setattr(native, "weight_gradient", lambda *a: calls.append(1) or original(*a))
    layer = fast.ConvBNReLU(16, 24, 3, padding=1).train().to(memory_format=layout)
    plain = Plain(16, 24, 3, padding=1).double().train()
    plain.load_state_dict({k: v.double() for k, v in randomise(layer).state_dict().items()})
    x = numerics.random(2, 16, 9, 9, seed=5).contiguous(memory_format=torch.channels_last)
    grad = numerics.random(2, 24, 9, 9, seed=6)
    layer(x).backward(grad)
    plain(x.double()).backward(grad.double())
    assert calls == [1]
    assert layer.conv.weight.grad is not None and layer.conv.weight.grad.stride() == layer.conv.weight.stride()
    numerics.assert_close_gradient(layer.conv.weight.grad, plain.conv.weight.grad)


def test_autocast_keeps_the_gradient_in_float32() -> None:
    """One float32 sum of bfloat16 products: nearer to the truth than a gradient that was itself rounded."""
    case = CASES["square"]
    x, grad, expected = maps(case, torch.bfloat16, whole=False)
    weight = torch.zeros(20, 16, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.convolution(x.float(), weight, stride=1, padding=1)
    assert y.dtype is torch.bfloat16
    y.backward(grad)
    numerics.assert_close_gradient(weight.grad, expected)


def test_flops_are_those_of_the_product() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.rand(2, 16, 5, 5).contiguous(memory_format=torch.channels_last)
    weight = torch.rand(8, 16, 3, 3, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        ops.convolution(x, weight, stride=1, padding=1).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 2 * 25 * 8 * 16 * 9)  # forward and weight; x needs no gradient


def test_large_maps_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image row more than pays in float32, and the operator's gradient is torch's to the bit."""
    monkeypatch.setattr(native, "weight_gradient", lambda *a: pytest.fail("native on a map that does not pay"))
    x = numerics.random(1, 16, 65, 64, seed=1).contiguous(memory_format=torch.channels_last)
    weight = numerics.random(4, 16, 1, 1, seed=2).requires_grad_()
    grads = []
    for call in (lambda: ops.convolution(x, weight, stride=1, padding=0), lambda: F.conv2d(x, weight)):
        weight.grad = None
        call().square().sum().backward()
        grads.append(weight.grad)
    assert torch.equal(grads[0], grads[1])


def test_larger_maps_are_native_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = native.weight_gradient
    monkeypatch.setattr(native, "weight_gradient", lambda *a: calls.append(1) or original(*a))
    x = numerics.random(1, 16, 65, 64, seed=1).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = numerics.random(4, 16, 1, 1, seed=2).requires_grad_()
    ops.convolution(x, weight, stride=1, padding=0).square().sum().backward()
    assert calls == [1]
