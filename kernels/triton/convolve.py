"""The host side of the convolutions: weights as the kernels read them, and calls for given maps.

A packed convolution has one or more groups of columns that share x. One group is one convolution; several are siblings
(a merged 1x1 whose columns go to several places, a parallel split), each with weights, taps, padding, ReLU and
destination of its own, in one launch.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..spec import ConvSpec
from . import conv, tile
from .configs import Config
from .launch import Launch, Map, power, upcast, wide

ROW_ELEMENTS = 8  # rows of packed weights begin on 16 bytes, in every dtype
STEM_CHANNELS = 4  # up to here taps and channels are one axis
SCATTERED = 128 * 192  # sums of a tile whose columns go to several places; 128x256 spills
STEM_PRODUCTS = 1024  # taps * channels that the stem kernel takes
TURNED = 64  # columns of a product's first operand

Workspace = Callable[[int], Tensor]  # float32 elements that only this launch and its finish use


class Part(NamedTuple):
    """A convolution as the caller has it. weight [oc, c, kh, kw]; scale and shift [oc] or None; padding (top, left)."""

    weight: Any
    scale: Any
    shift: Any
    padding: tuple[int, int]
    relu: bool


class Group(NamedTuple):
    """A part's columns in a `Packed`: `offset` and `pitch` in its weights, `column` in its scale and shift.

    Groups of one block have the same pitch; in the first block a column is also its offset in the weights. Those with a
    ReLU come first in a block.
    """

    kh: int
    kw: int
    padding: tuple[int, int]
    relu: bool
    channels: int
    offset: int
    pitch: int
    column: int


class Packed(NamedTuple):
    """weight: blocks [kh * kw, c, pitch], one behind the other, each of neighbouring groups with the same taps and
    padding, whose columns lie side by side; scale and shift: float32, all columns. Each group begins at a multiple of
    `ROW_ELEMENTS` columns, zeros in between.
    """

    weight: Tensor
    scale: Tensor
    shift: Tensor
    groups: tuple[Group, ...]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.weight, self.scale, self.shift))

    @property
    def columns(self) -> int:
        """Of all groups, with what is between them."""
        return self.scale.numel()

    @property
    def curved(self) -> int:
        """Columns before the first without a ReLU, of one block."""
        return min((group.column for group in self.groups if not group.relu), default=self.columns)


def pack(parts: Sequence[Part], dtype: torch.dtype, device: torch.device | str) -> Packed:
    """Rounds weights to `dtype` once and lays them out; scale and shift stay float32."""
    weights, groups = [], list[Group]()
    columns = sum(_whole(part.weight.shape[0]) for part in parts)
    scale, shift = (torch.zeros(columns, dtype=torch.float32, device=device) for _ in range(2))
    offset = column = 0
    for (c, kh, kw, padding), alike in itertools.groupby(parts, lambda p: (*p.weight.shape[1:], p.padding)):
        block = list(alike)
        pitch = sum(_whole(part.weight.shape[0]) for part in block)
        rows = torch.zeros(kh * kw, c, pitch, dtype=dtype, device=device)
        for part, at in zip(block, _starts(block), strict=True):
            weight = _tensor(part.weight)
            oc = weight.shape[0]
            here, there = slice(at, at + oc), slice(column + at, column + at + oc)
            weight = weight.permute(2, 3, 1, 0).reshape(kh * kw, c, oc)
            rows[..., here] = weight.to(device=device, dtype=dtype)
            scale[there] = _vector(part.scale, oc, 1.0, device)
            shift[there] = _vector(part.shift, oc, 0.0, device)
            groups.append(Group(kh, kw, padding, part.relu, oc, offset + at, pitch, column + at))
        weights.append(rows.reshape(-1))
        offset, column = offset + rows.numel(), column + pitch
    return Packed(torch.cat(weights), scale, shift, tuple(groups))


def _whole(columns: int) -> int:
    return -(-columns // ROW_ELEMENTS) * ROW_ELEMENTS


def _starts(block: Sequence[Part]) -> list[int]:
    """Where each part's columns begin in their block: those with a ReLU first, in order."""
    found, at = [0] * len(block), 0
    for i in sorted(range(len(block)), key=lambda i: not block[i].relu):
        found[i], at = at, at + _whole(block[i].weight.shape[0])
    return found


