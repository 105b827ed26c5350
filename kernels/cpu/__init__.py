"""The native CPU backend: compiles a `Plan` for one instruction-set tier, runs it in one call without Python inside.

compiled = compile(plan)
compiled.run([(x.data_ptr(), "float32", x.stride())], [y.data_ptr()], arena.data_ptr(), threads=2)
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import numpy as np

from .. import was_forked
from ..plan import (
    Buffer,
    ConvStep,
    EltwiseStep,
    ImportStep,
    LrnStep,
    NormalizeStep,
    PairStep,
    Plan,
    PoolStep,
    Step,
    View,
)
from ..spec import ConvSpec, PairSpec, PoolSpec
from . import winograd
from .direct import trains_directly as trains_directly
from .winograd import DIRECT as DIRECT
from .winograd import Tile
from .winograd import training_tile as training_tile
from .winograd_gradient import gradient_tile as gradient_tile

try:
    from . import _native
except ImportError as error:
    raise ImportError(
        f"the native kernels of inception_fast are not built ({error}); run `pip install -e .` in the checkout"
    ) from error

# What is loaded by now sees later forks itself; of an earlier one, which lost the threads of torch, only Python knows.
if was_forked():
    _native.leave_openmp()

DTYPES = ("float32", "bfloat16")
EMULATED = ("amx_bf16_emulated",)  # what a tile unit computes, on any processor: slow, for tests, by name only
ISA_VARIABLE = "INCEPTION_FAST_ISA"

# Batch norm in training, with pointers for arguments: batch_norm_op.h says of what.
batch_norm_relu = _native.batch_norm_relu
batch_norm_relu_backward = _native.batch_norm_relu_backward
# What else training does natively, likewise: train_conv.h, weight_gradient_op.h, train_pool_op.h, update.h.
convolve_in_training = _native.convolve_in_training
conv_weight_gradient = _native.conv_weight_gradient
pool_in_training = _native.pool_in_training
rmsprop_update = _native.rmsprop_update

InputArgument = tuple[int, str, tuple[int, int, int, int]]


@functools.cache
def tiers() -> tuple[str, ...]:
    """Tiers this machine can run, slowest first."""
    return tuple(_native.tiers())


def default_tier() -> str:
    """The tier named by INCEPTION_FAST_ISA, else the best. Raises ValueError when the named one cannot run here."""
    name = os.environ.get(ISA_VARIABLE)
    if not name:
        return tiers()[-1]
    return _checked_tier(name, f"{ISA_VARIABLE}={name}")


def reasons(spec: ConvSpec | PairSpec | PoolSpec) -> list[str]:
    """Why this backend cannot run the operator; empty when it can."""
    if isinstance(spec, PairSpec):
        return [f"{name}: {why}" for name in ("first", "second") for why in reasons(getattr(spec, name))]
    found = []
    if spec.dtype not in DTYPES:
        found.append(f"dtype {spec.dtype}; the CPU kernels take {', '.join(DTYPES)}")
    largest = max(spec.h, spec.w, spec.c, spec.kh, spec.kw, spec.n, *spec.padding, *spec.stride)
    if isinstance(spec, ConvSpec) and spec.oc * (spec.c // spec.groups) * spec.kh * spec.kw >= 2**31:
        found.append("2^31 or more weights; the CPU kernels count them in 32 bits")
    if largest >= 2**20:
        found.append(f"a size of {largest}; the CPU kernels take sizes below 2^20")
    return found


def peak_flops(dtype: str = "float32", threads: int = 1, tier: str | None = None, seconds: float = 0.1) -> float:
    """FLOP/s that `threads` cores reach on registers, products of `dtype` summed in float32.

    The ceiling of every kernel of the tier, measured now; cores that others use at the time make it lower.
    """
    name = default_tier() if tier is None else _checked_tier(tier, f"tier {tier!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    with ThreadPoolExecutor(threads) as pool:
        return 2 * sum(pool.map(lambda _: _native.peak(name, dtype, seconds), range(threads)))


def handover_ns() -> float | None:
    """Nanoseconds until one core sees what another one wrote into a line of the cache that it waits for.

    Some 40 where both share a cache, 160 where they do not, on a Zen 4 whose host moves them from minute to minute.
    Takes 0.1 ms, 20 at most. None with one core, or where others leave no time for it.
    """
    seconds = _native.handover()
    return None if math.isnan(seconds) else 1e9 * seconds


def winograd_tile(spec: ConvSpec) -> tuple[Tile, str]:
    """The tile of Winograd's algorithm that pays for a convolution on the default tier, or (0, 0) and why none does."""
    return winograd.winograd_tile(spec, default_tier())


