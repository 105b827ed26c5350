"""The Hopper convolution's own source on the emulated device, against the float64 reference.

Small integers give exact float32 sums, so results equal the reference rounded once, bit for bit. Every tensor lies
flush with a forbidden page among channels of NaN: what is read beside x or written beside y shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from emulated import KERNELS, LATE, RANDOM, EmulationError, Mode, build, spoilt, starved
from emulated_conv import SOURCES, ConvDevice, Shape, assert_exact, assert_no_timing_matters, case, run

RELU, PLAIN = True, False


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ConvDevice:
    return ConvDevice(build(tmp_path_factory.mktemp("conv"), SOURCES))


@pytest.fixture
def device(library: ConvDevice) -> Iterator[ConvDevice]:
    with library.memory():
        library.configure(Mode())
        yield library


# Each line is a way to walk the map: rows that end inside a tile, tiles that span images, windows over every border,
# paddings that differ by side, strides, K that ends inside a chunk of channels (40 = 2 1/2 steps), one pixel alone.
GEOMETRIES = {
    "1x1": Shape(3, 5, 7, 40, ((48, RELU),)),
    "1x7": Shape(2, 9, 9, 24, ((56, RELU),), (1, 7), padding=(0, 0, 3, 3)),
    "7x1": Shape(2, 9, 9, 72, ((40, RELU),), (7, 1), padding=(3, 3, 0, 0)),
    "3x3": Shape(2, 7, 8, 64, ((48, RELU),), (3, 3), padding=(1, 1, 1, 1)),
    "3x3 inside": Shape(3, 8, 7, 32, ((24, RELU),), (3, 3)),
    "3x3 strided": Shape(3, 9, 11, 16, ((48, RELU),), (3, 3), stride=(2, 2)),
    "3x3 strided, padded behind": Shape(2, 8, 8, 48, ((48, RELU),), (3, 3), stride=(2, 2), padding=(0, 1, 0, 1)),
    "5x5": Shape(1, 6, 6, 48, ((64, RELU),), (5, 5), padding=(2, 2, 2, 2)),
    "7x7 strided": Shape(1, 14, 14, 8, ((48, RELU),), (7, 7), stride=(2, 2), padding=(2, 3, 2, 3)),
    "rows and columns strided apart": Shape(2, 9, 10, 16, ((32, RELU),), (3, 2), stride=(3, 1), padding=(2, 0, 1, 1)),
    "one pixel": Shape(1, 1, 1, 136, ((104, PLAIN),)),
    "images of one tile and a pixel": Shape(3, 5, 13, 16, ((16, PLAIN),)),
}
# (columns, turns, depth, cluster): tiles narrower and wider than a warp stores at a time, and whole multiples.
CUTS = ((48, 0, 64, 1), (48, 1, 64, 1), (80, 0, 32, 1), (32, 1, 32, 2), (80, 0, 64, 2), (192, 1, 64, 2))
TWOS = tuple((96, 1, depth, cluster, 128) for depth in (64, 32) for cluster in (1, 2))  # of 128 pixels in turn
BEHIND = ((96, 0, 64, 1, 128, 1), (96, 0, 32, 2, 128, 1), (192, 0, 64, 2, 128, 1))  # stored by warps of their own


@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_walk_is_exact_by_every_cut(device: ConvDevice, name: str) -> None:
    for cut in (*CUTS, *TWOS, *BEHIND):
        assert_exact(device, [GEOMETRIES[name]], device.config(*cut), torch.bfloat16)


WIDE = Shape(2, 9, 9, 72, ((128, RELU), (72, PLAIN), (200, RELU)), (3, 3), padding=(1, 1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("turns", [0, 1])
def test_columns_are_scattered_and_residuals_added(device: ConvDevice, dtype: torch.dtype, turns: int) -> None:
    """Ranges that begin and end inside a tile, with ReLU and without, one rounding behind the residual."""
    shape = replace(WIDE, residual_scale=0.5)
    assert_exact(device, [shape], device.config(192, turns), dtype)
    assert_exact(device, [shape], device.config(48, turns, 64, 2), dtype)


@pytest.mark.parametrize("turns", [0, 1])
@pytest.mark.parametrize(("columns", "pieces"), [(48, 3), (80, 5), (192, 12)])
def test_a_residual_is_asked_for_before_the_products(device: ConvDevice, columns: int, pieces: int, turns: int) -> None:
    """Every 16 columns of every pixel once, none beside them, which the guarded memory would show."""
    shape = Shape(3, 5, 7, 40, ((104, RELU),))
    assert_exact(device, [shape], device.config(columns, turns), torch.bfloat16)
    assert device.lib.emulated_prefetches() == 0
    assert_exact(device, [replace(shape, residual_scale=0.5)], device.config(columns, turns), torch.bfloat16)
    whole, rest = divmod(104, columns)
    assert device.lib.emulated_prefetches() == 105 * (whole * pieces + -(-rest // 16))


@pytest.mark.parametrize("splits", [2, 5, 18])
@pytest.mark.parametrize("cut", [(48, 0, 64, 1), (48, 1, 64, 2), (192, 0, 64, 1)], ids=str)
def test_parts_of_k_are_added(device: ConvDevice, splits: int, cut: tuple[int, int, int, int]) -> None:
    """18 iterations: even parts, uneven ones, and one iteration each."""
    shape = Shape(1, 9, 9, 72, ((96, RELU), (24, PLAIN)), (3, 3), padding=(1, 1, 1, 1), splits=splits)
    assert_exact(device, [replace(shape, residual_scale=2.0)], device.config(*cut), torch.bfloat16)


GROUP = [
    Shape(2, 7, 7, 40, ((48, RELU),)),
    Shape(2, 9, 9, 24, ((104, RELU), (8, PLAIN)), (1, 7), padding=(0, 0, 3, 3), splits=3),
    Shape(1, 12, 12, 64, ((80, PLAIN),), (3, 3), stride=(2, 2), residual_scale=0.25),
    Shape(5, 3, 3, 8, ((16, RELU),), (3, 3), padding=(1, 1, 1, 1), splits=9),
]


@pytest.mark.parametrize("blocks", [1, 2, 7, 200], ids="{} blocks".format)
@pytest.mark.parametrize("cut", [(48, 0, 64, 1), (48, 1, 32, 2)], ids=str)
def test_a_group_is_one_launch(device: ConvDevice, cut: tuple[int, int, int, int], blocks: int) -> None:
    """Tiles of four convolutions, shared out among fewer blocks than tiles, and more."""
    assert_exact(device, GROUP, device.config(*cut), torch.bfloat16, blocks)


PLAIN_GROUP = [*GROUP[:2], replace(WIDE, splits=5), replace(GROUP[2], residual_scale=None), GROUP[3]]


@pytest.mark.parametrize("blocks", [1, 2, 7, 200], ids="{} blocks".format)
@pytest.mark.parametrize("cut", TWOS, ids=str)
def test_two_and_two_take_tiles_in_turn(library: ConvDevice, cut: tuple[int, ...], blocks: int) -> None:
    """Each with 64 of a tile's 128 rows; columns that are scattered, K in parts, whatever comes early or late."""
    config = library.config(*cut)
    with library.memory():
        library.configure(Mode())
        assert_exact(library, PLAIN_GROUP, config, torch.float16, blocks)
        conv = case(library, replace(GROUP[0], residual_scale=1.0), torch.float16).conv
        assert library.reasons([conv], config) == ["a residual of tiles of 128 pixels in turn; allowed: none"]
    if blocks == 2:
        assert_no_timing_matters(library, PLAIN_GROUP, config)


