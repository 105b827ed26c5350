"""The host side of the fused pair: 1xn then nx1, or nx1 then 1xn, in one launch; what is between stays on the chip."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from ..maps import Map
from ..spec import ConvSpec, PairSpec
from . import abi
from .convolve import ALIGNED, Launch, Packed
from .loader import Library, PairConfig


class PairLaunch(Launch):
    """A prepared pair."""

    def run(self) -> None:
        """Puts the kernel on the current stream of the device, which has to be the current one."""
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        self.library.launch_pair(self.blob, stream)


def spec_reasons(library: Library, spec: PairSpec) -> list[str]:
    """Why no configuration runs the pair; empty when one does."""
    return list(_reasons(library, spec))


def able(library: Library, spec: PairSpec) -> tuple[PairConfig, ...]:
    """The configurations that run the pair, in the library's order."""
    if _reasons(library, spec):
        return ()
    blank = _blank(spec)
    return tuple(c for c in library.pair_configs if not library.pair_reasons(blank, spec.first.dtype, c))


@functools.lru_cache(maxsize=4096)
def _reasons(library: Library, spec: PairSpec) -> tuple[str, ...]:
    found = _shape_reasons(spec)
    if found or not library.pair_configs:
        return (*found, *(() if library.pair_configs else ("the library has no fused pairs",)))
    blank = _blank(spec)
    each = [library.pair_reasons(blank, spec.first.dtype, config) for config in library.pair_configs]
    fewest: list[str] = min(each, key=lambda reasons: len(reasons))
    return tuple(fewest)


def _shape_reasons(spec: PairSpec) -> list[str]:
    """What the C structure cannot even say."""
    first, second = spec.first, spec.second
    found = [] if spec.kind == "chain" else [f"kind {spec.kind!r}; allowed: 'chain'"]
    if first.dtype not in abi.TYPES:
        found.append(f"dtype {first.dtype}; allowed: {', '.join(abi.TYPES)}")
    if (first.kh, first.kw) != (second.kw, second.kh) or min(first.kh, first.kw) != 1:
        found.append(f"{first.kh}x{first.kw} then {second.kh}x{second.kw}; allowed: 1xn then nx1 or nx1 then 1xn")
    for part in (first, second):
        same = (part.kh // 2, part.kh // 2, part.kw // 2, part.kw // 2)
        if part.stride != (1, 1) or part.groups != 1 or part.padding != same or part.residual:
            found.append(f"stride {part.stride}, padding {part.padding}, groups {part.groups}; allowed: SAME, stride 1")
    return found


def _blank(spec: PairSpec) -> abi.Pair:
    first = replace(spec.first, n=max(spec.first.n, 1))
    return _filled(first, spec.second, (ALIGNED,) * 8, first.c, spec.second.oc)


def _filled(first: ConvSpec, second: ConvSpec, places: tuple[int, ...], x_pitch: int, y_pitch: int) -> abi.Pair:
    x, y, w1, scale1, shift1, w2, scale2, shift2 = places
    return abi.Pair(
        x=x, y=y, w1=w1, scale1=scale1, shift1=shift1, w2=w2, scale2=scale2, shift2=shift2, x_pitch=x_pitch,
        y_pitch=y_pitch, n=first.n, h=first.h, w=first.w, c=first.c, mid=first.oc, oc=second.oc,
        taps=max(first.kh, first.kw), wide_first=int(first.kh == 1), relu1=int(first.relu), relu2=int(second.relu),
    )  # fmt: skip


def launch(
    name: str, library: Library, spec: PairSpec, x: Map, packed: tuple[Packed, Packed], y: Map, config: PairConfig, *,
    overlap: bool = False,
) -> PairLaunch:  # fmt: skip
    """The pair in one launch. Raises ValueError where the library refuses it."""
    weights = tuple(tensor.data_ptr() for one in packed for tensor in one)
    made = _filled(spec.first, spec.second, (x.data.data_ptr(), y.data.data_ptr(), *weights), x.pitch, y.pitch)
    refused = library.pair_reasons(made, spec.first.dtype, config)
    if refused:
        raise ValueError(f"{name} with {config.name}: {'; '.join(refused)}")
    blob = library.prepare_pair(made, spec.first.dtype, config, overlap)
    return PairLaunch(name, library, blob, x.data.device, (x, packed, y))