def trim() -> None:
    """Gives what the C library keeps of freed memory back to the system. Only glibc can."""
    _native.trim()


def fuses(pair: PairSpec, threads: int) -> bool:
    """Whether a pair is better one operator over a local buffer than its two convolutions.

    Fewer images than threads are shared out by columns of the result, which a fused pair cannot: one image is 2 to 9 %
    slower on two threads of a Zen 5, and three images 0.5 %; two, and more than three, are 1 to 18 % faster. One image
    on one thread takes as long either way, and stays with the form that more threads share.
    """
    b = pair.second
    columns = b.kw == 1 and b.stride[1] == 1 and not any(b.padding[2:])
    rows = b.kh == 1 and b.stride[0] == 1 and not any(b.padding[:2])
    return pair.kind == "chain" and (columns or rows) and b.n > 1 and (b.n % threads == 0 or 2 * b.n > 3 * threads)


class CompiledPlan:
    """A plan with packed weights. Any number of threads may run it at once."""

    def __init__(self, native: _native.Plan) -> None:
        self._native = native

    @property
    def tier(self) -> str:
        return self._native.tier

    @property
    def packed_bytes(self) -> int:
        return self._native.packed_bytes

    @property
    def arena_bytes(self) -> int:
        return self._native.arena_bytes

    def run(self, inputs: Sequence[InputArgument], outputs: Sequence[int], arena: int, threads: int) -> None:
        """Runs every step.

        Args:
            inputs: data pointer, dtype ("float32", "bfloat16" or "uint8") and element strides of logical n, c, h,
                w, of each input.
            outputs: pointers of dense NHWC memory of the buffers' dtypes, by the output buffers' positions.
            arena: pointer to `arena_bytes` bytes, 64-byte aligned; not shared with a call that is still running.
            threads: how many threads to use, this one included.
        """
        self._native.run(inputs, outputs, arena, threads)

    def run_timed(
        self, inputs: Sequence[InputArgument], outputs: Sequence[int], arena: int, threads: int
    ) -> list[float]:
        """`run`, returning the seconds each step took, in the order of the plan's steps."""
        return self._native.run_timed(inputs, outputs, arena, threads)

    def run_shares(
        self, inputs: Sequence[InputArgument], outputs: Sequence[int], arena: int, threads: int
    ) -> list[list[float]]:
        """`run`, returning for each thread the seconds that it computed in each step, waiting left out.

        They are those in which the system gave it a core, so that there may be more threads than cores.
        """
        seconds = self._native.run_shares(inputs, outputs, arena, threads)
        steps = len(seconds) // threads
        return [seconds[i * steps : (i + 1) * steps] for i in range(threads)]


def compile(plan: Plan, tier: str | None = None, like: CompiledPlan | None = None) -> CompiledPlan:
    """Packs the weights for a tier; the plan's arrays may be freed afterwards.

    With `like`, a compiled plan of the same weights at another batch size, its packed weights are shared and those of
    `plan` are not read; only that the convolutions are the same is checked.

    Raises ValueError naming the step, what was seen and what is allowed when the plan does not fit its buffers.
    """
    builder = _native.Builder(
        default_tier() if tier is None else _checked_tier(tier, f"tier {tier!r}"), plan.arena_bytes
    )
    for n, c, h, w in plan.inputs:
        builder.input(n, c, h, w)
    for buffer in plan.buffers:
        builder.buffer(buffer.n, buffer.h, buffer.w, buffer.c, buffer.kind, buffer.position, buffer.dtype)
    if plan.images and len(plan.images) != len(plan.steps):
        raise ValueError(f"numbers of images for {len(plan.images)} steps; allowed: for none or for {len(plan.steps)}")
    for step, images in zip(plan.steps, plan.images or (0,) * len(plan.steps), strict=True):
        _add(builder, step, images, plan.buffers)
    return CompiledPlan(builder.build(None if like is None else like._native))


def _checked_tier(name: str, seen: str) -> str:
    if name not in (*tiers(), *EMULATED):
        raise ValueError(f"{seen}; this machine can run: {', '.join(tiers())}")
    return name


