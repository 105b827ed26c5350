"""Fused pairs for the emulated device: tensors in guarded memory, the C structure that names them, and the truth."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from inception_fast.kernels import reference
from torch import Tensor

from checkout import ROOT
from emulated import HERE, Device
from numerics import integers, powers_of_two, random

SOURCES = (HERE / "pair.cpp", ROOT / "kernels" / "cuda" / "pair_reasons.cpp")
DTYPES = {torch.bfloat16: 0, torch.float16: 1}
ADDRESSES = ("x", "y", "w1", "scale1", "shift1", "w2", "scale2", "shift2")
NUMBERS = ("n", "h", "w", "c", "mid", "oc", "taps", "wide_first", "relu1", "relu2")


class HopperPair(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ADDRESSES),
        *((name, ctypes.c_int64) for name in ("x_pitch", "y_pitch")),
        *((name, ctypes.c_int32) for name in NUMBERS),
    )


class HopperPairConfig(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int32) for name in ("groups", "cluster", "middle", "shared_bytes"))


@dataclass(frozen=True)
class Shape:
    """A pair of n images: c to mid to oc channels, `taps` long, 1xn first when `wide_first`."""

    n: int
    c: int
    mid: int
    oc: int
    taps: int = 7
    wide_first: bool = True
    relu: tuple[bool, bool] = (True, True)


@dataclass
class Case:
    """One pair on the device, and the values that went into it, logically NCHW."""

    pair: HopperPair
    x: Tensor
    weights: tuple[Tensor, Tensor]
    affine: tuple[Tensor, Tensor, Tensor, Tensor]
    y: Tensor  # [n, 17, 17, oc], a slice of `whole`
    whole: Tensor
    shape: Shape
    kept: list[Tensor]

    def expected(self, dtype: torch.dtype) -> Tensor:
        """In float64, the intermediate rounded to `dtype` as the kernel's is."""
        scale1, shift1, scale2, shift2 = (part.double() for part in self.affine)
        relu1, relu2 = self.shape.relu
        wide, tall = (0, 0, self.shape.taps // 2, self.shape.taps // 2), (self.shape.taps // 2,) * 2 + (0, 0)
        first, second = (wide, tall) if self.shape.wide_first else (tall, wide)
        a = reference.conv(self.x.double(), self.weights[0].double(), scale1, shift1, padding=first, relu=relu1)
        a = a.to(dtype).double()
        return reference.conv(a, self.weights[1].double(), scale2, shift2, padding=second, relu=relu2)

    def result(self) -> Tensor:
        return self.y.permute(0, 3, 1, 2)


class PairDevice(Device):
    """The emulated device with the fused pair's C interface."""

    def __init__(self, library: Path) -> None:
        super().__init__(library)
        pair = ctypes.POINTER(HopperPair)
        self.lib.emulated_pair.argtypes = [pair, ctypes.c_int, ctypes.c_int, ctypes.c_int]
        count = self.lib.hopper_pair_configs(None, 0)
        self.configs = (HopperPairConfig * count)()
        self.lib.hopper_pair_configs(self.configs, count)

    def reasons(self, pair: HopperPair, config: int = 0, type: int = 0) -> list[str]:
        text = ctypes.create_string_buffer(1 << 14)
        room = ctypes.c_int64(len(text))
        count = self.lib.hopper_pair_reasons(ctypes.byref(pair), type, config, text, room)
        lines = text.value.decode().splitlines()
        assert count == len(lines)
        return lines

    def launch(self, pair: HopperPair, dtype: torch.dtype, config: int, blocks: int = 0) -> None:
        self.check(self.lib.emulated_pair(ctypes.byref(pair), DTYPES[dtype], config, blocks))


def packed(weight: Tensor) -> Tensor:
    """[oc, c, kh, kw] as [taps][oc][c]."""
    oc, c, kh, kw = weight.shape
    return weight.permute(2, 3, 0, 1).reshape(kh * kw, oc, c).contiguous()


def case(
    device: PairDevice, shape: Shape, dtype: torch.dtype, seed: int = 0, whole_numbers: bool = True, beside: int = 8
) -> Case:
    """x and y are slices of rows with `beside` more channels of NaN on either side."""
    s = shape
    kernels = ((1, s.taps), (s.taps, 1)) if s.wide_first else ((s.taps, 1), (1, s.taps))
    sizes = (s.n, s.c, 17, 17), (s.mid, s.c, *kernels[0]), (s.oc, s.mid, *kernels[1])
    if whole_numbers:  # few enough ones that sums, and a rounded, stay whole numbers that float32 and T hold
        density = (0.3, min(1.0, 24 / (s.c * s.taps)), min(1.0, 12 / (s.mid * s.taps)))
        x, w1, w2 = (integers(*size, seed=seed + i, density=density[i]) for i, size in enumerate(sizes))
        affine = tuple(
            values
            for i, width in enumerate((s.mid, s.oc))
            for values in (powers_of_two(width, seed=seed + i, exponents=(0, 1)), integers(width, seed=seed + 5 + i))
        )
    else:
        x, w1, w2 = (random(*size, seed=seed + i) for i, size in enumerate(sizes))
        affine = tuple(random(width, seed=seed + 5 + i) for i, width in enumerate((s.mid, s.mid, s.oc, s.oc)))
    x, w1, w2 = x.to(dtype), w1.to(dtype), w2.to(dtype)
    source = device.empty(s.n, 17, 17, s.c + 2 * beside, dtype=dtype)[..., beside : beside + s.c]
    source.copy_(x.permute(0, 2, 3, 1))
    whole = device.empty(s.n, 17, 17, s.oc + 2 * beside, dtype=dtype)
    y = whole[..., beside : beside + s.oc]
    one, two = device.like(packed(w1)), device.like(packed(w2))
    scale1, shift1, scale2, shift2 = (device.like(values) for values in affine)
    addresses = (tensor.data_ptr() for tensor in (source, y, one, scale1, shift1, two, scale2, shift2))
    pitches = s.c + 2 * beside, s.oc + 2 * beside
    numbers = s.n, 17, 17, s.c, s.mid, s.oc, s.taps, s.wide_first, *s.relu
    pair = HopperPair(*addresses, *pitches, *numbers)
    return Case(pair, x, (w1, w2), affine, y, whole, shape, [source, one, two, scale1, shift1, scale2, shift2])
