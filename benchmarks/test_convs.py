"""Every distinct convolution of the six networks, each with how often they run it.

Without v2's grouped stem, for which there is no operator: networks time it.
"""

from __future__ import annotations

import pytest
from inventory import convs
from operands import device_of, exact, image, macs, operands

import inception_fast as fast
from conv_shapes import ConvShape

CONVS = {shape: uses for shape, uses in convs().items() if shape.groups == 1}


@pytest.mark.parametrize("shape", CONVS, ids=str)
def test_conv(measure, shape: ConvShape, backend: str) -> None:
    x, parts = image(shape), operands(shape)

    def make(name: str):
        device = device_of(name)
        mine, (weight, scale, shift) = x.to(device), (part.to(device) for part in parts)
        return lambda: fast.ops.conv_bn_relu(
            mine, weight, scale, shift, stride=shape.stride, padding=shape.padding, backend=name
        )

    measure(make, lambda: exact(x, shape, parts), macs=macs(shape), multiplicity=dict(CONVS[shape]))
