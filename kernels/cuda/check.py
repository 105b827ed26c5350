"""Whether the kernels are right on the GPU that is here: a small convolution and a small pair with exact results, by
every configuration, before anything else runs on the device. What is wrong makes the backend unavailable, with the
reason. A small walk as well: where that is wrong, plans have none, and steps are launches of their own. Forms of tiles
that nothing but a measurement chooses are proved where one did, and what is wrong with them costs them alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..maps import Map, dense
from ..spec import ConvSpec, PairSpec, PoolSpec
from . import convolve, loader, pair, pooled, walk
from .convolve import Cut, Problem, Target
from .driver import HOPPER
from .loader import Config, Library

# Two images of 9x9, so that tiles meet every border and the next image; sums below 256 are exact in both formats.
SPEC = ConvSpec(2, 9, 9, 64, 96, 1, 3, padding=(0, 0, 1, 1), relu=False, dtype="bfloat16")
# Of two columns of tiles, and windows that are clipped; more tiles for one block than barriers, whose rows go round its
# ring. And of one column, whose weights may stay.
POOLED = ConvSpec(24, 10, 9, 32, 104, 3, 3, padding=(1, 1, 1, 1), dtype="bfloat16")
STAYING = replace(POOLED, oc=56, dtype="float16")
PAIR = PairSpec(
    ConvSpec(1, 17, 17, 64, 32, 1, 7, padding=(0, 0, 3, 3), dtype="bfloat16"),
    ConvSpec(1, 17, 17, 32, 48, 7, 1, padding=(3, 3, 0, 0), dtype="bfloat16"),
)
# A small network, each step of what the one before wrote: tiles that are not whole, on many blocks; a pool of
# overlapping windows; K in parts; a pool of one window; columns in float32. Sums of integers are exact.
STEPS: tuple[ConvSpec | PoolSpec, ...] = (
    ConvSpec(1, 9, 9, 64, 96, 3, 3, padding=(1, 1, 1, 1)),
    PoolSpec(1, 9, 9, 96, 3, 3, (2, 2)),
    ConvSpec(1, 4, 4, 96, 64, 3, 3, padding=(1, 1, 1, 1)),
    PoolSpec(1, 4, 4, 64, 4, 4, kind="avg"),
    ConvSpec(1, 1, 1, 64, 40, 1, 1, relu=False),
)
PARTS = (1, 0, 4, 0, 1)  # of K
FORMS = ("behind", "pooled")  # a word in the names of configurations that a measurement alone chooses
_once = threading.Lock()
Key = TypeVar("Key")


def refusal(device: torch.device) -> str:
    """Why the kernels are not used on this device; empty when they are right there. Runs them at the first call."""
    index = torch.cuda.current_device() if device.index is None else device.index
    capability = torch.cuda.get_device_capability(index)
    if capability != HOPPER:
        return f"GPU {index} has compute capability {capability[0]}.{capability[1]}; allowed: 9.0"
    return _asked(loader.verdicts, index, index, "convolution", wrong)


def walk_refusal(device: torch.device) -> str:
    """Why plans have no walk on this device, whose kernels are trusted; empty when walks are right there. Runs some at
    the first call.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    return _asked(loader.walk_verdicts, index, index, "walk", wrong_walks)


def form_refusal(device: torch.device, form: str) -> str:
    """Why none of `FORMS` is used on this device, whose kernels are trusted; empty when it is right there. Runs every
    configuration of the form at the first call.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    found = wrong_behind if form == "behind" else wrong_pooled
    return _asked(loader.form_verdicts, (index, form), index, f"{form} tile", found)


def _asked(
    verdicts: dict[Key, str], key: Key, index: int, what: str, found: Callable[[Library, torch.device], str]
) -> str:
    """Raises OutOfMemoryError where there is no room for the first of them, and RuntimeError where the caller's stream
    is being captured: neither says anything of the kernels, and the next call asks again.
    """
    with _once:
        if key not in verdicts:
            there = torch.device("cuda", index)
            _refuse_capture(there, what)
            try:
                # What is compared is made on the CPU, whatever the caller's default device is.
                with torch.cuda.device(there), torch.device("cpu"):
                    verdicts[key] = found(loader.library(), there)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                verdicts[key] = f"GPU {index}: the first {what} failed: {error}"
        return verdicts[key]


def _refuse_capture(device: torch.device, what: str) -> None:
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the first {what} by the CUDA kernels on GPU {device.index}, which proves them, while a graph is "
                "captured; allowed: a call ahead of the capture"
            )


def wrong(kernels: Library, device: torch.device) -> str:
    """Which configurations give another result than the exact one, in words; empty when none does. All of them in
    bfloat16, and one of each form in float16, whose kernels are compiled from the same source.
    """
    bad = _wrong_in_both(kernels, device, [config for config in convolve.able(kernels, SPEC) if not config.behind])
    bad += _wrong_pairs(kernels, device)
    return f"the first convolution gave wrong numbers with {', '.join(bad)}" if bad else ""


def wrong_behind(kernels: Library, device: torch.device) -> str:
    """The same of tiles that are stored behind the next one's products."""
    bad = _wrong_in_both(kernels, device, [config for config in convolve.able(kernels, SPEC) if config.behind])
    return f"the first behind tile gave wrong numbers with {', '.join(bad)}" if bad else ""


