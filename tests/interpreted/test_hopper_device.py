"""The Hopper kernels on a Hopper GPU: exact integers, the accuracy budget, groups, splits, overlap in a graph."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from inception_fast.kernels import cuda
from inception_fast.kernels.cuda import convolve, driver, pair, pooled
from inception_fast.kernels.cuda.convolve import Cut, Problem, Target
from inception_fast.kernels.maps import dense
from inception_fast.kernels.spec import ConvSpec, PairSpec, PoolSpec
from torch import Tensor
from torch.nn import functional as F

import numerics
from inception_fast.engine import optimize
from inception_fast.engine.gpu_hopper import Hopper
from inception_fast.measure import gpu_profiler
from inception_fast.measure.roofline import Peak

from . import test_hopper_walk_plan as walks
from .maps import DEVICE, empty, put, take
from .test_hopper_plan import DEEP, compiled


@cache
def absent() -> str:
    if DEVICE.type != "cuda":
        return "no GPU: the kernels run in an emulation elsewhere"
    return cuda.missing() or driver.refusal((torch.cuda.get_device_capability(),))


pytestmark = pytest.mark.skipif(bool(absent()), reason=absent() or "runs here")

# Tests of one form name it first: a process that a form ends is begun anew without that form's other tests.
HALO_FORMS = [f"{kind}{depth}" for kind in ("halo", "halo3x", "halo4x") for depth in (64, 32)]
WAYS = ("halves", "turns", "twos", "behind")
FORMS = [f"{kind}{depth}c{cluster}" for kind in WAYS for cluster in (1, 2) for depth in (64, 32)]
FORMS += HALO_FORMS
POOLED_FORMS = ("pooled64", "pooled32")
PAIR_FORMS = ("pair3c1", "pair4c1", "pair3c2", "pair4c2")
# What the networks have: every map, taps, stride and tail of channels; a batch whose last tile is not full.
SPECS = {
    "1x7": ConvSpec(3, 17, 17, 192, 192, 1, 7, padding=(0, 0, 3, 3)),
    "7x1": ConvSpec(3, 17, 17, 160, 192, 7, 1, padding=(3, 3, 0, 0)),
    "3x3": ConvSpec(2, 35, 35, 96, 96, 3, 3, padding=(1, 1, 1, 1)),
    "5x5": ConvSpec(2, 35, 35, 48, 64, 5, 5, padding=(2, 2, 2, 2)),
    "3x3s2": ConvSpec(2, 35, 35, 288, 384, 3, 3, (2, 2)),
    "1x1": ConvSpec(2, 17, 17, 768, 192, 1, 1),
    "stem": ConvSpec(1, 149, 149, 32, 32, 3, 3),
    "stem64": ConvSpec(1, 73, 73, 64, 80, 1, 1),
    "8x8": ConvSpec(5, 8, 8, 448, 384, 3, 3, padding=(1, 1, 1, 1)),
    "head": ConvSpec(7, 1, 1, 2048, 1000, 1, 1, relu=False),
    "same": ConvSpec(2, 147, 147, 32, 64, 3, 3, padding=(1, 1, 1, 1)),
    "inside": ConvSpec(1, 73, 73, 80, 192, 3, 3),
}
# What each form is tested on: halo tiles take no strides.
TAKEN = [(f, name) for f in FORMS for name, spec in SPECS.items() if f not in HALO_FORMS or spec.stride == (1, 1)]

# Of which four together have at least two tiles for each multiprocessor, whatever the cut.
MANY = ConvSpec(16, 17, 17, 64, 320, 1, 1, dtype="bfloat16")


# v3's two and one whose windows are clipped, of which a band of several images is one block's.
POOLED = {
    "147": (ConvSpec(2, 147, 147, 32, 64, 3, 3, padding=(1, 1, 1, 1)), (0, 0)),
    "71": (ConvSpec(3, 73, 73, 80, 192, 3, 3), (0, 0)),
    "many": (ConvSpec(600, 10, 12, 64, 200, 3, 3, padding=(1, 1, 1, 1), relu=False), (1, 1)),
}


def integers(spec: ConvSpec, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and shift whose exact result has few enough bits for both formats."""
    generator = torch.Generator().manual_seed(seed)
    k = spec.c * spec.kh * spec.kw
    x = torch.randint(-1, 2, (spec.n, spec.c, spec.h, spec.w), generator=generator).float()
    # Sparse, so that no sum leaves the integers that bfloat16 has.
    weight = torch.randint(-1, 2, (spec.oc, spec.c, spec.kh, spec.kw), generator=generator).float()
    weight *= torch.rand(weight.shape, generator=generator) < min(1.0, 100 / k)
    return x, weight, torch.randint(-3, 4, (spec.oc,), generator=generator).float()


