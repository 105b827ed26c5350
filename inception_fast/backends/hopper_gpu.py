"""The "cuda" backend: the Hopper kernels, one operation at a time, on the current stream.

Weights are packed in `prepare`, once for all batches and maps, and again only after a weight, scale or shift changed. A
pair's intermediate is rounded to the tensor's dtype. How a shape is cut into tiles comes from what was measured, or
from a model where nothing was; unnamed, the backend is taken only where a measurement says that it wins.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import PoolProjectSpec, Spec
from ..kernels import cuda
from ..kernels.cuda import abi, check, choices, convolve
from ..kernels.cuda.choices import Row, Shape
from ..kernels.cuda.convolve import Cut, Packed, Problem, Target
from ..kernels.cuda.loader import Library
from ..kernels.maps import Map, dense
from ..kernels.spec import ConvSpec, PairSpec
from . import Params, laid_out
from .gpu_weights import Packs


class Weights(NamedTuple):
    packed: tuple[Packed, ...]

    @property
    def packed_bytes(self) -> int:
        return sum(p.bytes for p in self.packed)


weights = Packs[Weights]()


class Prepared(NamedTuple):
    compiled: Weights
    spec: Spec
    residual_scale: float


def reasons(spec: Spec) -> list[str]:
    """Why these kernels cannot run `spec` on the current GPU; asked only where there is one."""
    found = spec_reasons(cuda.library(), spec)
    refused = check.refusal(torch.device("cuda")) if not found and torch.cuda.is_available() else ""
    return [*found, refused] if refused else found


def spec_reasons(kernels: Library, spec: Any) -> list[str]:
    """Why no kernel of the library fits the spec; empty when one does."""
    if isinstance(spec, PairSpec):
        both = spec_reasons(kernels, spec.first) + spec_reasons(kernels, spec.second)
        return list(dict.fromkeys(both))
    if not isinstance(spec, ConvSpec):
        pooled = "an average pool with its 1x1 convolution" if isinstance(spec, PoolProjectSpec) else "a pool"
        return [f"{pooled}; allowed: convolutions and pairs"]
    return convolve.spec_reasons(kernels, spec)


def wins(spec: Any) -> bool:
    """Whether a measurement on a GPU like the current one says that these kernels are the faster ones."""
    parts = [spec.first, spec.second] if isinstance(spec, PairSpec) else [spec]
    known = all(isinstance(part, ConvSpec) and part.dtype in abi.TYPES for part in parts)
    if not known or not torch.cuda.is_available():
        return False
    rows = [choices.nearest(shape_of(part), *measured(torch.device("cuda"))) for part in parts]
    return all(row is not None and row.seconds < row.against for row in rows)


def prepare(spec: Spec, params: Params, x: Tensor, residual: Tensor | None, residual_scale: float) -> Prepared:
    tensors = tuple(tensor for triple in params for tensor in triple)
    key = (x.dtype, x.device, *map(id, tensors))
    packed = weights.get(
        key, tensors, x.device, lambda: Weights(tuple(convolve.pack(*triple, x.dtype, x.device) for triple in params))
    )
    return Prepared(packed, spec, residual_scale)


def run(prepared: Prepared, x: Tensor, residual: Tensor | None, memory_format: torch.memory_format) -> Tensor:
    """y in memory of its own, on the current stream of x's device. Raises RuntimeError on a GPU that is not trusted."""
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        refused = check.refusal(x.device) if x.is_cuda else ""
        if refused:
            raise RuntimeError(refused)
        y = _called(cuda.library(), prepared, x, residual)
        return laid_out(y.permute(0, 3, 1, 2), memory_format)


def shape_of(spec: ConvSpec, kernel: str = "conv") -> Shape:
    """What rows of measurements are looked up by. Raises ValueError for a dtype that has none."""
    taps = spec.kh * spec.kw
    precision = choices.precision_of(spec.dtype)
    return Shape(kernel, precision, spec.n * spec.oh * spec.ow, spec.oc, spec.c * taps, taps)