def wrong_pooled(kernels: Library, device: torch.device) -> str:
    """The same of convolutions with a maximum behind them."""
    bad = [name for spec in (POOLED, STAYING) for name in _wrong_pooled(kernels, device, spec)]
    return f"the first pooled tile gave wrong numbers with {', '.join(bad)}" if bad else ""


def _wrong_in_both(kernels: Library, device: torch.device, able: Sequence[Config]) -> list[str]:
    """By all of them in bfloat16 and by one of each form in float16."""
    forms = {config.form: config for config in able}
    bad = _wrong_convs(kernels, device, SPEC, able)
    other = replace(SPEC, dtype="float16")
    return bad + [f"{name} in float16" for name in _wrong_convs(kernels, device, other, list(forms.values()))]


def _wrong_convs(kernels: Library, device: torch.device, spec: ConvSpec, configs: Sequence[Config]) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-1, 2, (spec.n, spec.c, spec.h, spec.w), generator=generator).float()
    weight = torch.randint(-1, 2, (spec.oc, spec.c, spec.kh, spec.kw), generator=generator).float()
    shift = torch.randint(-3, 4, (spec.oc,), generator=generator).float()
    padding = (spec.padding[0], spec.padding[2])
    wanted = F.conv2d(x.double(), weight.double(), shift.double(), spec.stride, padding)
    dtype = getattr(torch, spec.dtype)
    there = x.to(device, dtype).permute(0, 2, 3, 1).contiguous()
    packed = convolve.pack(weight, None, shift, dtype, device)
    bad = []
    for config in configs:
        for splits in convolve.splits_of(spec, config, 1)[:2]:
            y = _run(kernels, spec, there, packed, Cut(config, splits))
            if not torch.equal(y.permute(0, 3, 1, 2).double().cpu(), wanted):
                bad.append(f"{config.name} in {splits}" if splits > 1 else config.name)
        if config.behind:  # whose residual comes another way
            y = _run(kernels, spec, there, packed, Cut(config), residual=True)
            if not torch.equal(y.permute(0, 3, 1, 2).double().cpu(), wanted + 1):
                bad.append(f"{config.name} with a residual")
    return bad


def _wrong_pairs(kernels: Library, device: torch.device) -> list[str]:
    """The fused pairs whose result differs: sums of integers are exact, and both roundings are to nearest."""
    spec, generator = PAIR, torch.Generator().manual_seed(1)
    parts = (spec.first, spec.second)
    x = torch.randint(-1, 2, (1, parts[0].c, 17, 17), generator=generator).bfloat16()
    weights = [torch.randint(-1, 2, (p.oc, p.c, p.kh, p.kw), generator=generator).float() for p in parts]
    wanted = x
    for part, weight in zip(parts, weights, strict=True):
        sums = F.conv2d(wanted.double(), weight.double(), None, 1, (part.padding[0], part.padding[2]))
        wanted = sums.relu().bfloat16()
    source = dense(x.to(device).permute(0, 2, 3, 1).contiguous())
    first, second = (convolve.pack(weight, None, None, torch.bfloat16, device) for weight in weights)
    bad = []
    for config in pair.able(kernels, spec):
        y = torch.full((1, 17, 17, parts[1].oc), float("nan"), dtype=torch.bfloat16, device=device)
        pair.launch("check", kernels, spec, source, (first, second), dense(y), config).run()
        if not torch.equal(y.permute(0, 3, 1, 2).cpu(), wanted):
            bad.append(config.name)
    return bad


def maximum(spec: ConvSpec) -> PoolSpec:
    """The pool behind one of those that are pooled."""
    return PoolSpec(spec.n, spec.oh, spec.ow, spec.oc, 3, 3, (2, 2), overhang=(1, 0), dtype=spec.dtype)


