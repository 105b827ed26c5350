"""The native pools and per-pixel steps: exact on integers, within budget on random data, never outside their memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from inception_fast.kernels import cpu
from inception_fast.kernels.plan import EltwiseStep, ImportStep, LrnStep, NormalizeStep, PoolStep
from inception_fast.kernels.spec import PoolSpec

from cpu_plans import Scene
from numerics import FP32_REL_L2, rel_l2

every_tier = pytest.mark.parametrize("tier", cpu.tiers())


def run_pool(
    x: torch.Tensor, spec: PoolSpec, tier: str, threads: int = 1, shift: torch.Tensor | None = None, relu: bool = False
) -> torch.Tensor:
    scene = Scene()
    source = scene.put(x, 2, 1)
    y = scene.room(spec.n, spec.oh, spec.ow, spec.c, 1, 4)
    scene.steps.append(PoolStep("pool", spec, source, y, None if shift is None else shift.numpy(), relu))
    return scene.run(tier, threads).get(y)


# size, kernel, stride, padding, ceil_mode: what the variants use, then odd ones. c = 37 leaves a tail in every tier.
POOLS = [(17, 3, 1, 1, False), (35, 3, 2, 0, False), (14, 3, 2, 0, True), (14, 3, 2, 1, True), (10, 5, 3, 2, True)]


@every_tier
@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "ceil"), POOLS)
@pytest.mark.parametrize("kind", ["max", "avg", "avg+pad"])
def test_pools_equal_torch(tier: str, kind: str, size: int, kernel: int, stride: int, padding: int, ceil: bool) -> None:
    x = torch.randint(-50, 50, (2, 37, size, size + 3), generator=torch.Generator().manual_seed(1)).double()
    if kind == "max":
        truth = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil)
    else:
        truth = F.avg_pool2d(x, kernel, stride, padding, ceil_mode=ceil, count_include_pad=kind == "avg+pad")
    over = [
        (truth.shape[2 + i] - 1) * stride + kernel - (x.shape[2 + i] + 2 * padding) if ceil else 0 for i in range(2)
    ]
    spec = PoolSpec(
        *(2, size, size + 3, 37, kernel, kernel),
        (stride, stride),
        (padding,) * 4,
        kind[:3],
        kind == "avg+pad",
        (max(0, over[0]), max(0, over[1])),
    )
    assert (spec.oh, spec.ow) == truth.shape[2:]
    y = run_pool(x.float(), spec, tier)
    if kind == "max":
        assert torch.equal(y.double(), truth)
    else:
        assert torch.equal(y, truth.float())  # the sum is exact, the division rounds once
    assert torch.equal(run_pool(x.float(), spec, tier, threads=3), y)


@every_tier
def test_max_pool_lets_nan_win_and_pads_with_minus_infinity(tier: str) -> None:
    x = torch.full((1, 20, 5, 5), -math.inf)
    x[0, 3, 2, 2] = math.nan
    x[0, 4, 2, 2], x[0, 4, 2, 3] = math.nan, 5.0
    x[0, 5] = -7.0
    y = run_pool(x, PoolSpec(1, 5, 5, 20, 3, 3, (1, 1), (1, 1, 1, 1)), tier)
    torch.testing.assert_close(y, F.max_pool2d(x, 3, 1, 1), rtol=0, atol=0, equal_nan=True)


@every_tier
@pytest.mark.parametrize("share", [0, 0.002, 0.5], ids=["no NaN", "few NaN", "many NaN"])
def test_max_pool_of_bfloat16_orders_every_kind_of_number(tier: str, share: float) -> None:
    g = torch.Generator().manual_seed(7)
    x = torch.randint(-(2**15), 2**15, (2, 157, 9, 11), generator=g).to(torch.int16).view(torch.bfloat16)
    x = torch.where(x.isfinite() & (x.abs() > 1e-37), x, 0)
    kinds = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1.0, -1.0]).bfloat16()
    x[:, ::3] = kinds[torch.randint(6, x[:, ::3].shape, generator=g)]
    x[:, 1::3] = -x[:, 1::3].abs()
    nans = torch.tensor([0x7FC0, -0x40], dtype=torch.int16).view(torch.bfloat16)  # of either sign
    x = torch.where(torch.rand(x.shape, generator=g) < share, nans[torch.randint(2, x.shape, generator=g)], x)
    scene = Scene()
    source, y = scene.put(x, 2, 1, "bfloat16"), scene.room(2, 5, 6, 157, 1, 4, "bfloat16")
    scene.steps.append(PoolStep("pool", PoolSpec(2, 9, 11, 157, 3, 3, (2, 2), (1, 1, 1, 1)), source, y))
    for threads in (1, 3):
        found = scene.run(tier, threads).get(y)
        torch.testing.assert_close(found, F.max_pool2d(x.float(), 3, 2, 1).bfloat16(), rtol=0, atol=0, equal_nan=True)


@every_tier
@pytest.mark.parametrize("size", [1, 8, 17])
def test_global_average_with_shift_and_relu(tier: str, size: int) -> None:
    g = torch.Generator().manual_seed(2)
    x, shift = torch.randn(3, 2048, size, size, generator=g), torch.randn(2048, generator=g)
    spec = PoolSpec(3, size, size, 2048, size, size, kind="avg")
    truth = (x.double().mean((2, 3), keepdim=True) + shift.double()[:, None, None]).relu()
    y = run_pool(x, spec, tier, 2, shift, relu=True)
    assert rel_l2(y, truth) <= FP32_REL_L2
    assert torch.equal(run_pool(x, spec, tier, 5, shift, relu=True), y)


@every_tier
def test_relu_keeps_nan_and_has_no_negative(tier: str) -> None:
    x = torch.tensor([math.nan, -1.0, -0.0, 0.0, 2.0, -math.inf, math.inf, -1e-45]).repeat(5)[None, :, None, None]
    scene = Scene()
    view = scene.put(x)
    y = scene.room(1, 1, 1, x.numel())
    scene.steps.append(EltwiseStep("relu", view, y, relu=True))
    torch.testing.assert_close(scene.run(tier).get(y), x.relu(), rtol=0, atol=0, equal_nan=True)


@every_tier
@pytest.mark.parametrize("parts", ["", "scale", "shift", "residual", "scale shift residual relu"])
def test_eltwise_is_exact_with_any_of_its_parts(tier: str, parts: str) -> None:
    g = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-9, 10, shape, generator=g).float()

    x, residual, scale, shift = draw(2, 21, 7, 5), draw(2, 21, 7, 5), draw(21), draw(21)
    truth = x.clone()
    truth = truth * scale[:, None, None] if "scale" in parts else truth
    truth = truth + shift[:, None, None] if "shift" in parts else truth
    truth = residual + 3 * truth if "residual" in parts else truth
    truth = truth.relu() if "relu" in parts else truth
    for place in ("apart", "over x", "over the residual"):
        scene = Scene()
        source, left = scene.put(x, 1, 2), scene.put(residual, 3, 0)
        y = {"apart": scene.room(2, 7, 5, 21, 2, 2), "over x": source, "over the residual": left}[place]
        if place == "over the residual" and "residual" not in parts:
            continue
        step = EltwiseStep(
            "eltwise",
            source,
            y,
            scale.numpy() if "scale" in parts else None,
            shift.numpy() if "shift" in parts else None,
            "relu" in parts,
            left if "residual" in parts else None,
            3.0,
        )
        scene.steps.append(step)
        assert torch.equal(scene.run(tier, 2).get(y), truth), place


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    n, c, h, w = x.shape
    wide = torch.zeros(n, c + 2, h + 3, w * 2, dtype=x.dtype)
    wide[:, 1 : c + 1, 2 : h + 2, ::2] = x
    return {
        "nchw": x.contiguous(),
        "nhwc": x.contiguous(memory_format=torch.channels_last),
        "sliced": wide[:, 1 : c + 1, 2 : h + 2, ::2],
        "expanded": x[:1].expand(n, c, h, w),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }


@every_tier
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced", "expanded", "transposed"])
@pytest.mark.parametrize("c", [1, 3, 40])
def test_import_takes_any_strides(tier: str, dtype: torch.dtype, layout: str, c: int) -> None:
    g = torch.Generator().manual_seed(4)
    x = layouts(torch.randint(0, 256, (3, c, 9, 37), generator=g).to(dtype))[layout]
    scale, shift = torch.arange(1.0, c + 1), torch.arange(c, 0.0, -1)
    for parts in ((None, None), (scale, None), (None, shift), (scale, shift)):
        scene = Scene()
        y = scene.put(x, 2, 1)
        arrays = [None if part is None else part.numpy() for part in parts]
        scene.steps[0] = ImportStep("import", 0, y, *arrays)
        truth = x.float()
        truth = truth if parts[0] is None else truth * scale[:, None, None]
        truth = truth if parts[1] is None else truth + shift[:, None, None]
        assert torch.equal(scene.run(tier, 2).get(y), truth)


@every_tier
@pytest.mark.parametrize(
    ("size", "alpha", "beta", "k"), [(5, 1e-4, 0.75, 1.0), (4, 2.0, 0.6, 2.0), (1, 1.0, 0.5, 0.5), (99, 3.0, 1.0, 1.0)]
)
def test_local_response_normalisation_equals_torch(tier: str, size: int, alpha: float, beta: float, k: float) -> None:
    x = torch.randn(2, 37, 6, 5, generator=torch.Generator().manual_seed(5)) * 30
    for in_place in (False, True):
        scene = Scene()
        source = scene.put(x, 1, 1)
        y = source if in_place else scene.room(2, 6, 5, 37, 2, 0)
        scene.steps.append(LrnStep("lrn", source, y, size, alpha, beta, k))
        truth = F.local_response_norm(x.double(), size, alpha, beta, k)
        assert rel_l2(scene.run(tier, 2).get(y), truth) <= FP32_REL_L2


@every_tier
def test_normalize_equals_torch(tier: str) -> None:
    x = torch.randn(3, 515, 2, 2, generator=torch.Generator().manual_seed(6))
    x[1] *= 1e-9
    x[2] = 0
    scene = Scene()
    source, y = scene.put(x, 0, 3), scene.room(3, 2, 2, 515, 1, 0)
    scene.steps.append(NormalizeStep("normalize", source, y, 1e-6))
    found, truth = scene.run(tier, 2).get(y), F.normalize(x.double(), eps=1e-6)
    for i in range(2):
        assert rel_l2(found[i], truth[i]) <= FP32_REL_L2
    assert torch.equal(found[2].double(), truth[2])
