"""The schedule of convolutions that are pooled, at the sizes that networks have and at odd ones: which lines a band
has, and that its tiles and lines neither wait for each other for ever nor overwrite what is still needed.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
import pytest
from inception_fast.kernels.cuda import abi
from numpy.typing import NDArray

from kernel_maps import built, every_config, pointer

Integers = NDArray[np.int32]
AHEAD = 16  # POOLED_TILES_AHEAD
WINDOW = 3


class Sizes(NamedTuple):
    """A square convolution of stride 1 and its maximum's rows and columns."""

    side: int
    c: int
    oc: int
    kernel: int
    padding: int
    pooled: int


# v3's two and BN-Inception's, whose last windows are clipped; small and odd ones.
SHAPES = {
    "147": Sizes(147, 32, 64, 3, 1, 73),
    "71": Sizes(73, 80, 192, 3, 0, 35),
    "56": Sizes(56, 64, 192, 3, 1, 28),
    "half of its rows": Sizes(40, 16, 64, 3, 1, 10),
    "5x5": Sizes(31, 48, 200, 5, 2, 15),
    "few rows": Sizes(7, 24, 96, 3, 1, 4),
    "one window": Sizes(5, 136, 16, 3, 0, 1),
    "windows of one row": Sizes(3, 64, 64, 1, 0, 2),
}


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return built(tmp_path_factory.mktemp("maps"))


def described(shape: Sizes, n: int) -> abi.Conv:
    out = shape.side + 2 * shape.padding - shape.kernel + 1
    conv = abi.Conv(
        x=4096, weights=4096, scale=4096, shift=4096, x_pitch=shape.c, n=n, h=shape.side, w=shape.side, c=shape.c,
        oc=shape.oc, kh=shape.kernel, kw=shape.kernel, stride_h=1, stride_w=1, top=shape.padding, left=shape.padding,
        oh=out, ow=out, pooled_h=shape.pooled, pooled_w=shape.pooled, splits=1, outputs=1,
    )  # fmt: skip
    conv.output[0] = abi.Output(4096, shape.oc, shape.oc, 1)
    return conv


def able(maps: ctypes.CDLL, conv: abi.Conv) -> dict[int, abi.Config]:
    """The configurations that run it, by their index."""
    text = ctypes.create_string_buffer(4000)
    return {
        index: cut
        for index, cut in enumerate(every_config(maps))
        if cut.pooled and not maps.hopper_conv_reasons(ctypes.byref(conv), 1, 0, index, text, len(text))
    }


class Band:
    """A block's, as the kernel's header has it."""

    def __init__(self, maps: ctypes.CDLL, conv: abi.Conv, config: int, bands: int, block: int) -> None:
        head, sizes = np.zeros(4, np.int32), np.zeros(4, np.int32)
        self.blocks = maps.maps_band(ctypes.byref(conv), config, bands, block, pointer(head), None)
        self.column, self.row, count, self.tiles = map(int, head)
        self.lines = np.zeros((count, 4), np.int32)
        maps.maps_band(ctypes.byref(conv), config, bands, block, pointer(head), pointer(self.lines))
        maps.maps_pooled(ctypes.byref(conv), config, pointer(sizes))
        self.pitch, self.image_rows, self.ring, self.end = map(int, sizes)
        self._maps, self._conv, self._config = maps, conv, config

    def allowed(self, row: int, made: int, before: int) -> int:
        """How many tiles may be stored where `before` of them may be already, the next line begins at a row of the
        band's and `made` tiles are stored.
        """
        given = ctypes.byref(self._conv), self._config
        while before < self.tiles and self._maps.maps_may_store(*given, before, row, made):
            before += 1
        return before


