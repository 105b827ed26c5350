"""Halo tiles on the emulated device: the same exact tests as other tiles, on what these take."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from emulated import EARLY, LATE, MODES, RANDOM, EmulationError, Mode, build, spoilt, with_mistake
from emulated_conv import SOURCES, ConvDevice, Shape, assert_exact, assert_no_timing_matters, case, run

RELU, PLAIN, HALO = True, False, 2


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ConvDevice:
    return ConvDevice(build(tmp_path_factory.mktemp("halo"), SOURCES))


@pytest.fixture
def device(library: ConvDevice) -> Iterator[ConvDevice]:
    with library.memory():
        library.configure(Mode())
        yield library


# (columns, warpgroups, depth, cluster): tiles of 512, 128 and 192 positions.
CUTS = (
    (48, HALO, 64, 1), (48, HALO, 32, 1), (32, HALO, 64, 1), (32, HALO, 32, 1), (192, HALO, 64, 1),
    (48, 4, 32, 1), (48, 4, 64, 1), (128, 3, 64, 1), (128, 3, 32, 1),
)  # fmt: skip
# Rows that end inside a tile, tiles that span images, one image of several tiles, windows over every border, paddings
# that differ by side, K that ends inside a chunk, windows as large as the map, rows of one pixel, an odd padded row.
GEOMETRIES = {
    "1x1": Shape(3, 9, 17, 40, ((48, RELU),)),
    "1x7": Shape(2, 9, 9, 24, ((56, RELU),), (1, 7), padding=(0, 0, 3, 3)),
    "7x1": Shape(2, 9, 9, 72, ((40, RELU),), (7, 1), padding=(3, 3, 0, 0)),
    "3x3": Shape(4, 17, 16, 80, ((48, RELU),), (3, 3), padding=(1, 1, 1, 1)),
    "3x3 inside": Shape(3, 25, 22, 32, ((24, RELU),), (3, 3)),
    "5x5": Shape(1, 35, 35, 48, ((64, RELU),), (5, 5), padding=(2, 2, 2, 2)),
    "5x3, padded behind": Shape(2, 12, 11, 16, ((104, PLAIN),), (5, 3), padding=(0, 3, 0, 1)),
    "7x7, one window": Shape(3, 7, 7, 136, ((16, PLAIN),), (7, 7)),
    "one column": Shape(2, 40, 1, 8, ((200, RELU),), (3, 1), padding=(1, 1, 0, 0)),
    "one pixel": Shape(1, 1, 1, 136, ((104, PLAIN),)),
    "wide": Shape(1, 5, 247, 16, ((8, PLAIN),), (3, 3), padding=(1, 1, 1, 1)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_walk_is_exact_by_every_cut(device: ConvDevice, name: str) -> None:
    conv, configs = case(device, GEOMETRIES[name], torch.bfloat16).conv, [device.config(*cut) for cut in CUTS]
    fitting = [config for config in configs if not device.reasons([conv], config)]
    assert len(fitting) >= {"wide": 3, "5x5": len(CUTS) - 1}.get(name, len(CUTS))
    for config in fitting:
        assert_exact(device, [GEOMETRIES[name]], config, torch.bfloat16)


WIDE = Shape(2, 9, 9, 72, ((128, RELU), (72, PLAIN), (200, RELU)), (3, 3), padding=(1, 1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_columns_are_scattered_and_residuals_added(device: ConvDevice, dtype: torch.dtype) -> None:
    for cut in CUTS[::2]:
        assert_exact(device, [replace(WIDE, residual_scale=0.5)], device.config(*cut), dtype)


GROUP = [
    Shape(2, 7, 7, 40, ((48, RELU),)),
    Shape(3, 19, 19, 24, ((104, RELU), (8, PLAIN)), (1, 7), padding=(0, 0, 3, 3)),
    Shape(1, 23, 23, 80, ((80, PLAIN),), (3, 3), residual_scale=0.25),
    Shape(5, 3, 3, 8, ((16, RELU),), (3, 3), padding=(1, 1, 1, 1)),
]


@pytest.mark.parametrize("blocks", [1, 2, 200], ids="{} blocks".format)
@pytest.mark.parametrize("cut", [CUTS[0], CUTS[1], CUTS[5]], ids=str)
def test_a_group_is_one_launch(device: ConvDevice, cut: tuple[int, int, int, int], blocks: int) -> None:
    """Tiles of four convolutions, shared out among fewer blocks than tiles, and more."""
    assert_exact(device, GROUP, device.config(*cut), torch.bfloat16, blocks)


@pytest.mark.parametrize("cut", [*CUTS[1:3], (48, 4, 32, 1), (128, 3, 32, 1)], ids=str)
def test_no_timing_changes_a_bit(library: ConvDevice, cut: tuple[int, int, int, int]) -> None:
    assert_no_timing_matters(library, GROUP, library.config(*cut))


def test_an_image_alone_and_in_a_batch_has_the_same_bits(device: ConvDevice) -> None:
    """Tiles begin anywhere in the second image of a batch."""
    both = case(device, replace(GEOMETRIES["3x3"], n=2), torch.bfloat16, integers=False)
    (y,) = run(device, [both], device.config(48, HALO), torch.bfloat16)
    for image in range(2):
        alone = case(device, replace(GEOMETRIES["3x3"], n=1), torch.bfloat16, integers=False)
        alone.conv.x = both.conv.x + image * 2 * both.conv.x_pitch * both.conv.h * both.conv.w
        alone.conv.weights, alone.conv.scale, alone.conv.shift = both.conv.weights, both.conv.scale, both.conv.shift
        assert torch.equal(run(device, [alone], device.config(48, HALO), torch.bfloat16)[0][0], y[image])


def test_weights_do_not_wait_for_the_earlier_grid(device: ConvDevice) -> None:
    """That x and y do wait is checked at every access."""
    assert_exact(device, [GEOMETRIES["3x3 inside"]], device.config(32, HALO, 32), torch.bfloat16, 1)
    assert device.lib.emulated_early_loads() > 8, "a tile has nine taps"


# Of several tiles, with weights that all fit the ring; that do not, two chunks of nine taps; that do in three chunks.
STAYING = (
    Shape(3, 25, 22, 32, ((24, RELU),), (3, 3)),
    Shape(2, 25, 22, 40, ((24, RELU),), (3, 3)),
    Shape(2, 25, 22, 72, ((24, RELU),), (1, 3)),
)


def loads_of(shape: Shape, depth: int) -> int:
    """Copies of weights by one block: of one tile where they stay, else of all."""
    each = shape.kernel[0] * shape.kernel[1] * -(-shape.c // depth)
    positions = shape.n * shape.h * (-(-shape.w // (64 // depth)) * (64 // depth))
    last = positions - (shape.kernel[0] - 1) * (positions // shape.n // shape.h) - (shape.kernel[1] - 1)
    return each if each <= 12 else each * -(-last // 512)


@pytest.mark.parametrize("shape", STAYING, ids=["stay", "pass", "stay in chunks"])
def test_weights_that_fit_are_loaded_once_a_block(library: ConvDevice, shape: Shape) -> None:
    for mode in MODES:
        with library.memory():
            library.configure(mode)
            assert_exact(library, [shape], library.config(48, HALO, 32), torch.bfloat16, 1)
            assert library.lib.emulated_early_loads() == loads_of(shape, 32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stride_w": 2}, "strides 1 and 2 of halo tiles; allowed: 1"),
        ({"splits": 2, "c": 136}, "splits of halo tiles 2; allowed: 1 to 1"),
        ({"w": 300, "ow": 300}, "pixels of a padded row of halo tiles 302; allowed: 1 to 255"),
        ({"w": 180, "ow": 180, "kh": 9, "h": 30}, "bytes of rows of a halo tile; allowed: as many as leave room"),
        ({"n": 2**22}, "pixels of padded maps of halo tiles"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused_is_named(device: ConvDevice, change: dict[str, int], reason: str) -> None:
    conv, config = case(device, GEOMETRIES["3x3"], torch.bfloat16).conv, device.config(48, HALO)
    assert device.reasons([conv], config) == []
    for name, value in change.items():
        setattr(conv, name, value)
    conv.x_pitch = max(conv.x_pitch, conv.c)
    assert any(reason in line for line in device.reasons([conv], config)), device.reasons([conv], config)


# (what the source says, what a mistake would make of it): each is caught by a deadlock, a fault or a wrong number.
MUTANTS = {
    "a tap's row forgotten": ("halo.cuh", r"a = a \+ down;", ""),
    "a stage released before its products end": ("halo.cuh", r"wgmma_wait<1>\(\);", ""),
    "rows released a chunk early": (
        "halo.cuh",
        r"release_rows\(shared, place, lane\);\n    if",
        "place.used_x = place.x.stage;\n release_rows(shared, place, lane);\n if",
    ),
    "one warp does not release": (
        "halo.cuh",
        r"if \(place\.used >= 0 && lane",
        "if (place.used >= 0 && threadIdx.x >= 160 && lane",
    ),
    "the second warpgroup's positions": ("halo.cuh", r"\.offset\) \+ mine", ".offset)"),
    "images are not told apart": ("halo.cuh", r"\+\+image;", ";"),
    "x is loaded before the earlier grid ends": ("halo.cuh", r"grid_wait\(\); // before x is read", ""),
    "y is written before the earlier grid ends": ("halo.cuh", r"grid_wait\(\); // before a residual is read", "//"),
    "a row of x too few": ("halo_schedule.h", r"last - first \+ 1,", "last - first,"),
    "padding is stored": ("halo_schedule.h", r"at\.w < problem\.ow && ", ""),
    "the rows between images are stored": ("halo_schedule.h", r" && at\.h < problem\.oh", ""),
    "weights that stay are not waited for": ("halo.cuh", r"barrier_wait\(&shared\.full\[stage\], 0\);", ""),
    "the next chunk's weights that stay": ("halo.cuh", r"b = b \+ apart\)", "b = b)"),
    "the next tap's weights that stay": ("halo.cuh", r"b = b \+ N \* ROW;", ""),
    "others never start where weights stay": ("halo.cuh", r"STAY && place\.lead > 0", "false"),
    "others start a tile later where weights stay": ("halo.cuh", r" \|\| chunk \+ 1 == HALO_STAGES\)", ")"),
    "the next tile's image": ("halo_schedule.h", r"\+\+to\.image;", ";"),
    "the next tile's rows of x": ("halo.cuh", r"begin = moved\([^;]*;", ""),
    "the next tile's pixels": ("halo.cuh", r"own = moved\([^;]*;", ""),
    "weights that stay are one tile's": ("halo.cuh", r"group\.stay \? group\.units : gridDim\.x", "gridDim.x"),
    "weights stay that do not fit": ("halo_schedule.h", r" <= stages;", " <= stages + 99;"),
    "not all warps are waited for": ("halo.cuh", r"empty\[i\], 4 \* WARPGROUPS", "empty[i], 8"),
    "a lead that the ring does not hold": ("halo_schedule.h", r"half < most \? half : most", "half + stages"),
}


BESIDE = ("halo.cuh", "halo_schedule.h", "conv_plan.h", "pooled.cuh", "pooled_schedule.h")


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory, library: ConvDevice) -> Iterator[dict[str, Future[Path]]]:
    """The library with each mistake, two compiled at a time."""

    def made(name: str) -> Path:
        headers = with_mistake(*MUTANTS[name], BESIDE)
        return spoilt(tmp_path_factory.mktemp("mutant"), SOURCES, headers, "-DONLY_48")

    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(made, name) for name in MUTANTS}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_in_the_kernel_is_noticed(mutants: dict[str, Future[Path]], name: str) -> None:
    device = ConvDevice(mutants[name].result())
    noticed = 0
    for mode in (Mode(EARLY, LATE), Mode(LATE, LATE, schedule=1, seed=3), Mode(RANDOM, EARLY, schedule=1, seed=1)):
        with device.memory():
            device.configure(mode)
            try:
                for cut in ((48, HALO), (48, 4, 32)):
                    assert_exact(device, GROUP, device.config(*cut), torch.bfloat16, 2)
                for shape in STAYING:
                    assert_exact(device, [shape], device.config(48, HALO, 32), torch.bfloat16, 1)
                    assert device.lib.emulated_early_loads() == loads_of(shape, 32)
            except (AssertionError, EmulationError):
                noticed += 1
    assert noticed, "the tests would not notice this"
