"""What one kernel call is asked to do, as plain frozen data: shapes, strides, paddings, with its work and its traffic.

Tensors are logically NCHW; every kernel meets them as NHWC. Padding is always four-sided: (top, bottom, left, right).
"""

from __future__ import annotations

from dataclasses import dataclass

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}


def out_size(size: int, kernel: int, stride: int, before: int, after: int) -> int:
    """Number of kernel positions along one axis of `size` elements padded by `before` and `after`."""
    return (size + before + after - kernel) // stride + 1


def check(condition: bool, seen: str, allowed: str) -> None:
    """Raises ValueError naming the value seen and the value allowed."""
    if not condition:
        raise ValueError(f"{seen}; allowed: {allowed}")


@dataclass(frozen=True)
class ConvSpec:
    """y = act(residual + residual_scale * (scale * conv(x, w) + shift)), act = ReLU or the identity.

    x is [n, h, w, c], w is [oc, c / groups, kh, kw], scale and shift are float32 [oc], y is [n, oh, ow, oc].
    """

    n: int
    h: int
    w: int
    c: int
    oc: int
    kh: int
    kw: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    groups: int = 1
    relu: bool = True
    residual: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check(self.n >= 0 and min(self.h, self.w, self.c, self.oc) >= 1, f"sizes {self}", "n >= 0, h w c oc >= 1")
        check(min(self.kh, self.kw, *self.stride) >= 1, f"kernel and stride of {self}", "at least 1")
        check(min(self.padding) >= 0, f"padding {self.padding}", "non-negative (top, bottom, left, right)")
        divides = self.groups >= 1 and self.c % self.groups == 0 and self.oc % self.groups == 0
        check(divides, f"groups {self.groups}", "a divisor of c and oc")
        check(self.dtype in ITEM_BYTES, f"dtype {self.dtype!r}", ", ".join(ITEM_BYTES))
        check(
            min(self.oh, self.ow) >= 1,
            f"kernel {self.kh}x{self.kw} on a {self.h}x{self.w} map",
            "not larger than the padded map",
        )

    @property
    def oh(self) -> int:
        return out_size(self.h, self.kh, self.stride[0], self.padding[0], self.padding[1])

    @property
    def ow(self) -> int:
        return out_size(self.w, self.kw, self.stride[1], self.padding[2], self.padding[3])

    def macs(self) -> int:
        """Multiply-adds, taps on the zero padding counted in (the literature's convention)."""
        return self.n * self.oh * self.ow * self.oc * (self.c // self.groups) * self.kh * self.kw

    def flops(self) -> int:
        return 2 * self.macs()

    def bytes(self) -> int:
        """Compulsory traffic: each of x, w, scale, shift, residual and y moved once."""
        y = self.n * self.oh * self.ow * self.oc
        x = self.n * self.h * self.w * self.c
        w = self.oc * (self.c // self.groups) * self.kh * self.kw
        return ITEM_BYTES[self.dtype] * (x + w + y * (2 if self.residual else 1)) + 8 * self.oc


@dataclass(frozen=True)
class PairSpec:
    """Two convolutions with scale, shift and ReLU each, as one call.

    kind "chain": the second reads what the first wrote (1xn then nx1, or the other order).
    kind "split": both read x and write neighbouring channels (1x3 beside 3x1).
    """

    first: ConvSpec
    second: ConvSpec
    kind: str = "chain"

    def __post_init__(self) -> None:
        a, b = self.first, self.second
        check(self.kind in ("chain", "split"), f"kind {self.kind!r}", "chain, split")
        left = (a.n, a.oh, a.ow, a.oc) if self.kind == "chain" else (a.n, a.h, a.w, a.c)
        check(left == (b.n, b.h, b.w, b.c), f"second input {(b.n, b.h, b.w, b.c)}", f"{left} for a {self.kind}")

    def macs(self) -> int:
        return self.first.macs() + self.second.macs()

    def flops(self) -> int:
        return 2 * self.macs()

    def bytes(self) -> int:
        """Compulsory traffic of the fused form: a chain's intermediate never moves, a split's input moves once."""
        a, b = self.first, self.second
        size = ITEM_BYTES[a.dtype]
        if self.kind == "chain":
            return a.bytes() + b.bytes() - 2 * size * b.n * b.h * b.w * b.c
        return a.bytes() + b.bytes() - size * a.n * a.h * a.w * a.c


@dataclass(frozen=True)
class PoolSpec:
    """Max or average pooling of [n, h, w, c].

    `overhang` (bottom, right) is the reach beyond the padded map that torch's ceil_mode allows, never counted.
    Padding is minus infinity for "max"; for "avg" it is zero and counts in the divisor only with count_include_pad.
    """

    n: int
    h: int
    w: int
    c: int
    kh: int
    kw: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    kind: str = "max"
    count_include_pad: bool = False
    overhang: tuple[int, int] = (0, 0)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check(self.kind in ("max", "avg"), f"kind {self.kind!r}", "max, avg")
        check(self.dtype in ITEM_BYTES, f"dtype {self.dtype!r}", ", ".join(ITEM_BYTES))
        check(self.n >= 0 and min(self.h, self.w, self.c) >= 1, f"sizes {self}", "n >= 0, h w c >= 1")
        check(min(self.kh, self.kw, *self.stride) >= 1, f"kernel and stride of {self}", "at least 1")
        check(min(*self.padding, *self.overhang) >= 0, f"padding {self.padding} {self.overhang}", "non-negative")
        check(
            max(self.padding[:2]) < self.kh and max(self.padding[2:]) < self.kw,
            f"padding {self.padding}",
            "less than the kernel, or a window would hold nothing",
        )
        check(
            min(self.oh, self.ow) >= 1,
            f"kernel {self.kh}x{self.kw} on a {self.h}x{self.w} map",
            "not larger than the padded map",
        )

    @property
    def oh(self) -> int:
        return out_size(self.h, self.kh, self.stride[0], self.padding[0], self.padding[1] + self.overhang[0])

    @property
    def ow(self) -> int:
        return out_size(self.w, self.kw, self.stride[1], self.padding[2], self.padding[3] + self.overhang[1])

    def flops(self) -> int:
        return self.n * self.oh * self.ow * self.c * self.kh * self.kw

    def bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * self.n * self.c * (self.h * self.w + self.oh * self.ow)
