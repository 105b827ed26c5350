"""Convolutions with the maximum behind them, in one launch, on the emulated device."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from emulated import EARLY, LATE, RANDOM, EmulationError, Mode, build, spoilt, starved, with_mistake
from emulated_conv import SOURCES, ConvDevice, Shape, assert_exact, assert_no_timing_matters, case, run

RELU, PLAIN = True, False


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ConvDevice:
    return ConvDevice(build(tmp_path_factory.mktemp("pooled"), SOURCES))


@pytest.fixture
def device(library: ConvDevice) -> Iterator[ConvDevice]:
    with library.memory():
        library.configure(Mode())
        yield library


CUTS = ((64, 64), (64, 32), (96, 64), (96, 32), (192, 32, 128), (64, 64, 512), (64, 32, 512))  # columns, depth, rows


def cut(device: ConvDevice, columns: int, depth: int, rows: int = 256) -> int:
    return device.config(columns, 2, depth, rows=rows, pooled=1)


# Bands that begin and end inside an image, windows that are clipped in rows, in columns and in neither, rows that no
# window reads, one line an image, one window, several columns of tiles, K in chunks, weights that stay and that do not,
# rows shorter and longer than a tile, paddings, kernels without and with a row of padding between images.
GEOMETRIES = {
    "inside": Shape(3, 25, 22, 32, ((24, RELU),), (3, 3), pooled=(11, 9)),
    "clipped": Shape(3, 20, 18, 32, ((24, RELU),), (3, 3), padding=(1, 1, 1, 1), pooled=(10, 9)),
    "rows left over": Shape(2, 20, 17, 40, ((64, RELU),), (3, 3), padding=(1, 1, 1, 1), pooled=(9, 8)),
    "1x1": Shape(4, 9, 9, 72, ((96, PLAIN),), pooled=(4, 4)),
    "1x7": Shape(2, 9, 33, 24, ((56, RELU),), (1, 7), padding=(0, 0, 3, 3), pooled=(5, 17)),
    "7x1": Shape(3, 17, 9, 16, ((40, RELU),), (7, 1), padding=(3, 3, 0, 0), pooled=(8, 4)),
    "5x5": Shape(1, 33, 33, 48, ((200, RELU),), (5, 5), padding=(2, 2, 2, 2), pooled=(16, 16)),
    "one line": Shape(5, 3, 40, 8, ((104, RELU),), (3, 3), padding=(1, 1, 1, 1), pooled=(1, 20)),
    "one window": Shape(6, 5, 5, 136, ((16, PLAIN),), (3, 3), pooled=(1, 1)),
    "one pixel": Shape(2, 1, 1, 16, ((8, PLAIN),), pooled=(1, 1)),
    "few of the windows": Shape(3, 24, 24, 16, ((48, RELU),), (3, 3), padding=(1, 1, 1, 1), pooled=(2, 3)),
    "tall": Shape(1, 420, 11, 16, ((24, RELU),), pooled=(210, 5)),
    "long rows": Shape(1, 7, 149, 32, ((64, RELU),), (3, 3), padding=(1, 1, 1, 1), pooled=(3, 74)),
}


@pytest.mark.parametrize(
    ("name", "blocks"), [*((name, 3) for name in GEOMETRIES), *(("inside", blocks) for blocks in (1, 200))]
)
def test_every_band_is_exact_by_every_cut(device: ConvDevice, name: str, blocks: int) -> None:
    shape, fitting = GEOMETRIES[name], 0
    for one in CUTS:
        config = cut(device, *one)
        conv = case(device, shape, torch.bfloat16).conv
        if not device.reasons([conv], config):
            fitting += 1
            assert_exact(device, [shape], config, torch.bfloat16, blocks)
    assert fitting >= (1 if name == "long rows" else 4)


WIDE = replace(GEOMETRIES["clipped"], outputs=((128, RELU), (72, PLAIN), (8, RELU)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_columns_are_scattered(device: ConvDevice, dtype: torch.dtype) -> None:
    conv = case(device, WIDE, dtype).conv
    fitting = [config for config in (cut(device, *one) for one in CUTS) if not device.reasons([conv], config, dtype)]
    assert len(fitting) == len(CUTS) - 1, "512 positions and chunks of 64 channels leave no room for weights"
    for config in fitting:
        assert_exact(device, [WIDE], config, dtype, 8)


@pytest.mark.parametrize("name", ["inside", "one line", "few of the windows"])
@pytest.mark.parametrize(("columns", "rows"), [(64, 256), (64, 512), (96, 256), (192, 128)])
def test_no_timing_changes_a_bit(library: ConvDevice, name: str, columns: int, rows: int) -> None:
    assert_no_timing_matters(library, [GEOMETRIES[name]], cut(library, columns, 32, rows))


# A warp that loads, one that pools, a lane of it, one of either half of those that multiply.
LATE_ONES = [*(starved(warp=warp) for warp in (1, 2, 4, 8)), starved(thread=95)]


@pytest.mark.parametrize("mode", LATE_ONES, ids=lambda mode: f"schedule {mode.schedule}")
@pytest.mark.parametrize("columns", [64, 96])
def test_whoever_is_late_is_waited_for(library: ConvDevice, columns: int, mode: Mode) -> None:
    with library.memory():
        library.configure(mode)
        for name in ("inside", "7x1", "few of the windows", "tall"):
            assert_exact(library, [GEOMETRIES[name]], cut(library, columns, 32), torch.bfloat16, 1)


@pytest.mark.parametrize("sign", [1, -1])
def test_nan_of_one_result_is_that_of_its_windows(device: ConvDevice, sign: int) -> None:
    shape = Shape(1, 9, 9, 16, ((32, PLAIN),), pooled=(4, 4))
    made = case(device, shape, torch.bfloat16)
    x = torch.frombuffer(
        (ctypes.c_uint8 * (2 * 81 * made.conv.x_pitch)).from_address(made.conv.x - 16),
        dtype=torch.bfloat16,
    ).view(9, 9, -1)
    x[4, 3, 8:] = sign * torch.nan
    (y,) = run(device, [made], cut(device, 64, 64), torch.bfloat16)
    seen = y[0].isnan().any(-1)
    wanted = torch.zeros(4, 4, dtype=torch.bool)
    wanted[1:3, 1] = True  # rows 2..4 and 4..6, columns 2..4
    assert torch.equal(seen, wanted)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pooled_h": 0}, "pooled rows 0; allowed: 1 to 12"),
        ({"pooled_w": 11}, "pooled columns 11; allowed: 1 to 10"),
        ({"stride_w": 2}, "strides 1 and 2 of halo tiles; allowed: 1"),
        ({"residual": 4096, "residual_pitch": 64}, "a residual of a convolution that is pooled; allowed: none"),
        ({"w": 200, "ow": 200}, "bytes of rows of a halo tile; allowed: as many as leave room"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_is_refused_is_named(device: ConvDevice, change: dict[str, int], reason: str) -> None:
    conv, config = case(device, GEOMETRIES["inside"], torch.bfloat16).conv, cut(device, 96, 32)
    assert device.reasons([conv], config) == []
    for name, value in change.items():
        setattr(conv, name, value)
    assert any(reason in line for line in device.reasons([conv], config)), device.reasons([conv], config)


def test_a_launch_has_one_and_others_do_not_pool(device: ConvDevice) -> None:
    conv = case(device, GEOMETRIES["inside"], torch.bfloat16).conv
    assert "convolutions of a launch that is pooled 2; allowed: 1 to 1" in "".join(
        device.reasons([conv, conv], cut(device, 96, 32))
    )
    for config in (device.config(48, 2), device.config(64), device.config(64, 1), device.config(96, behind=1)):
        assert "pooled rows of tiles that are not pooled 11; allowed: 0 to 0" in device.reasons([conv], config)


# (what the source says, what a mistake would make of it): each is caught by a deadlock, a fault or a wrong number.
MUTANTS = {
    "the second row forgotten": ("pooled.cuh", r"placed\(lesser\(1, bottom - top\)\)", "placed(0)"),
    "the last row forgotten": ("pooled.cuh", r"placed\(bottom - top\)\}", "placed(0)}"),
    "the ring's end within a line": ("pooled.cuh", r"\(place \+ behind < ring \? 0 : ring\)", "0"),
    "a line's place in the ring": ("pooled.cuh", r"place \+= line\.row - band\.line\.row - top;", "place += 2;"),
    "a window beyond the run": ("pooled.cuh", r"w \+ i < last,", "true,"),
    "two windows of the same columns": ("pooled.cuh", r"lesser\(w \+ i / 2, last - 1\)", "w"),
    "a line does not wait for its last row": ("pooled.cuh", r"\(bottom \* pitch \+", "(top * pitch +"),
    "a line waits for one tile": ("pooled.cuh", r"made <= end\)", "made < end)"),
    "tiles are allowed a row early": ("pooled_schedule.h", r"free \+ ring \*", "free + (ring + 1) *"),
    "rows that no window reads are free at once": ("pooled_schedule.h", r", made \* positions\);", ", 1 << 30);"),
    "tiles do not wait": ("pooled.cuh", r"barrier_wait\(&shared\.free[^;]*;", ""),
    "a warpgroup is not waited for": ("pooled.cuh", r"shared\.made\[i\], 4 \* WARPGROUPS", "shared.made[i], 4"),
    "a pooling warp is not waited for": ("pooled.cuh", r"shared\.free\[i\], POOLING_WARPS", "shared.free[i], 1"),
    "lanes are not waited for": ("pooled.cuh", r"sync_warp\(\); // all lanes have read", ""),
    "a ring too small": ("pooled_schedule.h", r"problem\.pitch\) \+ WINDOW;", "problem.pitch) + WINDOW - 1;"),
    "the ring's end": ("pooled.cuh", r"at < ring \? at : at - ring", "at"),
    "a tile's place in the ring": ("pooled.cuh", r"position -= position >= ring \? ring : 0;", "position %= ring - 1;"),
    "a tile's place in its row": ("pooled.cuh", r"% problem\.pitch;", "% problem.ow;"),
    "the next image's line": ("pooled_schedule.h", r"line\.image \+ 1, 0\)", "line.image, line.h + 1)"),
    "a band's lines": ("pooled_schedule.h", r"each \+ \(at < more\)", "each"),
    "a band's first line": ("pooled_schedule.h", r"at \* each \+ lesser\(at, more\)", "at * each"),
    "a tile too few": ("pooled_schedule.h", r"ceil_div\(count, positions\)", "count / positions"),
    "rows beyond the map": ("pooled_schedule.h", r"lesser\(row \+ WINDOW - 1, problem\.oh - 1\)", "(row + WINDOW - 1)"),
    "columns beyond the map": ("pooled_schedule.h", r"lesser\(WINDOW_STEP \* w \+ ahead, problem\.ow - 1\)",
                               "(WINDOW_STEP * w + ahead)"),
    "the column of tiles": ("pooled.cuh", r"problem, band\.column \* N, place", "problem, 0, place"),
    "the column's scale": ("pooled.cuh", r"load_columns<N>\(problem, band\.column \* N", "load_columns<N>(problem, 0"),
    "the pooled pixel": ("pooled.cuh", r"line\.image \* problem\.pooled_h \+", "line.image * problem.oh +"),
    "a run's end": ("pooled.cuh", r"\(run \+ 1\) \* problem\.pooled_w / ALL", "run * problem.pooled_w / ALL + 1"),
    "y is written before the earlier grid ends": ("pooled.cuh", r"grid_wait\(\); // before y is written", ""),
    "x is loaded before the earlier grid ends": ("pooled.cuh", r"grid_wait\(\); // before x is read", ""),
    "rows of x from the tile before": ("pooled.cuh", r"tile \* positions, positions\)",
                                       "(tile ? tile - 1 : 0) * positions, positions)"),
    "a window reuses the wrong column": ("pooled.cuh", r"left = right;", "left = middle;"),
    "barriers are too few": ("conv_sizes.h", r"POOLED_TILES_AHEAD = 16;", "POOLED_TILES_AHEAD = 1;"),
    "a phase is not told from the next": ("pooled.cuh", r"tile / POOLED_TILES_AHEAD & 1", "0"),
}  # fmt: skip


BESIDE = (
    "pooled.cuh", "pooled_schedule.h", "conv_plan.h", "halo.cuh", "halo_schedule.h", "conv_sizes.h", "conv_ring.cuh",
    "epilogue.cuh", "conv.cuh", "behind.cuh",
)  # fmt: skip


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory, library: ConvDevice) -> Iterator[dict[str, Future[Path]]]:
    """The library with each mistake, two compiled at a time."""

    def made(name: str) -> Path:
        headers = with_mistake(*MUTANTS[name], BESIDE)
        return spoilt(tmp_path_factory.mktemp("mutant"), SOURCES, headers, "-DONLY_POOLED")

    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(made, name) for name in MUTANTS}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_in_the_kernel_is_noticed(mutants: dict[str, Future[Path]], name: str) -> None:
    device = ConvDevice(mutants[name].result())
    noticed = 0
    for mode in (Mode(LATE, LATE, schedule=1, seed=3), *LATE_ONES, Mode(RANDOM, EARLY, schedule=1, seed=1)):
        with device.memory():
            device.configure(mode)
            try:
                for columns, depth, blocks in ((64, 32, 1), (96, 32, 4)):
                    for one in ("inside", "clipped", "few of the windows", "one line"):
                        assert_exact(device, [GEOMETRIES[one]], cut(device, columns, depth), torch.bfloat16, blocks)
                assert_exact(device, [WIDE], cut(device, 64, 64), torch.bfloat16, 7)
                assert_exact(device, [GEOMETRIES["long rows"]], cut(device, 64, 32), torch.bfloat16, 1)
                assert_exact(device, [GEOMETRIES["tall"]], cut(device, 96, 64), torch.bfloat16, 1)
            except (AssertionError, EmulationError):
                noticed += 1
                break
    assert noticed, "the tests would not notice this"
