"""1x1 convolutions of training as products of matrices: what is served, values, layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import inception_fast as fast
import numerics
from inception_fast import ops
from inception_fast.backends import matrix as native

LAST = torch.channels_last
ONE, NONE = [1, 1], [0, 0]

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch multiplies matrices without MKL")

# x [n, c, h, w], oc and the risk: v3's longest sum; the smallest layer; the largest map of an odd batch.
CASES = [((16, 2048, 3, 3), 320), ((2, 128, 1, 2), 128), ((5, 160, 7, 7), 129)]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each product that was made."""
    found: list[int] = []
    original = native.forward
    monkeypatch.setattr(native, "forward", lambda *a: found.append(1) or original(*a))
    return found


def operands(case: tuple, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and the gradient of y; small integers where `whole`."""
    (n, c, h, w), oc = case
    shapes = (n, c, h, w), (oc, c, 1, 1), (n, oc, h, w)
    if whole:
        x, weight, grad = (numerics.integers(*s, seed=i, limit=3, density=0.5) for i, s in enumerate(shapes))
    else:
        x, weight, grad = (numerics.random(*s, seed=i) for i, s in enumerate(shapes))
    return x.contiguous(memory_format=LAST), weight, grad.contiguous(memory_format=LAST)


def results(x: Tensor, weight: Tensor, grad: Tensor, ours: bool) -> list[Tensor]:
    a, b = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = ops.convolution(a, b, stride=1, padding=0) if ours else F.conv2d(a, b)
    return [y.detach(), *torch.autograd.grad(y, (a, b), grad)]


@every_case
@pytest.mark.parametrize("weight_format", [LAST, torch.contiguous_format], ids=str)
def test_integers_are_exact(case: tuple, weight_format: torch.memory_format, products: list[int]) -> None:
    x, weight, grad = operands(case, whole=True)
    weight = weight.contiguous(memory_format=weight_format)
    found = results(x, weight, grad, ours=True)
    assert products == [1]
    expected = results(x.double(), weight.double(), grad.double(), ours=False)
    for mine, wide in zip(found, expected, strict=True):
        numerics.assert_exact(mine, wide)
    torchs = results(x, weight, grad, ours=False)
    assert [mine.stride() for mine in found[:2]] == [theirs.stride() for theirs in torchs[:2]]


@every_case
def test_errors_stay_in_the_budget(case: tuple, products: list[int]) -> None:
    operand = operands(case, whole=False)
    (y, *grads), (wide, *expected) = results(*operand, ours=True), results(*map(Tensor.double, operand), ours=False)
    assert products == [1]
    numerics.assert_close_budget(y, wide)
    for mine, theirs in zip(grads, expected, strict=True):
        numerics.assert_close_gradient(mine, theirs)


def test_a_layer_takes_the_product(products: list[int]) -> None:
    layer = fast.ConvBNReLU(128, 128, 1).to(memory_format=LAST).train()
    x = numerics.random(4, 128, 3, 3, seed=1).contiguous(memory_format=LAST).requires_grad_()
    layer(x).square().mean().backward()
    assert products == [1]


def test_other_calls_are_not_served() -> None:
    """Each differs from a served call in one thing."""
    x, weight, _ = operands(((4, 128, 3, 3), 128), whole=False)
    assert native.serves(x, weight, ONE, NONE)
    wide = numerics.random(4, 160, 3, 3).contiguous(memory_format=LAST)[:, :128]
    large = numerics.random(29, 128, 3, 3).contiguous(memory_format=LAST)
    turned = weight.transpose(0, 1).contiguous().transpose(0, 1)
    for case in (
        (x, weight.repeat(1, 2, 1, 1), ONE, NONE),
        (x.bfloat16(), weight, ONE, NONE),
        (x.double(), weight.double(), ONE, NONE),
        (x, weight.bfloat16(), ONE, NONE),
        (x.contiguous(), weight, ONE, NONE),
        (wide, weight, ONE, NONE),
        (large, weight, ONE, NONE),
        (x[:0], weight, ONE, NONE),
        (x, turned, ONE, NONE),
        (x, weight[:127], ONE, NONE),
        (x[:, :127].contiguous(memory_format=LAST), weight[:, :127].contiguous(), ONE, NONE),
        (x, weight.expand(128, 128, 1, 3), ONE, NONE),
        (x, weight, [2, 1], NONE),
        (x, weight, ONE, [0, 1]),
    ):
        assert not native.serves(*case)


def test_products_that_may_round_what_they_read_are_not_taken() -> None:
    x, weight, _ = operands(((4, 128, 3, 3), 128), whole=False)
    torch.set_float32_matmul_precision("medium")
    try:
        assert not native.serves(x, weight, ONE, NONE)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert native.serves(x, weight, ONE, NONE)


def test_channels_of_another_number_are_torchs_error() -> None:
    x, weight, _ = operands(((4, 128, 3, 3), 128), whole=False)
    with pytest.raises(RuntimeError, match="channels"):
        ops.convolution(x, weight.repeat(1, 2, 1, 1), stride=1, padding=0)
