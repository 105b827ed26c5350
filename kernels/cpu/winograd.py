"""Which convolutions Winograd's algorithm makes faster, and by which tile."""

from __future__ import annotations

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
    return tiles[0], ""
