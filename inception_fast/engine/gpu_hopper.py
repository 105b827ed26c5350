"""The part of a GPU plan that runs on the Hopper kernels: which steps, how they are cut, and their launches.

A step is given to these kernels where a measurement says that they win, or wherever they can run for those who named
the backend. Steps of one level that are cut alike become one launch. Launches of one stream run in turn, so they share
a workspace; where one follows another with nothing else to wait for, it may start before that one has ended, at the
batches for which starting costs more than computing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import torch

from .. import dispatch
from ..backends import hopper_gpu
from ..kernels import cuda
from ..kernels.cuda import abi, check, choices, convolve, pair, pooled
from ..kernels.cuda.choices import Row
from ..kernels.cuda.convolve import Cut, Launch, Packed, Problem, Target, Workspace
from ..kernels.cuda.loader import Config, Library, PairConfig
from ..kernels.maps import Map
from ..kernels.plan import Buffer, ConvStep, PairStep, PoolStep, Step, View
from ..kernels.spec import ITEM_BYTES, ConvSpec, PairSpec
from .gpu_invariant import judged
from .gpu_pooled import PooledStep
from .segment import views

# Up to here launches of a stream may overlap: on an H200 v3 takes 1.31 ms so and 1.36 without at batch 32, at 128 as
# long (benchmarks/results/nvidia-h200/2026-11-26-gpu-12.json, "early" beside "ours").
OVERLAP_BATCH = 32
# What that is worth a launch, which rows of measurements, timed alone, leave out: in chains of small convolutions on an
# H200 0.4 to 1.3 us (benchmarks/results/nvidia-h200/2026-11-26-gpu.json, probe/hopper).
OVERLAP_SECONDS = 1.0e-6
# In a network a step stays with these kernels where alone it takes up to this much of Triton's time: on an H200 v3 by
# all steps that they can run is 10, 4 and 3 % faster at batch 1, 32 and 128 than with those alone that win alone, of
# the others each up to 1.21 times as long at 32 and 128 (benchmarks/results/nvidia-h200/2026-11-26-gpu-5.json, "cuda"
# beside "ours").
MARGIN = 1.25
Place = Callable[[View], Map]


@dataclass(frozen=True)
class Work:
    """Convolutions of one launch: independent ones, a fused pair's two, or one that is `pooled`. `cut` says how,
    `measured` whether that was measured.
    """

    parts: tuple[tuple[ConvStep, Packed], ...]
    cut: Cut | PairConfig
    measured: bool
    pooled: PooledStep | None = None

    @property
    def name(self) -> str:
        return " + ".join(step.name for step in self.steps)

    @property
    def steps(self) -> list[Step]:
        return [*(step for step, _ in self.parts), *(() if self.pooled is None else (self.pooled.second,))]

    @property
    def unmoved_bytes(self) -> int:
        """What its steps alone would write and read and this keeps on the chip: a fused pair's intermediate, and a map
        that is pooled.
        """
        if self.pooled is None and isinstance(self.cut, Cut):
            return 0
        spec = self.parts[0][0].spec
        return 2 * ITEM_BYTES[spec.dtype] * spec.n * spec.oh * spec.ow * spec.oc

    def joined(self, other: Work) -> Work:
        return Work(self.parts + other.parts, self.cut, self.measured and other.measured)

    def fits(self, other: Work) -> bool:
        """Whether both can be one launch: cut alike, of one dtype, few enough."""
        same = (
            self.cut == other.cut
            and self.pooled is None
            and isinstance(self.cut, Cut)
            and self.parts[0][0].spec.dtype == other.parts[0][0].spec.dtype
        )
        return same and len(self.parts) + len(other.parts) <= abi.GROUP


class Hopper:
    """What the plans of one module on one device share: the library, the measurements, the packed weights.

    `invariant`: all batches have the kernels of one, none of which cuts a sum.
    """

    def __init__(
        self, kernels: Library, device: torch.device, *, always: bool, gpu: str = "", rows: Sequence[Row] = (),
        invariant: bool = False,
    ) -> None:  # fmt: skip
        self.kernels, self.device, self.always, self.gpu, self.rows = kernels, device, always, gpu, tuple(rows)
        self.invariant = invariant
        self._packs: dict[tuple[Any, ...], Packed] = {}

    @functools.cached_property
    def unwalked(self) -> str:
        """Why no plan has a walk; empty when walks are right on the device. Who never asks for one runs none."""
        return check.walk_refusal(self.device) if self.device.type == "cuda" else ""

    @property
    def bytes(self) -> int:
        """Of the packed weights."""
        return sum(packed.bytes for packed in self._packs.values())

    def take(self, step: Step | PooledStep, buffers: Sequence[Buffer]) -> Work | str:
        """The step's work for these kernels, or why another kernel runs it. A chain comes here only where `fuses`, and
        a convolution with its pool where `pools`.
        """
        if isinstance(step, PooledStep):
            config = self._pooled_by(step, buffers)
            assert config is not None
            return Work(((step.first, self.packed(step.first)),), Cut(config), True, step)
        if not isinstance(step, (ConvStep, PairStep)):
            return f"a {type(step).__name__.removesuffix('Step').lower()} has no kernel here"
        steps = (step.first, step.second) if isinstance(step, PairStep) else (step,)
        if isinstance(step, PairStep) and step.kind == "chain":
            row = self._won(step, buffers)
            assert row is not None
            parts = tuple((part, self.packed(part)) for part in steps)
            return Work(parts, self.kernels.pair_config(row.config), True)
        found = [self._cut(part, buffers) for part in steps]
        refused = [cut for cut in found if isinstance(cut, str)]
        cuts = [cut for cut in found if not isinstance(cut, str)]
        both = [cut for cut in cuts if not self._refusal(steps, cut[0])]
        if refused or not both:
            return "; ".join(dict.fromkeys(refused or self._refusal(steps, cuts[0][0])))
        return Work(tuple((part, self.packed(part)) for part in steps), *both[0])

    def _refusal(self, steps: Sequence[ConvStep], cut: Cut) -> list[str]:
        """Why these cannot be one launch by this cut."""
        convs = [convolve.blank(spec_of(step), columns_of(step), cut.splits) for step in steps]
        return self.kernels.reasons(convs, steps[0].spec.dtype, cut.config)

    def fuses(self, step: PairStep, buffers: Sequence[Buffer]) -> bool:
        """Whether a chain is one launch: only where that was measured to be faster than two."""
        return step.kind == "chain" and self._won(step, buffers) is not None

    def pools(self, step: PooledStep, buffers: Sequence[Buffer]) -> bool:
        """Whether a convolution and its pool are one launch: only where that was measured to be faster than two."""
        return self._pooled_by(step, buffers) is not None

    def _pooled_by(self, step: PooledStep, buffers: Sequence[Buffer]) -> Config | None:
        """The configuration that won, where it runs these two."""
        conv, pool = spec_of(step.first), step.second.spec
        if misplaced(step.first, conv.dtype, buffers) or misplaced(step.second, conv.dtype, buffers):
            return None
        able = {config.name: config for config in pooled.able(self.kernels, conv, pool)}
        row = self._row(conv, "pooled") if able else None
        return None if row is None or row.seconds >= row.against else able.get(row.config)

    def _won(self, step: PairStep, buffers: Sequence[Buffer]) -> Row | None:
        """The row of a fused pair that won and that runs this one."""
        first, second = step.first, step.second
        spec = pair_of(step)
        views = (first.x, second.outputs[0].view)
        misplaced = any(
            buffers[v.buffer].dtype != first.spec.dtype or v.offset % 8 or buffers[v.buffer].c % 8 for v in views
        )
        several = len(first.outputs) + len(second.outputs) > 2 or second.residual is not None
        if misplaced or several or first.residual is not None or pair.spec_reasons(self.kernels, spec):
            return None
        row = self._row(second.spec, "pair")
        if row is None or row.seconds >= row.against:
            return None
        return row if row.config in [config.name for config in pair.able(self.kernels, spec)] else None

    def expect_work(self, tasks: Iterable[Any]) -> None:
        """Raises ValueError where these kernels were named and every one of a program's tasks is left to others."""
        found = list(tasks)
        if self.always and not any(task.backend == "cuda" for task in found):
            why = "; ".join(dict.fromkeys(task.note for task in found if task.note)) or "no convolutions"
            raise ValueError(f"backend 'cuda' runs no step of this network ({why}); allowed: one or more")

    def _cut(self, step: ConvStep, buffers: Sequence[Buffer]) -> tuple[Cut, bool] | str:
        """How to cut a convolution and whether that was measured, or why it is not for these kernels."""
        spec, columns = spec_of(step), columns_of(step)
        why = convolve.spec_reasons(self.kernels, spec, columns)
        why += misplaced(step, spec.dtype, buffers)
        if why:
            return "; ".join(why)
        row = self._row(spec)
        if not self.always and row is None:
            return "not measured"
        decisive = self._decisive(spec)
        early = OVERLAP_SECONDS if decisive.n <= OVERLAP_BATCH else 0.0
        if not self.always and row is not None and row.seconds - early >= MARGIN * row.against:
            return f"measured slower: {row.seconds * 1e6:.1f} us, {row.against * 1e6:.1f} by Triton"
        cut = hopper_gpu.cut_of(self.kernels, decisive, columns, row)
        return (cut._replace(splits=1) if self.invariant else cut), row is not None

    def _decisive(self, spec: ConvSpec) -> ConvSpec:
        """The convolution by which the kernel of this one is chosen."""
        return judged(spec) if self.invariant else spec

    def _row(self, spec: ConvSpec, kernel: str = "conv") -> Row | None:
        """The measurement that is nearest."""
        return choices.nearest(hopper_gpu.shape_of(self._decisive(spec), kernel), self.gpu, self.rows)

    def packed(self, step: ConvStep) -> Packed:
        """The step's weights, packed once for all plans."""
        arrays = (step.whole, step.scale, step.shift)
        key = (step.spec.dtype, *((a.shape, blake2b(a.tobytes()).digest()) for a in arrays))
        if key not in self._packs:
            dtype = torch.bfloat16 if step.spec.dtype == "bfloat16" else torch.float16
            self._packs[key] = convolve.pack(*arrays, dtype, self.device)
        return self._packs[key]

    def sizes(self, work: Work) -> tuple[int, int]:
        """Bytes of workspace, and how many of them are counters."""
        if not isinstance(work.cut, Cut) or work.pooled is not None:
            return 0, 0
        convs = [convolve.blank(spec_of(step), columns_of(step), work.cut.splits) for step, _ in work.parts]
        return self.kernels.workspace_bytes(convs, work.cut.config)

    def workspaces(self, work: Sequence[tuple[int, Work]]) -> dict[int, Workspace | None]:
        """One for each stream that runs such work."""
        return {stream: convolve.workspace(sizes, self.device) for stream, sizes in self._by_stream(work).items()}

    def workspace_bytes(self, work: Sequence[tuple[int, Work]]) -> int:
        """Of all streams together, before any is made."""
        return sum(sum(convolve.workspace_sizes(sizes)) for sizes in self._by_stream(work).values())

    def _by_stream(self, work: Sequence[tuple[int, Work]]) -> dict[int, list[tuple[int, int]]]:
        found: dict[int, list[tuple[int, int]]] = {}
        for stream, one in work:
            found.setdefault(stream, []).append(self.sizes(one))
        return found

    def launch(self, work: Work, place: Place, workspace: Workspace | None, overlap: bool) -> Launch:
        """The work as one launch on the maps that `place` finds."""
        alone = overlap and max(step.spec.n for step, _ in work.parts) <= OVERLAP_BATCH
        if not isinstance(work.cut, Cut):
            (first, one), (second, two) = work.parts
            spec, x, y = pair_of(PairStep(work.name, "chain", first, second)), first.x, second.outputs[0].view
            return pair.launch(work.name, self.kernels, spec, place(x), (one, two), place(y), work.cut, overlap=alone)
        if work.pooled is not None:
            problems = [pooled_problem(work.pooled, work.parts[0][1], place)]
        else:
            problems = [problem_of(step, packed, place) for step, packed in work.parts]
        return convolve.group(work.name, self.kernels, problems, work.cut, place=workspace, overlap=alone)


