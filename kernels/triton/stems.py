"""The host side of the stem: its tiles, and its launch for an image as the caller has it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import triton
from torch import Tensor, float32

from ..spec import ConvSpec
from . import stem
from .configs import Config
from .convolve import Packed
from .launch import Launch, Map, parameters, power, upcast

STEM = Config("stem", block_m=128, block_n=64, block_k=32, stages=2)  # where nothing was measured
MOST_UNROLLED = 8  # steps; exact float32 spills unrolled
# The axis of two without contiguity that the compiler takes lanes from: the last since Triton 3.7.
LANES = int(tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7))


def box(oh: int, ow: int, pixels: int) -> tuple[int, int]:
    """Rows and columns of the box of `pixels` outputs that hangs over the least; wider boxes first."""
    boxes = [(pixels // width, width) for width in (16, 32, 64, 128, 256) if width <= pixels]
    return min(boxes, key=lambda b: (triton.cdiv(oh, b[0]) * triton.cdiv(ow, b[1]), -b[1]))


def fitting(config: Config, columns: int, products: int, exact: bool) -> Config:
    """`config` with a tile no larger than a stem's columns and products. `exact`: float32 that is not to be rounded; a
    tcgen05 product needs 64 rows or more, and Triton 3.7 rounds float32 that came from bytes to TF32 for it.
    """
    return dataclasses.replace(
        config, form="stem", block_m=min(config.block_m, 32) if exact else config.block_m,
        block_n=min(config.block_n, power(columns, 16, 64)), block_k=min(config.block_k, power(products, 16, 64)),
    )  # fmt: skip


def convolution(
    name: str, spec: ConvSpec, x: Tensor, packed: Packed, y: Map, *,
    scale: Any = None, shift: Any = None, config: Config | None = None, tf32: bool = False,
) -> list[Launch]:  # fmt: skip
    """A convolution straight from [n, c, h, w] of any strides, uint8 or floating: a = scale * x + shift, then the sum.

    One group: `packed` and `spec` are of as many channels as x has.
    """
    if spec.n == 0:
        return []
    group, products = packed.groups[0], spec.kh * spec.kw * spec.c
    single = packed.weight.dtype is float32
    config = fitting(config or STEM, group.channels, products, single and not tf32)
    blocks, steps = triton.cdiv(group.channels, config.block_n), triton.cdiv(products, config.block_k)
    height, width = box(spec.oh, spec.ow, config.block_m)
    strides = dict(zip(("stride_n", "stride_c", "stride_y", "stride_x"), x.stride(), strict=True))
    affine = scale is not None or shift is not None
    # A parameter that is absent beside one that is there is the neutral one.
    before = [np.full(spec.c, d, np.float32) if affine and v is None else v for v, d in ((scale, 1), (shift, 0))]
    arguments = {
        **{"x_ptr": x, "w_ptr": packed.weight, "scale_ptr": packed.scale, "shift_ptr": packed.shift, "y_ptr": y.data},
        **{"before_scale_ptr": parameters(before[0], y.data), "before_shift_ptr": parameters(before[1], y.data)},
        **{"h": spec.h, "w": spec.w, "oh": spec.oh, "ow": spec.ow, "oc": group.channels},
        **{"blocks": blocks, **strides, "w_pitch": group.pitch, "y_pitch": y.pitch},
        **{"C": spec.c, "KH": spec.kh, "KW": spec.kw, "STRIDE_H": spec.stride[0], "STRIDE_W": spec.stride[1]},
        **{"PAD_TOP": spec.padding[0], "PAD_LEFT": spec.padding[2], "PADDED": any(spec.padding)},
        **{"AFFINE": affine, "RELU": group.relu, "PRECISION": "tf32" if tf32 and single else "ieee"},
        **{"UPCAST": upcast(packed.weight.dtype), "BOX_H": height, "BOX_W": width},
        **{"BLOCK_N": config.block_n, "BLOCK_K": config.block_k},
        **{"UNROLLED": 1 if (single and not tf32) or steps > MOST_UNROLLED else steps, "PIXELS": LANES},
    }
    grid = (spec.n * triton.cdiv(spec.oh, height) * triton.cdiv(spec.ow, width) * blocks,)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return [Launch(name, stem.stem_kernel, grid, arguments, options)]
