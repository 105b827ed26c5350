"""Plans in which a convolution and the maximum behind it are one launch of the Hopper kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inception_fast.kernels.cuda import check, choices, convolve, loader, pooled, tune
from inception_fast.kernels.cuda.choices import Row, Shape
from inception_fast.kernels.cuda.loader import Library
from inception_fast.kernels.plan import ConvStep
from inception_fast.kernels.spec import ConvSpec, PoolSpec
from torch import Tensor, nn

import engine_nets
import numerics
from hopper_library import emulated, launched, stub
from inception_fast import dispatch
from inception_fast.backends.triton_gpu import spec_reasons
from inception_fast.engine import gpu_pooled, gpu_tune, gpu_walk, optimize
from inception_fast.engine.gpu_hopper import Hopper
from inception_fast.engine.gpu_plan import Packs
from inception_fast.engine.gpu_runner import GpuCompiled
from inception_fast.engine.plan import lower
from inception_fast.engine.segment import writes
from inception_fast.measure import gpu_profiler

from .maps import DEVICE
from .test_gpu_plan import big

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the stub's pointers are host memory")
# Five convolutions in a row, each of rounded weights, x and results, and twice that for sums that cancel.
DEEP = 2 * 15**0.5 * numerics.BF16_REL_L2
WON, LOST = (1e-6, 2e-6), (2e-6, 1e-6)


def conv(c: int, oc: int, kernel: int = 3, **options: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c, oc, kernel, bias=False, **options), nn.BatchNorm2d(oc, eps=1e-3), nn.ReLU())


class Stem(nn.Module):
    """Convolutions and pools as v3's stem has them; the last of them are read twice, and averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 16, stride=2), conv(16, 32, padding=1)
        self.third, self.twice, self.averaged = conv(32, 48, 1), conv(48, 16), conv(32, 16, 1)
        self.maximum, self.clipped = nn.MaxPool2d(3, 2), nn.MaxPool2d(3, 2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maximum(self.second(self.first(x)))
        x = self.clipped(self.third(x))
        y = self.twice(x)
        y = self.averaged(torch.cat((self.clipped(y), nn.functional.avg_pool2d(y, (2, 3))), 1))
        return nn.functional.avg_pool2d(y, (2, 1))


class Overwritten(nn.Module):
    """Between a convolution and its maximum another result takes the memory of what that convolution reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv(3, 16, stride=2), conv(16, 16, padding=1), conv(16, 32, padding=1)
        self.inner = conv(16, 16, 1)
        self.outer = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16, eps=1e-3))
        self.maximum, self.last = nn.MaxPool2d(3, 2), conv(16, 32, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        y = self.third(x)
        x = torch.relu(x + self.outer(self.inner(x)))
        return nn.functional.avg_pool2d(self.maximum(y) + self.last(x), 2)


# What the first two pools' convolutions are looked up by, at one image of 51 by 47.
SHAPES = {"second": (25 * 23, 32, 144, 9), "third": (12 * 11, 48, 32, 1)}


def compiled(
    library: Library, rows: Sequence[Row], n: int = 1, net: type[nn.Module] = Stem
) -> tuple[Tensor, GpuCompiled, Tensor]:
    module = engine_nets.randomised(net()).eval()
    x = numerics.random(n, 3, 51, 47)
    captured = next(iter(optimize(module, x)._session._captured.values()))
    program = lower(captured.graph, [x], spec_reasons, "bfloat16")
    with gpu_walk.disabled():
        executable = GpuCompiled(program, Packs(DEVICE), big, hopper=Hopper(library, DEVICE, always=True, rows=rows))
    return x, executable, engine_nets.eager(module, x)


def row(name: str, config: str, times: tuple[float, float] = WON, n: int = 1) -> Row:
    m, *others = SHAPES[name]
    return Row("", Shape("pooled", "half", n * m, *others), config, 1, *times)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("library", [stub, emulated], ids=["loops", "own source"])
def test_a_convolution_and_its_maximum_are_one_launch(library: object, n: int) -> None:
    kernels: Library = library()  # type: ignore[operator]
    name = {"stub": "256x64x32 pooled"}.get(library.__name__, "256x96x32 pooled")  # type: ignore[attr-defined]
    rows = [row(one, name, n=n) for one in SHAPES]
    x, apart, wanted = compiled(kernels, [], n)
    _, joined, _ = compiled(kernels, rows, n)
    y, separate = joined.run([x])[0], apart.run([x])[0]
    assert torch.equal(y, separate), "a maximum rounds nothing"
    assert numerics.rel_l2(y, wanted) <= DEEP
    made = [task for task in joined.plan.tasks if isinstance(task.step, gpu_pooled.PooledStep)]
    assert len(made) == 2 and len(joined.plan.tasks) == len(apart.plan.tasks) - 2
    assert not any(isinstance(task.step, gpu_pooled.PooledStep) for task in apart.plan.tasks)
    assert joined.plan.arena_bytes < apart.plan.arena_bytes, "what is between lies in no memory"
    for task in made:
        assert task.backend == "cuda" and len(task.steps) == 2 and " + " in task.name
        assert all(joined.plan.ran_by(step) == ("cuda", "") for step in task.steps)
        conv, pool = task.step.first.spec, task.step.second.spec
        maps = conv.n * conv.h * conv.w * conv.c + pool.n * pool.oh * pool.ow * pool.c
        work = gpu_profiler.task_work(joined.plan, task)
        assert work.bytes == 2 * (maps + conv.oc * conv.c * conv.kh * conv.kw) + 8 * conv.oc, (
            "no bytes of what is between"
        )
        assert work.flops == conv.flops() + pool.flops()


def test_launches_say_what_they_are() -> None:
    x, executable, _ = compiled(stub(), [row("second", "256x64x32 pooled")])
    launched()
    executable.run([x])
    assert [name for _, name, *_ in launched()].count("256x64x32 pooled") == 1


@pytest.mark.parametrize(
    "rows",
    [
        [row("second", "256x64x32 pooled", LOST)],
        [row("second", "256x64x64 pooled")],
        [Row("", Shape("conv", "half", *SHAPES["second"]), "256x64x32 pooled", 1, *WON)],
    ],
    ids=["measured slower", "an unknown configuration", "a row of another kernel"],
)
def test_what_did_not_win_stays_apart(rows: list[Row]) -> None:
    x, executable, wanted = compiled(stub(), rows)
    assert not any(isinstance(task.step, gpu_pooled.PooledStep) for task in executable.plan.tasks)
    assert numerics.rel_l2(executable.run([x])[0], wanted) <= DEEP


def test_what_a_convolution_reads_is_overwritten_behind_it() -> None:
    rows = [Row("", Shape("pooled", "half", *SHAPES["second"]), "256x64x32 pooled", 1, *WON)]
    x, apart, _ = compiled(stub(), [], net=Overwritten)
    _, joined, _ = compiled(stub(), rows, net=Overwritten)
    steps = joined.plan.plan.steps
    (task,) = [task for task in joined.plan.tasks if isinstance(task.step, gpu_pooled.PooledStep)]
    first, second = map(steps.index, task.steps)
    assert any(task.step.first.x in writes(step) for step in steps[first:second]), "a vacuous test: nothing overwrites"
    assert torch.equal(joined.run([x])[0], apart.run([x])[0])


def test_what_is_read_elsewhere_is_no_candidate() -> None:
    plan = compiled(stub(), [])[1].plan.plan
    found = gpu_pooled.candidates(plan, frozenset())
    assert [(one.first.spec.oc, one.second.spec.oh) for one in found] == [(32, 12), (48, 6)]
    kept = frozenset({found[0].second.x.buffer})
    assert gpu_pooled.candidates(plan, kept) == found[1:]


class Grouped(nn.Sequential):
    """As the beginning of Inception v2, whose first convolution is one launch a group."""

    def __init__(self) -> None:
        first = nn.Conv2d(3, 24, 7, 2, 3, groups=3)
        super().__init__(first, nn.ReLU(), nn.MaxPool2d(3, 2), conv(24, 16), conv(16, 32), conv(32, 8))


def test_groups_are_no_candidates() -> None:
    plan = compiled(stub(), [], net=Grouped)[1].plan.plan
    assert any(isinstance(step, ConvStep) and step.spec.groups == 3 for step in plan.steps)
    assert gpu_pooled.candidates(plan, frozenset()) == []


CONV = ConvSpec(2, 12, 11, 16, 32, 3, 3, padding=(1, 1, 1, 1), dtype="bfloat16")
POOL = PoolSpec(2, 12, 11, 32, 3, 3, (2, 2), dtype="bfloat16")


@pytest.mark.parametrize(
    ("conv", "pool", "why"),
    [
        ({}, {"kind": "avg"}, "avg of 3x3 at stride (2, 2); allowed: max of 3x3 at stride 2"),
        ({}, {"kh": 2, "kw": 2}, "max of 2x2 at stride (2, 2); allowed: max of 3x3 at stride 2"),
        ({}, {"padding": (1, 0, 0, 0)}, "padding (1, 0, 0, 0) of a maximum; allowed: behind the map alone"),
        ({}, {"h": 14}, "a maximum of 2x14x11x32 in bfloat16; allowed: the convolution's"),
        ({"dtype": "float32"}, {"dtype": "float32"}, "dtype float32; allowed: bfloat16, float16"),
        ({"groups": 2}, {}, "groups 2; allowed: 1"),
        ({"residual": True}, {}, "a group or a residual, pooled"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_what_cannot_be_one_launch_says_why(conv: dict[str, object], pool: dict[str, object], why: str) -> None:
    one, two = replace(CONV, **conv), replace(POOL, **pool)  # type: ignore[arg-type]
    assert why in pooled.spec_reasons(stub(), one, two) and pooled.able(stub(), one, two) == ()
    assert pooled.spec_reasons(stub(), CONV, POOL) == [] and len(pooled.able(stub(), CONV, POOL)) == 1


@pytest.mark.parametrize("spec", [check.POOLED, check.STAYING], ids=["of two columns", "weights that stay"])
def test_the_check_runs_every_one_and_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch, spec: ConvSpec) -> None:
    able = pooled.able(emulated(), spec, check.maximum(spec))
    assert {config.form for config in able} == {"pooled64", "pooled32"}
    assert check._wrong_pooled(emulated(), DEVICE, spec) == []
    monkeypatch.setattr(loader.Library, "launch", lambda *ignored: None)
    ways = (", one block", "")
    assert check._wrong_pooled(emulated(), DEVICE, spec) == [
        f"{config.name} in {spec.dtype}{way}" for config in able for way in ways
    ]


def test_the_check_goes_round_rings_and_barriers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every configuration: one tile a block would be right without either."""
    asked: list[int] = []
    monkeypatch.setattr(loader.Library, "prepare", lambda *given: asked.append(given[-1]))
    monkeypatch.setattr(convolve.Launch, "run", lambda launch: None)
    check._wrong_pooled(emulated(), DEVICE, check.POOLED)
    assert set(asked) == {0, 1}
    spec, every = check.POOLED, [config.rows for config in Library._configs(emulated()) if config.pooled]
    pitch, rows = spec.ow + spec.kw - 1, spec.n * (spec.oh + spec.kh - 1)
    assert all(rows > 2 * (-(-positions // pitch) + 3) for positions in every), "rows of results"
    assert rows * pitch // min(every) > 16, "POOLED_TILES_AHEAD"


def test_every_cut_is_tried() -> None:
    x = numerics.random(CONV.n, CONV.c, CONV.h, CONV.w, dtype=torch.bfloat16)
    weight = numerics.random(CONV.oc, CONV.c, 3, 3, seed=1, dtype=torch.bfloat16)
    scale, shift = torch.ones(CONV.oc), torch.zeros(CONV.oc)

    def timer(call: object) -> float:
        call()  # type: ignore[operator]
        return 1e-6

    found = tune.tried(emulated(), CONV, x, weight, scale, shift, timer, pool=POOL)
    assert {cut.config for cut in found} == set(pooled.able(emulated(), CONV, POOL)) and len(found) >= 4
    assert all(convolve.splits_of(CONV, cut.config, 1) == [1] for cut in found)


def test_the_tuner_keeps_what_won(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Beside the convolution's own time and the pool's, and a plan then takes it."""
    x, executable, wanted = compiled(stub(), [])
    pairs = gpu_tune.pools_of([executable.plan])
    assert [(conv.oc, pool.oh) for conv, pool in pairs] == [(32, 12), (48, 6)]
    times = iter((3e-6, 2e-6))  # of the launch, of the pool alone

    def seconds(call: Callable[[], object]) -> float:
        call()
        return next(times)

    file = tmp_path / "choices.json"
    monkeypatch.setattr(gpu_tune.cuda, "library", stub)
    here, there = dispatch.backend_status(), {"cuda": True}
    monkeypatch.setattr(dispatch, "backend_status", lambda: {**here, **there})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(choices, "cache_file", lambda gpu, version: file)
    monkeypatch.setattr(gpu_tune, "_seconds", seconds)
    kept = gpu_tune.raced_pooled(*pairs[0], 1.5e-6, DEVICE)
    assert kept is not None and choices.read(file) == [kept]
    assert kept[2:4] == ("256x64x32 pooled", 1) and (kept.seconds, kept.against) == pytest.approx((3e-6, 3.5e-6))
    _, joined, _ = compiled(stub(), [kept])
    assert [task.name for task in joined.plan.tasks if isinstance(task.step, gpu_pooled.PooledStep)]
    assert numerics.rel_l2(joined.run([x])[0], wanted) <= DEEP
    other = replace(pairs[0][1], padding=(1, 1, 1, 1))
    assert gpu_tune.raced_pooled(pairs[0][0], other, 1.5e-6, DEVICE) is None
    with monkeypatch.context() as distrust:  # found wrong by the very question, after the status was read
        distrust.setattr(gpu_tune.hopper_gpu, "reasons", lambda spec: ["wrong numbers"])
        assert gpu_tune.raced_pooled(*pairs[0], 1.5e-6, DEVICE) is None
    there["cuda"] = False
    assert gpu_tune.raced_pooled(*pairs[0], 1.5e-6, DEVICE) is None