def wanted(spec: ConvSpec, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    padding = (spec.padding[0], spec.padding[2])
    y = F.conv2d(x.to(DEVICE).double(), weight.to(DEVICE).double(), None, spec.stride, padding).cpu()
    y = y * scale.double().reshape(1, -1, 1, 1) + shift.double().reshape(1, -1, 1, 1)
    return y.relu() if spec.relu else y


class Case:
    """A convolution on maps of wider pixels, between guarded margins."""

    def __init__(self, spec: ConvSpec, x: Tensor, weight: Tensor, scale: Any, shift: Tensor) -> None:
        self.spec, self.dtype = spec, getattr(torch, spec.dtype)
        self.packed = convolve.pack(weight, scale, shift, self.dtype, DEVICE)
        self.source = put(x.to(self.dtype), 8, 16)

    def run(self, cut: Cut) -> Tensor:
        spec = self.spec
        y = empty(spec.n, spec.oc, spec.oh, spec.ow, self.dtype, 16, 8)
        problem = Problem(spec, self.source, self.packed, (Target(y, spec.relu),))
        convolve.group("test", cuda.library(), [problem], cut).run()
        return take(y)


def cuts(spec: ConvSpec, form: str) -> list[Cut]:
    """Those of one form, which differ in columns and parts of K: one and, where K has as many steps, three."""
    library = cuda.library()
    configs = [config for config in convolve.able(library, spec) if config.form == form]
    parted = [convolve.blank(spec, (spec.oc,), splits) for splits in (1, 3)]
    return [
        Cut(config, part.splits)
        for config in configs
        for part in parted
        if not library.reasons([part], spec.dtype, config)
    ]


def all_right(wrong: dict[str, str]) -> None:
    """Fails with what is wrong about each cut, the first ones in full."""
    found = {cut: said for cut, said in wrong.items() if said}
    told = [f"{cut}: {said}" for cut, said in found.items()]
    assert not told, f"{len(found)} of {len(wrong)} wrong: {', '.join(found)}\n" + "\n".join(told[:4])


def named(cut: Cut) -> str:
    return f"{cut.config.name} in {cut.splits}"


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize(("form", "name"), TAKEN)
def test_integers_are_exact_by_every_configuration(form: str, name: str, dtype: str) -> None:
    spec = replace(SPECS[name], dtype=dtype)
    x, weight, shift = integers(spec)
    expected = wanted(spec, x, weight, torch.ones(spec.oc), shift)
    case, fitting = Case(spec, x, weight, None, shift), cuts(spec, form)
    if not fitting:  # high tiles of wide maps have no room for chunks of 64 channels
        assert form in ("halo3x64", "halo4x64")
        assert any(cuts(replace(other, dtype=dtype), form) for other in SPECS.values())
        pytest.skip("no cut of this form has room for these rows")
    all_right({named(cut): numerics.differences(case.run(cut), expected) for cut in fitting})


@pytest.mark.parametrize(("form", "name"), TAKEN)
def test_random_numbers_stay_in_the_budget(form: str, name: str) -> None:
    spec = replace(SPECS[name], dtype="bfloat16")
    x = numerics.random(spec.n, spec.c, spec.h, spec.w, dtype=torch.bfloat16)
    weight = numerics.random(spec.oc, spec.c, spec.kh, spec.kw, seed=1, dtype=torch.bfloat16)
    scale, shift = numerics.random(spec.oc, seed=2, low=0.5), numerics.random(spec.oc, seed=3)
    expected = wanted(spec, x, weight, scale, shift)
    case = Case(spec, x, weight, scale, shift)
    for cut in cuts(spec, form):
        y = case.run(cut)
        numerics.assert_close_budget(y, expected)
        assert not numerics.differences(case.run(cut), y), f"{named(cut)} differs from run to run"


@pytest.mark.parametrize("form", FORMS)
def test_a_group_with_two_destinations_and_a_residual(form: str) -> None:
    spec = replace(SPECS["1x7"], dtype="bfloat16")
    x, weight, shift = integers(spec)
    expected = wanted(replace(spec, relu=False), x, weight, torch.ones(spec.oc), shift)
    packed = convolve.pack(weight, None, shift, torch.bfloat16, DEVICE)
    source, old = put(x.bfloat16()), torch.randint(-3, 4, expected.shape).float()
    wrong: dict[str, str] = {}
    for cut in cuts(spec, form):
        left, right = (empty(spec.n, 96, 17, 17, torch.bfloat16, 32, 0) for _ in range(2))
        whole = empty(spec.n, 192, 17, 17, torch.bfloat16)
        problems = [
            Problem(spec, source, packed, (Target(left, True), Target(right, False))),
            Problem(
                replace(spec, residual=True), source, packed, (Target(whole, True),), put(old.bfloat16(), 8, 16), 2.0
            ),
        ][: 1 if form.startswith("twos") else 2]  # these take no residual
        convolve.group("test", cuda.library(), problems, cut).run()
        sums = (old + 2 * expected).relu().bfloat16()
        results = (("left", left, expected[:, :96].relu()), ("right", right, expected[:, 96:]), ("whole", whole, sums))
        for place, y, what in results[: 1 + len(problems)]:
            wrong[f"{named(cut)}, {place}"] = numerics.differences(take(y), what)
    all_right(wrong)


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("behind")])
def test_residuals_come_to_where_results_are_still_stored(form: str) -> None:
    """More tiles than blocks, of a step or two each, by turns with a residual and without."""
    x, weight, shift = integers(MANY)
    expected = wanted(replace(MANY, relu=False), x, weight, torch.ones(MANY.oc), shift)
    packed = convolve.pack(weight, None, shift, torch.bfloat16, DEVICE)
    old = torch.randint(-3, 4, expected.shape).float()
    source, before = put(x.bfloat16()), put(old.bfloat16(), 8, 16)
    whole, sums = expected.relu().bfloat16(), (old + 2 * expected).relu().bfloat16()
    wrong: dict[str, str] = {}
    for cut in cuts(MANY, form):
        results = [empty(MANY.n, MANY.oc, MANY.oh, MANY.ow, torch.bfloat16, 8, 0) for _ in range(4)]
        problems = [
            Problem(replace(MANY, residual=True), source, packed, (Target(y, True),), before, 2.0)
            if index % 2
            else Problem(MANY, source, packed, (Target(y, True),))
            for index, y in enumerate(results)
        ]
        convolve.group("test", cuda.library(), problems, cut).run()
        for index, y in enumerate(results):
            wrong[f"{named(cut)}, {index}"] = numerics.differences(take(y), sums if index % 2 else whole)
    all_right(wrong)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize("name", POOLED)
