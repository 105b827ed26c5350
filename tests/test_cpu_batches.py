"""Every distinct layer of the variants at batch 0, 1 and 3, both memory formats, every tier and dtype, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from inception_fast.kernels import cpu
from inception_fast.kernels.spec import ConvSpec

from conv_shapes import CONV_SHAPES, ConvShape
from cpu_plans import Conv, integers

TIERS = {"float32": cpu.tiers(), "bfloat16": (*cpu.tiers(), *cpu.EMULATED)}


def small(shape: ConvShape, n: int) -> ConvSpec:
    """The layer with its own channels, taps, stride and padding, on the smallest map with an inner pixel.

    What a larger map adds is more of the same pixels, and the kernels' remainders of pixels by 2, 6 and 14: three
    images of such maps leave remainders too, in tiles that reach over two and three images, which larger maps have not.
    """

    def size(own: int, kernel: int, before: int, after: int) -> int:
        least = kernel + 2 * shape.stride + (0 if before or after else shape.stride)
        return own if own <= least else least + (own - least) % shape.stride

    top, bottom, left, right = shape.padding
    h, w = size(shape.h, shape.kh, top, bottom), size(shape.w, shape.kw, left, right)
    stride = (shape.stride, shape.stride)
    return ConvSpec(n, h, w, shape.c, shape.oc, shape.kh, shape.kw, stride, shape.padding, shape.groups)


def layouts(conv: Conv) -> list[Conv]:
    return [
        replace(conv, x=conv.x.contiguous(memory_format=form))
        for form in (torch.contiguous_format, torch.channels_last)
    ]


@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("kernel", sorted({(s.kh, s.kw, s.stride) for s in CONV_SHAPES}), ids=str)
def test_every_layer_is_exact_in_every_batch(kernel: tuple[int, int, int], dtype: str) -> None:
    for shape in (s for s in CONV_SHAPES if (s.kh, s.kw, s.stride) == kernel):
        conv = integers(replace(small(shape, 3), dtype=dtype))
        truth = conv.reference()
        assert truth.abs().max() > 0
        nothing = integers(replace(small(shape, 0), dtype=dtype))
        for tier in TIERS[dtype]:
            for threads, form in enumerate(layouts(conv), 1):
                assert torch.equal(form.run(tier, threads).double(), truth), (shape, tier)
            alone = layouts(conv.image(1))[shape.oc % 2]
            assert torch.equal(alone.run(tier, threads=2).double(), truth[1:2]), (shape, tier)
            assert nothing.run(tier).shape == (0, *truth.shape[1:])


def test_small_maps_keep_every_kind_of_border() -> None:
    for shape in CONV_SHAPES:
        spec = small(shape, 3)
        assert spec.h <= shape.h and spec.w <= shape.w
        assert (shape.h - spec.h) % shape.stride == 0 and (shape.w - spec.w) % shape.stride == 0
        whole = shape.h == spec.h
        first_inner = -(-shape.padding[0] // shape.stride)
        assert whole or first_inner * shape.stride - shape.padding[0] + shape.kh <= spec.h, "no pixel off the borders"
