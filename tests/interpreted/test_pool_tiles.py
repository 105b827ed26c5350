"""Pools whose outputs share taps, on every class of shape, and mistakes that they could have."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inception_fast.kernels import reference
from inception_fast.kernels.spec import PoolSpec
from inception_fast.kernels.triton import pool, pools
from inception_fast.kernels.triton.launch import interpreting
from torch import Tensor

import numerics
from native.mutants import Mutant

from . import maps
from .maps import empty, put, run, take

NEVER = 1 << 40
SAME, NONE = (1, 1, 1, 1), (0, 0, 0, 0)


def avg(
    h: int, w: int, c: int, kernel: int, stride: int = 1, padding: tuple[int, ...] = SAME, **rest: bool
) -> PoolSpec:
    return PoolSpec(3, h, w, c, kernel, kernel, (stride, stride), padding, "avg", **rest)  # type: ignore[arg-type]


def most(h: int, w: int, c: int, kernel: int = 3, stride: int = 2, padding: tuple[int, ...] = NONE) -> PoolSpec:
    return PoolSpec(3, h, w, c, kernel, kernel, (stride, stride), padding)  # type: ignore[arg-type]


# The risk, the shape, and rows and columns of a position. Two of them divide 8 and not 5, 7 and 9.
SHAPES: dict[str, tuple[PoolSpec, tuple[int, int]]] = {
    "average, odd map": (avg(9, 7, 32, 3), (2, 2)),
    "average, even map": (avg(8, 8, 64, 3), (2, 2)),
    "average that counts its padding": (avg(9, 8, 32, 3, count_include_pad=True), (2, 2)),
    "average of stride 2, lopsided": (avg(8, 9, 32, 3, 2, (0, 1, 0, 1)), (2, 2)),
    "average that counts lopsided padding": (avg(9, 8, 32, 3, 2, (0, 1, 1, 0), count_include_pad=True), (2, 2)),
    "average past the padding": (replace(avg(6, 6, 32, 3, 2, count_include_pad=True), overhang=(1, 1)), (2, 2)),
    "average inside the map": (avg(9, 7, 32, 3, 1, NONE), (2, 2)),
    "rows alone": (avg(7, 8, 32, 5, 1, (2, 2, 2, 2)), (2, 1)),
    "one row of outputs": (avg(3, 9, 32, 3, 1, (0, 0, 1, 1)), (1, 2)),
    "one column of outputs": (avg(9, 3, 32, 3, 1, (1, 1, 0, 0)), (2, 1)),
    "no overlap": (avg(8, 8, 32, 2, 2, NONE), (1, 1)),
    "too many taps for one loop": (avg(7, 6, 32, 7, 1, (3, 3, 3, 3)), (1, 1)),
    "maximum inside an odd map": (most(11, 9, 32), (2, 2)),
    "maximum inside an even map": (most(10, 8, 32), (2, 2)),
    "maximum in lopsided padding": (most(9, 8, 32, padding=(0, 1, 1, 0)), (2, 2)),
    "maximum of stride 1": (most(7, 6, 32, 3, 1, SAME), (2, 2)),
    "maximum past the map": (replace(most(8, 8, 32), overhang=(1, 1)), (2, 2)),
    "maximum of windows that hold nothing": (replace(most(6, 6, 32, 3, 2), overhang=(3, 2)), (2, 2)),
    "maximum, too many taps": (most(5, 4, 32, 6, 1, (2, 3, 3, 2)), (1, 1)),
    "a map of one output": (avg(4, 3, 32, 3, 2, NONE), (1, 1)),
    "a block that hangs over": (avg(5, 5, 72, 3), (2, 2)),
    "maximum of a block that hangs over": (most(9, 9, 20), (2, 2)),
    "blocks": (most(9, 7, 96), (2, 2)),
}
# A whole map: of one pixel, of fewer than a step has, of whole steps and of more, some of whose channels hang over.
WHOLE_MAPS = {
    f"{spec.kind} of a whole {h}x{w}x{c}": spec
    for h, w, c in ((1, 1, 32), (2, 3, 128), (8, 8, 160), (9, 11, 40))
    for spec in (avg(h, w, c, 1, 1, NONE), most(h, w, c, 1, 1))
    for spec in (replace(spec, kh=h, kw=w),)
}


IN_PAIRS = (
    *("average, odd map", "average that counts its padding", "too many taps for one loop", "a block that hangs over"),
    *("maximum inside an odd map", "maximum in lopsided padding", "maximum, too many taps", "maximum past the map"),
)


@pytest.fixture(params=(1, NEVER), ids=("shared", "alone"))
def sharing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether outputs share taps: small maps are too few for it."""
    monkeypatch.setattr(pools, "ENOUGH", request.param)
    yield request.param == 1


