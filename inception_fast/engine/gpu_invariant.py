"""How a GPU runs every batch alike, so that an image has the same bits alone and among others.

A sum's order is its kernel's: which kernel that is, how its tile is cut, in how many parts the sum is. A tile's place
among the others changes none of it. So all of these are chosen as for one fixed batch, and no sum is in parts. What
torch runs in between, on a CPU too, is torch's to keep: `loose` names it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch

from ..kernels.spec import ConvSpec
from ..kernels.triton.configs import Config
from . import graph as ir
from .plan import Program, TorchItem

BATCH = 32  # whose kernels all batches have
MOVES = (
    ir.Input,
    ir.Constant,
    ir.Affine,
    ir.Relu,
    ir.Add,
    ir.Concat,
    ir.Slice,
    ir.Pad,
    ir.Reshape,
    ir.Cast,
    ir.Identity,
)
COPIES = {getattr(torch.ops.aten, name) for name in ("cat", "stack", "flip", "roll", "constant_pad_nd", "_to_copy")}


def judged(spec: ConvSpec) -> ConvSpec:
    """The convolution whose measurements decide for this one."""
    return replace(spec, n=BATCH)


def chooser(choose: Callable[[ConvSpec], Config]) -> Callable[[ConvSpec], Config]:
    """`choose` for every batch alike."""
    return lambda spec: replace(choose(judged(spec)), split=1)


def loose(program: Program) -> list[str]:
    """What torch runs, and may run otherwise in another batch: all but what moves or computes single elements."""
    return [item.node.name for item in program.items if isinstance(item, TorchItem) and not _is_fixed(item.node.op)]


def warn_of(names: list[str]) -> None:
    """Says for which nodes the promise is torch's to keep."""
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    warnings.warn(
        f"batch_invariant=True, but torch runs {some} ({len(names)} in all), whose bits may be others in another "
        "batch; report() says why torch runs them",
        RuntimeWarning,
        stacklevel=2,
    )


def _is_fixed(op: ir.Op) -> bool:
    if not isinstance(op, ir.Torch):
        return isinstance(op, MOVES)
    if not isinstance(op.target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in op.target.tags or op.target.is_view or op.target.overloadpacket in COPIES