def mixed(groups: Sequence[Group]) -> bool:
    """Whether groups differ in taps or padding, so that their columns are no single matrix."""
    return len({(group.kh, group.kw, group.padding) for group in groups}) > 1


def one_matrix(groups: Sequence[Group]) -> bool:
    """Whether TMA sees the weights as one [taps, c, columns]: of mixed taps, those of as many columns each."""
    return not mixed(groups) or len({group.pitch for group in groups}) == 1


def fitting(config: Config, groups: Sequence[Group]) -> Config:
    """`config` with a tile no wider than the columns that lie side by side, and no larger than scatters unspilled."""
    widest = max(group.channels if mixed(groups) else group.pitch for group in groups)
    block_n = min(config.block_n, power(widest, 16, 256))
    while len(groups) > 1 and config.block_m * block_n > SCATTERED:
        block_n //= 2
    return dataclasses.replace(config, block_n=block_n)


def _column_blocks(groups: Sequence[Group], block_n: int) -> int:
    """Blocks of columns; of mixed taps none holds columns of two groups."""
    if mixed(groups):
        return sum(triton.cdiv(group.channels, block_n) for group in groups)
    return triton.cdiv(groups[0].pitch, block_n)


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
    """Whether the stem kernel should run it: few channels of any strides, a group at a time."""
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
    config = fitting(config, packed.groups)
    call = _Call(name, spec, x, packed, outputs, config, residual, residual_scale, workspace, tf32)
    return call.launches()


