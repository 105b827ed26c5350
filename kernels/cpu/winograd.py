"""Which convolutions Winograd's algorithm makes faster, and by which tile.

A count of multiply-adds, of the products and of the two transforms. Of the 3x3 and 5x5 layers of five variants by every
tile, one image on two threads of a Zen 4, measured gains were 0.79 to 1.19 of what it says in float32 and 0.88 to 1.48
in bfloat16, whose direct sums over few channels fall short of their rate.
"""

from __future__ import annotations

import functools
import math

from ..spec import ConvSpec

Tile = tuple[int, int]

# Outputs of a tile for a kernel, as winograd_pack.cpp has them, the largest first.
TILES: dict[tuple[int, int], tuple[Tile, ...]] = {
    (3, 3): ((6, 6), (4, 4), (2, 2)),
    (5, 5): ((4, 4), (2, 2)),
    (1, 3): ((1, 4),),
    (3, 1): ((4, 1),),
    (1, 7): ((1, 6), (1, 4)),
    (7, 1): ((6, 1), (4, 1)),
}
DIRECT: Tile = (0, 0)
LEAST_GAIN = 1.15  # below it the points' weights, up to 14 times the kernel's bytes, cost more than products save
CLOSE = 0.95  # of the best gain: of tiles that are so close, the one with the fewest weights
TALL = 14  # a point's product of fewer tiles waits for its weights, and takes as long as one of so many
# Products of bfloat16 that a tier's direct sums make while a tile makes one, of float32: other tiers widen bfloat16.
DIRECT_RATE = {"avx512_bf16": 2.0, "amx_bf16": 14.0, "amx_bf16_emulated": 14.0}


def winograd_tile(spec: ConvSpec, tier: str) -> tuple[Tile, str]:
    """The tile that pays on the tier, or (0, 0) and why none does.

    The batch is not looked at, so that an image alone and in a batch take the same path and give the same bits: an
    image alone is what is counted.
    """
    tiles = TILES.get((spec.kh, spec.kw))
    if tiles is None:
        return DIRECT, f"kernel {spec.kh}x{spec.kw}: 3x3, 5x5, 1x3, 3x1, 1x7 and 7x1 alone"
    if spec.stride != (1, 1) or spec.groups != 1:
        return DIRECT, f"stride {spec.stride}, {spec.groups} groups: stride 1 and one group alone"
    rate = direct_rate(spec.dtype, tier)
    gains = {tile: gain(spec, tile) / rate for tile in tiles}
    most = max(gains.values())
    if most < LEAST_GAIN:
        return DIRECT, f"saves too little: {most:.2f} times at most, from {LEAST_GAIN} on it pays"
    close = (tile for tile in tiles if gains[tile] >= CLOSE * most)
    return min(close, key=lambda tile: math.prod(points(spec, tile))), ""


def direct_rate(dtype: str, tier: str) -> float:
    return DIRECT_RATE.get(tier, 1.0) if dtype == "bfloat16" else 1.0


def gain(spec: ConvSpec, tile: Tile) -> float:
    """How many times the multiply-adds of the direct sum are those of the tiles of an image, by count."""
    tiles = math.ceil(spec.oh / tile[0]) * math.ceil(spec.ow / tile[1])
    each = max(tiles, TALL) * spec.c * spec.oc + tiles * transform(spec, tile) * (spec.c + spec.oc)
    return spec.oh * spec.ow * spec.kh * spec.kw * spec.c * spec.oc / (math.prod(points(spec, tile)) * each)


def points(spec: ConvSpec, tile: Tile) -> Tile:
    """Products of a tile along both axes."""
    return tile[0] + spec.kh - 1, tile[1] + spec.kw - 1


def transform(spec: ConvSpec, tile: Tile) -> int:
    """Multiply-adds of a point's transforms along both axes, for each channel that goes in or comes out."""
    return sum(n for n in points(spec, tile) if n > 1)


EXACT_TILE: Tile = (2, 2)  # of 3x3: its transforms are exact, and its errors like those of oneDNN's direct sums
WEIGHTS = 8  # multiply-adds' worth of transforming a weight into a point's, in training at every call
LEAST_TRAINING_GAIN = 1.15
LEAST_CHANNELS = 16  # with fewer, most of a vector is padding
IN_BFLOAT16 = ("avx2", "avx512", "avx512_bf16")  # tiers on which tiles are known to beat torch's bfloat16 in training


def trains_by_tiles(spec: ConvSpec, tier: str) -> bool:
    """Whether any tile may be for a convolution in training, or for a gradient of it."""
    served = spec.dtype != "bfloat16" or tier in IN_BFLOAT16
    return served and spec.stride == (1, 1) and spec.groups == 1 and min(spec.c, spec.oc) >= LEAST_CHANNELS


@functools.lru_cache(maxsize=4096)
def training_tile(spec: ConvSpec, every: bool, tier: str) -> Tile:
    """The tile that pays in training on the tier; (0, 0): none does.

    In float32 of all tiles or of the exact one alone. In bfloat16 of all: each computes in float32, of weights that are
    not rounded, and so errs less than a direct sum.

    Fitted to v3's layers on a Zen 4, of whose measured gains over oneDNN it says 0.80 to 1.16. There the direct kernels
    of this package took 1.05 times oneDNN's time, so what does not pay is left to it.
    """
    every = every or spec.dtype == "bfloat16"
    tiles = TILES.get((spec.kh, spec.kw), ()) if every or (spec.kh, spec.kw) == (3, 3) else ()
    if not trains_by_tiles(spec, tier):
        return DIRECT
    rate = direct_rate(spec.dtype, tier)
    gains = {tile: _training_gain(spec, tile) / rate for tile in tiles if every or tile == EXACT_TILE}
    best = max(gains, key=gains.__getitem__, default=DIRECT)
    return best if best != DIRECT and gains[best] >= LEAST_TRAINING_GAIN else DIRECT


def _training_gain(spec: ConvSpec, tile: Tile) -> float:
    """As `gain`, for the whole batch, with the weights' transform, beside a direct sum that leaves out padding."""
    tiles = spec.n * math.ceil(spec.oh / tile[0]) * math.ceil(spec.ow / tile[1])
    each = tiles * (spec.c * spec.oc + transform(spec, tile) * (spec.c + spec.oc)) + WEIGHTS * spec.c * spec.oc
    return spec.n * taps_on_map(spec) * spec.c * spec.oc / (math.prod(points(spec, tile)) * each)


def taps_on_map(spec: ConvSpec) -> int:
    """Taps of all outputs of an image at stride 1 that do not lie on padding."""
    return _taps(spec.h, spec.oh, spec.kh, spec.padding[0]) * _taps(spec.w, spec.ow, spec.kw, spec.padding[2])


def _taps(size: int, out: int, kernel: int, before: int) -> int:
    """Taps of all outputs along an axis that lie on the map."""
    return sum(min(size, at - before + kernel) - max(0, at - before) for at in range(out))
