"""The host side of a convolution whose result only a 3x3 maximum of stride 2 needs: both in one launch, and what is
between stays on the chip.
"""

from __future__ import annotations

import functools

from ..spec import ConvSpec, PoolSpec
from . import convolve
from .loader import Config, Library

WINDOW, STRIDE = (3, 3), (2, 2)


def spec_reasons(library: Library, conv: ConvSpec, pool: PoolSpec) -> list[str]:
    """Why no configuration runs the two as one launch; empty when one does. `conv.residual` is honoured."""
    return list(_reasons(library, conv, pool))


def able(library: Library, conv: ConvSpec, pool: PoolSpec) -> tuple[Config, ...]:
    """The configurations that run the two, in the library's order."""
    if _reasons(library, conv, pool):
        return ()
    made = convolve.blank(conv, (conv.oc,), pooled=(pool.oh, pool.ow))
    return tuple(c for c in library.configs if not library.reasons([made], conv.dtype, c))


@functools.lru_cache(maxsize=4096)
def _reasons(library: Library, conv: ConvSpec, pool: PoolSpec) -> tuple[str, ...]:
    found = [*_pool_reasons(conv, pool), *convolve.unsayable(conv, (conv.oc,))]
    configs = [config for config in library.configs if config.pooled]
    if found or not configs:
        return (*found, *(() if configs else ("the library has no tiles that are pooled",)))
    made = convolve.blank(conv, (conv.oc,), pooled=(pool.oh, pool.ow))
    fewest: list[str] = min((library.reasons([made], conv.dtype, config) for config in configs), key=len)
    return tuple(fewest)


def _pool_reasons(conv: ConvSpec, pool: PoolSpec) -> list[str]:
    """What the C structure has no words for."""
    found = []
    if pool.kind != "max" or (pool.kh, pool.kw) != WINDOW or pool.stride != STRIDE:
        found.append(f"{pool.kind} of {pool.kh}x{pool.kw} at stride {pool.stride}; allowed: max of 3x3 at stride 2")
    if (pool.padding[0], pool.padding[2]) != (0, 0):
        found.append(f"padding {pool.padding} of a maximum; allowed: behind the map alone")
    if (pool.n, pool.h, pool.w, pool.c, pool.dtype) != (conv.n, conv.oh, conv.ow, conv.oc, conv.dtype):
        found.append(f"a maximum of {pool.n}x{pool.h}x{pool.w}x{pool.c} in {pool.dtype}; allowed: the convolution's")
    return found
