"""Convolutions of maps whose pixels are no whole lines of 128 bytes apart, beside the same with pixels that begin with
a line: copies of 64 channels then cross none. Dense maps of 224 channels take up to a seventh more a step than those of
256 (`tiles/*`), though every fourth step is half of one; whether their pitch is why, this tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from inception_fast.kernels import cuda
from inception_fast.kernels.cuda import convolve
from inception_fast.kernels.cuda.convolve import Cut, Problem, Target
from inception_fast.kernels.maps import Map, dense
from inception_fast.kernels.spec import ConvSpec
from measure import LAYER_BUDGET, draw
from tails import Raced, agreeing, favourites, line, race_rows

LINE = 64  # channels of 128 bytes
# Of v3, v4 and Inception-ResNet-v2: side of the map, channels, columns, rows and columns of the kernel.
SHAPES = (
    (17, 224, 256, 7, 1),
    (17, 224, 224, 1, 7),
    (17, 160, 192, 7, 1),
    (17, 160, 160, 1, 7),
    (8, 224, 256, 3, 1),
    (35, 96, 96, 3, 3),
    (35, 48, 64, 5, 5),
    (35, 288, 176, 1, 1),
)
TRIED = 8  # the model's favourites


def pitch_rows(batch: int, dtype: str) -> Iterator[list[dict[str, Any]]]:
    """A row for each cut of each shape at either pitch; all so far."""
    return race_rows((line(batch, *shape, dtype) for shape in SHAPES), right_calls)


def right_calls(spec: ConvSpec) -> Raced:
    """Calls by name and pitch whose results are the first one's, and how far the others are off it, of its largest
    value.
    """
    x, *params = draw(spec)
    source, packed = x.permute(0, 2, 3, 1).contiguous(), convolve.pack(*params, x.dtype, x.device)
    y = torch.empty(spec.n, spec.oh, spec.ow, spec.oc, dtype=x.dtype, device=x.device)
    calls: dict[str, Callable[[], Any]] = {}
    for config in favourites(spec, TRIED, halo=True):
        for place in (dense(source), on_lines(source)):
            problem = Problem(spec, place, packed, (Target(dense(y), spec.relu),))
            launch = convolve.group("pitch", cuda.library(), [problem], Cut(config))
            calls[f"{config.name}, {place.pitch} apart"] = launch.run
    return agreeing(calls, y, LAYER_BUDGET[spec.dtype])


def on_lines(x: torch.Tensor) -> Map:
    """A copy of a contiguous [n, h, w, c] tensor whose pixels begin with a line of their own; no numbers between."""
    n, h, w, c = x.shape
    wide = x.new_full((n, h, w, -(-c // LINE) * LINE), float("nan"))
    wide[..., :c] = x
    return dense(wide).channels(0, c)