def drawn(spec: PoolSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """For maxima more below zero than above it, or zeros in place of their padding would hide."""
    x = numerics.random(spec.n, spec.c, spec.h, spec.w, seed=spec.c + spec.h, dtype=dtype)
    return x - 0.5 if spec.kind == "max" else x


def pool_of(spec: PoolSpec, x: Tensor, shift: Tensor | None = None, relu: bool = False) -> Tensor:
    y = empty(spec.n, spec.c, spec.oh, spec.ow, x.dtype, 8, 8)
    run(pools.pooled(spec, put(x, 8, 16), y, shift, relu))
    return take(y)


def wanted_of(spec: PoolSpec, x: Tensor) -> Tensor:
    rest = {"kind": spec.kind, "count_include_pad": spec.count_include_pad, "overhang": spec.overhang}
    return reference.pool(x.double(), (spec.kh, spec.kw), spec.stride, spec.padding, **rest)


def check(spec: PoolSpec, x: Tensor) -> None:
    y, wanted = pool_of(spec, x), wanted_of(spec, x)
    if spec.kind == "max":
        numerics.assert_exact(y, wanted)
    elif x.dtype is torch.bfloat16 and interpreting():
        assert numerics.rel_l2(y, wanted) <= numerics.BF16_CUT_REL_L2
    else:
        numerics.assert_close_budget(y, wanted)


@pytest.mark.parametrize("name", SHAPES)
def test_every_class_of_shape(name: str, sharing: bool) -> None:
    spec, outputs = SHAPES[name]
    tile = pools.tile_of(spec, 4)
    assert (tile.rows, tile.columns) == (outputs if sharing else (1, 1))
    check(spec, drawn(spec))


@pytest.mark.parametrize("name", WHOLE_MAPS)
def test_whole_maps(name: str) -> None:
    spec = WHOLE_MAPS[name]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check(replace(spec, dtype=str(dtype).removeprefix("torch.")), drawn(spec, dtype))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", IN_PAIRS)
def test_pairs_of_16_bits(name: str, dtype: torch.dtype, sharing: bool) -> None:
    """On a GPU by instructions of their own, which the interpreter does not know."""
    spec, _ = SHAPES[name]
    x = drawn(spec, dtype)
    check(replace(spec, dtype=str(dtype).removeprefix("torch.")), x)
    x[0, 3, 3, 3] = x[2, 1, 0, 0] = x[1, 2, -1, -1] = float("nan")
    assert torch.equal(pool_of(spec, x).isnan(), wanted_of(spec, x).isnan())


@pytest.mark.parametrize("name", SHAPES)
def test_no_tile_changes_a_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a batch may choose the tile: an image has the same result alone."""
    spec, _ = SHAPES[name]
    x, shift = drawn(spec), numerics.random(spec.c, seed=3)
    found = []
    for enough in (1, NEVER):
        monkeypatch.setattr(pools, "ENOUGH", enough)
        found.append(pool_of(spec, x, shift, True))
        alone = pool_of(replace(spec, n=1), x[1:2], shift, True)
        assert torch.equal(alone, found[-1][1:2])
    assert torch.equal(*found)


def test_a_batch_chooses() -> None:
    """By the threads that it has: 128 images of v3's smallest average share taps, one does not."""
    spec = replace(avg(8, 8, 192, 3), n=128)
    tiles = [pools.tile_of(replace(spec, n=n), 2) for n in (1, 128)]
    assert [(tile.rows, tile.columns, tile.pixels, tile.channels) for tile in tiles] == [(1, 1, 16, 64), (2, 2, 16, 64)]
    assert pools.tile_of(replace(spec, n=128), 4).pixels == 8, "a thread has 16 bytes of a tap"


@pytest.mark.parametrize("name", ("average, odd map", "maximum in lopsided padding", "rows alone"))
def test_nan_reaches_its_windows_alone(name: str, sharing: bool) -> None:
    spec, _ = SHAPES[name]
    x = drawn(spec)
    x[0, 3, 3, 3] = x[2, 1, 0, 0] = x[1, 2, -1, -1] = float("nan")
    wanted = wanted_of(spec, x)
    assert 3 <= wanted.isnan().sum() < wanted.numel() / 4
    assert torch.equal(pool_of(spec, x).isnan(), wanted.isnan())


@pytest.mark.parametrize("name", ("average, odd map", "maximum inside an odd map", "too many taps for one loop"))
def test_wide_maps(name: str, sharing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "wide", lambda *rows: True)
    spec, _ = SHAPES[name]
    check(spec, drawn(spec))


def test_what_is_wide() -> None:
    """Positions of a batch, or elements inside one image, that 32 bits do not hold."""
    nothing = torch.empty(0, device="meta")
    for spec, found in (
        (most(9, 9, 32), False),
        (replace(most(9, 9, 32), n=1 << 25), True),
        (most(1 << 14, 1 << 14, 8), True),
    ):
        x_map = pools.Map(nothing, spec.n, spec.h, spec.w, spec.c, 64)
        y_map = pools.Map(nothing, spec.n, spec.oh, spec.ow, spec.c, 64)
        (launch,) = pools.pooled(spec, x_map, y_map)
        assert launch.arguments["WIDE"] is found


def _mutant(name: str, shape: str, old: str, new: str) -> Mutant:
    return Mutant(name, "pool.py", old, new, shape)


# What it is, the shape that shows it, the text and what becomes of it.
MUTANTS = (
    _mutant("rows past the end are written", "average, odd map", "across * ROWS, oh - ROWS", "across * ROWS, oh - 1"),
    _mutant("columns stay where they are", "maximum inside an even map",
            "tl.minimum(position % across * COLUMNS, ow - COLUMNS)", "position % across * COLUMNS"),
    _mutant("all positions are of the first image", "average, even map", "image * h + top", "top"),
    _mutant("the padding above is not asked for", "average, odd map", "ok = ok & (first + tap >= 0)", "ok = ok"),
    _mutant("the end of the map is not asked for", "average, odd map", "ok = ok & (first + tap < size)", "ok = ok"),
    _mutant("a tap beside the padding is sure", "maximum of stride 1", "(s >= LEFT) & (s < SURE_W)",
            "(s >= 0) & (s < SURE_W)"),
    _mutant("a tap past the end is sure", "maximum of stride 1", "(r >= TOP) & (r < SURE_H)",
            "(r >= TOP) & (r <= SURE_H)"),
    _mutant("the padding of a maximum is zero", "maximum in lopsided padding", 'other=float("-inf") if MAX else 0.0',
            "other=0.0"),
    _mutant("a window begins a column early", "average, odd map", "row = line[j * STRIDE_W]", "row = line[0]"),
    _mutant("windows are a column apart", "maximum inside an odd map", "line[j * STRIDE_W + s]", "line[j + s]"),
    _mutant("a row goes to all windows", "average inside the map", "elif r > i * STRIDE_H and r < i * STRIDE_H + KH:",
            "elif r > i * STRIDE_H:"),
    _mutant("windows one above the other have one divisor", "average, odd map", "top + i * STRIDE_H", "top"),
    _mutant("neighbours have one divisor", "average, odd map", "left + j * STRIDE_W", "left"),
    _mutant("all windows count all", "average, odd map", "    if EVEN:\n", "    if True:\n"),
    _mutant("what is past the padding counts", "average past the padding",
            "tl.minimum(up + KH, h + BOTTOM)", "up + KH"),
    _mutant("the second row of outputs is the first", "average, even map", "first + i * y_line + j", "first + j"),
    _mutant("a long window has one row", "too many taps for one loop",
            "acc = joined(acc, row, MAX, False)\n    return acc", "acc = row\n    return acc"),
    _mutant("a long window leaves its map", "maximum, too many taps", " & (left + s < w)\n", "\n"),
    _mutant("other channels are stored", "a block that hangs over", "m_ok[:, None] & k_ok[None, :]\n    tl.store",
            "m_ok[:, None]\n    tl.store"),
    _mutant("steps of a whole map do not move", "max of a whole 9x11x40",
            "    first += STEPS * BLOCK_M * X_PITCH\n", ""),
    _mutant("steps of a whole map are a pixel", "avg of a whole 8x8x160", "first + i * BLOCK_M * X_PITCH, ok",
            "first + i * X_PITCH, ok"),
    _mutant("more than the whole map", "max of a whole 2x3x128", "ok = start + i * BLOCK_M + lane < pixels",
            "ok = lane < BLOCK_M"),
)  # fmt: skip


@pytest.mark.skipif(not interpreting(), reason="the interpreter has shown it; a GPU would only compile them all")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_are_caught(mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pool.py"
    file.write_text(mutant.applied(Path(pool.__file__).read_text()))
    spec = importlib.util.spec_from_file_location(f"{pool.__package__}.spoilt", file)
    assert spec is not None and spec.loader is not None
    spoilt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(spoilt)
    monkeypatch.setattr(pools, "pool", spoilt)
    monkeypatch.setattr(pools, "ENOUGH", 1)
    monkeypatch.setattr(maps, "MARGIN", 1 << 16)  # a mistake shall not leave the buffers
    shape = WHOLE_MAPS[mutant.test] if mutant.test in WHOLE_MAPS else SHAPES[mutant.test][0]
    with pytest.raises(AssertionError):
        check(shape, drawn(shape))
