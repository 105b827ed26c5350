"""The Triton convolutions against the float64 reference, in the interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from inception_fast.kernels import reference
from inception_fast.kernels.spec import ConvSpec
from inception_fast.kernels.triton import conv, convolve, stems
from inception_fast.kernels.triton.configs import Config
from inception_fast.kernels.triton.convolve import Part, convolution, pack, split_columns
from inception_fast.kernels.triton.launch import Launch, Map, interpreting
from torch import Tensor

import numerics

from .maps import DEVICE, empty, put, run, take

HALF, FLOAT, BRAIN = torch.float16, torch.float32, torch.bfloat16
BIG = Config(block_m=128, block_n=64, block_k=32)

# name: (n, h, w, c, oc, kernel, stride, padding). Each names the risk it covers.
SHAPES: dict[str, tuple[Any, ...]] = {
    "pointwise": (2, 7, 9, 64, 48, (1, 1), (1, 1), (0, 0, 0, 0)),
    "wide_1x7": (1, 9, 17, 32, 64, (1, 7), (1, 1), (0, 0, 3, 3)),
    "tall_7x1": (1, 17, 9, 32, 64, (7, 1), (1, 1), (3, 3, 0, 0)),
    "strided_3x3": (2, 11, 10, 32, 40, (3, 3), (2, 2), (0, 0, 0, 0)),
    "square_5x5": (1, 6, 5, 32, 64, (5, 5), (1, 1), (2, 2, 2, 2)),
    "lopsided_tf_same": (1, 8, 10, 32, 24, (3, 3), (2, 2), (0, 1, 0, 1)),
    "ragged_channels": (1, 5, 7, 20, 70, (3, 1), (1, 1), (1, 1, 0, 0)),
    "linear_layer": (3, 1, 1, 100, 130, (1, 1), (1, 1), (0, 0, 0, 0)),
}


def spec_of(case: str, dtype: torch.dtype, residual: bool = False) -> ConvSpec:
    n, h, w, c, oc, kernel, stride, padding = SHAPES[case]
    return ConvSpec(n, h, w, c, oc, *kernel, stride, padding, 1, True, residual, str(dtype).removeprefix("torch."))


def draws(spec: ConvSpec, exact: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = getattr(torch, spec.dtype)
    shapes = ((spec.n, spec.c, spec.h, spec.w), (spec.oc, spec.c // spec.groups, spec.kh, spec.kw))
    if exact:
        x, weight = (numerics.integers(*s, seed=i, dtype=dtype, density=0.4) for i, s in enumerate(shapes))
        return x, weight, numerics.powers_of_two(spec.oc), numerics.integers(spec.oc, seed=3, limit=4)
    x, weight = (numerics.random(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes))
    return x, weight, numerics.random(spec.oc, seed=2, low=0.5), numerics.random(spec.oc, seed=3)


def convolved(
    spec: ConvSpec, arguments: tuple[Tensor, ...], config: Config, residual: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    x, weight, *params = arguments
    packed = pack([Part(weight, *params, (spec.padding[0], spec.padding[2]), spec.relu)], x.dtype, DEVICE)
    y = empty(spec.n, spec.oc, spec.oh, spec.ow, x.dtype, 8, 16)
    old = None if residual is None else put(residual, 0, 8)
    launches = convolution(
        "conv", spec, put(x, 16, 8 + -spec.c % 8), packed, [y], config, residual=old, residual_scale=scale
    )
    pointers = config.form in ("pointer", "cached")
    assert launches[0].kernel is (conv.conv_kernel if pointers else conv.conv_tma_kernel)
    if pointers:
        assert launches[0].arguments["CACHED"] is (config.form == "cached" and x.dtype is not FLOAT)
    run(launches)
    return take(y)


def expected(spec: ConvSpec, arguments: tuple[Tensor, ...], dtype: torch.dtype = torch.float64, **rest: Any) -> Tensor:
    x, *others = arguments
    return reference.conv(x.to(dtype), *others, stride=spec.stride, padding=spec.padding, relu=spec.relu, **rest)


# TMA skips no pixels: another stride than 1 takes the pointer form.
FORMS = [
    (case, form)
    for case in SHAPES
    for form in ("pointer", "cached", "tma")
    if form != "tma" or SHAPES[case][6] == (1, 1)
]


@pytest.mark.parametrize(("case", "form"), FORMS)
@pytest.mark.parametrize("dtype", (HALF, FLOAT), ids=str)
def test_integers_are_exact(case: str, dtype: torch.dtype, form: str) -> None:
    spec = spec_of(case, dtype)
    arguments = draws(spec, exact=True)
    y = convolved(spec, arguments, replace(BIG, form=form))
    numerics.assert_exact(y, expected(spec, arguments, dtype))


# Columns of two products: whole tiles of them, a last tile whose second has none, and one that ends within it.
@pytest.mark.parametrize(("case", "block_n"), [("square_5x5", 48), ("pointwise", 96), ("ragged_channels", 80)])
@pytest.mark.parametrize("form", ("pointer", "tma"))
def test_a_tile_of_two_widths_is_exact(case: str, block_n: int, form: str) -> None:
    spec = spec_of(case, HALF, residual=True)
    arguments = draws(spec, exact=True)
    old = numerics.integers(spec.n, spec.oc, spec.oh, spec.ow, seed=9, dtype=HALF, limit=3)
    y = convolved(spec, arguments, replace(BIG, form=form, block_n=block_n), old, 2.0)
    numerics.assert_exact(y, expected(spec, arguments, HALF, residual=old, residual_scale=2.0))


@pytest.mark.parametrize("case", [case for case, form in FORMS if form == "tma"])
@pytest.mark.parametrize(("block_n", "split"), [(64, 1), (192, 1), (64, 2)])
def test_turned_sums_are_exact(case: str, block_n: int, split: int) -> None:
    spec = spec_of(case, HALF)
    arguments = draws(spec, exact=True)
    config = replace(BIG, form="turned", block_n=block_n, split=split)
    numerics.assert_exact(convolved(spec, arguments, config), expected(spec, arguments, HALF))


def launched(spec: ConvSpec, config: Config) -> Launch:
    """The first launch on an x of its own."""
    x, weight, *params = draws(spec, exact=True)
    packed = pack([Part(weight, *params, (spec.padding[0], spec.padding[2]), spec.relu)], x.dtype, DEVICE)
    y = empty(spec.n, spec.oc, spec.oh, spec.ow, x.dtype)
    return convolution("conv", spec, put(x, 0, -spec.c % 8), packed, [y], config)[0]


def test_what_cannot_be_turned_is_not() -> None:
    """Columns are rows of a product's first operand, which has 64, and float32 has no operand that is turned."""
    turned = replace(BIG, form="turned")
    spec = spec_of("wide_1x7", HALF)
    for one, config, wanted in (
        (spec, turned, True),
        (spec, replace(turned, block_n=32), False),
        (replace(spec, oc=256), replace(turned, block_n=96), False),
        (replace(spec, dtype="float32"), turned, False),
    ):
        launch = launched(one, config)
        assert launch.kernel is conv.conv_tma_kernel and launch.arguments["TURNED"] is wanted
    assert launched(spec_of("strided_3x3", HALF), turned).kernel is conv.conv_kernel