def part_elements(spec: ConvSpec, groups: Sequence[Group], config: Config) -> int:
    """float32 elements of workspace that a split needs; 0 without one."""
    config = fitting(config, groups)
    blocks = _column_blocks(groups, config.block_n)
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
        self.grouped, self.mixed = len(outputs) > 1, mixed(packed.groups)
        self.config = dataclasses.replace(config, form=self._form(config))
        self.blocks = _column_blocks(packed.groups, self.config.block_n)
        self.rows = spec.n * spec.oh * spec.ow
        self.part_pitch = self.blocks * self.config.block_n
        elements = part_elements(spec, packed.groups, self.config)
        self.parts = packed.scale
        if elements:
            self.parts = (workspace or self._allocate)(elements)
        # Tensors that nobody reads stand in for tables that are not needed.
        self.table = packed.scale
        if self.mixed:
            self.table = _table(packed.groups, self.config.block_n, x.data.device)
        self.places, self.aligned = self._places() if self.grouped else (packed.scale, 1)

    def _allocate(self, elements: int) -> Tensor:
        return torch.empty(elements, dtype=torch.float32, device=self.x.data.device)

    def _form(self, config: Config) -> str:
        """TMA strides are whole 16 bytes; it cannot skip pixels, and its weights are one matrix. Turned, columns are
        rows of the first operand, of which a product of Hopper's has 64, and float32 has no turned operands. Copies of
        four elements have 8 bytes where these have two, and a program has no second index but a split's.
        """
        item, x = self.x.data.element_size(), self.x
        if config.form == "cached" and item == 2 and config.split == 1:
            return config.form
        aligned = x.data.data_ptr() % 16 == 0 and x.pitch * item % 16 == 0 and config.block_n <= 256
        there = not x.data.is_cuda or torch.cuda.get_device_capability(x.data.device) >= (9, 0)
        able = there and aligned and self.spec.stride == (1, 1) and one_matrix(self.packed.groups)
        if config.form not in ("tma", "turned", "rows") or not able:
            return "pointer"
        whole = item == 2 and config.widths[0] >= TURNED and config.widths[1] % TURNED == 0
        if not whole or config.form == "tma":
            return "tma"
        return "rows" if config.form == "rows" and self._rows_are_taps() else "turned"

    def _rows_are_taps(self) -> bool:
        """Whether the pixels that a row of taps sees lie side by side, so that their channels are one tap's."""
        return not any(self.spec.padding[2:]) and self.x.pitch == self.spec.c and not self.mixed and self.spec.kw > 1

    def launches(self) -> list[Launch]:
        found = [self._pointer() if self.config.form in ("pointer", "cached") else self._tma()]
        if self.config.split > 1:
            found.append(self._finish())
        return found

    def _ends(self) -> dict[str, Any]:
        """What every kernel's epilogue reads."""
        y, residual = self.outputs[0], self.residual
        return {
            **{"scale_ptr": self.packed.scale, "shift_ptr": self.packed.shift, "y_ptr": y.data},
            "residual_ptr": y.data if residual is None else residual.data,
            **{"oc": self._columns(), "blocks": self.blocks, "y_pitch": y.pitch},
            **{"place_ptr": self.places, "places": self.packed.columns, "ALIGNED": self.aligned},
            **{"GROUPED": self.grouped, "curved": self.packed.curved},
            "residual_pitch": 0 if residual is None else residual.pitch,
            **{"part_pitch": self.part_pitch, "residual_scale": float(self.residual_scale), "part_ptr": self.parts},
            **{"RELU": self.packed.groups[0].relu and not self.grouped, "RESIDUAL": residual is not None},
            "SPLIT": self.config.split,
        }

    def _columns(self) -> int:
        return self.packed.columns if self.grouped else self.packed.groups[0].channels

    def _walk(self) -> dict[str, Any]:
        group, config = self.packed.groups[0], self.config
        taps = {"KH": group.kh, "KW": group.kw, "PAD_TOP": group.padding[0], "PAD_LEFT": group.padding[1]}
        if self.mixed:  # the table has them; one compiled kernel serves all
            taps = {"KH": 1, "KW": 1, "PAD_TOP": 0, "PAD_LEFT": 0}
        return {
            **{"n": self.spec.n, "c": self.spec.c, "oh": self.spec.oh, "ow": self.spec.ow, **taps},
            **{"MIXED": self.mixed, "table_ptr": self.table},
            **{"PRECISION": self.precision, "UPCAST": upcast(self.x.data.dtype)},
            **{"BLOCK_N": config.widths[0], "EXTRA": config.widths[1], "BLOCK_K": config.block_k},
        }

    def _options(self) -> dict[str, int]:
        return {"num_warps": self.config.warps, "num_stages": self.config.stages}

    def _pointer(self) -> Launch:
        spec, config = self.spec, self.config
        arguments = {
            **self._ends(),
            **self._walk(),
            **{"x_ptr": self.x.data, "w_ptr": self.packed.weight},
            **{"h": spec.h, "w": spec.w, "x_pitch": self.x.pitch, "w_pitch": self.packed.groups[0].pitch},
            **{"STRIDE_H": spec.stride[0], "STRIDE_W": spec.stride[1]},
            **{"PADDED": any(spec.padding) or self.mixed, "EVEN_C": spec.c % config.block_k == 0},
            **{"WIDE": wide(self.rows, self.x.rows), "BLOCK_M": config.block_m},
            **{"STATS": False, "CACHED": config.form == "cached"},
        }
        grid = (triton.cdiv(self.rows, config.block_m) * self.blocks, config.split)
        return Launch(self.name, conv.conv_kernel, grid, arguments, self._options())

    def _tma(self) -> Launch:
        spec, config, x, group = self.spec, self.config, self.x, self.packed.groups[0]
        n, h, w, oh, ow = self._extents()
        images, height, width = box(n, oh, ow, config.block_m)
        strides, c = [h * w * x.pitch, w * x.pitch, x.pitch, 1], spec.c
        taps, columns = self.packed.weight.numel() // (c * group.pitch), group.pitch if self.mixed else self._columns()
        if config.form == "rows":  # windows of kw pixels that overlap
            w, c, taps = ow, group.kw * c, group.kh
        x_desc = TensorDescriptor(x.data, [n, h, w, c], strides, [images, height, width, config.block_k])
        w_shape, w_strides = [taps, c, columns], [c * group.pitch, group.pitch, 1]
        w_desc, more_desc = (
            TensorDescriptor(self.packed.weight, w_shape, w_strides, [1, config.block_k, width or config.widths[0]])
            for width in config.widths
        )
        arguments = {
            **{**self._ends(), **self._walk(), "n": n, "oh": oh, "ow": ow, "c": c, "TURNED": config.form != "tma"},
            **({"KW": 1} if config.form == "rows" else {}),
            **{"BOX_N": images, "BOX_H": height, "BOX_W": width},
            **{"x_desc": x_desc, "w_desc": w_desc, "more_desc": more_desc},
        }
        tiles = triton.cdiv(n, images) * triton.cdiv(oh, height) * triton.cdiv(ow, width)
        return Launch(self.name, conv.conv_tma_kernel, (tiles * self.blocks, config.split), arguments, self._options())

    def _extents(self) -> tuple[int, int, int, int, int]:
        """Images, rows and columns of x, rows and columns of y. A 1x1 without padding sees no neighbours, so all pixels
        are one row: its boxes hang over once, not once a map, and are matrices as they come.
        """
        spec, group = self.spec, self.packed.groups[0]
        if group.kh * group.kw == 1 and not (self.mixed or any(spec.padding) or wide(self.rows)):
            return 1, 1, self.rows, 1, self.rows
        return spec.n, spec.h, spec.w, spec.oh, spec.ow

    def _finish(self) -> Launch:
        block_m = min(self.config.block_m, 32)
        arguments = {
            **self._ends(),
            **{"rows": self.rows, "table_ptr": self.table, "MIXED": self.mixed, "WIDE": wide(self.rows)},
            **{"BLOCK_M": block_m, "BLOCK_N": self.config.block_n},
        }
        grid = (triton.cdiv(self.rows, block_m) * self.blocks,)
        return Launch(f"{self.name}:finish", conv.finish_kernel, grid, arguments, {"num_warps": 4})

    def _places(self) -> tuple[Tensor, int]:
        """[2, columns] int64 for `tile.scatter_tile`, and how many neighbours always lie side by side. Nothing comes
        from the host, from which a stream that is being captured takes no copies.
        """
        first, aligned = self.outputs[0].data, ROW_ELEMENTS
        places = torch.zeros(2, self.packed.columns, dtype=torch.int64, device=first.device)
        for group, y in zip(self.packed.groups, self.outputs, strict=True):
            offset = (y.data.data_ptr() - first.data_ptr()) // first.element_size()
            columns = slice(group.column, group.column + group.channels)
            places[0, columns] = torch.arange(offset, offset + group.channels, device=first.device)
            places[1, columns].fill_(y.pitch)
            aligned = math.gcd(aligned, offset, y.pitch, group.channels)
        return places, aligned


