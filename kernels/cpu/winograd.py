"""Which convolutions Winograd's algorithm makes faster, and by which tile.

A count of multiply-adds, of the products and of the two transforms. Of 19 layers at batch 16 on a Zen 4, measured gains
were 0.81 to 0.99 of what it says.
"""

from __future__ import annotations

import math

from ..spec import ConvSpec

Tile = tuple[int, int]

# Outputs of a tile for a kernel, as winograd_pack.cpp has them, the preferred one first.
TILES: dict[tuple[int, int], tuple[Tile, ...]] = {
    (3, 3): ((4, 4), (2, 2)),
    (5, 5): ((2, 2),),
    (1, 3): ((1, 4),),
    (3, 1): ((4, 1),),
    (1, 7): ((1, 4),),
    (7, 1): ((4, 1),),
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
