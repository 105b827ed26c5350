"""Networks kept in bfloat16: every kind of step, and whole models with float32 at both ends."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from inception_fast.kernels import cpu
from inception_fast.kernels.plan import EltwiseStep, ImportStep, LrnStep, NormalizeStep, PoolStep
from inception_fast.kernels.spec import PoolSpec
from torch import Tensor, nn

import engine_nets
from cpu_plans import Scene
from inception_fast import create_model, optimize
from inception_fast.engine import OptimizedModule
from numerics import BF16_REL_L2, BF16_ROUNDING, NET_BF16_REL_L2, rel_l2

every_tier = pytest.mark.parametrize("tier", (*cpu.tiers(), *cpu.EMULATED))
every_target = pytest.mark.parametrize("target", cpu.DTYPES)
HALF = "bfloat16"


def half_integers(*shape: int, seed: int = 0) -> Tensor:
    """Integers that bfloat16 holds."""
    return torch.randint(-50, 51, shape, generator=torch.Generator().manual_seed(seed)).float()


def rounded(x: Tensor, dtype: str) -> Tensor:
    return x.to(getattr(torch, dtype))


@every_tier
@every_target
@pytest.mark.parametrize("kind", ["max", "avg"])
def test_pools(tier: str, target: str, kind: str) -> None:
    x = half_integers(2, 37, 17, 20)
    truth = F.max_pool2d(x, 3, 2, 1) if kind == "max" else F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
    scene = Scene()
    source, y = scene.put(x, 2, 1, HALF), scene.room(2, 9, 10, 37, 1, 4, target)
    scene.steps.append(PoolStep("pool", PoolSpec(2, 17, 20, 37, 3, 3, (2, 2), (1, 1, 1, 1), kind), source, y))
    for threads in (1, 3):
        assert torch.equal(scene.run(tier, threads).get(y), rounded(truth, target))


@every_tier
@every_target
def test_eltwise(tier: str, target: str) -> None:
    x, residual, shift = half_integers(2, 21, 7, 5), half_integers(2, 21, 7, 5, seed=1), half_integers(21, seed=2)
    truth = (residual + 3 * (x + shift[:, None, None])).relu()
    scene = Scene()
    source, left = scene.put(x, 1, 2, HALF), scene.put(residual, 3, 0, target)
    scene.steps.append(EltwiseStep("eltwise", source, left, None, shift.numpy(), True, left, 3.0))
    assert torch.equal(scene.run(tier, 2).get(left), rounded(truth, target))


@every_tier
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("c", [1, 3, 40])
@pytest.mark.parametrize("around", [(0, 0), (2, 1)], ids=["dense", "slices"])
def test_import(tier: str, source: torch.dtype, c: int, around: tuple[int, int]) -> None:
    x = torch.randint(0, 256, (3, c, 9, 37), generator=torch.Generator().manual_seed(4)).to(source)
    scale, shift = torch.arange(1.0, c + 1), torch.arange(c, 0.0, -1)
    for layout in (x, x.contiguous(memory_format=torch.channels_last)):
        scene = Scene()
        y = scene.put(layout, *around, HALF)
        scene.steps[0] = ImportStep("import", 0, y, scale.numpy(), shift.numpy())
        truth = x.float() * scale[:, None, None] + shift[:, None, None]
        assert torch.equal(scene.run(tier, 2).get(y), truth.bfloat16())


@every_tier
@every_target
def test_normalisations(tier: str, target: str) -> None:
    x = torch.randn(2, 37, 6, 5, generator=torch.Generator().manual_seed(5)).bfloat16()
    for step, truth in (
        (LrnStep("lrn", *_none(2), 5, 1e-4, 0.75, 1.0), F.local_response_norm(x.double(), 5, 1e-4, 0.75, 1.0)),
        (NormalizeStep("normalize", *_none(2), 1e-6), F.normalize(x.double(), eps=1e-6)),
    ):
        scene = Scene()
        source, y = scene.put(x, 1, 1, HALF), scene.room(2, 6, 5, 37, 2, 0, target)
        scene.steps.append(type(step)(**{**vars(step), "x": source, "y": y}))
        assert rel_l2(scene.run(tier, 2).get(y), truth) <= BF16_ROUNDING


def _none(count: int) -> tuple[None, ...]:
    return (None,) * count


@every_tier
def test_rounding_is_to_nearest_even_and_keeps_specials(tier: str) -> None:
    bits = torch.arange(0x3F800000, 0x3F840001, 0x1000, dtype=torch.int32)
    x = torch.cat([bits.view(torch.float32), torch.tensor([float("nan"), float("inf"), -float("inf"), 3.4e38, -0.0])])
    scene = Scene()
    y = scene.put(x[None, :, None, None], 0, 0, HALF)
    found = scene.run(tier).get(y)[0, :, 0, 0]
    torch.testing.assert_close(found, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["inception_v1", "inception_v3", "inception_resnet_v2"])
def test_models(name: str) -> None:
    x = engine_nets.images(name)
    fast = optimize(engine_nets.built(name), x, dtype=torch.bfloat16)
    with torch.no_grad():
        truth = engine_nets.optimised(name)(x)
    found = fast(x)
    assert found.dtype == torch.float32 and not fast.report().fallbacks
    error = rel_l2(found, truth.double())
    assert 1e-4 < error <= NET_BF16_REL_L2  # the lower bound: it did run in bfloat16
    assert torch.equal(fast(x[1:]), found[1:])
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(fast(x), found)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("tier", cpu.EMULATED)
def test_a_model_on_a_tile_unit(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.ISA_VARIABLE, tier)
    torch.manual_seed(0)
    model, x = create_model("inception_v3").eval(), torch.randn(2, 3, 75, 75)
    fast = optimize(model, x, dtype=torch.bfloat16)
    with torch.no_grad():
        found, truth = fast(x), model(x)
    assert 1e-4 < rel_l2(found, truth.double()) <= NET_BF16_REL_L2
    assert torch.equal(fast(x[1:]), found[1:])


def test_bytes_and_features() -> None:
    """Outputs that later layers read too stay float32 for the caller and bfloat16 for the layers."""
    model = create_model("inception_v1", features_only=True).eval()
    x = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    fast = optimize(model, x.float(), dtype=torch.bfloat16)
    for found, wanted in zip(fast(x.float()), optimize(model, x.float())(x.float()), strict=True):
        assert found.dtype == torch.float32 and found.shape == wanted.shape
        assert rel_l2(found, wanted.double()) <= NET_BF16_REL_L2


class Mixed(nn.Module):
    """A node in the middle that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sin(self.first(x)))


def test_what_torch_runs_sees_float32() -> None:
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(2, 3, 9, 9)
    fast: OptimizedModule = optimize(model, x, dtype=torch.bfloat16)
    assert len(fast.report().fallbacks) == 1
    with torch.no_grad():
        assert rel_l2(fast(x), model(x).double()) <= 3 * BF16_REL_L2


def test_the_torch_backend_runs_in_it_too() -> None:
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(2, 3, 9, 9)
    found = optimize(model, x, dtype=torch.bfloat16, backend="torch")(x)
    with torch.no_grad():
        assert found.dtype == torch.float32 and 1e-4 < rel_l2(found, model(x).double()) <= 5 * BF16_REL_L2
