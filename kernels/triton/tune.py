"""Tries tiles on a convolution and says which is fastest. Runs only when asked, and only on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..spec import ConvSpec
from . import stems
from .configs import Config, Row, candidates, choose, precision_of
from .convolve import Group, Packed, Part, convolution, fitting, one_matrix, pack
from .launch import Launch, Map, dense, power

Timer = Callable[[Callable[[], None]], float]
# Tiles by what limits an H200: traffic from L2, so wide ones, and columns that networks have. (block_m, block_n, warps,
# stages), of which boxes that are no matrix as they come take the second list.
FLAT = [(128, 64, 4, 4), (128, 96, 4, 3), (128, 128, 8, 3), (128, 160, 8, 3), (128, 192, 8, 3), (128, 256, 8, 3)]
FLAT += [(64, 128, 4, 4), (64, 192, 4, 3), (64, 64, 4, 4), (128, 80, 4, 4)]
TURNED = [(64, 64, 4, 4), (128, 64, 4, 4), (256, 64, 4, 3), (64, 128, 4, 4), (128, 128, 8, 3), (256, 128, 8, 3)]
TURNED += [(128, 192, 8, 3), (64, 192, 4, 3)]
MOST_EMPTY = 1.35  # columns of the tiles, of those that there are
NARROW = 64  # columns
FEWEST = 66  # programs: half of an H200's multiprocessors
STEM_SUMS = 64  # a thread; with 128 beside its pixels it spills
TRIED = 12  # wide tiles and the cost model's favourites, these in both forms where TMA can serve
LEAST = 2  # of these favourites


def proposals(
    spec: ConvSpec, arch: str, tf32: bool = False, count: int = TRIED, groups: Sequence[Group] = ()
) -> list[Config]:
    """What ships for the shape, Hopper's wide tiles, and the cost model's favourites, no wider than fits the groups; on
    Hopper with stride 1 each of these through TMA as well.
    """
    m, k, precision = spec.n * spec.oh * spec.ow, spec.c * spec.kh * spec.kw, precision_of(spec.dtype, tf32)
    shipped = choose(arch, precision, m, spec.oc, k, c=spec.c)
    hopper = arch == "sm_90" and precision == "half"
    wide = [_fitted(config, groups) for config in (_wide(spec, groups) if hopper else ())]
    best = [_fitted(config, groups) for config in candidates(arch, precision, m, spec.oc, k)]
    best = list(dict.fromkeys(best))[: max(count - len(wide), LEAST)]
    tma = arch == "sm_90" and spec.stride == (1, 1) and one_matrix(groups)
    beside = [replace(config, form="tma") for config in best] if tma else []
    return list(dict.fromkeys([_fitted(shipped, groups), *wide, *best, *beside]))


def _fitted(config: Config, groups: Sequence[Group]) -> Config:
    return fitting(config, groups) if groups else config


def _wide(spec: ConvSpec, groups: Sequence[Group]) -> list[Config]:
    """Hopper's tiles that fill it and of whose columns few are empty; steps over channels that waste least."""
    rows, flat = spec.n * spec.oh * spec.ow, spec.kh * spec.kw == 1
    block_k = 32 if 0 < spec.c % 64 <= 32 else 64
    if spec.stride != (1, 1) or not one_matrix(groups):
        form, tiles = "pointer", FLAT
    else:
        form, tiles = ("tma", FLAT) if flat else ("turned", TURNED)
    found = []
    if not flat and spec.oc <= NARROW and rows >= 256 * FEWEST:  # a layer whose taps cross from L2 for most of its time
        # Few stages, since shared memory is L1 that is lost.
        shapes = ((128, 4, 2), (256, 8, 2), (128, 4, 3))
        found = [Config("cached", m, power(spec.oc, 16, NARROW), block_k, 1, w, stages) for m, w, stages in shapes]
    for block_m, block_n, warps, stages in tiles:
        columns = -(-spec.oc // block_n) * block_n
        full = columns <= MOST_EMPTY * spec.oc and -(-rows // block_m) * (columns // block_n) >= FEWEST
        if full and not (len(groups) > 1 and block_n > 32 * warps):  # scattered, that spills
            found.append(Config(form, block_m, block_n, block_k, 1, warps, stages + (block_k == 32)))
    # Where a row of taps is one, its channels are more whole steps.
    wide = [c for c in found if c.form == "turned" and c.block_m * c.block_n >= 128 * 128]
    if spec.kw > 1 and spec.c % 64 and not any(spec.padding[2:]) and len(groups) < 2:
        found += [replace(c, form="rows", block_k=64, stages=3) for c in wide]
    return found


def stem_proposals(spec: ConvSpec, tf32: bool = False) -> list[Config]:
    """Tiles of the stem kernel, what it has without a measurement first."""
    sizes = [(m, k, warps) for m in (64, 128, 256) for k in (32, 64) for warps in (4, 8)]
    found = [stems.STEM, *(replace(stems.STEM, block_m=m, block_k=k, warps=warps) for m, k, warps in sizes)]
    exact = spec.dtype == "float32" and not tf32
    fitted = [stems.fitting(config, spec.oc, spec.c * spec.kh * spec.kw, exact) for config in found]
    return [one for one in dict.fromkeys(fitted) if one.block_m * one.block_n <= STEM_SUMS * 32 * one.warps]


def results(spec: ConvSpec, channels: Sequence[int], device: torch.device) -> tuple[Tensor, list[Map]]:
    """Memory for results of so many channels each, dense maps one behind the other, and these."""
    rows, at, maps = spec.n * spec.oh * spec.ow, 0, list[Map]()
    y = torch.empty(rows * sum(channels), dtype=getattr(torch, spec.dtype), device=device)
    for c in channels:
        maps.append(Map(y[rows * at : rows * (at + c)], spec.n, spec.oh, spec.ow, c, c))
        at += c
    return y, maps


def prepared(
    spec: ConvSpec, x: Tensor, packed: Packed, stem: bool, tf32: bool = False, residual: Tensor | None = None
) -> tuple[Tensor, Callable[[Config], list[Launch]]]:
    """Memory for the results, and what makes a config's launches. A `stem` reads the caller's x as it lies; a residual
    is [n, oh, ow, oc].
    """
    y, outputs = results(spec, [group.channels for group in packed.groups], x.device)
    if stem:
        return y, lambda config: stems.convolution("tuned", spec, x, packed, outputs[0], config=config, tf32=tf32)
    source = dense(x.permute(0, 2, 3, 1).contiguous())
    old = None if residual is None else dense(residual)
    return y, lambda config: convolution("tuned", spec, source, packed, outputs, config, residual=old, tf32=tf32)


def tried(
    spec: ConvSpec, x: Tensor, parts: Sequence[Part], arch: str, timer: Timer, *,
    tf32: bool = False, count: int = TRIED, stem: bool = False, residual: Tensor | None = None,
) -> dict[Config, float]:  # fmt: skip
    """Seconds of every proposal that fits the device and gives what the first one gives; x is [n, c, h, w], `spec` that
    of all parts as one convolution, each part's result goes to a place of its own; a single one may add to a residual
    [n, oh, ow, oc].

    Raises RuntimeError when none runs.
    """
    packed = pack(parts, getattr(torch, spec.dtype), x.device)
    y, made = prepared(spec, x, packed, stem, tf32, residual)
    found: dict[Config, float] = {}
    problems, wanted = [], None
    for config in stem_proposals(spec, tf32) if stem else proposals(spec, arch, tf32, count, packed.groups):
        y.fill_(float("nan"))
        launches = made(config)

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
