"""Which bfloat16 convolutions of training the direct kernels, packing weights in the call, make faster than oneDNN."""

from __future__ import annotations

from ..spec import ConvSpec

MEASURED = ("avx512_bf16",)  # the tiers that the rule was measured on; on others torch's kernels stay
LEAST_CHANNELS = 16
MOST_PIXELS = {"1x1": 1000, "1xn": 288}  # of all images


def trains_directly(spec: ConvSpec, tier: str) -> bool:
    """Whether the direct sum pays, forward or as the gradient of x.

    Of v3's layers at batch 16 and 139x139 on a Zen 4: 1x1 on 7x7 maps 1.06 to 1.12 times as fast as oneDNN and on 3x3
    maps 1.17 to 1.61, 1x3 and 3x1 there 1.16 to 1.32, stride 2 1.03 to 1.23. Of the others, 0.86 to 1.1, oneDNN's stay.
    """
    if tier not in MEASURED or min(spec.c, spec.oc) < LEAST_CHANNELS:
        return False
    if spec.stride != (1, 1):
        return True
    longest = max(spec.kh, spec.kw)
    form = "1x1" if longest == 1 else "1xn" if min(spec.kh, spec.kw) == 1 else ""
    return spec.n * spec.oh * spec.ow <= MOST_PIXELS.get(form, 0)