QUICK = Shape(8, 9, 9, 16, ((96, RELU),), residual_scale=0.5)  # many tiles of a product each, which wait for stores
STILL = replace(QUICK, residual_scale=None)
UNSPLIT = [*(replace(shape, splits=1) for shape in GROUP), WIDE, replace(WIDE, residual_scale=0.5), QUICK, STILL]


@pytest.mark.parametrize("blocks", [1, 2, 7, 200], ids="{} blocks".format)
@pytest.mark.parametrize("cut", BEHIND, ids=str)
def test_other_warps_store_behind_the_products(library: ConvDevice, cut: tuple[int, ...], blocks: int) -> None:
    """Columns that are scattered, residuals that come to where results will be, tiles past the last of a cluster."""
    config = library.config(*cut)
    for dtype in (torch.bfloat16, torch.float16):
        with library.memory():
            library.configure(Mode())
            assert_exact(library, UNSPLIT, config, dtype, blocks)
    if blocks == 2:
        assert_no_timing_matters(library, UNSPLIT, config)
        for warp in (2, 3):  # who stores is late for one half, then for the other
            with library.memory():
                library.configure(starved(warp=warp))
                assert_exact(library, UNSPLIT[-2:], config, torch.bfloat16, blocks)
    with library.memory():
        conv = case(library, replace(WIDE, splits=2), torch.bfloat16).conv
        assert library.reasons([conv], config) == ["splits of tiles that are stored behind 2; allowed: 1 to 1"]


@pytest.mark.parametrize("cut", [(48, 0, 64, 1), (48, 1, 64, 1), (48, 0, 64, 2), (48, 1, 64, 2)], ids=str)
def test_no_timing_changes_a_bit(library: ConvDevice, cut: tuple[int, int, int, int]) -> None:
    assert_no_timing_matters(library, GROUP, library.config(*cut))