def test_a_split_is_not_cached() -> None:
    """A program's second index, zero without a split, is what hides where x lies."""
    spec = spec_of("square_5x5", HALF)
    for split, wanted in ((1, True), (2, False)):
        assert launched(spec, replace(BIG, form="cached", split=split)).arguments["CACHED"] is wanted


@pytest.mark.parametrize(("around", "padding", "taps"), [(0, 0, (3, 1)), (8, 0, (3, 3)), (0, 1, (3, 3))])
def test_a_row_of_taps_is_one_where_its_pixels_lie_side_by_side(
    around: int, padding: int, taps: tuple[int, int]
) -> None:
    """72 channels are three steps of 32, where 24 are one for each of three taps."""
    spec = ConvSpec(2, 9, 10, 24, 72, 3, 3, (1, 1), (1, 1, padding, padding), dtype="float16")
    x, weight, *params = draws(spec, exact=True)
    packed, y = pack([Part(weight, *params, (1, padding), True)], HALF, DEVICE), empty(2, 72, spec.oh, spec.ow, HALF)
    config = replace(BIG, form="rows")
    (launch,) = convolution("conv", spec, put(x, 0, around), packed, [y], config)
    assert launch.kernel is conv.conv_tma_kernel and launch.arguments["TURNED"]
    assert (launch.arguments["KH"], launch.arguments["KW"]) == taps
    run([launch])
    numerics.assert_exact(take(y), expected(spec, (x, weight, *params), HALF))