def measured(device: torch.device) -> tuple[str, tuple[Row, ...]]:
    """The GPU's name, and the rows that were measured on it or on others."""
    if device.type != "cuda":
        return "", choices.shipped()
    return _measured(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _measured(index: int) -> tuple[str, tuple[Row, ...]]:
    device = torch.device("cuda", index)
    name = torch.cuda.get_device_name(device)
    return name, proved(choices.tuned(name, abi.ABI), device)


def proved(rows: tuple[Row, ...], device: torch.device) -> tuple[Row, ...]:
    """The rows without those of a form of tiles that gives wrong numbers on the device, of which a warning tells."""
    named = [form for form in check.FORMS if any(form in row.config.split() for row in rows)]
    if not named or check.refusal(device):
        return rows
    for form in named:
        refused = check.form_refusal(device, form)
        if refused:
            warnings.warn(
                f"no tile {form!r} is used, which measurements chose: {refused}", RuntimeWarning, stacklevel=2
            )
            rows = tuple(row for row in rows if form not in row.config.split())
    return rows


def cut_of(kernels: Library, spec: ConvSpec, columns: tuple[int, ...] = (), row: Row | None = None) -> Cut:
    """As measured for a shape near it, where that configuration runs this one, in fewer parts where K is too short for
    as many; else as the model predicts.
    """
    named = [
        config for config in convolve.able(kernels, spec, columns) if row is not None and config.name == row.config
    ]
    if row is None or not named:
        return convolve.predicted(kernels, spec, columns)
    return Cut(named[0], max(parts for parts in convolve.splits_of(spec, named[0], 2) if parts <= row.splits))


def _called(kernels: Library, prepared: Prepared, x: Tensor, residual: Tensor | None) -> Tensor:
    spec: Any = prepared.spec
    source = nhwc(x)
    if isinstance(spec, ConvSpec):
        y = _empty(spec, spec.oc, x)
        old = None if residual is None else nhwc(residual)
        packed = prepared.compiled.packed[0]
        problem = Problem(spec, source, packed, (Target(dense(y), spec.relu),), old, prepared.residual_scale)
        _launch(kernels, [problem], x.device)
        return y
    first, second = prepared.compiled.packed
    if spec.kind == "split":
        y = _empty(spec.first, spec.first.oc + spec.second.oc, x)
        places = (dense(y).channels(0, spec.first.oc), dense(y).channels(spec.first.oc, spec.second.oc))
        parts = zip((spec.first, spec.second), (first, second), places, strict=True)
        _launch(kernels, [Problem(s, source, p, (Target(place, True),)) for s, p, place in parts], x.device)
        return y
    middle, y = _empty(spec.first, spec.first.oc, x), _empty(spec.second, spec.second.oc, x)
    _launch(kernels, [Problem(spec.first, source, first, (Target(dense(middle), True),))], x.device)
    _launch(kernels, [Problem(spec.second, dense(middle), second, (Target(dense(y), True),))], x.device)
    return y


def _launch(kernels: Library, problems: list[Problem], device: torch.device) -> None:
    """In one launch, by a cut that runs them all, or each by its own where none does: rows of x that a halo tile keeps
    for a 1x3 may have no room for the rows beside them that a 3x1 reads.
    """
    if problems[0].spec.n == 0:
        return
    gpu, rows = measured(device)
    specs = [problem.spec for problem in problems]
    cuts = [cut_of(kernels, spec, row=choices.nearest(shape_of(spec), gpu, rows)) for spec in specs]
    for cut in cuts:
        convs = [convolve.described(problem, cut.splits) for problem in problems]
        if not kernels.reasons(convs, specs[0].dtype, cut.config):
            convolve.group("conv", kernels, problems, cut).run()
            return
    for problem, cut in zip(problems, cuts, strict=True):
        convolve.group("conv", kernels, [problem], cut).run()


def _empty(spec: ConvSpec, channels: int, x: Tensor) -> Tensor:
    return torch.empty((spec.n, spec.oh, spec.ow, channels), dtype=x.dtype, device=x.device)


def nhwc(x: Tensor) -> Map:
    """[n, c, h, w] as a map that begins on 16 bytes, through a copy where its memory is another."""
    there = x.permute(0, 2, 3, 1).contiguous()
    return dense(there.clone() if there.data_ptr() % 16 else there)
