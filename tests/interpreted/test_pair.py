"""The Triton pairs and splits against the float64 reference, in the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from inception_fast.kernels import reference
from inception_fast.kernels.spec import ConvSpec, PairSpec
from inception_fast.kernels.triton import pairs
from inception_fast.kernels.triton.configs import Config
from inception_fast.kernels.triton.convolve import Part, pack
from inception_fast.kernels.triton.launch import interpreting
from torch import Tensor

import numerics

from .maps import DEVICE, empty, put, run, take

HALF, FLOAT, BRAIN = torch.float16, torch.float32, torch.bfloat16
BIG = Config(block_m=128, block_n=64, block_k=32)
ORDERS = {"1xn_nx1": ((1, 7), (7, 1)), "nx1_1xn": ((7, 1), (1, 7)), "3x1_1x3": ((3, 1), (1, 3))}


def same(kernel: tuple[int, int]) -> tuple[int, int, int, int]:
    return (kernel[0] // 2,) * 2 + (kernel[1] // 2,) * 2


def pair_case(order: str, dtype: torch.dtype, exact: bool) -> tuple[PairSpec, Tensor, list[Tensor]]:
    (k1, k2), name = ORDERS[order], str(dtype).removeprefix("torch.")
    first = ConvSpec(2, 9, 11, 32, 40, *k1, (1, 1), same(k1), dtype=name)
    second = ConvSpec(2, 9, 11, 40, 72, *k2, (1, 1), same(k2), dtype=name)
    draw = (lambda *s, seed: numerics.integers(*s, seed=seed, dtype=dtype, density=0.2)) if exact else (
        lambda *s, seed: numerics.random(*s, seed=seed, dtype=dtype, low=-0.5, high=0.5)
    )  # fmt: skip
    params: list[Tensor] = []
    for i, part in enumerate((first, second)):
        shift = numerics.integers(part.oc, seed=9 + i) if exact else numerics.random(part.oc, seed=9 + i)
        scale = torch.ones(part.oc) if exact else numerics.random(part.oc, seed=7 + i, low=0.5)
        params += [draw(part.oc, part.c, part.kh, part.kw, seed=i), scale, shift]
    return PairSpec(first, second), draw(2, 32, 9, 11, seed=5), params


def paired(spec: PairSpec, x: Tensor, params: list[Tensor], fused: bool) -> Tensor:
    parts = [
        Part(*params[i : i + 3], (p.padding[0], p.padding[2]), True) for i, p in ((0, spec.first), (3, spec.second))
    ]
    packed = tuple(pack([part], x.dtype, DEVICE) for part in parts)
    middle, y = empty(2, 40, 9, 11, x.dtype, 0, 8), empty(2, 72, 9, 11, x.dtype, 8, 0)
    launches = pairs.chain(
        "pair", spec, put(x, 8), packed, middle, y, lambda _: BIG, fused=replace(BIG) if fused else None, strip=4
    )
    assert len(launches) == (1 if fused else 2)
    run(launches)
    take(middle)
    return take(y)


@pytest.mark.parametrize("fused", (False, True), ids=("two_launches", "one_launch"))
@pytest.mark.parametrize("order", ORDERS)
def test_integers_are_exact(order: str, fused: bool) -> None:
    spec, x, params = pair_case(order, HALF, exact=True)
    wanted = reference.pair(x, *params)
    assert wanted.max() <= 2048
    numerics.assert_exact(paired(spec, x, params, fused), wanted)


@pytest.mark.parametrize("fused", (False, True), ids=("two_launches", "one_launch"))
@pytest.mark.parametrize("dtype", (HALF, FLOAT, BRAIN), ids=str)
def test_random_draws_stay_in_the_budget(dtype: torch.dtype, fused: bool) -> None:
    spec, x, params = pair_case("1xn_nx1", dtype, exact=False)
    y, wanted = paired(spec, x, params, fused), reference.pair(x.double(), *params)
    if dtype is BRAIN and interpreting():  # what is cut off always points to zero, so two errors add up in full
        assert numerics.rel_l2(y, wanted) <= numerics.BF16_CUT_REL_L2 * 2
    else:
        numerics.assert_close_budget(y, wanted, roundings=2)


def test_one_launch_refuses_what_is_no_pair() -> None:
    spec, _, _ = pair_case("1xn_nx1", HALF, exact=True)
    assert pairs.fused_reasons(spec) == []
    square = replace(spec.second, kh=3, kw=3, padding=(1, 1, 1, 1))
    assert "allowed: 1xn or nx1" in pairs.fused_reasons(PairSpec(spec.first, square))[0]
    valid = replace(spec.second, padding=(0, 0, 0, 0))
    assert "allowed: SAME" in pairs.fused_reasons(PairSpec(spec.first, valid))[0]
