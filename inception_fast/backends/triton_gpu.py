"""The "triton" backend: the portable GPU kernels, one operation at a time, on the current stream.

Weights are packed in `prepare`, once for all batches and maps, and again only after a weight, scale or shift changed. A
pair's intermediate is rounded to the tensor's dtype; an average pool with the convolution first goes through float32.
Networks run through `optimize`, which launches a whole plan as one graph; here every operation pays its launches.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import PoolProjectSpec, Spec
from ..kernels.spec import ConvSpec, PairSpec, PoolSpec
from ..kernels.triton import configs, convolve, launch, pairs, pools, stems
from ..kernels.triton.configs import Config
from ..kernels.triton.convolve import Packed, Part
from ..kernels.triton.launch import Launch, Map
from . import Params, laid_out
from .gpu_weights import Packs

OLDEST = (8, 0)  # bfloat16 on tensor cores and asynchronous copies
DTYPES = ("float32", "float16", "bfloat16")


class Weights(NamedTuple):
    """Packed convolutions, one an element; a split's two are one. `shift`: what is added behind a pool, float32."""

    packed: tuple[Packed, ...]
    shift: Tensor | None

    @property
    def packed_bytes(self) -> int:
        return sum(p.bytes for p in self.packed)


weights = Packs[Weights]()


class Prepared(NamedTuple):
    compiled: Weights
    spec: Spec
    residual_scale: float


def reasons(spec: Spec) -> list[str]:
    """Why these kernels cannot run `spec`; asked only where there is a GPU."""
    found = spec_reasons(spec)
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < OLDEST:
        major, minor = torch.cuda.get_device_capability()
        found.append(f"GPU of compute capability {major}.{minor}; allowed: 8.0 and up")
    return found


def spec_reasons(spec: Any) -> list[str]:
    """Why no kernel fits the spec, on whatever GPU; empty when one does."""
    if isinstance(spec, PairSpec):
        return list(dict.fromkeys(spec_reasons(spec.first) + spec_reasons(spec.second)))
    if isinstance(spec, PoolProjectSpec):
        return list(dict.fromkeys(spec_reasons(spec.pool) + spec_reasons(spec.conv)))
    found = []
    if spec.dtype not in DTYPES:
        found.append(f"dtype {spec.dtype}; allowed: {', '.join(DTYPES)}")
    if isinstance(spec, ConvSpec) and spec.groups > 1 and not convolve.stem_takes(spec):
        found.append(
            f"groups {spec.groups} of {spec.c} channels; allowed: 1, or up to {convolve.STEM_CHANNELS} channels"
        )
    return found


def prepare(spec: Spec, params: Params, x: Tensor, residual: Tensor | None, residual_scale: float) -> Prepared:
    tensors = tuple(tensor for triple in params for tensor in triple)
    key = (_shapeless(spec), x.dtype, x.device, *map(id, tensors))
    packed = weights.get(key, tensors, x.device, lambda: _pack(spec, params, x))
    return Prepared(packed, spec, residual_scale)


def run(prepared: Prepared, x: Tensor, residual: Tensor | None, memory_format: torch.memory_format) -> Tensor:
    """y in memory of its own, on the current stream of x's device."""
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        call = _Call(prepared, x, residual)
        for one in call.launches():
            one.run()
        return laid_out(call.y.permute(0, 3, 1, 2), memory_format)


def _shapeless(spec: Any) -> tuple[Any, ...]:
    """What packing depends on: not the batch, not the map."""
    if isinstance(spec, PairSpec):
        return (spec.kind, _shapeless(spec.first), _shapeless(spec.second))
    if isinstance(spec, PoolProjectSpec):
        return ("pool_project", spec.conv_first, _shapeless(spec.conv))
    return (spec.c, spec.oc, spec.kh, spec.kw, spec.padding, spec.groups, spec.relu)


def _pack(spec: Any, params: Params, x: Tensor) -> Weights:
    if isinstance(spec, PairSpec):
        parts = [_part(part, triple, True) for part, triple in zip((spec.first, spec.second), params, strict=True)]
        groups = [parts] if spec.kind == "split" else [[part] for part in parts]
    elif isinstance(spec, PoolProjectSpec):
        weight, scale, shift = params[0]
        behind = spec.conv_first  # the shift then comes after the pool, as the ReLU does
        groups = [[_part(spec.conv, (weight, scale, None if behind else shift), not behind)]]
    else:
        groups = [[_part(spec, params[0], spec.relu)]]
    packed = tuple(convolve.pack(group, x.dtype, x.device) for group in groups)
    behind_pool = isinstance(spec, PoolProjectSpec) and spec.conv_first
    return Weights(packed, shift.detach().to(x.device, torch.float32) if behind_pool else None)


def _part(spec: ConvSpec, params: tuple[Any, Any, Any], relu: bool) -> Part:
    return Part(*params, (spec.padding[0], spec.padding[2]), relu)


