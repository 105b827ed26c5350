"""The host side of the convolutions: weights as the kernels read them, and calls for given maps.

A packed convolution has one or more groups of columns that share x. One group is one convolution; several are siblings
(a merged 1x1 whose columns go to several places, a parallel split), each with weights, taps, padding, ReLU and
destination of its own, in one launch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..spec import ConvSpec
from . import conv, stem, tile
from .configs import Config
from .launch import Launch, Map, parameters, power, upcast, wide

ROW_ELEMENTS = 8  # rows of packed weights begin on 16 bytes, in every dtype
STEM_CHANNELS = 4  # up to here taps and channels are one axis
STEM_PRODUCTS = 1024  # taps * channels that the stem kernel takes

Workspace = Callable[[int], Tensor]  # float32 elements that only this launch and its finish use


class Part(NamedTuple):
    """A convolution as the caller has it. weight [oc, c, kh, kw]; scale and shift [oc] or None; padding (top, left)."""

    weight: Any
    scale: Any
    shift: Any
    padding: tuple[int, int]
    relu: bool


class Group(NamedTuple):
    """A part's columns in a `Packed`: `offset` and `pitch` in its weights, `column` in its scale and shift."""

    kh: int
    kw: int
    padding: tuple[int, int]
    relu: bool
    channels: int
    offset: int
    pitch: int
    column: int


class Packed(NamedTuple):
    """weight: each group's [kh * kw, c, pitch], one behind the other; scale and shift: float32, all columns."""

    weight: Tensor
    scale: Tensor
    shift: Tensor
    groups: tuple[Group, ...]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.weight, self.scale, self.shift))