def _add(builder: _native.Builder, step: Step, images: int, buffers: Sequence[Buffer]) -> None:
    if not isinstance(step, get_args(Step)):
        raise TypeError(f"step of type {type(step).__name__}; allowed: {', '.join(s.__name__ for s in get_args(Step))}")
    builder.step(step.name, images)
    if isinstance(step, ConvStep):
        _add_conv(builder, step)
    elif isinstance(step, PairStep):
        _add_pair(builder, step, buffers)
    elif isinstance(step, PoolStep):
        _add_pool(builder, step)
    elif isinstance(step, ImportStep):
        scale, shift = _optional(step, "scale"), _optional(step, "shift")
        builder.import_(step.source, _view(step.y), scale, shift)
    elif isinstance(step, EltwiseStep):
        scale, shift = _optional(step, "scale"), _optional(step, "shift")
        residual = None if step.residual is None else _view(step.residual)
        builder.eltwise(_view(step.x), _view(step.y), scale, shift, step.relu, residual, step.residual_scale)
    elif isinstance(step, LrnStep):
        builder.lrn(_view(step.x), _view(step.y), step.size, step.alpha, step.beta, step.k)
    elif isinstance(step, NormalizeStep):
        builder.normalize(_view(step.x), _view(step.y), step.eps)


def _add_conv(builder: _native.Builder, step: ConvStep) -> None:
    spec = step.spec
    _check_spec(step.name, spec)
    builder.conv(
        sizes=(spec.n, spec.h, spec.w, spec.c, spec.oc, spec.kh, spec.kw),
        stride=spec.stride,
        padding=spec.padding,
        groups=spec.groups,
        x=_view(step.x),
        weights=_weights(step),
        scale=_array(step, "scale"),
        shift=_array(step, "shift"),
        outputs=[(*_view(output.view), output.relu) for output in step.outputs],
        residual=None if step.residual is None else _view(step.residual),
        residual_scale=step.residual_scale,
        tile=step.tile,
    )


def _add_pair(builder: _native.Builder, step: PairStep, buffers: Sequence[Buffer]) -> None:
    """A chain over a local buffer is one fused operator; any other pair is its two convolutions in one step."""
    first, second = step.first, step.second
    if step.kind == "chain" and (len(first.outputs) != 1 or second.x != first.outputs[0].view):
        raise ValueError(f"step {step.name!r}: second reads {second.x}; allowed: the one output of first")
    if step.kind == "split" and second.x != first.x:
        raise ValueError(f"step {step.name!r}: second reads {second.x}; allowed: {first.x}, as first does")
    PairSpec(first.spec, second.spec, step.kind)
    if step.kind == "chain" and buffers[second.x.buffer].kind == "local":
        _add_fused(builder, first, second)
        return
    _add_conv(builder, first)
    _add_conv(builder, second)


def _add_fused(builder: _native.Builder, first: ConvStep, second: ConvStep) -> None:
    for part in (first, second):
        _check_spec(part.name, part.spec)
        if any(part.tile):
            raise ValueError(f"step {part.name!r}: tile {part.tile} in a fused pair; allowed: (0, 0)")
        if part.residual is not None:
            raise ValueError(f"step {part.name!r}: a residual in a fused pair; allowed: none")
    relu = first.outputs[0].relu
    outputs = [(*_view(output.view), output.relu) for output in second.outputs]
    builder.pair(_conv_tuple(first), _conv_tuple(second), _view(first.x), _view(second.x), relu, outputs)


def _conv_tuple(step: ConvStep) -> _native._Conv:
    spec = step.spec
    sizes = (spec.n, spec.h, spec.w, spec.c, spec.oc, spec.kh, spec.kw)
    arrays = (_array(step, "scale"), _array(step, "shift"))
    return (sizes, spec.stride, spec.padding, spec.groups, _weights(step), *arrays)


def _add_pool(builder: _native.Builder, step: PoolStep) -> None:
    spec = step.spec
    _check_spec(step.name, spec)
    builder.pool(
        (spec.n, spec.h, spec.w, spec.c, spec.kh, spec.kw),
        spec.stride,
        spec.padding,
        spec.overhang,
        spec.kind == "max",
        spec.count_include_pad,
        _view(step.x),
        _view(step.y),
        _optional(step, "shift"),
        step.relu,
    )


def _check_spec(name: str, spec: ConvSpec | PoolSpec) -> None:
    found = reasons(spec)
    if found:
        raise ValueError(f"step {name!r}: {'; '.join(found)}")


def _view(view: View) -> tuple[int, int, int]:
    return (view.buffer, view.offset, view.channels)


def _array(step: Step, field: str) -> np.ndarray:
    return np.ascontiguousarray(_checked(step, field, getattr(step, field)))


def _weights(step: ConvStep) -> list[np.ndarray]:
    """The parts as they lie: packing reads any strides."""
    return [np.require(_checked(step, "weight", part), requirements="A") for part in step.parts]


def _checked(step: Step, field: str, array: object) -> np.ndarray:
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
        seen = f"dtype {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"step {step.name!r}: {field} of {seen}; allowed: a float32 NumPy array")
    return array


def _optional(step: Step, field: str) -> np.ndarray | None:
    return None if getattr(step, field) is None else _array(step, field)
