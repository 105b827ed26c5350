"""Convolutions for the emulated device: tensors in guarded memory, the C structure that names them, and the truth."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from inception_fast.kernels import reference
from inception_fast.kernels.cuda import abi
from torch import Tensor
from torch.nn import functional as F

from checkout import ROOT
from emulated import HERE, MODES, Device
from numerics import assert_close_budget

SOURCES = (HERE / "conv.cpp", *(ROOT / "kernels" / "cuda" / f"conv_{name}.cpp" for name in ("api", "reasons")))
DTYPES = {torch.bfloat16: 0, torch.float16: 1}


class ConvDevice(Device):
    """The emulated device with the convolution's C interface."""

    def __init__(self, library: Path) -> None:
        super().__init__(library)
        group = ctypes.POINTER(abi.Conv), ctypes.c_int32
        for name in ("hopper_conv_configs", "hopper_conv_workspace_bytes", "hopper_conv_counter_bytes",
                     "hopper_conv_units", "hopper_conv_reasons"):  # fmt: skip
            function = getattr(self.lib, name)
            function.restype, function.argtypes = abi.FUNCTIONS[name]
        self.lib.emulated_conv.argtypes = [*group, ctypes.c_int32, ctypes.c_int32, ctypes.c_uint64, ctypes.c_int32]
        self.configs = (abi.Config * self.lib.hopper_conv_configs(None, 0))()
        self.lib.hopper_conv_configs(self.configs, len(self.configs))

    def config(
        self, columns: int, turns: int = 0, depth: int = 64, cluster: int = 1, rows: int = 0, behind: int = 0,
        pooled: int = 0,
    ) -> int:  # fmt: skip
        """The index of the configuration; the first of them where `rows` are not named."""
        wanted = (columns, turns, depth, cluster, behind, pooled)
        keys = [
            (one.columns, one.turns, one.depth, one.cluster, one.behind, one.pooled) if rows in (0, one.rows) else ()
            for one in self.configs
        ]
        return keys.index(wanted)

    def reasons(self, convs: Sequence[abi.Conv], config: int, dtype: torch.dtype = torch.bfloat16) -> list[str]:
        text = ctypes.create_string_buffer(1 << 14)
        count = self.lib.hopper_conv_reasons(_array(convs), len(convs), DTYPES[dtype], config, text, len(text))
        lines = text.value.decode().splitlines()
        assert count == len(lines)
        return lines

    def workspace(self, convs: Sequence[abi.Conv], config: int) -> tuple[Tensor, int]:
        """NaN everywhere but in the counters, and how many bytes these take."""
        group = _array(convs), len(convs), config
        size, counters = self.lib.hopper_conv_workspace_bytes(*group), self.lib.hopper_conv_counter_bytes(*group)
        assert 0 <= counters <= size
        memory = self.empty(max(size, 256) + 256, dtype=torch.uint8)
        memory = memory[-memory.data_ptr() % 256 :][:size]
        memory[:counters] = 0
        return memory, counters

    def launch(
        self, convs: Sequence[abi.Conv], dtype: torch.dtype, config: int, workspace: Tensor, blocks: int = 3
    ) -> None:
        self.check(
            self.lib.emulated_conv(
                _array(convs), len(convs), DTYPES[dtype], config, workspace.data_ptr(), ctypes.c_int32(blocks)
            )
        )


def _array(convs: Sequence[abi.Conv]) -> ctypes.Array[abi.Conv]:
    return (abi.Conv * len(convs))(*convs)


@dataclass(frozen=True)
class Shape:
    """One convolution. `outputs`: (channels, relu) of each destination; pixels are `gap` elements wider than needed."""

    n: int
    h: int
    w: int
    c: int
    outputs: tuple[tuple[int, bool], ...]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    residual_scale: float | None = None
    splits: int = 1
    gap: int = 8
    pooled: tuple[int, int] = (0, 0)  # rows and columns of 3x3 maxima at stride 2

    @property
    def oc(self) -> int:
        return sum(channels for channels, _ in self.outputs)


@dataclass
class Case:
    """A shape's tensors. Channels beside x, the residual and y are NaN, and have to stay so."""

    shape: Shape
    x: Tensor  # [n, c, h, w]
    weight: Tensor
    scale: Tensor
    shift: Tensor
    residual: Tensor | None
    conv: abi.Conv
    wide: list[Tensor] = field(default_factory=list)  # each output with its gap

    def expected(self) -> list[Tensor]:
        """float64 [n, oh, ow, channels] of each output."""
        shape, wide, results, column = self.shape, torch.float64, [], 0
        residual = None if self.residual is None else self.residual.to(wide)
        for channels, relu in shape.outputs:
            part = slice(column, column + channels)
            y = reference.conv(
                self.x.to(wide), self.weight[part].to(wide), self.scale[part].to(wide), self.shift[part].to(wide),
                stride=shape.stride, padding=shape.padding, relu=relu,
                residual=None if residual is None else residual[:, part],
                residual_scale=1.0 if shape.residual_scale is None else shape.residual_scale,
            )  # fmt: skip
            results.append(_pooled(y, shape.pooled).permute(0, 2, 3, 1))
            column += channels
        return results

    def results(self) -> list[Tensor]:
        """[n, oh, ow, channels] of each output. Fails when the gap beside one was written to."""
        for wide, (channels, _) in zip(self.wide, self.shape.outputs, strict=True):
            assert wide[..., channels:].isnan().all(), "channels beside an output were written to"
        return [wide[..., :channels] for wide, (channels, _) in zip(self.wide, self.shape.outputs, strict=True)]


