"""The Triton pools and pointwise kernels against the float64 reference, in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from inception_fast.kernels import reference
from inception_fast.kernels.plan import EltwiseStep, LrnStep, NormalizeStep, View
from inception_fast.kernels.spec import PoolSpec
from inception_fast.kernels.triton import pools
from inception_fast.kernels.triton.launch import eltwise, imported, interpreting, lrn, normalized
from inception_fast.kernels.triton.pools import pooled
from torch import Tensor

import numerics

from .maps import DEVICE, empty, put, run, take

HALF, FLOAT, BRAIN = torch.float16, torch.float32, torch.bfloat16
NO_VIEW = View(0, 0, 1)  # launches are handed maps; a step's views are for plans

# name: (h, w, c, kernel, stride, padding, kind, include_pad, overhang). Each names the risk it covers.
POOLS = {
    "max_3x3_stride_2": (9, 8, 24, (3, 3), (2, 2), (0, 0, 0, 0), "max", False, (0, 0)),
    "max_lopsided_with_overhang": (8, 8, 20, (3, 3), (2, 2), (0, 1, 1, 0), "max", False, (1, 1)),
    "average_of_what_is_there": (6, 7, 24, (3, 3), (1, 1), (1, 1, 1, 1), "avg", False, (0, 0)),
    "average_with_the_padding": (6, 7, 24, (3, 3), (1, 1), (1, 1, 1, 1), "avg", True, (0, 0)),
    "average_with_padding_and_overhang": (6, 6, 8, (3, 3), (2, 2), (1, 1, 1, 1), "avg", True, (1, 1)),
    "average_5x5_stride_3": (17, 17, 40, (5, 5), (3, 3), (0, 0, 0, 0), "avg", False, (0, 0)),
    "whole_map_average": (8, 8, 200, (8, 8), (1, 1), (0, 0, 0, 0), "avg", False, (0, 0)),
    "whole_map_maximum": (5, 7, 48, (5, 7), (1, 1), (0, 0, 0, 0), "max", False, (0, 0)),
}


def pool_case(case: str, dtype: torch.dtype) -> tuple[PoolSpec, Tensor]:
    h, w, c, kernel, stride, padding, kind, include, overhang = POOLS[case]
    name = str(dtype).removeprefix("torch.")
    spec = PoolSpec(2, h, w, c, *kernel, stride, padding, kind, include, overhang, name)
    return spec, numerics.random(2, c, h, w, dtype=dtype)


def pool_of(spec: PoolSpec, x: Tensor, shift: Tensor | None = None, relu: bool = False) -> Tensor:
    y = empty(2, spec.c, spec.oh, spec.ow, x.dtype, 8, 8)
    run(pooled(spec, put(x, 8, 16), y, shift, relu))
    return take(y)


@pytest.mark.parametrize("case", POOLS)
@pytest.mark.parametrize("dtype", (HALF, FLOAT), ids=str)
def test_pools(case: str, dtype: torch.dtype) -> None:
    spec, x = pool_case(case, dtype)
    rest = {"kind": spec.kind, "count_include_pad": spec.count_include_pad, "overhang": spec.overhang}
    wanted = reference.pool(x.double(), (spec.kh, spec.kw), spec.stride, spec.padding, **rest)
    y = pool_of(spec, x)
    if spec.kind == "max":
        numerics.assert_exact(y, wanted)
    else:
        numerics.assert_close_budget(y, wanted)


@pytest.mark.parametrize("case", ("average_of_what_is_there", "whole_map_average", "whole_map_maximum"))
def test_pool_behind_a_1x1_adds_the_shift_and_rectifies(case: str) -> None:
    spec, x = pool_case(case, FLOAT)
    shift = numerics.random(spec.c, seed=3)
    rest = {"kind": spec.kind, "count_include_pad": spec.count_include_pad, "shift": shift, "relu": True}
    wanted = reference.pool(x.double(), (spec.kh, spec.kw), spec.stride, spec.padding, **rest)
    assert (wanted == 0).any()
    numerics.assert_close_budget(pool_of(spec, x, shift, True), wanted)


@pytest.mark.parametrize("case", ("max_3x3_stride_2", "average_of_what_is_there", "whole_map_maximum"))
def test_nan_spreads(case: str) -> None:
    spec, x = pool_case(case, FLOAT)
    x[0, 3, 4, 4] = float("nan")
    rest = {"kind": spec.kind, "count_include_pad": spec.count_include_pad}
    wanted = reference.pool(x, (spec.kh, spec.kw), spec.stride, spec.padding, **rest)
    assert torch.equal(pool_of(spec, x).isnan(), wanted.isnan()) and wanted.isnan().any()


def test_wide_rows_pool_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "wide", lambda *rows: True)
    spec, x = pool_case("max_3x3_stride_2", HALF)
    numerics.assert_exact(pool_of(spec, x), reference.pool(x, (3, 3), (2, 2)))


@pytest.mark.parametrize("dtype", (HALF, FLOAT, BRAIN), ids=str)
@pytest.mark.parametrize("parts", ("all", "copy", "residual", "affine"))
def test_eltwise(parts: str, dtype: torch.dtype) -> None:
    x, old = (numerics.random(2, 20, 5, 6, seed=i, dtype=dtype) for i in range(2))
    affine = parts in ("all", "affine")
    scale = numerics.random(20, seed=2, low=0.5).numpy() if affine else None
    shift = numerics.random(20, seed=3).numpy() if affine else None
    residual = old if parts in ("all", "residual") else None
    step = EltwiseStep("e", NO_VIEW, NO_VIEW, scale, shift, parts == "all", None, 0.17)
    y = empty(2, 20, 5, 6, dtype, 4, 8)
    run(eltwise(step, put(x, 4, 0), y, None if residual is None else put(residual, 8, 8)))
    given = [None if v is None else torch.from_numpy(v) for v in (scale, shift)]
    wanted = reference.eltwise(x.double(), *given, relu=parts == "all", residual=residual, residual_scale=0.17)
    if dtype is BRAIN and interpreting():
        assert numerics.rel_l2(take(y), wanted) <= numerics.BF16_CUT_REL_L2
    else:
        numerics.assert_close_budget(take(y), wanted)


@pytest.mark.parametrize("kind", (torch.uint8, torch.float32))
@pytest.mark.parametrize("affine", (False, True))
def test_import_takes_any_strides(kind: torch.dtype, affine: bool) -> None:
    x = numerics.integers(2, 3, 9, 7, limit=9).abs().to(kind).transpose(2, 3)
    scale, shift = (np.float32([0.5, 2, 1]), np.float32([1, -1, 0])) if affine else (None, None)
    y = empty(2, 3, 7, 9, HALF, 0, 5)
    run(imported(x.to(DEVICE), y, scale, shift))
    given = [None if v is None else torch.from_numpy(v) for v in (scale, shift)]
    numerics.assert_exact(take(y), reference.eltwise(x.double(), *given))


@pytest.mark.parametrize("c", (20, 200))
def test_lrn(c: int) -> None:
    x = numerics.random(2, c, 3, 5, low=-4, high=4)
    y = empty(2, c, 3, 5, FLOAT, 0, 8)
    run(lrn(LrnStep("l", NO_VIEW, NO_VIEW, 5, 1e-2, 0.75, 2.0), put(x, 3), y))
    numerics.assert_close_budget(take(y), reference.lrn(x.double(), 5, 1e-2, 0.75, 2.0))


@pytest.mark.parametrize("c", (20, 2500))
def test_normalize(c: int) -> None:
    x = numerics.random(3, c, 1, 2)
    x[0, :, 0, 0] = 0
    y = empty(3, c, 1, 2, FLOAT)
    run(normalized(NormalizeStep("n", NO_VIEW, NO_VIEW, 1e-12), put(x, 3), y))
    numerics.assert_close_budget(take(y), reference.normalize(x.double()))