def test_pixels_of_a_pointwise_convolution_are_one_row() -> None:
    """Boxes hang over once, not once a map; with padding, or taps, an image's rows are what they are."""
    spec = spec_of("pointwise", HALF)
    boxes = [
        [launched(one, replace(BIG, form="tma")).arguments[name] for name in ("n", "oh", "ow", "BOX_N", "BOX_H")]
        for one in (spec, replace(spec, padding=(1, 1, 1, 1)), spec_of("wide_1x7", HALF))
    ]
    assert boxes[0] == [1, 1, 2 * 7 * 9, 1, 1]
    assert boxes[1][:3] == [2, 9, 11] and boxes[2][:3] == [1, 9, 17]


@pytest.mark.parametrize("form", ("pointer", "tma"))
@pytest.mark.parametrize("dtype", (HALF, FLOAT, BRAIN), ids=str)
def test_random_draws_stay_in_the_budget(dtype: torch.dtype, form: str) -> None:
    spec = spec_of("wide_1x7", dtype, residual=True)
    arguments = draws(spec, exact=False)
    old = numerics.random(spec.n, spec.oc, spec.oh, spec.ow, seed=9, dtype=dtype)
    y = convolved(spec, arguments, replace(BIG, form=form), old, 0.17)
    wanted = expected(spec, arguments, residual=old, residual_scale=0.17)
    if dtype is BRAIN and interpreting():  # the interpreter's stores cut bfloat16 off where the hardware rounds
        assert numerics.rel_l2(y, wanted) <= numerics.BF16_CUT_REL_L2
    else:
        numerics.assert_close_budget(y, wanted)


@pytest.mark.parametrize("form", ("pointer", "tma"))
@pytest.mark.parametrize("case", ("ragged_channels", "wide_1x7"))
def test_splits_sum_the_same(case: str, form: str) -> None:
    spec = spec_of(case, HALF, residual=True)
    arguments = draws(spec, exact=True)
    old = numerics.integers(spec.n, spec.oc, spec.oh, spec.ow, seed=9, dtype=HALF, limit=3)
    y = convolved(spec, arguments, replace(BIG, form=form, block_m=64, split=3), old, 2.0)
    numerics.assert_exact(y, expected(spec, arguments, HALF, residual=old, residual_scale=2.0))


# columns, their ReLU, and channels before and after them in their buffer. The first begin and end off 16 bytes, the
# second on them, but for one buffer; blocks of 16 or more columns hold columns of two and of three of them.
SIBLINGS: dict[str, list[tuple[int, bool, int, int]]] = {
    "ragged": [(20, True, 4, 4), (12, False, 0, 0), (15, True, 0, 24)],
    "whole": [(16, False, 8, 8), (8, True, 0, 0), (24, True, 0, 20)],
}


def scattered(
    case: str, dtype: torch.dtype, config: Config, spec: ConvSpec | None = None
) -> tuple[list[Map], list[Tensor], list[Launch]]:
    """Where siblings write, what they should write, and their launches."""
    columns = SIBLINGS[case]
    spec = replace(spec or spec_of("pointwise", dtype), oc=sum(c for c, *_ in columns))
    x, weight, scale, shift = draws(spec, exact=True)
    padding = (spec.padding[0], spec.padding[2])
    packed = pack(split_columns(Part(weight, scale, shift, padding, True), [c[:2] for c in columns]), dtype, DEVICE)
    outputs = [empty(spec.n, c, spec.oh, spec.ow, dtype, *around) for c, _, *around in columns]
    launches = convolution("conv", spec, put(x), packed, outputs, config)
    whole = reference.conv(x, weight, scale, shift, stride=spec.stride, padding=spec.padding, relu=False)
    parts = whole.split([c for c, *_ in columns], 1)
    return outputs, [y.relu() if c[1] else y for y, c in zip(parts, columns, strict=True)], launches


SCATTERED = [(*tile, split) for tile in (("ragged", 16), ("ragged", 64), ("whole", 32)) for split in (1, 2)]


