"""Jobs of a walk for the emulated device: a small network of convolutions and pools in guarded memory, its truth."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from inception_fast.kernels import reference
from inception_fast.kernels.cuda import abi
from torch import Tensor
from torch.nn import functional as F

from checkout import ROOT
from emulated import HERE, Device
from emulated_conv import DTYPES

GAP = 8  # channels of NaN behind those of a buffer
SOURCES = (
    HERE / "walk.cpp",
    *(ROOT / "kernels" / "cuda" / f"{name}.cpp" for name in ("conv_api", "conv_reasons", "walk_api")),
)
KINDS = {"max": 0, "avg": 1, "padded": 2}


class WalkDevice(Device):
    """The emulated device with the walk's C interface."""

    def __init__(self, library: Path) -> None:
        super().__init__(library)
        for name in ("hopper_walk_columns", "hopper_walk_reasons", "hopper_walk_sizes", "hopper_walk_units"):
            function = getattr(self.lib, name)
            function.restype, function.argtypes = (abi.WALK_FUNCTIONS | abi.TRACE_FUNCTIONS)[name]
        self.lib.hopper_error.restype = ctypes.c_char_p
        jobs = ctypes.POINTER(abi.Job), ctypes.c_int32
        self.lib.emulated_walk.argtypes = [*jobs, ctypes.c_int32, ctypes.c_uint64, ctypes.c_int32, ctypes.c_uint64]

    def reasons(self, jobs: Sequence[abi.Job], dtype: torch.dtype = torch.bfloat16) -> list[str]:
        text = ctypes.create_string_buffer(1 << 14)
        count = self.lib.hopper_walk_reasons(_array(jobs), len(jobs), DTYPES[dtype], text, len(text))
        lines = text.value.decode().splitlines()
        assert count == len(lines)
        return lines

    def workspace(self, jobs: Sequence[abi.Job], blocks: int) -> tuple[Tensor, int]:
        """NaN everywhere but in the counters, and how many bytes these take."""
        sizes = abi.WalkSizes()
        assert not self.lib.hopper_walk_sizes(_array(jobs), len(jobs), blocks, ctypes.byref(sizes)), (
            self.lib.hopper_error()
        )
        memory = self.empty(sizes.workspace + 256, dtype=torch.uint8)
        memory = memory[-memory.data_ptr() % 256 :][: sizes.workspace]
        memory[: sizes.counters] = 0
        return memory, sizes.counters

    def launch(
        self, jobs: Sequence[abi.Job], dtype: torch.dtype, workspace: Tensor, blocks: int, trace: Tensor | None = None
    ) -> None:
        place = 0 if trace is None else trace.data_ptr()
        self.check(self.lib.emulated_walk(_array(jobs), len(jobs), DTYPES[dtype], workspace.data_ptr(), blocks, place))

    def units(self, jobs: Sequence[abi.Job], blocks: int) -> list[tuple[int, int]]:
        """The job and the block of each unit, in the order of a trace."""
        job, block = (ctypes.c_int32 * 1000)(), (ctypes.c_int32 * 1000)()
        count = self.lib.hopper_walk_units(_array(jobs), len(jobs), blocks, job, block, len(job))
        assert 0 <= count <= len(job)
        return list(zip(job[:count], block[:count], strict=True))


def _array(jobs: Sequence[abi.Job]) -> ctypes.Array[abi.Job]:
    return (abi.Job * len(jobs))(*jobs)


@dataclass
class Buffer:
    """[n, h, w, c + GAP] on the device, and what its c channels have to be in the end, [n, c, h, w]."""

    wide: Tensor
    truth: Tensor

    @property
    def c(self) -> int:
        return self.truth.shape[1]

    def part(self, first: int = 0, channels: int = 0) -> Part:
        return Part(self, first, channels or self.c - first)


@dataclass
class Part:
    """Channels of a buffer."""

    buffer: Buffer
    first: int
    channels: int

    @property
    def address(self) -> int:
        return self.buffer.wide.data_ptr() + self.first * self.buffer.wide.itemsize

    @property
    def pitch(self) -> int:
        return self.buffer.c + GAP

    @property
    def truth(self) -> Tensor:
        return self.buffer.truth[:, self.first : self.first + self.channels]