def pack(parts: Sequence[Part], dtype: torch.dtype, device: torch.device | str) -> Packed:
    """Rounds weights to `dtype` once and lays them out; scale and shift stay float32."""
    weights, scales, shifts, groups = [], [], [], []
    offset = column = 0
    for part in parts:
        weight = _tensor(part.weight)
        oc, c, kh, kw = weight.shape
        pitch = -(-oc // ROW_ELEMENTS) * ROW_ELEMENTS
        rows = torch.zeros(kh * kw, c, pitch, dtype=dtype, device=device)
        rows[..., :oc] = weight.permute(2, 3, 1, 0).reshape(kh * kw, c, oc).to(device=device, dtype=dtype)
        weights.append(rows.reshape(-1))
        scales.append(_vector(part.scale, oc, 1.0, device))
        shifts.append(_vector(part.shift, oc, 0.0, device))
        groups.append(Group(kh, kw, part.padding, part.relu, oc, offset, pitch, column))
        offset, column = offset + rows.numel(), column + oc
    return Packed(torch.cat(weights), torch.cat(scales), torch.cat(shifts), tuple(groups))


def split_columns(part: Part, columns: Sequence[tuple[int, bool]]) -> list[Part]:
    """One part for each (channels, relu) range of a convolution's columns."""
    found, at = [], 0
    for channels, relu in columns:
        cut = slice(at, at + channels)
        scale, shift = (None if v is None else v[cut] for v in (part.scale, part.shift))
        found.append(Part(part.weight[cut], scale, shift, part.padding, relu))
        at += channels
    return found


def _tensor(values: Any) -> Tensor:
    return torch.from_numpy(values) if isinstance(values, np.ndarray) else values.detach()


def _vector(values: Any, length: int, default: float, device: torch.device | str) -> Tensor:
    if values is None:
        return torch.full((length,), default, dtype=torch.float32, device=device)
    return _tensor(values).to(device=device, dtype=torch.float32)


def stem_takes(spec: ConvSpec) -> bool:
    """Whether the stem kernel should run it: few channels, any strides, groups as zeros in a dense weight."""
    return spec.c <= STEM_CHANNELS and spec.kh * spec.kw * spec.c <= STEM_PRODUCTS and not spec.residual


def convolution(
    name: str,
    spec: ConvSpec,
    x: Map,
    packed: Packed,
    outputs: Sequence[Map],
    config: Config,
    *,
    residual: Map | None = None,
    residual_scale: float = 1.0,
    workspace: Workspace | None = None,
    tf32: bool = False,
) -> list[Launch]:
    """The launches of a packed convolution; group i writes outputs[i]. A residual needs a single group."""
    if len(outputs) != len(packed.groups) or (residual is not None and len(outputs) > 1):
        raise ValueError(f"{len(outputs)} outputs, {len(packed.groups)} groups; allowed: as many, one with a residual")
    if spec.n == 0:
        return []
    call = _Call(name, spec, x, packed, outputs, config, residual, residual_scale, workspace, tf32)
    return call.launches()


def part_elements(spec: ConvSpec, groups: Sequence[Group], config: Config) -> int:
    """float32 elements of workspace that a split needs; 0 without one."""
    blocks = sum(triton.cdiv(group.channels, config.block_n) for group in groups)
    return 0 if config.split == 1 else config.split * spec.n * spec.oh * spec.ow * blocks * config.block_n


class _Call:
    """One convolution on its way to launches."""

    def __init__(
        self, name: str, spec: ConvSpec, x: Map, packed: Packed, outputs: Sequence[Map], config: Config,
        residual: Map | None, residual_scale: float, workspace: Workspace | None, tf32: bool,
    ) -> None:  # fmt: skip
        self.name, self.spec, self.x, self.packed, self.outputs = name, spec, x, packed, outputs
        self.residual, self.residual_scale = residual, residual_scale
        self.precision = "tf32" if tf32 and x.data.dtype is torch.float32 else "ieee"
        self.grouped = len(outputs) > 1
        self.config = config if self._tma_fits(config) else dataclasses.replace(config, form="pointer")
        self.blocks = sum(triton.cdiv(group.channels, self.config.block_n) for group in packed.groups)
        self.rows = spec.n * spec.oh * spec.ow
        self.part_pitch = self.blocks * self.config.block_n
        elements = part_elements(spec, packed.groups, self.config)
        self.parts = packed.scale
        if elements:
            self.parts = (workspace or self._allocate)(elements)
        self.table = self._table() if self.grouped else packed.scale

    def _allocate(self, elements: int) -> Tensor:
        return torch.empty(elements, dtype=torch.float32, device=self.x.data.device)

    def _tma_fits(self, config: Config) -> bool:
        """TMA strides are whole 16 bytes; it cannot skip pixels and its result does not scatter."""
        item, x = self.x.data.element_size(), self.x
        aligned = x.data.data_ptr() % 16 == 0 and x.pitch * item % 16 == 0 and config.block_n <= 256
        there = not x.data.is_cuda or torch.cuda.get_device_capability(x.data.device) >= (9, 0)
        return config.form == "tma" and there and aligned and self.spec.stride == (1, 1) and not self.grouped

    def launches(self) -> list[Launch]:
        tma = self.config.form == "tma"
        found = [self._tma() if tma else self._pointer()]
        if self.config.split > 1:
            found.append(self._finish())
        return found

    def _ends(self) -> dict[str, Any]:
        """What every kernel's epilogue reads."""
        y, residual = self.outputs[0], self.residual
        return {
            **{"scale_ptr": self.packed.scale, "shift_ptr": self.packed.shift, "y_ptr": y.data},
            "residual_ptr": y.data if residual is None else residual.data,
            **{"oc": self.packed.groups[0].channels, "blocks": self.blocks, "y_pitch": y.pitch},
            "residual_pitch": 0 if residual is None else residual.pitch,
            **{"part_pitch": self.part_pitch, "residual_scale": float(self.residual_scale), "part_ptr": self.parts},
            **{"RELU": self.packed.groups[0].relu, "RESIDUAL": residual is not None, "SPLIT": self.config.split},
        }

    def _walk(self) -> dict[str, Any]:
        group, config = self.packed.groups[0], self.config
        return {
            **{"n": self.spec.n, "c": self.spec.c, "oh": self.spec.oh, "ow": self.spec.ow},
            **{"KH": group.kh, "KW": group.kw, "PAD_TOP": group.padding[0], "PAD_LEFT": group.padding[1]},
            **{"PRECISION": self.precision, "UPCAST": upcast(self.x.data.dtype)},
            **{"BLOCK_N": config.block_n, "BLOCK_K": config.block_k},
        }

    def _options(self) -> dict[str, int]:
        return {"num_warps": self.config.warps, "num_stages": self.config.stages}

    def _pointer(self) -> Launch:
        spec, config = self.spec, self.config
        single = len({(g.kh, g.kw, g.padding) for g in self.packed.groups}) == 1
        arguments = {
            **self._ends(),
            **self._walk(),
            **{"x_ptr": self.x.data, "w_ptr": self.packed.weight, "table_ptr": self.table},
            **{"h": spec.h, "w": spec.w, "x_pitch": self.x.pitch, "w_pitch": self.packed.groups[0].pitch},
            **{"STRIDE_H": spec.stride[0], "STRIDE_W": spec.stride[1]},
            **{"PADDED": any(spec.padding) or not single, "EVEN_C": spec.c % config.block_k == 0},
            **{"WIDE": wide(self.rows, self.x.rows), "GROUPED": self.grouped, "BLOCK_M": config.block_m},
            "STATS": False,
        }
        if self.grouped:  # the table has them; one compiled kernel serves all
            arguments |= {"KH": 1, "KW": 1, "PAD_TOP": 0, "PAD_LEFT": 0, "RELU": False}
        grid = (triton.cdiv(self.rows, config.block_m) * self.blocks, config.split)
        return Launch(self.name, conv.conv_kernel, grid, arguments, self._options())

    def _tma(self) -> Launch:
        spec, config, x, group = self.spec, self.config, self.x, self.packed.groups[0]
        images, height, width = box(spec.n, spec.oh, spec.ow, config.block_m)
        strides = [spec.h * spec.w * x.pitch, spec.w * x.pitch, x.pitch, 1]
        shape = [spec.n, spec.h, spec.w, spec.c]
        x_desc = TensorDescriptor(x.data, shape, strides, [images, height, width, config.block_k])
        w_shape, w_strides = [group.kh * group.kw, spec.c, group.channels], [spec.c * group.pitch, group.pitch, 1]
        w_desc = TensorDescriptor(self.packed.weight, w_shape, w_strides, [1, config.block_k, config.block_n])
        boxes = {"BOX_N": images, "BOX_H": height, "BOX_W": width}
        arguments = {**self._ends(), **self._walk(), **boxes, "x_desc": x_desc, "w_desc": w_desc}
        tiles = triton.cdiv(spec.n, images) * triton.cdiv(spec.oh, height) * triton.cdiv(spec.ow, width)
        return Launch(self.name, conv.conv_tma_kernel, (tiles * self.blocks, config.split), arguments, self._options())

    def _finish(self) -> Launch:
        block_m = min(self.config.block_m, 32)
        arguments = {
            **self._ends(),
            **{"rows": self.rows, "table_ptr": self.table, "GROUPED": self.grouped, "WIDE": wide(self.rows)},
            **{"BLOCK_M": block_m, "BLOCK_N": self.config.block_n},
        }
        grid = (triton.cdiv(self.rows, block_m) * self.blocks,)
        return Launch(f"{self.name}:finish", conv.finish_kernel, grid, arguments, {"num_warps": 4})

    def _table(self) -> Tensor:
        """[blocks, FIELDS] int64: each column block's weights, taps and destination."""
        first, item, rows = self.outputs[0].data, self.outputs[0].data.element_size(), []
        for group, y in zip(self.packed.groups, self.outputs, strict=True):
            y_offset = (y.data.data_ptr() - first.data_ptr()) // item
            for at in range(0, group.channels, self.config.block_n):
                row = {
                    **{"w_offset": group.offset + at, "w_pitch": group.pitch, "kw": group.kw},
                    **{"taps": group.kh * group.kw, "pad_top": group.padding[0], "pad_left": group.padding[1]},
                    **{"column": group.column + at, "columns": group.channels - at},
                    **{"y_offset": y_offset + at, "y_pitch": y.pitch, "relu": int(group.relu)},
                }
                rows.append([row[field] for field in tile.FIELDS])
        return torch.tensor(rows, dtype=torch.int64).to(first.device)


def box(n: int, oh: int, ow: int, pixels: int) -> tuple[int, int, int]:
    """Images, rows and columns of the box of `pixels` outputs that hangs over the least; wider boxes first."""
    powers = [1 << i for i in range(pixels.bit_length())]
    boxes = [(a, b, pixels // (a * b)) for a in powers for b in powers if a * b <= pixels]

    def covered(sizes: tuple[int, int, int]) -> int:
        counts = [triton.cdiv(size, part) * part for size, part in zip((n, oh, ow), sizes, strict=True)]
        return counts[0] * counts[1] * counts[2]

    return min(boxes, key=lambda sizes: (covered(sizes), -sizes[2], -sizes[1]))


def stem_convolution(
    name: str, spec: ConvSpec, x: Tensor, packed: Packed, y: Map, *,
    scale: Any = None, shift: Any = None, config: Config | None = None, tf32: bool = False,
) -> list[Launch]:  # fmt: skip
    """A convolution straight from [n, c, h, w] of any strides, uint8 or floating: a = scale * x + shift, then the sum.

    `packed` has one group made from a dense weight (see `dense_weight`).
    """
    if spec.n == 0:
        return []
    group, rows, products = packed.groups[0], spec.n * spec.oh * spec.ow, spec.kh * spec.kw * spec.c
    float32 = packed.weight.dtype is torch.float32
    # A tcgen05 product needs 64 rows or more, and Triton 3.7 rounds float32 that came from bytes to TF32 for it.
    rows_of_tile = 32 if float32 and not tf32 else 128
    config = config or Config(block_m=rows_of_tile, block_n=power(group.channels, 16, 64), block_k=32, stages=2)
    blocks = triton.cdiv(group.channels, config.block_n)
    strides = dict(zip(("stride_n", "stride_c", "stride_y", "stride_x"), x.stride(), strict=True))
    affine = scale is not None or shift is not None
    # A parameter that is absent beside one that is there is the neutral one.
    before = [np.full(spec.c, d, np.float32) if affine and v is None else v for v, d in ((scale, 1), (shift, 0))]
    arguments = {
        **{"x_ptr": x, "w_ptr": packed.weight, "scale_ptr": packed.scale, "shift_ptr": packed.shift, "y_ptr": y.data},
        **{"before_scale_ptr": parameters(before[0], y.data), "before_shift_ptr": parameters(before[1], y.data)},
        **{"n": spec.n, "h": spec.h, "w": spec.w, "oh": spec.oh, "ow": spec.ow, "oc": group.channels},
        **{"blocks": blocks, **strides, "w_pitch": group.pitch, "y_pitch": y.pitch},
        **{"C": spec.c, "KH": spec.kh, "KW": spec.kw, "STRIDE_H": spec.stride[0], "STRIDE_W": spec.stride[1]},
        **{"PAD_TOP": spec.padding[0], "PAD_LEFT": spec.padding[2], "AFFINE": affine, "RELU": group.relu},
        **{"WIDE": wide(rows), "PRECISION": "tf32" if tf32 and float32 else "ieee"},
        **{"UPCAST": upcast(packed.weight.dtype), "BLOCK_M": config.block_m, "BLOCK_N": config.block_n},
        "BLOCK_K": min(config.block_k, power(products, 16, 64)),
    }
    grid = (triton.cdiv(rows, config.block_m) * blocks,)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return [Launch(name, stem.stem_kernel, grid, arguments, options)]


def dense_weight(weight: Any, groups: int) -> Any:
    """[oc, c / groups, kh, kw] as [oc, c, kh, kw], zeros where a group does not look."""
    if groups == 1:
        return weight
    whole = _tensor(weight)
    oc, cg, kh, kw = whole.shape
    wide_weight = whole.new_zeros(oc, cg * groups, kh, kw)
    for i, rows in enumerate(torch.arange(oc).split(oc // groups)):
        wide_weight[rows, i * cg : (i + 1) * cg] = whole[rows]
    return wide_weight
