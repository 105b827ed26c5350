"""Tries every cut of a convolution and says how long each takes. Runs only when asked, and only on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..maps import dense
from ..spec import ConvSpec, PoolSpec
from . import convolve, pooled
from .convolve import Cut, Launch, Problem, Target
from .loader import Library

Timer = Callable[[Callable[[], None]], float]
TRIED = 60  # of some 500; of 153 shapes on an H200 the fastest stood 53rd at worst, and in the first 7 as a rule


def proposals(kernels: Library, spec: ConvSpec, count: int | None = None) -> list[Cut]:
    """Every configuration that runs the spec, whole and with the splits that leave each part some steps; with `count`
    so many that a model of time puts first.
    """
    able = convolve.able(kernels, spec)
    found = [Cut(config, splits) for config in able for splits in convolve.splits_of(spec, config, 2)]
    return sorted(found, key=lambda cut: convolve.modelled(spec, cut))[:count]


def tried(
    kernels: Library, spec: ConvSpec, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, timer: Timer, *,
    count: int | None = TRIED, residual: Tensor | None = None, pool: PoolSpec | None = None,
) -> dict[Cut, float]:  # fmt: skip
    """Seconds of every proposal that gives what the first one gives; x is [n, c, h, w], a residual [n, oh, ow, oc].
    With `pool`, of those that give its maxima.

    Raises RuntimeError when none runs.
    """
    source = dense(x.permute(0, 2, 3, 1).contiguous())
    packed = convolve.pack(weight, scale, shift, x.dtype, x.device)
    spec, old = replace(spec, residual=residual is not None), None if residual is None else dense(residual)
    rows, columns = (spec.oh, spec.ow) if pool is None else (pool.oh, pool.ow)
    y = torch.empty(spec.n, rows, columns, spec.oc, dtype=x.dtype, device=x.device)
    cuts = proposals(kernels, spec, count) if pool is None else list(map(Cut, pooled.able(kernels, spec, pool)))
    found: dict[Cut, float] = {}
    problems, wanted = [], None
    for cut in cuts:
        y.fill_(float("nan"))
        try:
            windows = (0, 0) if pool is None else (rows, columns)
            problem = Problem(spec, source, packed, (Target(dense(y), spec.relu),), old, pooled=windows)
            launch: Launch = convolve.group("tuned", kernels, [problem], cut)
            launch.run()
            wanted = y.float() if wanted is None else wanted
            # Parts of K are added in another order: a unit in the last place of the largest values, not more.
            slack = 4 * torch.finfo(y.dtype).eps * float(wanted.abs().max())
            if not bool(((y.float() - wanted).abs() <= slack).all()):
                raise RuntimeError("other numbers than the first")
            found[cut] = timer(launch.run)
        except (RuntimeError, ValueError) as error:
            problems.append(f"{cut.config.name} in {cut.splits}: {error}")
    if not found:
        raise RuntimeError(f"no configuration of {spec} runs: {'; '.join(problems)[:400]}")
    return found
