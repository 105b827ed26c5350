"""Which weight gradients Winograd's algorithm makes faster, and by which tile: a count, as in winograd.py."""

from __future__ import annotations

import functools
import math

from ..spec import ConvSpec
from .winograd import DIRECT, TILES, Tile, direct_rate, points, taps_on_map, trains_by_tiles, transform

# Tiles that err like a direct sum, by kernel: at most 4.6e-7 round float64 on v3's layers with a step's data, where
# oneDNN has 8.2e-7. Tiles of 4x4 for 3x3, 2x2 for 5x5 and of four for 1x7 err by 9e-7 to 2.1e-6; the next larger ones
# are expected to err by 4.0, 3.3 and 2.3 times as much (tests/numerics.py).
BY_DEFAULT: dict[tuple[int, int], Tile] = {(3, 3): (2, 2), (1, 3): (1, 4), (3, 1): (4, 1)}
FINISH = 0.7  # for each point and sum, of taking the sums to the weights: the more points, the farther away they lie
LEAST_GAIN = 1.25  # on large maps oneDNN is up to 1.2 times as fast as the direct kernel here


@functools.lru_cache(maxsize=4096)
def gradient_tile(spec: ConvSpec, every: bool, tier: str) -> Tile:
    """The tile by which the gradient of the convolution's weight pays on the tier; (0, 0): none.

    In float32 of all or of the default ones. In bfloat16 of all: they err by less than a hundredth of what rounding x
    and the gradient to bfloat16 has cost.

    Fitted to v3's layers on a Zen 4, of whose measured gains over the direct kernel it says 0.86 to 1.18.
    """
    every = every or spec.dtype == "bfloat16"
    if not trains_by_tiles(spec, tier):
        return DIRECT
    kernel = spec.kh, spec.kw
    tiles = TILES.get(kernel, ())
    rate = direct_rate(spec.dtype, tier)
    gains = {tile: gradient_gain(spec, tile) / rate for tile in tiles if every or tile == BY_DEFAULT.get(kernel)}
    best = max(gains, key=gains.__getitem__, default=DIRECT)
    return best if best != DIRECT and gains[best] >= LEAST_GAIN else DIRECT


def gradient_gain(spec: ConvSpec, tile: Tile) -> float:
    """How many times the multiply-adds of the direct sum, which leaves out padding, are those of the batch's tiles."""
    count = math.prod(points(spec, tile))
    tiles = spec.n * math.ceil(spec.oh / tile[0]) * math.ceil(spec.ow / tile[1])
    into = transform(spec, tile) / 2  # there is none on the way out
    each = tiles * (spec.c * spec.oc + into * (spec.c + spec.oc)) + FINISH * count * spec.c * spec.oc
    return spec.n * taps_on_map(spec) * spec.c * spec.oc / (count * each)
