"""Which weight gradients Winograd's algorithm makes faster, and by which tile: a count, as in winograd.py."""

from __future__ import annotations

import functools
import math

from ..spec import ConvSpec
from .winograd import DIRECT, EXACT_TILE, LEAST_CHANNELS, TILES, Tile

TRANSFORM = 16  # multiply-adds' worth of a point's transform, for each channel that goes in
FINISH = 24  # of taking a point's sum to the weights, once a call
LEAST_GAIN = 1.15


@functools.lru_cache(maxsize=4096)
def gradient_tile(spec: ConvSpec, every: bool) -> Tile:
    """The tile by which the gradient of the convolution's weight pays, of all or of the exact one alone; (0, 0): none."""
    if spec.dtype != "float32" or spec.stride != (1, 1) or spec.groups != 1 or min(spec.c, spec.oc) < LEAST_CHANNELS:
        return DIRECT
    tiles = TILES.get((spec.kh, spec.kw), ()) if every or (spec.kh, spec.kw) == (3, 3) else ()
    gains = {tile: gradient_gain(spec, tile) for tile in tiles if every or tile == EXACT_TILE}
    best = max(gains, key=gains.__getitem__, default=DIRECT)
    return best if best != DIRECT and gains[best] >= LEAST_GAIN else DIRECT


def gradient_gain(spec: ConvSpec, tile: Tile) -> float:
    """How many times the multiply-adds of the direct sum, padding included, are those of the batch's tiles, by count."""
    points = (tile[0] + spec.kh - 1) * (tile[1] + spec.kw - 1)
    tiles = spec.n * math.ceil(spec.oh / tile[0]) * math.ceil(spec.ow / tile[1])
    each = tiles * (spec.c * spec.oc + TRANSFORM * (spec.c + spec.oc)) + FINISH * spec.c * spec.oc
    return spec.n * spec.oh * spec.ow * spec.kh * spec.kw * spec.c * spec.oc / (points * each)