def _pooled(y: Tensor, sizes: tuple[int, int]) -> Tensor:
    """y [n, c, h, w], or its maxima: windows may reach beyond the end, where there is nothing."""
    if sizes == (0, 0):
        return y
    (h, w), (rows, columns) = sizes, y.shape[2:]
    beyond = F.pad(y, (0, max(2 * w + 1 - columns, 0), 0, max(2 * h + 1 - rows, 0)), value=-torch.inf)
    return F.max_pool2d(beyond[:, :, : 2 * h + 1, : 2 * w + 1], 3, 2)


def case(device: Device, shape: Shape, dtype: torch.dtype, seed: int = 0, integers: bool = True) -> Case:
    """Draws a shape's tensors. Small integers: every sum is exact in float32, so one rounding is all that happens."""
    random = torch.Generator().manual_seed(seed)

    def draw(*sizes: int, least: int, most: int) -> Tensor:
        if integers:
            return torch.randint(least, most + 1, sizes, generator=random).to(dtype)
        return (torch.randn(sizes, generator=random) * most / 2).to(dtype)

    (kh, kw), (sh, sw), (top, bottom, left, right) = shape.kernel, shape.stride, shape.padding
    oh, ow = (shape.h + top + bottom - kh) // sh + 1, (shape.w + left + right - kw) // sw + 1
    x = draw(shape.n, shape.c, shape.h, shape.w, least=-3, most=3)
    weight = draw(shape.oc, shape.c, kh, kw, least=-2, most=2)
    scale = torch.randint(1, 4, (shape.oc,), generator=random) / 2.0
    shift = torch.randint(-9, 10, (shape.oc,), generator=random).float()
    residual = None if shape.residual_scale is None else draw(shape.n, shape.oc, oh, ow, least=-40, most=40)
    conv = abi.Conv(
        n=shape.n, h=shape.h, w=shape.w, c=shape.c, oc=shape.oc, kh=kh, kw=kw, stride_h=sh, stride_w=sw, top=top,
        left=left, oh=oh, ow=ow, splits=shape.splits, outputs=len(shape.outputs),
        pooled_h=shape.pooled[0], pooled_w=shape.pooled[1], residual_scale=shape.residual_scale or 0,
    )  # fmt: skip
    conv.x, conv.x_pitch = _placed(device, x, shape.gap)
    conv.weights = device.like(weight.permute(2, 3, 0, 1).contiguous()).data_ptr()
    conv.scale, conv.shift = device.like(scale).data_ptr(), device.like(shift).data_ptr()
    if residual is not None:
        conv.residual, conv.residual_pitch = _placed(device, residual, shape.gap)
    made = Case(shape, x, weight, scale, shift, residual, conv)
    for index, (channels, relu) in enumerate(shape.outputs):
        rows, columns = (oh, ow) if shape.pooled == (0, 0) else shape.pooled
        wide = device.empty(shape.n, rows, columns, channels + shape.gap, dtype=dtype)
        made.wide.append(wide)
        conv.output[index] = abi.Output(wide.data_ptr(), channels + shape.gap, channels, int(relu))
    return made


def _placed(device: Device, values: Tensor, gap: int) -> tuple[int, int]:
    """Address and pitch of [n, c, h, w] as the last channels of wider pixels, the others NaN."""
    n, c, h, w = values.shape
    wide = device.empty(n, h, w, gap + c, dtype=values.dtype)
    wide[..., gap:] = values.permute(0, 2, 3, 1)
    return wide.data_ptr() + gap * values.itemsize, gap + c


def run(device: ConvDevice, cases: list[Case], config: int, dtype: torch.dtype, blocks: int = 3) -> list[Tensor]:
    convs = [one.conv for one in cases]
    workspace, counters = device.workspace(convs, config)
    device.launch(convs, dtype, config, workspace, blocks)
    assert not workspace[:counters].any(), "counters are not left zero for the next launch"
    return [y for one in cases for y in one.results()]


def assert_exact(device: ConvDevice, shapes: list[Shape], config: int, dtype: torch.dtype, blocks: int = 3) -> None:
    cases = [case(device, shape, dtype, seed) for seed, shape in enumerate(shapes)]
    found = run(device, cases, config, dtype, blocks)
    expected = [y for one in cases for y in one.expected()]
    assert all(y.abs().max() > 0 for y in expected), "a vacuous comparison: everything expected is zero"
    for y, wanted in zip(found, expected, strict=True):
        rounded = wanted.to(dtype)
        assert torch.equal(y, rounded), f"{(y != rounded).sum()} of {y.numel()} elements of {tuple(y.shape)} differ"


def assert_no_timing_matters(library: ConvDevice, shapes: list[Shape], config: int) -> None:
    """Random numbers, whose sums depend on their order: copies and products early, late and at random."""
    runs = []
    for mode in MODES:
        with library.memory():
            library.configure(mode)
            cases = [case(library, shape, torch.bfloat16, seed, integers=False) for seed, shape in enumerate(shapes)]
            found = run(library, cases, config, torch.bfloat16, 4)
            for y, wanted in zip(found, (y for one in cases for y in one.expected()), strict=True):
                assert_close_budget(y, wanted)
            runs.append([y.clone() for y in found])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
