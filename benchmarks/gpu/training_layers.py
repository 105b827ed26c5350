"""One training step of single layers, forward and backward: ours beside torch's, after their gradients are right."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from catalogue import LAYERS
from measure import DEVICE, error_of
from timing import device_seconds, summary
from torch import Tensor, nn

import inception_fast as fast

BATCH, CHECKED = 128, 8
NAMES = ("stem_3x3", "35_1x1_176", "35_3x3_96", "17_1x7_192", "17_1x1_576", "8_3x3_384")
# A gradient passes four roundings, of activation, gradient, and both once more; sums over the batch cancel some digits.
GRADIENT_BUDGET = {"bfloat16": 5e-2, "float16": 8e-3}


def training_rows(dtype: str) -> Iterator[list[dict[str, Any]]]:
    """All rows so far, a layer at a time."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # of the truth
    rows: list[dict[str, Any]] = []
    for name in NAMES:
        rows += layer_rows(name, dtype)
        yield rows


def layer_rows(name: str, dtype: str) -> list[dict[str, Any]]:
    """Ours, torch's modules as they are, and compiled; compared on a few images, timed on all."""
    kind = getattr(torch, dtype)
    size, c, oc, kernel, stride, padding = LAYERS[name]
    torch.manual_seed(0)
    layer = fast.ConvBNReLU(c, oc, kernel, stride, (padding[0], padding[2])).to(DEVICE)
    layer = layer.to(memory_format=torch.channels_last)
    x = torch.randn(BATCH, c, size, size, device=DEVICE, dtype=kind).contiguous(memory_format=torch.channels_last)
    slope = torch.randn_like(plain(layer)(x.float())).to(kind)
    few, truth = x[:CHECKED], gradients(plain(layer), x[:CHECKED].float(), slope[:CHECKED].float())
    steps = {"ours": layer, "eager": plain(layer), "compile": torch.compile(plain(layer), dynamic=False)}
    found: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for runtime, step in steps.items():
        row = found[runtime] = {"layer": name, "batch": BATCH, "dtype": dtype, "runtime": runtime}
        try:
            mine = gradients(step, few, slope[:CHECKED])
            error = max(error_of(a, b.double()) for a, b in zip(mine, truth, strict=True))
        except Exception as problem:
            row |= {"status": "failed", "note": f"{type(problem).__name__}: {problem}"[:400]}
            continue
        right = error <= GRADIENT_BUDGET[dtype]  # a NaN is not
        row |= {"rel_error": error if math.isfinite(error) else None, "status": "ok" if right else "wrong"}
        if right:
            calls[runtime] = functools.partial(gradients, step, x, slope)
    for runtime, seconds in device_seconds(calls, 15).items() if calls else ():
        found[runtime] |= summary(seconds)
    return list(found.values())


def plain(layer: fast.ConvBNReLU) -> nn.Module:
    """The same layer by torch's own modules, with parameters of its own."""
    conv, bn = copy.deepcopy(layer.conv), copy.deepcopy(layer.bn)
    return nn.Sequential(conv, bn, nn.ReLU(inplace=True))


def gradients(step: nn.Module, x: Tensor, slope: Tensor) -> list[Tensor]:
    """y, and the gradients of x and of the parameters, under autocast where x is narrow."""
    leaf = x.detach().requires_grad_()
    with torch.autocast(x.device.type, x.dtype, enabled=x.dtype is not torch.float32):
        y = step(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *step.parameters()], slope)]
