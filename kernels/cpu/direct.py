"""Which bfloat16 convolutions of training the direct kernels, packing weights in the call, make faster than oneDNN."""

from __future__ import annotations

from ..spec import ConvSpec

LEAST_CHANNELS = {"avx2": 1, "avx512": 16, "avx512_bf16": 16}  # of the tiers that were measured; elsewhere torch's stay
MOST_PIXELS = {"1x1": 1000, "1xn": 288}  # of all images, where oneDNN multiplies pairs of bfloat16


def trains_directly(spec: ConvSpec, tier: str) -> bool:
    """Whether the direct sum pays, forward or as the gradient of x.

    Without products of pairs oneDNN widens bfloat16 for each of them, and on AVX2 its fast kernels know none: of v3's
    layers at batch 16 and 139x139 the direct sum is 1.3 to 4.8 times as fast on an AVX-512 Xeon, but for the three
    channels of the first, and 3 to 45 times where oneDNN is held to AVX2.

    With these products, on a Zen 4, 1x1 on 7x7 maps are 1.06 to 1.12 times as fast as oneDNN and on 3x3 maps 1.17 to
    1.61, 1x3 and 3x1 there 1.16 to 1.32, stride 2 1.03 to 1.23. Of the others, 0.86 to 1.1, oneDNN's stay.
    """
    least = LEAST_CHANNELS.get(tier)
    if least is None or min(spec.c, spec.oc) < least:
        return False
    if tier != "avx512_bf16" or spec.stride != (1, 1):
        return True
    longest = max(spec.kh, spec.kw)
    form = "1x1" if longest == 1 else "1xn" if min(spec.kh, spec.kw) == 1 else ""
    return spec.n * spec.oh * spec.ow <= MOST_PIXELS.get(form, 0)
