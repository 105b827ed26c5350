"""The host side of asymmetric pairs and parallel splits."""

from __future__ import annotations

from collections.abc import Callable

import triton

from ..spec import ConvSpec, PairSpec
from . import pair
from .configs import Config
from .convolve import Packed, Workspace, convolution
from .launch import Launch, Map, upcast

Choose = Callable[[ConvSpec], Config]


def fused_reasons(spec: PairSpec) -> list[str]:
    """Why the one-launch form cannot run a pair; empty when it can."""
    first, second = spec.first, spec.second
    found = [] if spec.kind == "chain" else [f"kind {spec.kind!r}; the one-launch pair is a chain"]
    for part in (first, second):
        same = part.padding == (part.kh // 2, part.kh // 2, part.kw // 2, part.kw // 2)
        if part.stride != (1, 1) or part.groups != 1 or not same or part.kh % 2 == 0 or part.kw % 2 == 0:
            found.append(f"{part.kh}x{part.kw} stride {part.stride} padding {part.padding}; allowed: SAME, stride 1")
    if min(second.kh, second.kw) > 1:
        found.append(f"second kernel {second.kh}x{second.kw}; allowed: 1xn or nx1")
    return found


def chain(
    name: str, spec: PairSpec, x: Map, packed: tuple[Packed, Packed], middle: Map, y: Map, choose: Choose,
    *, fused: Config | None = None, strip: int = 8, workspace: Workspace | None = None, tf32: bool = False,
) -> list[Launch]:  # fmt: skip
    """The second convolution of the first's result, which goes through `middle`: two launches, or with `fused` one."""
    if fused is not None:
        return _fused(name, spec, x, packed, middle, y, fused, strip, tf32)
    found = []
    for part, source, weights, target in ((spec.first, x, packed[0], middle), (spec.second, middle, packed[1], y)):
        label = f"{name}:{'first' if part is spec.first else 'second'}"
        config = choose(part)
        found += convolution(label, part, source, weights, [target], config, workspace=workspace, tf32=tf32)
    return found


def side_by_side(
    name: str, spec: PairSpec, x: Map, packed: Packed, outputs: tuple[Map, Map], config: Config,
    *, workspace: Workspace | None = None, tf32: bool = False,
) -> list[Launch]:  # fmt: skip
    """Both convolutions of one x in one launch; `packed` has a group for each."""
    return convolution(name, spec.first, x, packed, outputs, config, workspace=workspace, tf32=tf32)


def _fused(
    name: str, spec: PairSpec, x: Map, packed: tuple[Packed, Packed], middle: Map, y: Map, config: Config, strip: int,
    tf32: bool,
) -> list[Launch]:  # fmt: skip
    reasons = fused_reasons(spec)
    if reasons:
        raise ValueError("; ".join(reasons))
    if spec.first.n == 0:
        return []
    first, second, (one, two) = spec.first, spec.second, packed
    strips = triton.cdiv(first.w if second.kh > 1 else first.h, strip)
    tensor_cores = "tf32" if tf32 and x.data.element_size() == 4 else "ieee"
    arguments = {
        **{"x_ptr": x.data, "w1_ptr": one.weight, "scale1_ptr": one.scale, "shift1_ptr": one.shift},
        **{"w2_ptr": two.weight, "scale2_ptr": two.scale, "shift2_ptr": two.shift},
        **{"middle_ptr": middle.data, "y_ptr": y.data, "h": first.h, "w": first.w, "strips": strips},
        **{"c": first.c, "mid": first.oc, "oc": second.oc, "STRIP": strip},
        **{"x_pitch": x.pitch, "middle_pitch": middle.pitch, "y_pitch": y.pitch},
        **{"w1_pitch": one.groups[0].pitch, "w2_pitch": two.groups[0].pitch},
        **{"KH1": first.kh, "KW1": first.kw, "KH2": second.kh, "KW2": second.kw},
        **{"RELU1": one.groups[0].relu, "RELU2": two.groups[0].relu},
        **{"PRECISION": tensor_cores, "UPCAST": upcast(x.data.dtype)},
        **{"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k},
    }
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return [Launch(name, pair.pair_kernel, (first.n * strips,), arguments, options)]