@pytest.mark.parametrize("form", POOLED_FORMS)
def test_a_maximum_behind_a_convolution_is_exact(form: str, name: str, dtype: str) -> None:
    """By every configuration, twice over: integers, and the maxima of what is rounded once."""
    spec, overhang = replace(POOLED[name][0], dtype=dtype), POOLED[name][1]
    pool = PoolSpec(spec.n, spec.oh, spec.ow, spec.oc, 3, 3, (2, 2), overhang=overhang, dtype=dtype)
    x, weight, shift = integers(spec)
    kind = getattr(torch, dtype)
    expected = wanted(spec, x, weight, torch.ones(spec.oc), shift).to(kind)
    expected = F.max_pool2d(expected.float(), 3, 2, ceil_mode=overhang != (0, 0)).to(kind)
    packed, source = convolve.pack(weight, None, shift, kind, DEVICE), put(x.to(kind), 8, 16)
    able = [config for config in pooled.able(cuda.library(), spec, pool) if config.form == form]
    if not able:  # rows of results leave no room for chunks of 64 channels
        assert form == "pooled64" and name != "many"
        pytest.skip("no cut of this form has room for these rows")
    wrong: dict[str, str] = {}
    for config in able:
        for time in ("first", "second"):
            y = empty(spec.n, spec.oc, pool.oh, pool.ow, kind, 16, 8)
            problem = Problem(spec, source, packed, (Target(y, spec.relu),), pooled=(pool.oh, pool.ow))
            convolve.group("test", cuda.library(), [problem], Cut(config)).run()
            wrong[f"{config.name}, {time}"] = numerics.differences(take(y), expected)
    all_right(wrong)


@pytest.mark.parametrize("wide_first", (True, False), ids=("wide", "high"))
@pytest.mark.parametrize("sizes", ((192, 192, 192), (128, 128, 192), (192, 224, 256), (128, 160, 192)), ids=str)
@pytest.mark.parametrize("form", PAIR_FORMS)
def test_fused_pairs_are_exact(form: str, sizes: tuple[int, int, int], wide_first: bool) -> None:
    """Sums of integers are exact in float32 and rounded as the reference rounds, the intermediate as well."""
    wide = ((1, 7), (0, 0, 3, 3)), ((7, 1), (3, 3, 0, 0))
    (one, pad_one), (two, pad_two) = wide if wide_first else wide[::-1]
    first = ConvSpec(3, 17, 17, *sizes[:2], *one, padding=pad_one, dtype="bfloat16")
    second = ConvSpec(3, 17, 17, *sizes[1:], *two, padding=pad_two, dtype="bfloat16")
    spec = PairSpec(first, second)
    configs = [config for config in pair.able(cuda.library(), spec) if config.form == form]
    assert len(configs) == (form.startswith("pair4") or max(sizes) <= 192)
    (x, left, shift_left), (_, right, shift_right) = integers(first), integers(second, 1)
    middle = wanted(first, x, left, torch.ones(sizes[1]), shift_left).bfloat16()
    expected = wanted(second, middle, right, torch.ones(sizes[2]), shift_right).bfloat16()
    packed = tuple(
        convolve.pack(weight, None, shift, torch.bfloat16, DEVICE)
        for weight, shift in ((left, shift_left), (right, shift_right))
    )
    wrong: dict[str, str] = {}
    for config in configs:
        source, y = put(x.bfloat16(), 8, 16), empty(3, sizes[2], 17, 17, torch.bfloat16, 16, 8)
        pair.launch("test", cuda.library(), spec, source, (packed[0], packed[1]), y, config).run()
        wrong[config.name] = numerics.differences(take(y), expected)
    all_right(wrong)