def _wrong_pooled(kernels: Library, device: torch.device, spec: ConvSpec) -> list[str]:
    """The convolutions with a maximum behind them whose result differs, by one block or by many: a maximum rounds
    nothing.
    """
    pool, generator, dtype = maximum(spec), torch.Generator().manual_seed(3), getattr(torch, spec.dtype)
    x = torch.randint(-1, 2, (spec.n, spec.c, spec.h, spec.w), generator=generator).to(dtype)
    weight = torch.randint(-1, 2, (spec.oc, spec.c, spec.kh, spec.kw), generator=generator).float()
    sums = F.conv2d(x.double(), weight.double(), None, 1, (spec.padding[0], spec.padding[2])).relu()
    wanted = F.max_pool2d(sums, 3, 2, ceil_mode=True).to(dtype)
    source = dense(x.to(device).permute(0, 2, 3, 1).contiguous())
    packed = convolve.pack(weight, None, None, dtype, device)
    bad = []
    for config in pooled.able(kernels, spec, pool):
        for blocks in (1, 0):
            y = torch.full((pool.n, pool.oh, pool.ow, pool.c), float("nan"), dtype=dtype, device=device)
            problem = Problem(spec, source, packed, (Target(dense(y), True),), pooled=(pool.oh, pool.ow))
            convolve.group("check", kernels, [problem], Cut(config), blocks=blocks).run()
            if not torch.equal(y.permute(0, 3, 1, 2).cpu(), wanted):
                bad.append(f"{config.name} in {spec.dtype}" + (", one block" if blocks else ""))
    return bad


def _run(
    kernels: Library, spec: ConvSpec, x: Tensor, packed: convolve.Packed, cut: Cut, residual: bool = False
) -> Tensor:
    """The result; a residual is ones."""
    y = torch.full((spec.n, spec.oh, spec.ow, spec.oc), float("nan"), dtype=x.dtype, device=x.device)
    old = dense(torch.ones_like(y)) if residual else None
    problem = Problem(replace(spec, residual=residual), dense(x), packed, (Target(dense(y), spec.relu),), old)
    launch = convolve.group("check", kernels, [problem], cut)
    launch.run()
    if x.is_cuda:  # not for the whole device, which would end what another thread captures
        torch.cuda.current_stream(x.device).synchronize()
    return y


def wrong_walks(kernels: Library, device: torch.device) -> str:
    """Which walks give another result than the exact one, by each kind of tile in either format; in words."""
    bad = [
        f"{cut.columns} columns{' whose rows stay' * cut.halo} in {str(dtype).removeprefix('torch.')}"
        for dtype in (torch.bfloat16, torch.float16)
        for columns in kernels.walk_columns
        for cut in (walk.Cut(columns), walk.Cut(columns, halo=True))
        if not _walks(kernels, device, cut, dtype)
    ]
    return f"the first walk gave wrong numbers with {', '.join(bad)}" if bad else ""


def _walks(kernels: Library, device: torch.device, cut: walk.Cut, dtype: torch.dtype) -> bool:
    """Whether each step of `STEPS` is exact, twice over: what a walk counts with is left as it was found. Rows of x
    stay where K is whole and 16 bits are the result.
    """
    maps, wanted, weights = _exact_steps(dtype)
    places = [dense(one.to(device)) for one in maps]
    jobs: list[walk.Job] = []
    for i, (step, parts) in enumerate(zip(STEPS, PARTS, strict=True)):
        kind, x, y, needs = str(dtype).removeprefix("torch."), places[i], places[i + 1], (i - 1,) if i else ()
        if isinstance(step, PoolSpec):
            jobs.append(walk.Job(walk.Pooling(replace(step, dtype=kind), x, y), None, needs))
        else:
            packed = convolve.pack(weights[i], None, None, dtype, device)
            problem = Problem(replace(step, dtype=kind), x, packed, (Target(y, step.relu),))
            stays = cut.halo and parts == 1 and y.data.dtype == dtype
            jobs.append(walk.Job(problem, cut._replace(splits=parts, halo=stays), needs))
    made = walk.launch("check", kernels, jobs, device)
    return all(_is_walked(made, places[1:], wanted) for _ in range(2))


def _is_walked(made: walk.WalkLaunch, places: list[Map], wanted: list[Tensor]) -> bool:
    for place in places:
        place.data.fill_(float("nan"))
    made.run()
    return all(torch.equal(place.data.cpu(), right.flatten()) for place, right in zip(places, wanted, strict=True))


def _exact_steps(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], dict[int, Tensor]]:
    """Memory for x and what each step writes, [n, h, w, c]; the exact results; weights of the convolutions."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-1, 2, (1, STEPS[0].c, STEPS[0].h, STEPS[0].w), generator=generator).double()
    maps, wanted, weights = [x.to(dtype).permute(0, 2, 3, 1).contiguous()], [], {}
    for i, spec in enumerate(STEPS):
        if isinstance(spec, ConvSpec):
            weight = torch.randint(-1, 2, (spec.oc, spec.c, spec.kh, spec.kw), generator=generator).float()
            weights[i], x = weight, F.conv2d(x, weight.double(), None, spec.stride, spec.padding[0])
            x = x.relu() if spec.relu else x
        else:
            pool = F.max_pool2d if spec.kind == "max" else F.avg_pool2d
            x = pool(x, spec.kh, spec.stride)
        kind = torch.float32 if i == len(STEPS) - 1 else dtype
        right = x.to(kind).permute(0, 2, 3, 1).contiguous()
        x = right.permute(0, 3, 1, 2).double()
        wanted.append(right)
        maps.append(torch.empty_like(right))
    return maps, wanted, weights
