"""Which convolutions Winograd's algorithm makes faster, and by which tile.

A count of multiply-adds, of the products and of the two transforms. Of 19 layers at batch 16 on a Zen 4, measured gains
were 0.81 to 0.99 of what it says.
"""

from __future__ import annotations

import functools
import math

from ..spec import ConvSpec

Tile = tuple[int, int]

# Outputs of a tile for a kernel, as winograd_pack.cpp has them, the preferred one first.
TILES: dict[tuple[int, int], tuple[Tile, ...]] = {
    (3, 3): ((4, 4), (2, 2)),
    (5, 5): ((2, 2),),
    (1, 3): ((1, 4),),
    (3, 1): ((4, 1),),
    (1, 7): ((1, 6), (1, 4)),
    (7, 1): ((6, 1), (4, 1)),
}
DIRECT: Tile = (0, 0)
TRANSFORM = 12  # multiply-adds' worth of a point's transforms, for each channel that goes in or comes out
LEAST_GAIN = 1.25  # below it the weights, which are up to four times as many, cost more than products save


def winograd_tile(spec: ConvSpec) -> tuple[Tile, str]:
    """The tile that pays, or (0, 0) and why none does.

    The batch is not looked at, so that an image alone and in a batch take the same path and give the same bits.
    """
    tiles = TILES.get((spec.kh, spec.kw))
    if spec.dtype != "float32":
        return DIRECT, f"{spec.dtype}: float32 alone"
    if tiles is None:
        return DIRECT, f"kernel {spec.kh}x{spec.kw}: 3x3, 5x5, 1x3, 3x1, 1x7 and 7x1 alone"
    if spec.stride != (1, 1) or spec.groups != 1:
        return DIRECT, f"stride {spec.stride}, {spec.groups} groups: stride 1 and one group alone"
    gains = {tile: gain(spec, tile) for tile in tiles}
    best = max(tiles, key=gains.__getitem__)
    if gains[best] < LEAST_GAIN:
        return DIRECT, f"saves too little: {gains[best]:.2f} times at most, from {LEAST_GAIN} on it pays"
    return best, ""


def gain(spec: ConvSpec, tile: Tile) -> float:
    """How many times the multiply-adds of the direct sum are those of the tiles of an image, by count."""
    points = (tile[0] + spec.kh - 1) * (tile[1] + spec.kw - 1)
    tiles = math.ceil(spec.oh / tile[0]) * math.ceil(spec.ow / tile[1])
    each = spec.c * spec.oc + TRANSFORM * (spec.c + spec.oc)
    return spec.oh * spec.ow * spec.kh * spec.kw * spec.c * spec.oc / (points * tiles * each)


EXACT_TILE: Tile = (2, 2)  # of 3x3: its transforms are exact, and its errors like those of oneDNN's direct sums
WEIGHTS = 8  # multiply-adds' worth of transforming a weight into a point's, in training at every call
LEAST_TRAINING_GAIN = 1.15
LEAST_CHANNELS = 16  # with fewer, most of a vector is padding


@functools.lru_cache(maxsize=4096)
def training_tile(spec: ConvSpec, every: bool) -> Tile:
    """The tile that pays in training, of all or of the exact one alone; (0, 0): none does.

    Fitted to v3's layers on a Zen 4, of whose measured gains over oneDNN it says 0.80 to 1.16. There the direct kernels
    of this package took 1.05 times oneDNN's time, so what does not pay is left to it.
    """
    tiles = TILES.get((spec.kh, spec.kw), ()) if every or (spec.kh, spec.kw) == (3, 3) else ()
    if spec.dtype != "float32" or spec.stride != (1, 1) or spec.groups != 1 or min(spec.c, spec.oc) < LEAST_CHANNELS:
        return DIRECT
    gains = {tile: _training_gain(spec, tile) for tile in tiles if every or tile == EXACT_TILE}
    best = max(gains, key=gains.__getitem__, default=DIRECT)
    return best if best != DIRECT and gains[best] >= LEAST_TRAINING_GAIN else DIRECT


def _training_gain(spec: ConvSpec, tile: Tile) -> float:
    """As `gain`, for the whole batch, with the weights' transform, beside a direct sum that leaves out padding."""
    points = (tile[0] + spec.kh - 1) * (tile[1] + spec.kw - 1)
    tiles = spec.n * math.ceil(spec.oh / tile[0]) * math.ceil(spec.ow / tile[1])
    each = tiles * (spec.c * spec.oc + TRANSFORM * (spec.c + spec.oc)) + WEIGHTS * spec.c * spec.oc
    return spec.n * taps_on_map(spec) * spec.c * spec.oc / (points * each)


def taps_on_map(spec: ConvSpec) -> int:
    """Taps of all outputs of an image at stride 1 that do not lie on padding."""
    return _taps(spec.h, spec.oh, spec.kh, spec.padding[0]) * _taps(spec.w, spec.ow, spec.kw, spec.padding[2])


def _taps(size: int, out: int, kernel: int, before: int) -> int:
    """Taps of all outputs along an axis that lie on the map."""
    return sum(min(size, at - before + kernel) - max(0, at - before) for at in range(out))