@pytest.mark.parametrize("n", [1, 3, 128])
@pytest.mark.parametrize("name", SHAPES)
def test_every_line_is_in_one_band_of_each_column(maps: ctypes.CDLL, name: str, n: int) -> None:
    shape = SHAPES[name]
    conv, out = described(shape, n), shape.side + 2 * shape.padding - shape.kernel + 1
    for config in able(maps, conv):
        lines = n * shape.pooled
        for bands in {1, min(7, lines), min(132, lines)}:
            first = Band(maps, conv, config, bands, 0)
            every = [Band(maps, conv, config, bands, block) for block in range(first.blocks)]
            for column in range(-(-shape.oc // able(maps, conv)[config].columns)):
                mine = [band for band in every if band.column == column]
                found = np.concatenate([band.lines for band in mine])
                image, h = np.divmod(np.arange(lines), shape.pooled)
                top = image * first.image_rows + 2 * h
                last = image * first.image_rows + np.minimum(2 * h + WINDOW - 1, out - 1)
                assert (found == np.stack((image, h, top, last), 1)).all()
                assert max(len(b.lines) for b in mine) - min(len(b.lines) for b in mine) <= 1


@pytest.mark.parametrize("fast", [(True, True), (False, False), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_tiles_and_lines_take_turns(maps: ctypes.CDLL, name: str, fast: tuple[bool, bool]) -> None:
    """Whichever half of a tile is stored as soon as it may be, or only when a line waits for it: tiles end, lines find
    the rows that they need, and no barrier of a tile is used again early.
    """
    shape = SHAPES[name]
    for n, bands in ((2, 1), (9, 4)):
        conv = described(shape, n)
        found = able(maps, conv)
        assert found
        for config, cut in found.items():
            for block in (0, Band(maps, conv, config, bands, 0).blocks - 1):
                walked(Band(maps, conv, config, bands, block), cut.rows, fast)


def walked(band: Band, positions: int, fast: tuple[bool, bool]) -> None:
    length = band.ring * band.pitch
    held, stored = np.full(length, -1), [0, 0]
    made, allowed = 0, band.allowed(0, 0, 0)

    def store(half: int, last: int) -> None:
        """Tiles up to the last."""
        assert last < allowed, "a line waits for a tile that waits for it"
        for tile in range(stored[half], last + 1):
            at = tile * positions + half * positions // 2 + np.arange(positions // 2)
            assert (held[at % length] < at).all(), "what another half has stored is overwritten by something older"
            held[at % length] = at
            stored[half] = tile + 1

    for i, (_, _, top, last) in enumerate(band.lines - [0, 0, band.row, band.row]):
        end = (last * band.pitch + band.end - 1) // positions
        assert end < band.tiles
        while made <= end:
            for half in range(2):
                store(half, max(allowed - 1, made) if fast[half] else made)
            assert allowed <= min(stored) + AHEAD and max(stored) <= made + AHEAD, "a barrier is used again"
            made += 1
            allowed = band.allowed(int(top), made, allowed)
        for row in {top, min(top + 1, last), last}:
            wanted = row * band.pitch + np.arange(band.end)
            assert (held[wanted % length] == wanted).all(), "a row was overwritten, or is not there yet"
        beginning = band.lines[i + 1][2] - band.row if i + 1 < len(band.lines) else top
        allowed = band.allowed(int(beginning), made, allowed)
    assert allowed == band.tiles, "the last tiles wait for ever"


@pytest.mark.parametrize("columns", [64, 96, 192])
def test_results_do_not_meet_in_a_bank(maps: ctypes.CDLL, columns: int) -> None:
    """Of eight lanes with 16 bytes each: the same columns of eight positions, and eight columns of one."""
    places = np.array([[maps.maps_result_place(columns, p, g) for g in range(columns // 8)] for p in range(64)])
    assert sorted(places.flat) == list(range(64 * columns // 8)), "each has a place of its own"
    for first in range(56):
        for group in range(columns // 8):
            assert len({int(place) % 8 for place in places[first : first + 8, group]}) == 8
    for row in places:
        for group in range(0, columns // 8 - 7, 8):
            assert len({int(place) % 8 for place in row[group : group + 8]}) == 8