@pytest.mark.parametrize("overlap", (False, True), ids=("alone", "overlap"))
@pytest.mark.parametrize("form", FORMS)
def test_a_chain_in_a_graph_replays(form: str, overlap: bool) -> None:
    """Each of 24 convolutions reads what the one ahead wrote; one that starts too early gives another number."""
    spec = replace(SPECS["1x7"], n=1, dtype="bfloat16", relu=False)
    eye = torch.zeros(192, 192, 1, 7)
    eye[range(192), range(192), 0, 3] = 1
    packed = convolve.pack(eye, None, torch.ones(192), torch.bfloat16, DEVICE)
    kernels = cuda.library()
    for cut in cuts(spec, form):
        maps = [dense(torch.zeros(1, 17, 17, 192, dtype=torch.bfloat16, device=DEVICE)) for _ in range(2)]
        launches = [
            convolve.group(
                "test", kernels, [Problem(spec, maps[i % 2], packed, (Target(maps[1 - i % 2], False),))], cut,
                overlap=overlap and i > 0,
            )
            for i in range(24)
        ]  # fmt: skip
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for launch in launches:
                launch.run()
        for replay in range(1, 4):
            graph.replay()
            torch.cuda.synchronize()
            assert bool((maps[0].data == 24 * replay).all()), f"{named(cut)}, replay {replay}"


@pytest.mark.parametrize("n", (1, 3))
def test_a_network_in_one_graph_beside_triton(n: int) -> None:
    x, executable, expected = compiled(n, Hopper(cuda.library(), DEVICE, always=True))
    there = x.to(DEVICE)
    first, second = executable.run([there])[0], executable.run([there])[0]
    assert torch.equal(first, second)
    assert numerics.rel_l2(first.cpu(), expected) <= DEEP
    assert {task.hopper is None for task in executable.plan.tasks} == {True, False}


@pytest.mark.parametrize("form", ("walk",))
def test_a_network_as_a_walk(form: str) -> None:
    """Captured once and replayed: what a launch leaves in the counters is what the next one begins with."""
    if not cuda.library().walk_columns:
        pytest.skip("the library was built without the walk")
    x, executable, expected = walks.compiled(walks.made(), 1, Hopper(cuda.library(), DEVICE, always=True))
    assert walks.walks(executable.plan)
    first, *others = (executable.run([x.to(DEVICE)])[0] for _ in range(4))
    assert all(torch.equal(first, other) for other in others)
    assert numerics.rel_l2(first.cpu(), expected) <= walks.DEEP


@pytest.mark.parametrize("form", ("walk",))
def test_a_profile_has_the_steps_of_a_walk(form: str) -> None:
    """By the device's own marks: every step has a share, and together they are the walk's time and work."""
    if not cuda.library().walk_traces:
        pytest.skip("the library was built without a walk's traces")
    x = numerics.random(1, 3, 39, 35).to(DEVICE)
    fast = optimize(walks.made(), x, dtype=torch.float16, backend="cuda")
    before = fast(x)
    found = gpu_profiler.profile(fast, x, Peak(1e15, 4e12, "nothing", "float16", 0), rounds=3)
    (walk,) = found.walks
    *steps, waiting, launch = (row for row in found.layers if row.walk)
    assert not any(row.note for row in found.layers)
    assert all(0 < row.ms < walk.ms for row in (*steps, waiting)) and launch.ms >= 0
    assert sum(row.ms for row in (*steps, waiting, launch)) == pytest.approx(walk.ms)
    assert sum(row.flops for row in steps) == walk.flops
    assert all(0 <= row.begin_ms < row.end_ms <= walk.ms * 1.0001 for row in steps)  # type: ignore[operator]
    assert torch.equal(fast(x), before)
