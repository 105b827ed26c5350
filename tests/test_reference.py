"""The truth itself: against values worked by hand and against PyTorch's own float64 operations."""

from __future__ import annotations

import pytest
import torch
from inception_fast.kernels import reference
from inception_fast.kernels.spec import ConvSpec, PairSpec, PoolSpec
from torch import Tensor
from torch.nn import functional as F

import numerics


def draw(*shape: int, seed: int = 0) -> Tensor:
    return numerics.random(*shape, seed=seed, dtype=torch.float64)


def test_conv_by_hand() -> None:
    x = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]])
    weight = torch.tensor([[[[1.0, 10.0]]]])
    one, half = torch.ones(1), torch.full((1,), 0.5)
    assert reference.conv(x, weight).tolist() == [[[[21.0, 32.0], [54.0, 65.0]]]]
    assert reference.conv(x, weight, padding=(0, 0, 1, 0), stride=(1, 2)).tolist() == [[[[10.0, 32.0], [40.0, 65.0]]]]
    y = reference.conv(x, weight, half, -20 * one, residual=torch.full((1, 1, 2, 2), -1.0), residual_scale=2.0)
    assert y.tolist() == [[[[0.0, 0.0], [13.0, 24.0]]]]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
def test_conv_equals_torch(stride: tuple[int, int], groups: int) -> None:
    x, weight = draw(2, 6, 9, 8), draw(9, 6 // groups, 3, 2, seed=1)
    scale, shift, residual = draw(9, seed=2), draw(9, seed=3), draw(2, 9, *((10, 9) if stride == (1, 1) else (5, 3)))
    padded = F.pad(x, (0, 2, 1, 2))
    y = F.conv2d(padded, weight, stride=stride, groups=groups) * scale[:, None, None] + shift[:, None, None]
    options = {"stride": stride, "padding": (1, 2, 0, 2), "groups": groups, "residual": residual, "residual_scale": 0.3}
    for relu in (True, False):
        expected = residual + 0.3 * y
        expected = expected.relu() if relu else expected
        numerics.assert_close_budget(reference.conv(x, weight, scale, shift, relu=relu, **options), expected)


@pytest.mark.parametrize("kind", ["chain", "split"])
def test_pair_equals_torch(kind: str) -> None:
    x, w1, w2 = draw(2, 4, 7, 6), draw(5, 4, 1, 3, seed=1), draw(6, 5 if kind == "chain" else 4, 3, 1, seed=2)
    s1, b1, s2, b2 = draw(5, seed=3), draw(5, seed=4), draw(6, seed=5), draw(6, seed=6)
    first = (F.conv2d(x, w1, padding=(0, 1)) * s1[:, None, None] + b1[:, None, None]).relu()
    second = F.conv2d(first if kind == "chain" else x, w2, padding=(1, 0))
    second = (second * s2[:, None, None] + b2[:, None, None]).relu()
    expected = second if kind == "chain" else torch.cat((first, second), 1)
    numerics.assert_close_budget(reference.pair(x, w1, s1, b1, w2, s2, b2, kind=kind), expected)


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [((3, 3), (1, 1), 1), ((3, 3), (2, 2), 0), ((2, 3), (2, 2), 1)]
)
def test_pools_equal_torch(kernel: tuple[int, int], stride: tuple[int, int], padding: int, ceil: bool) -> None:
    x = draw(2, 3, 8, 9)
    sides = (padding,) * 4
    shape = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil).shape[2:]
    reach = [(o - 1) * s + k - size - 2 * padding for o, s, k, size in zip(shape, stride, kernel, (8, 9), strict=True)]
    overhang = tuple(max(0, r) for r in reach)
    expected = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil)
    assert torch.equal(reference.pool(x, kernel, stride, sides, overhang=overhang), expected)
    for counted in (True, False):
        expected = F.avg_pool2d(x, kernel, stride, padding, ceil, counted)
        y = reference.pool(x, kernel, stride, sides, kind="avg", count_include_pad=counted, overhang=overhang)
        numerics.assert_close_budget(y, expected)


def test_max_pool_pads_with_minus_infinity() -> None:
    x = -torch.ones(1, 1, 3, 3)
    assert reference.pool(x, (3, 3), padding=(1, 1, 1, 1)).eq(-1).all()


@pytest.mark.parametrize("counted", [True, False])
def test_pool_project_equals_torch(counted: bool) -> None:
    x, weight, scale, shift = draw(2, 6, 7, 5), draw(4, 6, 1, 1, seed=1), draw(4, seed=2), draw(4, seed=3)
    pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=counted)
    expected = (F.conv2d(pooled, weight) * scale[:, None, None] + shift[:, None, None]).relu()
    numerics.assert_close_budget(reference.pool_project(x, weight, scale, shift, count_include_pad=counted), expected)


def test_eltwise_parts_are_optional() -> None:
    x, residual = draw(2, 3, 4, 5), draw(2, 3, 4, 5, seed=1)
    scale, shift = draw(3, seed=2), draw(3, seed=3)
    assert torch.equal(reference.eltwise(x), x)
    assert torch.equal(reference.eltwise(x, relu=True), x.relu())
    expected = residual + 0.5 * (x * scale[:, None, None] + shift[:, None, None])
    y = reference.eltwise(x, scale, shift, residual=residual, residual_scale=0.5)
    numerics.assert_close_budget(y, expected)


@pytest.mark.parametrize("size", [3, 4, 5])
def test_lrn_equals_torch(size: int) -> None:
    x = draw(2, 9, 3, 4)
    expected = F.local_response_norm(x, size, alpha=0.3, beta=0.75, k=2.0)
    numerics.assert_close_budget(reference.lrn(x, size, 0.3, 0.75, 2.0), expected)


