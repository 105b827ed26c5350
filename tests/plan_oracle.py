"""Runs a native plan step by step with plain torch in float64 over one poisoned arena: what a plan means, independent
of the kernels and of the engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from inception_fast.kernels.plan import (
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
from torch import Tensor


def run_plan(plan: Plan, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The plan's outputs, [n, c, h, w] float64. Memory starts as NaN, so a read before a write shows."""
    return _Memory(plan, inputs).run()


class _Memory:
    def __init__(self, plan: Plan, inputs: Sequence[Tensor]) -> None:
        assert [tuple(x.shape) for x in inputs] == list(plan.inputs)
        self.plan, self.inputs = plan, inputs
        self.arena = torch.full((plan.arena_bytes // 4,), float("nan"), dtype=torch.float64)
        self.outputs = [torch.full((b.n, b.h, b.w, b.c), float("nan"), dtype=torch.float64) for b in plan.outputs]

        self.local: dict[int, Tensor] = {}

    def run(self) -> list[Tensor]:
        for step in self.plan.steps:
            self.step(step)
        return [o.permute(0, 3, 1, 2) for o in self.outputs]

    def base(self, b: Buffer) -> Tensor:
        """[n, h, w, c]"""
        if b.kind == "input":
            return self.inputs[b.position].double().permute(0, 2, 3, 1)
        if b.kind == "output":
            return self.outputs[b.position]
        if b.kind == "local":
            return self.local.setdefault(
                b.position, torch.full((b.n, b.h, b.w, b.c), float("nan"), dtype=torch.float64)
            )
        count = b.n * b.h * b.w * b.c
        return self.arena[b.position // 4 : b.position // 4 + count].view(b.n, b.h, b.w, b.c)

    def at(self, view: View) -> Tensor:
        """[n, c, h, w], the memory itself."""
        whole = self.base(self.plan.buffers[view.buffer])
        return whole[..., view.offset : view.offset + view.channels].permute(0, 3, 1, 2)

    def step(self, step: Step) -> None:
        if isinstance(step, PairStep):
            self.conv(step.first)
            self.conv(step.second)
        elif isinstance(step, ConvStep):
            self.conv(step)
        elif isinstance(step, ImportStep):
            self.write(step.y, _affine(self.inputs[step.source].double(), step.scale, step.shift))
        elif isinstance(step, PoolStep):
            y = _affine(_pool(step, self.at(step.x)), None, step.shift)
            self.write(step.y, y.relu() if step.relu else y)
        elif isinstance(step, EltwiseStep):
            y = _affine(self.at(step.x), step.scale, step.shift)
            if step.residual is not None:
                y = self.at(step.residual) + step.residual_scale * y
            self.write(step.y, y.relu() if step.relu else y)
        elif isinstance(step, LrnStep):
            y = F.local_response_norm(self.at(step.x).clone(), step.size, step.alpha, step.beta, step.k)
            self.write(step.y, y)
        else:
            assert isinstance(step, NormalizeStep)
            self.write(step.y, F.normalize(self.at(step.x), eps=step.eps))

    def write(self, view: View, values: Tensor) -> None:
        self.at(view).copy_(values.clone())

    def conv(self, step: ConvStep) -> None:
        spec = step.spec
        top, bottom, left, right = spec.padding
        x = F.pad(self.at(step.x), (left, right, top, bottom))
        y = F.conv2d(x, torch.from_numpy(step.whole).double(), stride=spec.stride, groups=spec.groups)
        assert tuple(y.shape) == (spec.n, spec.oc, spec.oh, spec.ow)
        y = _affine(y, step.scale, step.shift)
        if step.residual is not None:
            assert len(step.outputs) == 1
            y = self.at(step.residual) + step.residual_scale * y
        for output, part in zip(step.outputs, y.split([o.view.channels for o in step.outputs], 1), strict=True):
            self.write(output.view, part.relu() if output.relu else part)


def _affine(x: Tensor, scale: object, shift: object) -> Tensor:
    for values, op in ((scale, torch.mul), (shift, torch.add)):
        if values is not None:
            x = op(x, torch.as_tensor(values).double().view(1, -1, 1, 1))
    return x


def _pool(step: PoolStep, x: Tensor) -> Tensor:
    spec = step.spec
    top, bottom, left, right = spec.padding
    down, across = spec.overhang
    around = (left, right + across, top, bottom + down)
    if spec.kind == "max":
        return F.max_pool2d(F.pad(x, around, value=float("-inf")), (spec.kh, spec.kw), spec.stride)
    counted = F.pad(torch.ones_like(x), (left, right, top, bottom), value=float(spec.count_include_pad))
    counted = F.pad(counted, (0, across, 0, down))
    windows = [
        F.unfold(t.flatten(0, 1).unsqueeze(1), (spec.kh, spec.kw), stride=spec.stride)
        for t in (F.pad(x, around), counted)
    ]
    means = windows[0].sum(1) / windows[1].sum(1)
    return means.view(x.shape[0], x.shape[1], spec.oh, spec.ow)