class Network:
    """Jobs in order, with what each has to give. Weights are small integers, so that sums are exact in float32."""

    def __init__(self, device: WalkDevice, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
        self.device, self.dtype, self.jobs = device, dtype, list[abi.Job]()
        self.random = torch.Generator().manual_seed(seed)
        self.buffers: list[Buffer] = []
        self.workspace: tuple[Tensor, int] | None = None

    def map(self, n: int, h: int, w: int, c: int, dtype: torch.dtype | None = None) -> Buffer:
        wide = self.device.empty(n, h, w, c + GAP, dtype=dtype or self.dtype)
        made = Buffer(wide, torch.full((n, c, h, w), torch.nan, dtype=dtype or self.dtype))
        self.buffers.append(made)
        return made

    def image(self, n: int, h: int, w: int, c: int) -> Part:
        made = self.map(n, h, w, c)
        made.truth = self._draw(n, c, h, w, most=3)
        made.wide[..., :c] = made.truth.permute(0, 2, 3, 1)
        return made.part()

    def conv(
        self, x: Part, outputs: Sequence[tuple[Part, bool]], *needs: int, kernel: tuple[int, int] = (1, 1),
        stride: int = 1, padding: tuple[int, int] = (0, 0), columns: int = 32, splits: int = 1,
        residual: Part | None = None, scale: float = 0.25, ahead: bool = False,
        halo: bool = False,
    ) -> int:  # fmt: skip
        oc = sum(part.channels for part, _ in outputs)
        weight = self._draw(oc, x.channels, *kernel, most=1)
        factor, shift = torch.full((oc,), scale), torch.randint(-4, 5, (oc,), generator=self.random).float()
        n, _, h, w = x.truth.shape
        (kh, kw), (top, left) = kernel, padding
        oh, ow = (h + 2 * top - kh) // stride + 1, (w + 2 * left - kw) // stride + 1
        conv = abi.Conv(
            x=x.address, x_pitch=x.pitch, n=n, h=h, w=w, c=x.channels, oc=oc, kh=kh, kw=kw, stride_h=stride,
            stride_w=stride, top=top, left=left, oh=oh, ow=ow, splits=splits, outputs=len(outputs),
            weights=self.device.like(weight.permute(2, 3, 0, 1).contiguous()).data_ptr(),
            scale=self.device.like(factor).data_ptr(), shift=self.device.like(shift).data_ptr(), residual_scale=0.5,
        )  # fmt: skip
        if residual is not None:
            conv.residual, conv.residual_pitch = residual.address, residual.pitch
        column = 0
        for i, (part, relu) in enumerate(outputs):
            kind = abi.FLOAT32 if part.truth.dtype == torch.float32 else 0
            conv.output[i] = abi.Output(part.address, part.pitch, part.channels, int(relu) | kind)
            own, wide = slice(column, column + part.channels), torch.float64
            old = None if residual is None else residual.truth[:, own].to(wide)
            y = reference.conv(
                x.truth.to(wide), weight[own].to(wide), factor[own].to(wide), shift[own].to(wide),
                stride=(stride, stride), padding=(top, top, left, left), relu=relu, residual=old, residual_scale=0.5,
            )  # fmt: skip
            self._write(part, y)
            column += part.channels
        return self._add(abi.Job(kind=0, columns=columns, ahead=int(ahead), halo=int(halo), conv=conv), needs)

    def pool(
        self, x: Part, y: Part, *needs: int, kernel: int = 3, stride: int = 1, padding: int = 1, kind: str = "max",
        shift: bool = False, relu: bool = False,
    ) -> int:  # fmt: skip
        n, c, h, w = x.truth.shape
        _, _, oh, ow = y.truth.shape
        by = torch.randint(-4, 5, (c,), generator=self.random).float() if shift else torch.zeros(c)
        pool = abi.Pool(
            x=x.address, y=y.address, shift=self.device.like(by).data_ptr() if shift else 0, x_pitch=x.pitch,
            y_pitch=y.pitch, n=n, h=h, w=w, c=c, kh=kernel, kw=kernel, stride_h=stride, stride_w=stride, top=padding,
            left=padding, bottom=padding, right=padding, oh=oh, ow=ow, kind=KINDS[kind], relu=int(relu),
        )  # fmt: skip
        given = x.truth.float()
        if kind == "max":
            found = F.max_pool2d(given, kernel, stride, padding)
        else:
            found = F.avg_pool2d(given, kernel, stride, padding, count_include_pad=kind == "padded")
        found = found + by[:, None, None]
        self._write(y, found.relu() if relu else found)
        return self._add(abi.Job(kind=1, pool=pool), needs)

    def _add(self, job: abi.Job, needs: Sequence[int]) -> int:
        job.needs = len(needs)
        for i, need in enumerate(needs):
            job.need[i] = need
        self.jobs.append(job)
        return len(self.jobs) - 1

    def _write(self, part: Part, values: Tensor) -> None:
        assert 0 < values.nan_to_num().abs().max() < 1 << 14, "sums of these would not be exact"
        part.buffer.truth[:, part.first : part.first + part.channels] = values.to(part.truth.dtype)

    def _draw(self, *sizes: int, most: int) -> Tensor:
        return torch.randint(-most, most + 1, sizes, generator=self.random).to(self.dtype)

    def run(self, blocks: int = 3, times: int = 1) -> None:
        if self.workspace is None:
            self.workspace = self.device.workspace(self.jobs, blocks)
        workspace, counters = self.workspace
        for _ in range(times):
            self.device.launch(self.jobs, self.dtype, workspace, blocks)
            assert not workspace[:counters].any(), "counters are not left zero for the next launch"

    def check(self) -> None:
        for i, buffer in enumerate(self.buffers):
            assert buffer.wide[..., buffer.c :].isnan().all(), f"channels beside buffer {i} were written to"
            found = buffer.wide[..., : buffer.c].permute(0, 3, 1, 2)
            same = (found == buffer.truth) | (found.isnan() & buffer.truth.isnan())
            assert same.all(), f"buffer {i}: {(~same).sum()} of {same.numel()} elements differ"