@pytest.mark.parametrize("form", ("pointer", "tma", "turned"))
@pytest.mark.parametrize(("case", "block_n", "split"), [*SCATTERED, ("ragged", 48, 1), ("whole", 48, 1)])
def test_siblings_scatter(case: str, block_n: int, form: str, split: int) -> None:
    """A merged 1x1 whose columns go to three buffers, with and without ReLU."""
    outputs, wanted, launches = scattered(case, HALF, replace(BIG, form=form, block_n=block_n, split=split))
    assert launches[0].kernel is (conv.conv_kernel if form == "pointer" else conv.conv_tma_kernel)
    assert launches[0].arguments["ALIGNED"] == {"ragged": 1, "whole": 4}[case]
    run(launches)
    for y, one in zip(outputs, wanted, strict=True):
        numerics.assert_exact(take(y), one)


@pytest.mark.parametrize("form", ("pointer", "tma", "turned"))
def test_siblings_behind_a_single_tap_see_their_neighbours(form: str) -> None:
    """The first alone would take all pixels for one row."""
    spec, weights = replace(spec_of("pointwise", HALF), oc=16), []
    x, whole, *_ = draws(spec, exact=True)
    for taps, seed in ((1, 1), (3, 2)):
        weights.append(numerics.integers(8, whole.shape[1], taps, 1, seed=seed, dtype=HALF))
    outputs = [empty(spec.n, 8, spec.oh, spec.ow, HALF) for _ in weights]
    packed = pack([Part(w, None, None, (w.shape[2] // 2, 0), False) for w in weights], HALF, DEVICE)
    run(convolution("conv", spec, put(x), packed, outputs, replace(BIG, form=form, block_m=64)))
    for y, w in zip(outputs, weights, strict=True):
        numerics.assert_exact(take(y), torch.conv2d(x.double(), w.double(), padding=(w.shape[2] // 2, 0)))


@pytest.mark.parametrize("form", ("pointer", "tma"))
@pytest.mark.parametrize("dtype", (FLOAT, BRAIN), ids=str)
def test_siblings_of_wider_kernels_scatter(dtype: torch.dtype, form: str) -> None:
    spec = replace(spec_of("tall_7x1", dtype), c=16)
    outputs, wanted, launches = scattered("whole", dtype, replace(BIG, form=form, block_m=64, block_n=32), spec)
    run(launches)
    for y, one in zip(outputs, wanted, strict=True):
        numerics.assert_exact(take(y), one)


def side_by_side(places: Tensor, aligned: int) -> bool:
    """Whether runs of `aligned` columns are as the compiler is told; it alone would see, the interpreter does not."""
    offsets, pitches = (row.view(-1, aligned) for row in places)
    there = (pitches > 0).any(1)
    whole = (pitches == pitches[:, :1]).all(1) & (offsets.diff(dim=1) == 1).all(1)
    starts = (offsets[:, 0] % aligned == 0) & (pitches[:, 0] % aligned == 0)
    return bool((~there | whole & starts).all())


@pytest.mark.parametrize("case", SIBLINGS)
def test_neighbours_lie_as_the_compiler_is_told(case: str) -> None:
    (launch,) = scattered(case, HALF, BIG)[2]
    places, aligned = launch.arguments["place_ptr"], launch.arguments["ALIGNED"]
    assert side_by_side(places, aligned) and not side_by_side(places, 8)


@pytest.mark.parametrize("lost", ("pitch", "place", "curved"))
def test_a_wrong_place_is_seen(lost: str) -> None:
    """Mutants of the table: the last buffer's pitch, its columns' place, and where the ReLUs end."""
    outputs, wanted, launches = scattered("ragged", HALF, replace(BIG, form="tma", block_n=64))
    places, curved = launches[0].arguments["place_ptr"], launches[0].arguments["curved"]
    assert places.shape == (2, 24 + 16 + 16) and curved == 24 + 16, "columns with a ReLU come first"
    if lost == "curved":
        launches = [replace(launches[0], arguments={**launches[0].arguments, "curved": curved + 8})]
    else:
        row, change = (1, -1) if lost == "pitch" else (0, 1)
        places[row, 24:39] += change
    run(launches)
    with pytest.raises(AssertionError):
        for y, one in zip(outputs, wanted, strict=True):
            numerics.assert_exact(take(y), one)


@pytest.mark.parametrize(
    ("columns", "config", "form"),
    [
        ((24, 40), replace(BIG, form="tma"), "pointer"),
        ((24, 40), replace(BIG, form="pointer", block_n=48), "pointer"),
        ((40, 40), replace(BIG, form="tma", block_n=48), "tma"),
        ((72, 72), replace(BIG, form="turned"), "turned"),
        ((40, 40), replace(BIG, form="tma", block_n=16, split=2), "tma"),
    ],
)
@pytest.mark.parametrize("dtype", (HALF, FLOAT), ids=str)
def test_parallel_split_is_one_launch(dtype: torch.dtype, columns: tuple[int, int], config: Config, form: str) -> None:
    """Mixed taps go through TMA where both halves have as many columns, one behind the other in one matrix."""
    first = ConvSpec(2, 8, 8, 32, columns[0], 1, 3, (1, 1), (0, 0, 1, 1), dtype=str(dtype).removeprefix("torch."))
    second = replace(first, oc=columns[1], kh=3, kw=1, padding=(1, 1, 0, 0))
    a, b = draws(first, exact=True), draws(second, exact=True)
    b = (b[0], b[1].flip(0), *b[2:])  # not the first half's numbers
    packed = pack([Part(*a[1:], (0, 1), True), Part(*b[1:], (1, 0), True)], dtype, DEVICE)
    y = empty(2, sum(columns), 8, 8, dtype)
    halves = [y.channels(0, columns[0]), y.channels(*columns)]
    launches = convolution("split", first, put(a[0]), packed, halves, config)
    assert len(launches) == (1 if config.split == 1 else 2)
    assert launches[0].kernel is (conv.conv_kernel if form == "pointer" else conv.conv_tma_kernel)
    if form != "pointer":
        assert launches[0].arguments["TURNED"] is (form == "turned" and dtype is HALF)
    run(launches)
    numerics.assert_exact(take(y), reference.pair(a[0], *a[1:], *b[1:], kind="split"))


@pytest.mark.parametrize("lanes", (0, 1), ids=("pixels first", "taps first"))
@pytest.mark.parametrize("kind", ("uint8", "floating", "permuted"))
def test_stem_reads_images_as_they_come(kind: str, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its tile either way round, which depends on Triton's version."""
    monkeypatch.setattr(stems, "LANES", lanes)
    spec = ConvSpec(2, 15, 17, 3, 32, 3, 3, (2, 2), (0, 1, 1, 0), dtype="float16")
    x = numerics.integers(2, 3, 15, 17, limit=6).abs()
    weight = numerics.integers(32, 3, 3, 3, seed=1)
    params = (numerics.powers_of_two(32), numerics.integers(32, seed=3, limit=4))
    before = (torch.tensor([0.5, 1.0, 2.0]), torch.tensor([-1.0, 0.0, 2.0]))
    seen = {"uint8": x.to(torch.uint8), "floating": x, "permuted": x.permute(0, 2, 3, 1).contiguous()}[kind]
    seen = seen.permute(0, 3, 1, 2) if kind == "permuted" else seen
    packed = pack([Part(weight, *params, (0, 1), True)], HALF, DEVICE)
    y = empty(2, 32, spec.oh, spec.ow, HALF, 0, 8)
    run(stems.convolution("stem", spec, seen.to(DEVICE), packed, y, scale=before[0], shift=before[1]))
    a = reference.eltwise(x, *before).to(HALF)
    wanted = reference.conv(a, weight.to(HALF), *params, stride=(2, 2), padding=spec.padding)
    numerics.assert_exact(take(y), wanted)


def test_stem_serves_a_seven_wide_kernel() -> None:
    spec = ConvSpec(1, 20, 20, 3, 24, 7, 7, (2, 2), (2, 3, 2, 3), dtype="float32")
    x, weight = numerics.integers(1, 3, 20, 20), numerics.integers(24, 3, 7, 7, seed=1)
    packed = pack([Part(weight, None, None, (2, 2), False)], FLOAT, DEVICE)
    y = empty(1, 24, spec.oh, spec.ow, FLOAT)
    run(stems.convolution("stem", spec, x.to(DEVICE), packed, y))
    wanted = reference.conv(x, weight, stride=(2, 2), padding=spec.padding, relu=False)
    numerics.assert_exact(take(y), wanted)


@pytest.mark.parametrize(
    "config", (Config(block_m=64, block_n=32, warps=8), Config(block_m=256, block_n=16, block_k=16))
)
def test_any_tile_of_a_stem_gives_the_same(config: Config) -> None:
    """Boxes of rows that hang over a map on both sides, and a walk over taps and channels in several steps."""
    spec = ConvSpec(2, 35, 39, 3, 24, 5, 5, (2, 2), (1, 2, 2, 1), dtype="float16")
    x, weight = numerics.integers(2, 3, 35, 39), numerics.integers(24, 3, 5, 5, seed=1)
    packed = pack([Part(weight, None, None, (1, 2), False)], HALF, DEVICE)
    y = empty(2, 24, spec.oh, spec.ow, HALF, 8)
    (launch,) = stems.convolution("stem", spec, x.to(DEVICE), packed, y, config=config)
    sizes = [launch.arguments[name] for name in ("BOX_H", "BOX_W", "BLOCK_N", "BLOCK_K")]
    assert sizes == ([2, 32, 32, 64] if config.block_m == 64 else [8, 32, 16, 16])
    run([launch])
    wanted = reference.conv(x.half(), weight.half(), stride=(2, 2), padding=spec.padding, relu=False)
    numerics.assert_exact(take(y), wanted)


@pytest.mark.parametrize("lost", ("pixel", "padding"))
def test_a_stem_that_reads_elsewhere_is_seen(lost: str) -> None:
    """Mutants: rows one element apart from where they are, and taps outside that are not left out."""
    spec = ConvSpec(1, 15, 17, 3, 16, 3, 3, (2, 2), (1, 1, 1, 1), dtype="float16")
    x, weight = numerics.integers(1, 3, 15, 17), numerics.integers(16, 3, 3, 3, seed=1)
    packed, y = pack([Part(weight, None, None, (1, 1), False)], HALF, DEVICE), empty(1, 16, spec.oh, spec.ow, HALF)
    around = torch.full((3, 3, 15, 17), 7.0, device=DEVICE)
    around[1] = x[0]
    (launch,) = stems.convolution("stem", spec, around[1:2], packed, y)
    change = {"PADDED": False} if lost == "padding" else {"stride_y": 16}
    run([replace(launch, arguments={**launch.arguments, **change})])
    with pytest.raises(AssertionError):
        numerics.assert_exact(
            take(y), reference.conv(x.half(), weight.half(), stride=(2, 2), padding=spec.padding, relu=False)
        )


def test_wide_rows_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps of 2^31 pixels fit no test; their code path does."""
    monkeypatch.setattr(convolve, "wide", lambda *rows: True)
    spec = spec_of("strided_3x3", HALF)
    arguments = draws(spec, exact=True)
    numerics.assert_exact(convolved(spec, arguments, replace(BIG, split=2)), expected(spec, arguments, HALF))


def test_nan_and_infinity_pass() -> None:
    spec = spec_of("pointwise", HALF)
    x, weight, scale, shift = draws(spec, exact=True)
    x[0, 0, 0, 0], x[1, 0, 3, 3] = float("nan"), float("inf")
    weight[:, 0] = 1
    y = convolved(spec, (x, weight, scale, shift), BIG)
    assert y[0, :, 0, 0].isnan().all() and y[1, :, 3, 3].isinf().all()
    assert y.isfinite().sum() == y.numel() - 2 * spec.oc


@pytest.mark.parametrize("why", ("stride", "alignment"))
def test_what_tma_cannot_serve_takes_the_pointer_form(why: str) -> None:
    spec = spec_of("strided_3x3" if why == "stride" else "pointwise", HALF)
    arguments = draws(spec, exact=True)
    packed = pack([Part(*arguments[1:], (0, 0), True)], HALF, DEVICE)
    y = empty(spec.n, spec.oc, spec.oh, spec.ow, HALF)
    x = put(arguments[0], 0 if why == "stride" else 3)
    launches = convolution("conv", spec, x, packed, [y], replace(BIG, form="tma"))
    assert [launch.kernel for launch in launches] == [conv.conv_kernel]
    run(launches)
    numerics.assert_exact(take(y), expected(spec, arguments, HALF))


def test_an_empty_batch_launches_nothing() -> None:
    spec = replace(spec_of("pointwise", HALF), n=0)
    packed = pack([Part(torch.zeros(48, 64, 1, 1), None, None, (0, 0), True)], HALF, DEVICE)
    none = empty(0, 64, 7, 9, HALF)
    assert convolution("conv", spec, none, packed, [empty(0, 48, 7, 9, HALF)], BIG) == []