def test_weights_do_not_wait_for_the_earlier_grid(device: ConvDevice) -> None:
    """With programmatic launches they fill the ring meanwhile; that x and y do wait is checked at every access."""
    assert_exact(device, [GEOMETRIES["3x3"]], device.config(48), torch.bfloat16)
    assert device.lib.emulated_early_loads() == 9, "one tile of 128 pixels, one chunk, nine taps"


def test_whole_k_gives_the_same_bits_by_every_cut(device: ConvDevice) -> None:
    """What batch invariance stands on: neither the tile nor the images beside it change the order of a sum."""
    results = []
    for cut in CUTS:
        one = case(device, GEOMETRIES["3x3"], torch.bfloat16, integers=False)
        results.append(run(device, [one], device.config(*cut), torch.bfloat16)[0].clone())
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"c": 12}, "c 12; allowed: positive multiples of 8"),
        ({"oc": 44}, "oc 44"),
        ({"stride_h": 9}, "stride_h 9; allowed: 1 to 8"),
        ({"left": 129}, "left 129; allowed: 0 to 128"),
        ({"x_pitch": 32}, "pitch of x 32; allowed: at least its 40 channels"),
        ({"x_pitch": 2**31}, "pitch of x 2147483648; allowed: less than 2^31"),
        ({"scale": 0}, "address 0 of scale"),
        ({"splits": 2}, "splits 2; allowed: 1 to 1"),
        ({"ow": 400}, "last column of windows, from the map's end, 393; allowed: -128 to 127"),
        ({"n": 2**27}, "pixels of y 4697620480"),
        ({"outputs": 9}, "outputs 9; allowed: 1 to 8"),
        ({"n": 0}, "n 0; allowed: 1 to"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused_is_named(device: ConvDevice, change: dict[str, int], reason: str) -> None:
    conv = case(device, GEOMETRIES["1x1"], torch.bfloat16).conv
    config = device.config(48)
    assert device.reasons([conv], config) == []
    for name, value in change.items():
        setattr(conv, name, value)
    assert any(reason in line for line in device.reasons([conv], config)), device.reasons([conv], config)
    workspace = torch.empty(0, dtype=torch.uint8)
    with pytest.raises(EmulationError, match="allowed"):
        device.launch([conv], torch.bfloat16, config, workspace)


# (what the source says, what a mistake would make of it): each is caught by a deadlock, a fault or a wrong number.
MUTANTS = {
    "a tap's column forgotten": (r"static_cast<uint16_t>\(tap_w\)", "0"),
    "a tap's row forgotten": (r"\+\+tap_h;", ""),
    "a stage released before its products end": (r"wgmma_wait<1>\(\);", ""),
    "the second turn starts at the first's stage": (r"skip\(place, group\.stages, [^;]*;", ""),
    "one warp does not release": (r"if \(lane == 0\)\n", "if (lane == 0 && threadIdx.x >= 160)\n"),
    "rows past the last are stored": (r"pixel < problem\.pixels \? pixel : -1", "pixel"),
    "columns are kept while a warp still stores": (r"if \(WAY == HALVES\)[^\n]*\n\s*sync_named[^;]*;", ""),
    "columns are read before they are kept": (r"(keep_columns[^;]*;)\s*sync_named[^;]*;", r"\1"),
    "columns go to the first output alone": (r"output = output_of\(problem, eight\)", "output = 0"),
    "ReLU by the first output's word": (r"problem\.output\[output\]\.relu", "problem.output[0].relu"),
    "columns past the last are stored": (r"8 \* thread < N && eight < problem\.oc", "8 * thread < N"),
    "a residual of another tile's columns": (r"own = column \+ FIRST \+ 8", "own = FIRST + 8"),
    "no part of K comes last": (r"counter_add\(counter\) \+ 1 ==", "counter_add(counter) =="),
    "sums of the tile before are kept": (r"i > tile\.first\)", "true)"),
    "x is loaded before the earlier grid ends": (r"grid_wait\(\); // before x is read", ""),
    "y is written before the earlier grid ends": (r"grid_wait\(\); // before a residual is read", "//"),
    "a stage counts for full once one operand is there": (r"(barrier_init\(&shared\.full\[i\]), 2\)", r"\1, 1)"),
}


# Of tiles that two and two take in turn.
TWOS_MUTANTS = {
    "both multiply the first 64 rows": (r"warpgroup % sharers\(WAY\) \* 64 \* ROW", "0"),
    "both store the first 64 rows": (r"warpgroup % sharers\(WAY\) \* 64 \+ warp", "warp"),
    "each takes a turn of its own": (r"mine = warpgroup / sharers\(WAY\)", "mine = warpgroup % sharers(WAY)"),
    "the turn comes when one of the two is done": (r"consumers\(WAY\) \* WARPGROUP", "3 * WARPGROUP"),
    "a stage is free when one of the two is done": (r"4 \* sharers\(WAY\) \* group", "4 * group"),
    "one flag for both parts of K": (r"shared\.last\[warpgroup\]", "shared.last[0]"),
    "both add to the first part's sums": (r"const int part = warpgroup % sharers\(WAY\)", "const int part = 0"),
}


# Of tiles that other warps store.
BEHIND_MUTANTS = {
    "results are stored before they are made": (r"barrier_wait\(made, parity\);", ""),
    "results overwrite what is still stored": (r"barrier_wait\(&shared\.ready\[warpgroup\], parity\);", ""),
    "results of one warp count for all": (r"(barrier_init\(&shared\.made\[i\]), 4\)", r"\1, 1)"),
    "a phase is taken for the one before": (r", parity \^= 1\)", ")"),
    "both store the first 64 rows": (r"\+ 64 \* warpgroup;", ";"),
    "a residual is copied over results without a fence": (r"fence_async_shared\(\); // results lay[^\n]*", ""),
    "a residual of the first columns": (r"tile\.column \* N \+ part \* STAGED_COLUMNS", "part * STAGED_COLUMNS"),
    "a residual of the first part": (r"staged \+ part \* PART", "staged"),
    "parts lie on each other": (r"staged \+ 4 \* STAGED_BYTES, lane", "staged, lane"),
    "all columns go where the first part's go": (r"2 \* STAGED_COLUMNS \* part", "0"),
    "they store before the earlier grid ends": (
        r"grid_wait\(\); // before a residual is read, and before y is written\n  Tile",
        "Tile",
    ),
    "staging memory is free before it is stored": (
        r"(?s)(barrier_wait\(made, parity\);)(.*?)if \(more\)\s+announce\(parts\);",
        r"\1 if (more) announce(parts);\2",
    ),
    "the first tile has no residual": (r"bring\(tile, part\);\n  announce", "announce"),
}


EVERY_MUTANT = (
    *MUTANTS,
    *(f"in turn: {name}" for name in TWOS_MUTANTS),
    *(f"behind: {name}" for name in BEHIND_MUTANTS),
)


def mutant(name: str) -> tuple[tuple[tuple[tuple[int, ...], ...], list[Shape]], str, tuple[str, str]]:
    """(cuts and shapes that show it), the forms to compile, what to replace."""
    form, _, what = name.rpartition(": ")
    if form == "in turn":
        return (TWOS[:1], PLAIN_GROUP), "-DONLY_TWOS", TWOS_MUTANTS[what]
    if form == "behind":
        return (BEHIND[:1], UNSPLIT), "-DONLY_BEHIND", BEHIND_MUTANTS[what]
    return (((48, 0, 64, 1), (48, 1, 64, 1)), GROUP), "-DONLY_48", MUTANTS[what]


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory, library: ConvDevice) -> Iterator[dict[str, Future[Path]]]:
    """The library with each mistake, two compiled at a time."""
    texts = {
        name: (KERNELS / name).read_text()
        for name in ("conv.cuh", "conv_ring.cuh", "behind.cuh", "epilogue.cuh", "halo.cuh")
    }

    def made(name: str) -> Path:
        _, only, change = mutant(name)
        wrong = {file: re.sub(*change, text) for file, text in texts.items()}
        assert wrong != texts, "the kernel no longer says this"
        beside = {"pooled.cuh": (KERNELS / "pooled.cuh").read_text()}  # includes some of them
        return spoilt(tmp_path_factory.mktemp("mutant"), SOURCES, {**wrong, **beside}, only)

    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(made, name) for name in EVERY_MUTANT}


@pytest.mark.parametrize("name", EVERY_MUTANT)
def test_a_mistake_in_the_kernel_is_noticed(mutants: dict[str, Future[Path]], name: str) -> None:
    device = ConvDevice(mutants[name].result())
    (cuts, group), *_ = mutant(name)
    for mode in (
        Mode(),
        Mode(LATE, LATE, schedule=1, seed=3),
        Mode(RANDOM, RANDOM, schedule=1, seed=5),
        starved(warp=2),
    ):
        for cut in cuts:
            with device.memory():
                device.configure(mode)
                try:
                    assert_exact(device, group, device.config(*cut), torch.bfloat16, 2)
                except (AssertionError, EmulationError):
                    return
    pytest.fail("the tests would not notice this")