@functools.cache
def _table(groups: tuple[Group, ...], block_n: int, device: torch.device) -> Tensor:
    """[blocks, FIELDS] int64: each column block's weights, taps and padding. Kept for good: it is small, and a graph
    that was captured after a first call reads it whenever it runs.
    """
    rows = []
    for group in groups:
        for at in range(0, group.channels, block_n):
            row = {
                **{"w_offset": group.offset + at, "w_pitch": group.pitch, "kw": group.kw},
                **{"taps": group.kh * group.kw, "pad_top": group.padding[0], "pad_left": group.padding[1]},
                **{"column": group.column + at, "columns": _whole(group.channels) - at},
                "curved": group.channels if group.relu else 0,
            }
            rows.append([row[field] for field in tile.FIELDS])
    return torch.tensor(rows, dtype=torch.int64, device="cpu").to(device)


def box(n: int, oh: int, ow: int, pixels: int) -> tuple[int, int, int]:
    """Images, rows and columns of the box of `pixels` outputs that hangs over the least; wider boxes first."""
    powers = [1 << i for i in range(pixels.bit_length())]
    boxes = [(a, b, pixels // (a * b)) for a in powers for b in powers if a * b <= pixels]

    def covered(sizes: tuple[int, int, int]) -> int:
        counts = [triton.cdiv(size, part) * part for size, part in zip((n, oh, ow), sizes, strict=True)]
        return counts[0] * counts[1] * counts[2]

    return min(boxes, key=lambda sizes: (covered(sizes), -sizes[2], -sizes[1]))
