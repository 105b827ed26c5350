"""Tries tiles on a convolution and says which is fastest. Runs only when asked, and only on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..spec import ConvSpec
from .configs import Config, Row, candidates, precision_of
from .convolve import Group, Part, convolution, fitting, mixed, pack
from .launch import Map, dense

Timer = Callable[[Callable[[], None]], float]
TRIED = 12  # of the cost model's favourites, each in both forms where TMA can serve


def proposals(
    spec: ConvSpec, arch: str, tf32: bool = False, count: int = TRIED, groups: Sequence[Group] = ()
) -> list[Config]:
    """The cost model's favourites, no wider than fits the groups; on Hopper with stride 1 each through TMA as well."""
    m, k = spec.n * spec.oh * spec.ow, spec.c * spec.kh * spec.kw
    found = candidates(arch, precision_of(spec.dtype, tf32), m, spec.oc, k)
    best = list(dict.fromkeys(fitting(config, groups) if groups else config for config in found))[:count]
    tma = arch == "sm_90" and spec.stride == (1, 1) and not mixed(groups)
    return best + ([replace(config, form="tma") for config in best] if tma else [])


def results(spec: ConvSpec, channels: Sequence[int], like: Tensor) -> tuple[Tensor, list[Map]]:
    """Memory for results of so many channels each, dense maps one behind the other, and these."""
    rows, at, maps = spec.n * spec.oh * spec.ow, 0, list[Map]()
    y = torch.empty(rows * sum(channels), dtype=like.dtype, device=like.device)
    for c in channels:
        maps.append(Map(y[rows * at : rows * (at + c)], spec.n, spec.oh, spec.ow, c, c))
        at += c
    return y, maps


def tried(
    spec: ConvSpec, x: Tensor, parts: Sequence[Part], arch: str, timer: Timer, *,
    tf32: bool = False, count: int = TRIED,
) -> dict[Config, float]:  # fmt: skip
    """Seconds of every proposal that fits the device and gives what the first one gives; x is [n, c, h, w], `spec` that
    of all parts as one convolution, each part's result goes to a place of its own.

    Raises RuntimeError when none runs.
    """
    source = dense(x.permute(0, 2, 3, 1).contiguous())
    packed = pack(parts, x.dtype, x.device)
    y, outputs = results(spec, [group.channels for group in packed.groups], x)
    found: dict[Config, float] = {}
    problems, wanted = [], None
    for config in proposals(spec, arch, tf32, count, packed.groups):
        y.fill_(float("nan"))
        launches = convolution("tuned", spec, source, packed, outputs, config, tf32=tf32)

        def call(launches: list = launches) -> None:  # type: ignore[type-arg]
            for launch in launches:
                launch.run()

        try:
            call()
            wanted = y.float() if wanted is None else wanted
            # Tiles add in different orders: a unit in the last place of the largest values, not more.
            slack = 4 * torch.finfo(y.dtype).eps * float(wanted.abs().max())
            if not bool(((y.float() - wanted).abs() <= slack).all()):
                raise RuntimeError("other numbers than the first")
            found[config] = timer(call)
        except Exception as error:  # shared memory or registers that this device has not
            problems.append(f"{config}: {error}")
    if not found:
        raise RuntimeError(f"no configuration of {spec} runs: {'; '.join(problems)[:400]}")
    return found


def row_of(spec: ConvSpec, arch: str, config: Config, seconds: float, tf32: bool = False) -> Row:
    """A measured row for the data."""
    m, k = spec.n * spec.oh * spec.ow, spec.c * spec.kh * spec.kw
    return Row(arch, precision_of(spec.dtype, tf32), m, spec.oc, k, config, seconds)