def misplaced(step: ConvStep | PoolStep, dtype: str, buffers: Sequence[Buffer]) -> list[str]:
    """Why these kernels cannot reach the step's maps."""
    why = []
    for view, buffer in ((view, buffers[view.buffer]) for view in views(step)):
        if buffer.dtype != dtype:
            why.append(f"{buffer.dtype} beside {dtype}; allowed: one format")
        if view.offset % 8 or buffer.c % 8:
            why.append(f"channels from {view.offset} of {buffer.c}; allowed: multiples of 8")
    return why


def spec_of(step: ConvStep) -> ConvSpec:
    """The step's spec; whether it has a residual is the step's to say."""
    return replace(step.spec, residual=step.residual is not None)


def pair_of(step: PairStep) -> PairSpec:
    """The pair's spec, each convolution with the ReLU of its own output."""
    first, second = (replace(spec_of(s), relu=s.outputs[0].relu) for s in (step.first, step.second))
    return PairSpec(first, second, step.kind)


def problem_of(step: ConvStep, packed: Packed, place: Place) -> Problem:
    """The convolution on the maps that `place` finds."""
    targets = tuple(Target(place(o.view), o.relu) for o in step.outputs)
    residual = None if step.residual is None else place(step.residual)
    return Problem(spec_of(step), place(step.x), packed, targets, residual, step.residual_scale)