def tf32_asked() -> bool:
    """Whether the caller asked torch for TF32, by `torch.set_float32_matmul_precision` or by `torch.backends`, after
    which torch refuses to say what the former would.
    """
    return str(torch.backends.cuda.matmul.fp32_precision) == "tf32"


@functools.cache
def _rows(device: torch.device) -> tuple[str, tuple[configs.Row, ...]]:
    """The data set for a device and its rows, those tuned on this machine included."""
    if device.type != "cuda":
        return "sm_80", configs.shipped()
    return configs.arch_of(torch.cuda.get_device_capability(device)), configs.tuned(torch.cuda.get_device_name(device))


def chooser(device: torch.device, tf32: bool = False) -> Callable[[ConvSpec], Config]:
    """The config of a convolution on a device, by the nearest shape; a stem's by the nearest stem."""
    arch, rows = _rows(device)

    def choose(spec: ConvSpec) -> Config:
        precision = configs.precision_of(spec.dtype, tf32)
        m, k = spec.n * spec.oh * spec.ow, spec.c * spec.kh * spec.kw
        if convolve.stem_takes(spec):
            return configs.choose_stem(arch, precision, m, spec.oc, k, rows) or stems.STEM
        return configs.choose(arch, precision, m, spec.oc, k, rows, spec.c)

    return choose


class _Call:
    """One operation's launches, and its result y [n, oh, ow, oc]."""

    def __init__(self, prepared: Prepared, x: Tensor, residual: Tensor | None) -> None:
        self.spec: Any = prepared.spec
        self.packed, self.shift, self.scale = *prepared.compiled, prepared.residual_scale
        self.x, self.residual = x, residual
        self.tf32 = x.dtype is torch.float32 and tf32_asked()
        self.choose = chooser(x.device, self.tf32)
        last: Any = self.spec
        if isinstance(last, PairSpec):
            last = last.second
        elif isinstance(last, PoolProjectSpec):
            last = last.pool if last.conv_first else last.conv
        channels = last.c if isinstance(last, PoolSpec) else last.oc
        if isinstance(self.spec, PairSpec) and self.spec.kind == "split":
            channels += self.spec.first.oc
        self.y = self._empty(last.n, last.oh, last.ow, channels, x.dtype)
        self.target = launch.dense(self.y)

    def _empty(self, n: int, h: int, w: int, c: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((n, h, w, c), dtype=dtype, device=self.x.device)

    def launches(self) -> list[Launch]:
        if self.y.numel() == 0:
            return []
        if isinstance(self.spec, PairSpec):
            return self._pair()
        if isinstance(self.spec, PoolProjectSpec):
            return self._pool_project()
        return self._conv()

    def _conv(self) -> list[Launch]:
        spec = self.spec
        if convolve.stem_takes(spec):
            return stems.convolution(
                "conv", spec, self.x, self.packed[0], self.target, config=self.choose(spec), tf32=self.tf32
            )
        old = None if self.residual is None else nhwc(self.residual)
        return convolve.convolution(
            "conv", spec, nhwc(self.x), self.packed[0], [self.target], self.choose(spec),
            residual=old, residual_scale=self.scale, tf32=self.tf32,
        )  # fmt: skip

    def _pair(self) -> list[Launch]:
        spec, a = self.spec, self.spec.first
        if spec.kind == "split":
            outputs = (self.target.channels(0, a.oc), self.target.channels(a.oc, spec.second.oc))
            config = self.choose(a)
            return pairs.side_by_side("split", spec, nhwc(self.x), self.packed[0], outputs, config, tf32=self.tf32)
        middle = launch.dense(self._empty(a.n, a.oh, a.ow, a.oc, self.x.dtype))
        packed = (self.packed[0], self.packed[1])
        return pairs.chain("pair", spec, nhwc(self.x), packed, middle, self.target, self.choose, tf32=self.tf32)

    def _pool_project(self) -> list[Launch]:
        pool, conv, x = self.spec.pool, self.spec.conv, nhwc(self.x)
        if self.spec.conv_first:
            middle = launch.dense(self._empty(conv.n, conv.oh, conv.ow, conv.oc, torch.float32))
            first = convolve.convolution("conv", conv, x, self.packed[0], [middle], self.choose(conv), tf32=self.tf32)
            return first + pools.pooled(pool, middle, self.target, self.shift, True)
        middle = launch.dense(self._empty(pool.n, pool.oh, pool.ow, pool.c, self.x.dtype))
        second = convolve.convolution(
            "conv", conv, middle, self.packed[0], [self.target], self.choose(conv), tf32=self.tf32
        )
        return pools.pooled(pool, x, middle) + second


def nhwc(x: Tensor) -> Map:
    """[n, c, h, w] as a map, through a copy where its memory is another."""
    return launch.dense(x.permute(0, 2, 3, 1).contiguous())
