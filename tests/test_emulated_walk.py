"""The walk's own source on the emulated device: networks of dependent convolutions and pools, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from inception_fast.kernels.cuda import abi, walk
from inception_fast.kernels.spec import ConvSpec

from emulated import KERNELS, MODES, RANDOM, EmulationError, Mode, build, spoilt
from emulated_walk import SOURCES, Network, WalkDevice


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> WalkDevice:
    return WalkDevice(build(tmp_path_factory.mktemp("walk"), SOURCES))


@pytest.fixture
def device(library: WalkDevice) -> Iterator[WalkDevice]:
    with library.memory():
        library.configure(Mode())
        yield library


def block(net: Network) -> None:
    """An Inception block with a residual behind it, and a grid reduction: every kind of job, four levels deep."""
    x = net.image(1, 9, 11, 72)
    middle, joined = net.map(1, 9, 11, 40), net.map(1, 9, 11, 32 + 48 + 40 + 16)
    both = net.conv(x, [(joined.part(0, 32), True), (middle.part(), False)])
    pooled = net.map(1, 9, 11, 72)
    average = net.pool(x, pooled.part(), kind="avg")
    tall, wide = joined.part(32, 48), joined.part(80, 40)
    down = net.conv(middle.part(), [(tall, True)], both, kernel=(7, 1), padding=(3, 0), columns=64, splits=3)
    across = net.conv(middle.part(0, 24), [(wide, True)], both, kernel=(1, 3), padding=(0, 1))
    projected = net.conv(pooled.part(), [(joined.part(120, 16), True)], average, columns=64)
    level = (both, down, across, projected)
    y, reduced = net.map(1, 9, 11, 72), net.map(1, 4, 5, 136 + 24)
    again = net.conv(joined.part(), [(y.part(), True)], *level, residual=x, columns=64, scale=0.125)
    net.pool(joined.part(), reduced.part(24, 136), *level, stride=2, padding=0, relu=True, shift=True)
    net.conv(y.part(), [(reduced.part(0, 24), True)], again, kernel=(3, 3), stride=2, splits=2, scale=0.0625)


def chain(net: Network) -> None:
    """Jobs of one tile, each on a block of its own that waits for nothing but the one before."""
    x = net.image(1, 6, 6, 136)
    y, pooled, z = net.map(1, 6, 6, 16), net.map(1, 6, 6, 16), net.map(1, 1, 1, 16)
    split = net.conv(x, [(y.part(), True)], kernel=(3, 3), padding=(1, 1), splits=5)
    pool = net.pool(y.part(), pooled.part(), split)
    net.pool(pooled.part(), z.part(), pool, kernel=6, padding=0, kind="avg")


def mixed(net: Network, images: int = 1) -> None:
    """Tiles whose rows of x stay between others and pools, so that a ring is never at the same stage twice."""
    x = net.image(images, 12, 10, 136)
    a, b, c, d = (net.map(images, 12, 10, 72) for _ in range(4))
    one = net.conv(x, [(a.part(), True)], kernel=(1, 7), padding=(0, 3), halo=True, scale=0.125)
    two = net.conv(x, [(b.part(), True)], kernel=(3, 3), padding=(1, 1), columns=64, splits=3, scale=0.0625)
    pool = net.pool(a.part(), c.part(), one)
    three = net.conv(
        a.part(), [(d.part(), True)], one, kernel=(7, 1), padding=(3, 0), columns=64, halo=True, scale=0.0625
    )  # fmt: skip
    last = net.map(images, 12, 10, 40)
    net.conv(
        c.part(), [(last.part(), False)], pool, two, three, kernel=(3, 3), padding=(1, 1), halo=True,
        residual=d.part(0, 40), scale=0.03125,
    )  # fmt: skip


def two_images(net: Network) -> None:
    """The same, of images whose border lies inside a tile."""
    mixed(net, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("blocks", [1, 3, 8])
def test_a_block_is_exact(device: WalkDevice, dtype: torch.dtype, blocks: int) -> None:
    net = Network(device, dtype)
    block(net)
    net.run(blocks)
    net.check()


def test_no_timing_matters_and_counters_serve_again(library: WalkDevice) -> None:
    for mode in MODES:
        for made in (block, mixed, two_images):
            with library.memory():
                library.configure(mode)
                net = Network(library)
                made(net)
                net.run(4, times=2)
                net.check()


def test_pools_of_all_kinds(device: WalkDevice) -> None:
    """Windows over every border, strides, several units, and large windows, which lanes share."""
    net = Network(device, torch.float16)
    x = net.image(2, 13, 11, 88)
    for kind in ("max", "avg", "padded"):
        for kernel, stride, padding in ((3, 1, 1), (3, 2, 0), (2, 2, 0), (5, 3, 2), (11, 1, 0)):
            size = [(side + 2 * padding - kernel) // stride + 1 for side in (13, 11)]
            y = net.map(2, *size, 88)
            net.pool(x, y.part(), kernel=kernel, stride=stride, padding=padding, kind=kind, shift=kernel > 3, relu=True)
    net.run(3)
    net.check()


def test_nan_spreads_through_pools(device: WalkDevice) -> None:
    for kind in ("max", "avg"):
        for kernel in (3, 5):
            net = Network(device)
            x = net.image(1, 7, 7, 8)
            x.buffer.wide[0, 3, 3, 5] = torch.nan
            x.buffer.truth[0, 5, 3, 3] = torch.nan
            y = net.map(1, 7, 7, 8)
            net.pool(x, y.part(), kernel=kernel, padding=kernel // 2, kind=kind)
            net.run(1)
            net.check()
            assert y.truth.isnan().sum() == kernel**2


@pytest.mark.parametrize("columns", [32, 64])
def test_a_tile_of_every_width(device: WalkDevice, columns: int) -> None:
    """Columns that end inside a tile and beside it, pixels that fill several tiles, K that ends inside a step, in its
    first, second, third or last product.
    """
    for c in (200, 16, 72, 168, 176):
        net = Network(device, seed=columns)
        x = net.image(1, 10, 15, c)
        y, z = net.map(1, 10, 15, 200), net.map(1, 5, 8, 136)
        first = net.conv(x, [(y.part(), True)], columns=columns)
        net.conv(
            y.part(),
            [(z.part(), False)],
            first,
            kernel=(3, 3),
            stride=2,
            padding=(1, 1),
            columns=columns,
            splits=4,
        )
        net.run(2)
        net.check()


@pytest.mark.parametrize("columns", [32, 64])
def test_tiles_whose_rows_of_x_stay(device: WalkDevice, columns: int) -> None:
    """Every kind of taps that the networks have, padded and not, K that ends inside a chunk in each of its products,
    columns that end inside a tile, images whose border lies inside a tile, taps that fill several stages.
    """
    cases = [
        ((1, 7), (0, 3), 200, (2, 17, 17)), ((7, 1), (3, 0), 160, (1, 17, 17)), ((3, 3), (1, 1), 72, (1, 35, 35)),
        ((3, 3), (0, 0), 96, (2, 11, 20)), ((1, 3), (0, 1), 384, (1, 8, 8)), ((3, 1), (1, 0), 48, (3, 8, 8)),
        ((5, 5) if columns == 32 else (4, 5), (2, 2), 48, (1, 12, 12)), ((1, 1), (0, 0), 144, (2, 9, 5)),
        ((3, 3), (1, 1), 32, (4, 3, 2)), ((4, 6) if columns == 32 else (3, 4), (1, 2), 136, (1, 12, 12)),
    ]  # fmt: skip
    for kernel, padding, c, (n, h, w) in cases:
        net = Network(device, seed=c)
        x = net.image(n, h, w, c)
        y = net.map(n, h + 2 * padding[0] + 1 - kernel[0], w + 2 * padding[1] + 1 - kernel[1], 72)
        outputs = [(y.part(0, 40), True), (y.part(40, 32), False)]
        net.conv(x, outputs, kernel=kernel, padding=padding, columns=columns, halo=True, scale=0.0625)
        net.run(3)
        net.check()


@pytest.mark.parametrize("blocks", [1, 3, 8])
@pytest.mark.parametrize("images", [1, 2])
def test_both_kinds_of_tiles_follow_each_other(device: WalkDevice, images: int, blocks: int) -> None:
    net = Network(device)
    mixed(net, images)
    net.run(blocks, times=2)
    net.check()


@pytest.mark.parametrize(("columns", "tiles"), [(32, 3), (64, 2)])
def test_weights_that_the_ring_does_not_hold_are_asked_for_ahead(device: WalkDevice, columns: int, tiles: int) -> None:
    """Those of each step from the thirteenth on, once a tile; whoever does not ask gets the same."""
    for ahead, splits, asked in ((False, 1, 0), (True, 1, 27 - 12), (True, 2, 2 + 1), (True, 3, 0)):
        net = Network(device)
        x, y = net.image(1, 6, 6, 136), net.map(1, 6, 6, 72)
        net.conv(
            x,
            [(y.part(), True)],
            kernel=(3, 3),
            padding=(1, 1),
            columns=columns,
            splits=splits,
            ahead=ahead,
            scale=0.125,
        )
        net.run(2)
        net.check()
        assert device.lib.emulated_prefetches() == tiles * asked


@pytest.mark.parametrize("columns", [32, 64])
@pytest.mark.parametrize("splits", [1, 3])
def test_results_in_float32(device: WalkDevice, columns: int, splits: int) -> None:
    """Not rounded to 16 bits, with ReLU and without, columns past the last and pixels past the last left alone."""
    for relu in (True, False):
        net = Network(device)
        x, y = net.image(3, 1, 1, 200), net.map(3, 1, 1, 40, dtype=torch.float32)
        net.conv(x, [(y.part(), relu)], columns=columns, splits=splits, scale=1 / 128)
        net.run(2)
        net.check()
        assert (y.truth.bfloat16().float() != y.truth).any(), "rounding to 16 bits would not show"


def test_a_trace_tells_when_units_ran(device: WalkDevice) -> None:
    """Marks of a unit come in their order, and no unit is ready before those that it needs have ended."""
    net, blocks = Network(device), 4
    block(net)
    units = device.units(net.jobs, blocks)
    assert [unit[1] for unit in units] == sorted(unit[1] for unit in units) and {unit[1] for unit in units} == set(
        range(4)
    )
    trace = device.like(torch.zeros(len(units), 4, dtype=torch.int64))
    workspace, _ = device.workspace(net.jobs, blocks)
    device.launch(net.jobs, net.dtype, workspace, blocks, trace)
    net.check()
    begun, summed_by = dict[int, int](), dict[int, int]()
    for (job, _), (taken, ready, summed, end) in zip(units, trace.tolist(), strict=True):
        pool = net.jobs[job].kind == abi.POOL_JOB
        assert 0 < taken and 0 < ready and (summed == 0 if pool else max(taken, ready) < summed)
        if pool or net.jobs[job].conv.splits == 1:
            assert end > max(summed, ready)
        begun[job] = min(begun.get(job, ready), ready)
        summed_by[job] = max(summed_by.get(job, 0), summed, ready)
    for job, own in enumerate(net.jobs):
        assert all(begun[job] > summed_by[need] for need in own.need[: own.needs])


def test_a_missing_need_shows(library: WalkDevice) -> None:
    """What is not ordered is not waited for: some schedule reads too early."""

    def wrong(mode: Mode) -> bool:
        with library.memory():
            library.configure(mode)
            net = Network(library)
            block(net)
            net.jobs[2].needs = 0
            try:
                net.run(4)
                net.check()
            except (AssertionError, EmulationError):
                return True
            return False

    assert any(wrong(mode) for mode in MODES)


def test_what_cannot_run_is_named(device: WalkDevice) -> None:
    net = Network(device)
    x, y = net.image(1, 6, 6, 16), net.map(1, 6, 6, 16)
    net.conv(x, [(y.part(), True)])
    net.pool(x, net.map(1, 6, 6, 16).part(), 0)
    assert device.reasons(net.jobs) == []

    def seen(change: Callable[[abi.Job, abi.Job], None]) -> str:
        jobs = [abi.Job.from_buffer_copy(job) for job in net.jobs]
        change(*jobs)
        return "\n".join(device.reasons(jobs))

    def field(index: int, path: str, value: int) -> Callable[[abi.Job, abi.Job], None]:
        def change(*jobs: abi.Job) -> None:
            *parents, name = path.split(".")
            target = jobs[index]
            for parent in parents:
                target = getattr(target, parent)
            setattr(target, name, value)

        return change

    refused = {
        "job 0: columns 48; allowed: 32, 64": field(0, "columns", 48),
        "job 0: kind 2; allowed: 0 to 1": field(0, "kind", 2),
        "job 0: c 20; allowed: positive multiples of 8": field(0, "conv.c", 20),
        "job 0: splits 2; allowed: 1 to 1": field(0, "conv.splits", 2),
        "job 0: 1 outputs in float32 with a residual; allowed: one without a residual": lambda job, _: (
            setattr(job.conv, "residual", 256),
            setattr(job.conv, "residual_pitch", 16),
            setattr(job.conv.output[0], "relu", 2),
        ),
        "job 0: ahead 2; allowed: 0 to 1": field(0, "ahead", 2),
        "job 0: halo 2; allowed: 0 to 1": field(0, "halo", 2),
        "job 1: needs 17; allowed: 0 to 16": field(1, "needs", 17),
        "job 1: a needed job 1; allowed: 0 to 0": lambda _, job: job.need.__setitem__(0, 1),
        "job 1: kind of a pool 3; allowed: 0 to 2": field(1, "pool.kind", 3),
        "job 1: top of a pool 3; allowed: 0 to 2": field(1, "pool.top", 3),
        "job 1: c 12 of a pool; allowed: multiples of 8": field(1, "pool.c", 12),
        "job 1: windows of a pool beyond its map; allowed: those that hold an element of it": field(1, "pool.oh", 8),
        "job 1: pitch 20 of a pool": field(1, "pool.x_pitch", 20),
        "job 1: address 0 of y of a pool": field(1, "pool.y", 0),
    }
    for text, change in refused.items():
        assert text in seen(change)
    assert device.reasons([]) == ["jobs of a walk 0; allowed: 1 to 65536"]


def test_what_cannot_keep_its_rows_of_x_is_named(device: WalkDevice) -> None:
    def why(kernel: tuple[int, int], h: int, w: int, **given: Any) -> list[str]:
        net = Network(device)
        stride = given.get("stride", 1)
        y = net.map(1, (h - kernel[0]) // stride + 1, (w - kernel[1]) // stride + 1, 16, given.pop("dtype", None))
        x = net.image(1, h, w, given.pop("c", 64))
        net.conv(x, [(y.part(), True)], kernel=kernel, halo=True, scale=0.0625, **given)
        return device.reasons(net.jobs)

    assert why((3, 3), 20, 20) == why((3, 3), 10, 64) == why((5, 5), 20, 20) == []
    assert why((3, 3), 20, 20, stride=2) == [
        "rows of a halo tile's stride 2; allowed: 1 to 1",
        "columns of a halo tile's stride 2; allowed: 1 to 1",
    ]
    assert why((3, 3), 20, 20, splits=2) == ["parts of a halo tile's K 2; allowed: 1 to 1"]
    assert why((3, 3), 20, 20, dtype=torch.float32) == ["a halo tile of float32; allowed: 16 bits"]
    assert why((5, 5), 20, 20, columns=64) == ["stages of a halo tile's taps 7; allowed: 1 to 5"]
    # Behind a chunk's first stage of weights the one before lets go of its x: until then the ring holds both.
    several = "stages of the taps of a halo tile of several chunks"
    assert why((5, 5), 20, 20, c=72) == [f"{several} 4; allowed: 1 to 3"]
    assert why((4, 6), 20, 20, c=72) == why((3, 4), 20, 20, c=72, columns=64) == []
    assert why((3, 3), 10, 70) == ["pixels of rows that a halo tile reads 280; allowed: 1 to 256"]


MUTANTS = {
    "x is read before what it needs has ended": (
        "walk_loads.cuh",
        "if (convolution && !WEIGHTS) {",
        "if (convolution && !WEIGHTS && units < 0) {",
    ),
    "a pool does not wait": ("walk.cuh", "wait_for_needs(walk, slot.body, lane);\n      if", "if"),
    "stores are not ordered before copies": ("walk.cuh", "fence_async_global(); // own stores, before", "// before"),
    "a unit ends before all of its warps have stored": (
        "walk.cuh",
        "  sync_named(GROUP_BARRIER + warpgroup, WARPGROUP);\n  if (thread == 0)\n    counter_release",
        "  if (thread == 0)\n    counter_release",
    ),
    "every part of K ends a unit": (
        "walk.cuh",
        "thread))\n    return;",
        "thread)) {\n    end_unit(walk, slot.body, warpgroup, thread);\n    return;\n  }",
    ),
    "counters stay": ("walk.cuh", "    for (int i = 0; i <= walk.count; ++i)\n      walk.counters[i] = 0;", "    ;"),
    "a slot is given back by seven warps": (
        "walk.cuh",
        "WEIGHT_WARPS + CONSUMER_WARPS);",
        "WEIGHT_WARPS + CONSUMER_WARPS - 1);",
    ),
    "rows of x that stay are given back before the last tap": (
        "walk_products.cuh",
        "advance(place, WALK_STAGES);\n    Descriptor a = ring",
        "used_x = x;\n    advance(place, WALK_STAGES);\n    Descriptor a = ring",
    ),
    "rows of x that stay are not given back": ("walk_products.cuh", "    used_x = x;\n  }", "  }"),
    "a tap's row is forgotten": ("walk_products.cuh", "a = a + down;", ";"),
    "the tile's first position": ("walk_products.cuh", "offset * ROW", "0"),
    "the other kind of warp does not count itself in": (
        "walk_loads.cuh",
        "if (lane == 0)\n          barrier_arrive(full);",
        ";",
    ),
    "images are not told apart": ("walk_loads.cuh", "h = -top;\n            ++image;", "h = -top;"),
    "the rows of x begin at the map's and not at the padding's": (
        "walk_plan.h",
        " - problem.top, -problem.left};",
        ", -problem.left};",
    ),
    "a stage of weights is not counted": ("walk_plan.h", "(1 + ceil_div(problem.taps", "(ceil_div(problem.taps"),
    "positions without an output are stored": (
        "walk.cuh",
        "if (halo)\n      return pixel_of",
        "if (halo && r > 99)\n      return pixel_of",
    ),
    "a skipped unit leaves its stages": ("walk.cuh", "skip(place, WALK_STAGES, slot.unit.stages);", ";"),
    "the first tap of a part": ("walk_plan.h", "unit.tap_w = unit.step.tap % problem.kw;", "unit.tap_w = 0;"),
    "a part of K begins with its tile's first channels": (
        "walk_products.cuh",
        "int chunk = unit.step.chunk;",
        "int chunk = 0;",
    ),
    "columns of another width": (
        "walk_loads.cuh",
        "(unit.tile.column * slot.body.columns)",
        "(unit.tile.column * 32)",
    ),
    "lanes of a large window are not added": ("walk_pool.cuh", "other < lanes", "other < lanes - 1"),
    "the window's divisor": ("walk_schedule.h", "padded || top > 0 ? top : 0", "top"),
}  # fmt: skip


def noticed(device: WalkDevice) -> bool:
    """Whether any network goes wrong in any order of things."""
    modes = (Mode(), *(Mode(RANDOM, RANDOM, schedule=1, seed=seed) for seed in range(3)))
    for mode, made in itertools.product(modes, (chain, block, mixed, two_images)):
        with device.memory():
            device.configure(mode)
            net = Network(device)
            made(net)
            try:
                for _ in range(2):
                    net.run(8)
                    net.check()
            except (AssertionError, EmulationError):
                return True
    return False


def test_nothing_is_noticed_where_nothing_is_wrong(library: WalkDevice) -> None:
    assert not noticed(library)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file, old, new = MUTANTS[name]
    headers = {header.name: header.read_text() for header in KERNELS.glob("walk*.*h")}
    assert headers[file].count(old) == 1
    headers[file] = headers[file].replace(old, new)
    assert noticed(WalkDevice(spoilt(tmp_path_factory.mktemp("mutant"), SOURCES, headers)))


class Rules:
    """What `walk.chosen` asks a library."""

    walk_columns = (32, 64)

    def __init__(self, device: WalkDevice) -> None:
        self.device = device

    def walk_reasons(self, jobs: list[abi.Job], dtype: str) -> list[str]:
        return self.device.reasons(jobs, getattr(torch, dtype))


def test_rows_stay_where_a_map_with_taps_has_several_tiles(device: WalkDevice) -> None:
    """And where the kernel can keep them: at stride 1, of rows that fit, with K whole."""
    rules: Any = Rules(device)
    seventeen = ConvSpec(1, 17, 17, 192, 192, 1, 7, padding=(0, 0, 3, 3), dtype="bfloat16")
    stay = {
        seventeen: True,
        replace(seventeen, h=35, w=35, kh=3, kw=3, padding=(1,) * 4): True,
        replace(seventeen, h=8, w=8): False,
        replace(seventeen, kw=1, padding=(0,) * 4): False,
        replace(seventeen, stride=(2, 2)): False,
        replace(seventeen, h=73, w=73, kh=3, kw=3, padding=(0,) * 4): False,
        replace(seventeen, h=28, w=28, c=64, kh=5, kw=5, padding=(2,) * 4): True,
        replace(seventeen, h=28, w=28, c=72, kh=5, kw=5, padding=(2,) * 4): False,
        replace(seventeen, h=9, w=9, c=4096, kh=3, kw=3, padding=(1,) * 4): False,
    }
    for spec, expected in stay.items():
        found, plain = walk.chosen(rules, spec, (spec.oc,), 132), walk.cut(spec, rules.walk_columns, 132)
        assert found == plain._replace(halo=expected), spec
        assert not walk.conv_reasons(rules, spec, (spec.oc,), found)
    assert plain.splits > 1, "the last is one whose K is cut"