def pooled_problem(step: PooledStep, packed: Packed, place: Place) -> Problem:
    """A convolution that is pooled, on the maps that `place` finds."""
    y, pool = place(step.second.y), step.second.spec
    spec = spec_of(step.first)
    return Problem(spec, place(step.first.x), packed, (Target(y, step.relu),), pooled=(pool.oh, pool.ow))


def columns_of(step: ConvStep) -> tuple[int, ...]:
    return tuple(o.view.channels for o in step.outputs)


def of(device: torch.device, dtype: str, backend: str, named: bool, invariant: bool = False) -> Hopper | None:
    """The Hopper kernels for a session: None for one that named another backend or runs in float32, or where they are
    not to be had. Raises RuntimeError where they were named and the device refuses them.
    """
    wanted = backend == "cuda" or not named
    if not wanted or dtype not in abi.TYPES or (backend != "cuda" and not dispatch.backend_status()["cuda"]):
        return None
    gpu, rows = hopper_gpu.measured(device)
    if backend != "cuda" and not rows:
        return None
    refused = check.refusal(device) if device.type == "cuda" else ""
    if refused and backend == "cuda":
        raise RuntimeError(f"backend 'cuda' cannot run here: {refused}")
    if refused:
        return None
    return Hopper(cuda.library(), device, always=backend == "cuda", gpu=gpu, rows=rows, invariant=invariant)


def overlapping(tasks: Sequence[Any]) -> set[int]:
    """Places of the tasks that may start before the one ahead of them in their stream has ended: both are launches of
    these kernels, which wait for what is ahead before they touch memory that it may use, and there is nothing else to
    wait for. Weights are loaded before: they were packed before the first task of a stream, which never overlaps.
    """
    found, ahead = set(), dict[int, Any]()
    for j, task in enumerate(tasks):
        before = ahead.get(task.stream)
        if before is not None and before.hopper is not None and task.hopper is not None and not task.waits:
            found.add(j)
        ahead[task.stream] = task
    return found
