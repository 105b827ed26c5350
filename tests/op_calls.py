"""Arguments of the fused operations: the shapes they are tested on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import numerics

# name: (channels in and out, map, kernel, stride, padding (top, bottom, left, right)). Each names the risk it covers.
CONVS: dict[str, tuple[Any, ...]] = {
    "pointwise": (24, 40, (5, 7), (1, 1), (1, 1), (0, 0, 0, 0)),
    "wide_1x7": (16, 24, (9, 9), (1, 7), (1, 1), (0, 0, 3, 3)),
    "tall_7x1_on_a_shorter_map": (16, 24, (3, 9), (7, 1), (1, 1), (3, 3, 0, 0)),
    "stem_with_3_channels": (3, 32, (15, 17), (3, 3), (2, 2), (0, 0, 0, 0)),
    "lopsided_tf_same": (8, 12, (8, 10), (3, 3), (2, 2), (0, 1, 0, 1)),
    "channels_equal_the_map": (8, 8, (8, 8), (5, 5), (1, 1), (2, 2, 2, 2)),
    "one_pixel": (32, 48, (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)),
    "one_channel": (1, 1, (24, 24), (3, 3), (1, 1), (1, 1, 1, 1)),
    "stride_skips_the_edge": (8, 20, (10, 11), (1, 1), (3, 2), (0, 0, 0, 0)),
}


def conv_arguments(case: str, dtype: torch.dtype = torch.float32, n: int = 2) -> tuple[list[Tensor], dict[str, Any]]:
    c, oc, (h, w), kernel, stride, padding = CONVS[case]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    draws = [numerics.random(n, c, h, w, dtype=dtype), numerics.random(oc, c, *kernel, seed=1, dtype=dtype)]
    draws += [numerics.random(oc, seed=2, dtype=wide, low=0.5), numerics.random(oc, seed=3, dtype=wide)]
    return draws, {"stride": stride, "padding": padding}


def pair_arguments(kind: str, dtype: torch.dtype = torch.float32, size: int = 7) -> list[Tensor]:
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    middle = 12 if kind == "chain" else 8
    return [
        numerics.random(2, 8, 6, 9, dtype=dtype),
        numerics.random(12, 8, 1, size, seed=1, dtype=dtype),
        numerics.random(12, seed=2, dtype=wide, low=0.5),
        numerics.random(12, seed=3, dtype=wide),
        numerics.random(10, middle, size, 1, seed=4, dtype=dtype),
        numerics.random(10, seed=5, dtype=wide, low=0.5),
        numerics.random(10, seed=6, dtype=wide),
    ]


def pool_arguments(dtype: torch.dtype = torch.float32, oc: int = 6) -> list[Tensor]:
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    draws = [numerics.random(2, 8, 7, 9, dtype=dtype), numerics.random(oc, 8, 1, 1, seed=1, dtype=dtype)]
    return [*draws, numerics.random(oc, seed=2, dtype=wide, low=0.5), numerics.random(oc, seed=3, dtype=wide)]


def wide(arguments: list[Tensor]) -> list[Tensor]:
    return [argument.double() for argument in arguments]
