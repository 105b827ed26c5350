"""Convolutions whose tiles leave most blocks without work in their last turn, with the last images in a launch of their
own, by narrower tiles: what a kernel with both kinds of tiles could give, tried with those that there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from inception_fast.kernels import cuda
from inception_fast.kernels.cuda import convolve
from inception_fast.kernels.cuda.convolve import Cut, Launch, Problem, Target
from inception_fast.kernels.cuda.loader import Config
from inception_fast.kernels.maps import dense
from inception_fast.kernels.spec import ConvSpec
from measure import LAYER_BUDGET, draw
from timing import device_seconds, summary

# Lines of v3, v4 and Inception-ResNet-v2 on 17x17: channels, columns, rows and columns of the kernel.
SHAPES = ((192, 192, 1, 7), (192, 224, 1, 7), (224, 256, 7, 1), (160, 160, 1, 7), (160, 192, 7, 1))
MAINS, ENDS = 8, 3  # the model's favourites that are tried
Raced = tuple[dict[str, Callable[[], Any]], dict[str, float]]  # calls that are right, how far others are off
PREPARED = 400_000  # cycles of a backlog in which the host launches


def tail_rows(batch: int, dtype: str) -> Iterator[list[dict[str, Any]]]:
    """A row for each form of each shape; all so far."""
    return race_rows((line(batch, 17, *shape, dtype) for shape in SHAPES), right_calls)


def line(batch: int, side: int, c: int, oc: int, kh: int, kw: int, dtype: str) -> ConvSpec:
    """A convolution at stride 1 that keeps its map's size."""
    return ConvSpec(batch, side, side, c, oc, kh, kw, padding=(kh // 2, kh // 2, kw // 2, kw // 2), dtype=dtype)


def race_rows(specs: Iterable[ConvSpec], calls_of: Callable[[ConvSpec], Raced]) -> Iterator[list[dict[str, Any]]]:
    """A row for each call of each convolution, those that are wrong without a time; all so far."""
    rows: list[dict[str, Any]] = []
    for spec in specs:
        about = {"runtime": "ours", "shape": str(spec)}
        calls, wrong = calls_of(spec)
        rows += [
            {**about, "config": name, "status": "wrong", "note": f"off by {off:.3g}"} for name, off in wrong.items()
        ]
        for name, seconds in device_seconds(calls, backlog=PREPARED).items() if calls else ():
            rows.append({**about, "config": name, "status": "ok", **summary(seconds)})
        yield rows


def right_calls(spec: ConvSpec) -> Raced:
    """Calls by name whose results are the first one's, and how far the others are off it, of its largest value."""
    x, *params = draw(spec)
    source, packed = x.permute(0, 2, 3, 1).contiguous(), convolve.pack(*params, x.dtype, x.device)
    y = torch.empty(spec.n, spec.oh, spec.ow, spec.oc, dtype=x.dtype, device=x.device)

    def launch(config: Config, begin: int, end: int, early: bool = False) -> Launch:
        part = slice(begin, end)
        target = (Target(dense(y[part]), spec.relu),)
        problem = Problem(replace(spec, n=end - begin), dense(source[part]), packed, target)
        return convolve.group("tail", cuda.library(), [problem], Cut(config), overlap=early)

    calls: dict[str, Callable[[], Any]] = {}
    for config in favourites(spec, MAINS):
        calls[config.name] = launch(config, 0, spec.n).run
        images = whole_images(spec, config, convolve.MULTIPROCESSORS)
        if 0 < images < spec.n:
            rest = replace(spec, n=spec.n - images)
            for end in favourites(rest, ENDS):
                for early in (False, True):
                    pair = launch(config, 0, images), launch(end, images, spec.n, early)
                    calls[f"{config.name} + {end.name}{' early' if early else ''}"] = both(*pair)
    return agreeing(calls, y, LAYER_BUDGET[spec.dtype])


def both(first: Launch, second: Launch) -> Callable[[], None]:
    def run() -> None:
        first.run()
        second.run()

    return run


def favourites(spec: ConvSpec, count: int, halo: bool = False) -> list[Config]:
    """Configurations whose order of sums is one, or with `halo` others too; those that the model takes to be fast
    first.
    """
    able = [config for config in convolve.able(cuda.library(), spec) if halo or not config.halo]
    return sorted(able, key=lambda config: convolve.modelled(spec, Cut(config)))[:count]


def whole_images(spec: ConvSpec, config: Config, blocks: int) -> int:
    """Images whose tiles, in whole turns of all blocks, leave none of these without work; 0 where there is no turn."""
    columns = -(-spec.oc // config.columns)
    pixels = spec.oh * spec.ow
    tiles = -(-spec.n * pixels // config.rows) * columns
    return tiles // blocks * blocks // columns * config.rows // pixels


def agreeing(calls: dict[str, Callable[[], Any]], y: torch.Tensor, budget: float) -> Raced:
    """Calls that write to `y` what the first does, within a budget of its largest value; how far the others are off."""
    wanted, wrong = None, dict[str, float]()
    for name, call in calls.items():
        y.fill_(float("nan"))
        call()
        found = y.float()
        wanted = found if wanted is None else wanted
        off = float((found - wanted).abs().max() / wanted.abs().max())
        if not off <= budget:
            wrong[name] = off
    return {name: call for name, call in calls.items() if name not in wrong}, wrong