def test_normalize_equals_torch_and_survives_zeros() -> None:
    x = draw(3, 7, 2, 2)
    x[1] = 0
    numerics.assert_close_budget(reference.normalize(x), F.normalize(x))
    assert reference.normalize(x)[1].eq(0).all()


def test_rounds_once_to_the_dtype_of_x() -> None:
    """In bfloat16 the sum 256 + 1 - 256 would be 0; kept wide it is 1."""
    x = torch.tensor([256.0, 1.0, -256.0], dtype=torch.bfloat16).reshape(1, 3, 1, 1)
    y = reference.conv(x, torch.ones(1, 3, 1, 1, dtype=torch.bfloat16))
    assert y.dtype is torch.bfloat16 and y.item() == 1.0


def test_gradients_flow_through_the_truth() -> None:
    x, weight = draw(1, 2, 4, 4).requires_grad_(), draw(2, 2, 3, 3, seed=1).requires_grad_()
    scale, shift = draw(2, seed=2).requires_grad_(), draw(2, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: reference.conv(*a, padding=(1, 1, 1, 1)), (x, weight, scale, shift))


CONV = {"n": 2, "h": 5, "w": 6, "c": 4, "oc": 8, "kh": 3, "kw": 1}
POOL = {"n": 2, "h": 5, "w": 6, "c": 4, "kh": 3, "kw": 3}


def test_work_and_traffic_by_hand() -> None:
    conv = ConvSpec(**CONV, stride=(2, 1), padding=(1, 1, 0, 0), groups=2, residual=True, dtype="bfloat16")
    assert conv.flops() == 2 * (2 * 3 * 6) * 8 * 2 * 3
    assert conv.bytes() == 2 * (2 * 5 * 6 * 4 + 8 * 2 * 3 + 2 * (2 * 3 * 6 * 8)) + 4 * (8 + 8)
    second = ConvSpec(2, 3, 6, 8, 4, 1, 3, padding=(0, 0, 1, 1), dtype="bfloat16")
    pair = PairSpec(conv, second)
    assert pair.flops() == conv.flops() + second.flops()
    assert pair.bytes() == conv.bytes() + second.bytes() - 2 * 2 * (2 * 3 * 6 * 8)
    split = PairSpec(second, second, "split")
    assert split.bytes() == 2 * second.bytes() - 2 * (2 * 3 * 6 * 8)
    pool = PoolSpec(**POOL, stride=(2, 2))
    assert pool.flops() == 2 * 2 * 2 * 4 * 9 and pool.bytes() == 4 * 2 * 4 * (5 * 6 + 2 * 2)


@pytest.mark.parametrize(
    ("spec", "change", "said"),
    [
        (ConvSpec, {"c": 0}, "sizes .*; allowed: n >= 0, h w c oc >= 1"),
        (ConvSpec, {"stride": (0, 1)}, "kernel and stride of .*; allowed: at least 1"),
        (ConvSpec, {"padding": (0, 0, -1, 0)}, r"padding \(0, 0, -1, 0\); allowed: non-negative"),
        (ConvSpec, {"groups": 3}, "groups 3; allowed: a divisor of c and oc"),
        (ConvSpec, {"groups": 0}, "groups 0; allowed: a divisor of c and oc"),
        (ConvSpec, {"groups": -2}, "groups -2; allowed: a divisor of c and oc"),
        (ConvSpec, {"dtype": "int8"}, "dtype 'int8'; allowed: float64, float32"),
        (ConvSpec, {"kh": 6}, "kernel 6x1 on a 5x6 map; allowed: not larger than the padded map"),
        (PoolSpec, {"kind": "min"}, "kind 'min'; allowed: max, avg"),
        (PoolSpec, {"dtype": "int8"}, "dtype 'int8'; allowed: float64, float32"),
        (PoolSpec, {"padding": (3, 0, 0, 0)}, r"padding \(3, 0, 0, 0\); allowed: less than the kernel"),
    ],
)
def test_impossible_specs(spec: type, change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        spec(**(CONV if spec is ConvSpec else POOL) | change)


def test_exact_comparison_notices_one_element() -> None:
    y = numerics.integers(2, 3, 4, 5, limit=5)
    other = y.clone()
    other[1, 2, 3, 4] += 2**-20
    with pytest.raises(AssertionError, match="1 of 120 elements"):
        numerics.assert_exact(other, y)
    with pytest.raises(AssertionError, match="vacuous"):
        numerics.assert_exact(torch.zeros(3), torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_budget_notices_faults_that_looser_ones_let_pass(dtype: torch.dtype) -> None:
    """One rounding passes; a second one, as of a library that rounds before scale and shift, does not, nor does BN's
    epsilon of 1e-5 for 1e-3, nor TF32 operands."""
    expected = numerics.random(200, 100, dtype=torch.float64)
    numerics.assert_close_budget(expected.to(dtype), expected)
    faults = [expected * ((1 + 1e-5) / (1 + 1e-3)) ** 0.5] if dtype is torch.float32 else []
    faults += [((expected * 0.7).to(dtype).double() / 0.7)] if dtype is not torch.float32 else []
    faults += [(expected.float().view(torch.int32) & ~0x1FFF).view(torch.float32)] if dtype is torch.float32 else []
    for fault in faults:
        with pytest.raises(AssertionError, match="over the"):
            numerics.assert_close_budget(fault.to(dtype), expected)
