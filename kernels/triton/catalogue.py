"""Every kernel, with configurations and shapes that the networks use: what the offline compiler walks through.

The maps are meta tensors: they have sizes, no memory, and are never run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..plan import EltwiseStep, LrnStep, NormalizeStep, View
from ..spec import ConvSpec, PairSpec, PoolSpec
from . import norms, pairs, stems
from .configs import Config
from .convolve import Part, convolution, pack
from .launch import Launch, Map, eltwise, imported, lrn, normalized
from .pools import pooled

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
SHORT = {HALF: "float16", BRAIN: "bfloat16", FLOAT: "float32"}
N = 32
NOWHERE = View(0, 0, 1)
SMALL = Config(block_m=64, block_n=32, block_k=64)
WIDE = Config(block_m=128, block_n=128, block_k=64, warps=8)
TILES = (SMALL, Config(), WIDE, Config(block_m=128, block_n=256, block_k=64, warps=8))
EXACT = Config(block_m=64, block_n=64, block_k=16)
THROUGH_TMA = (Config("tma"), Config("tma", block_n=128, warps=8), Config("tma", 64, 256, 32, warps=8))
TURNED = (
    *(Config("turned", 256, 64, 32, stages=4), Config("turned", 256, 128, 64, warps=8)),
    *(Config("turned", 64, 192, 64), Config("turned", 128, 192, 64, warps=8)),
)
TWO_WIDTHS = (Config("tma", block_n=96), Config("tma", block_n=192, warps=8))  # the products of a tile
CACHED = (Config("cached", block_n=32, block_k=32, stages=2), Config("cached", 256, 64, 32, warps=8, stages=2))
ON_HOPPER = (*TURNED, *TWO_WIDTHS)  # only there proposed
HOPPER = ("sm_90a",)


@dataclass(frozen=True)
class Entry:
    """A kernel's name, what it is compiled for in words, its launch, and whether tensor cores are expected in it."""

    kernel: str
    config: str
    launch: Launch
    tensor_cores: bool
    arches: tuple[str, ...] = ("sm_80", "sm_90a", "sm_100a")


def blank(n: int, h: int, w: int, c: int, dtype: torch.dtype) -> Map:
    """A map without memory."""
    return Map(torch.empty(n * h * w * c, dtype=dtype, device="meta"), n, h, w, c, c)


def entries() -> Iterator[Entry]:
    """The whole catalogue, in the order of the table."""
    yield from _convolutions()
    yield from _groups()
    yield from _pairs()
    yield from _stems()
    yield from _rest()
    yield from _training()


def _part(oc: int, c: int, kh: int, kw: int) -> Part:
    return Part(torch.empty(oc, c, kh, kw, device="meta"), None, None, (kh // 2, kw // 2), True)


def _conv_entries(
    kernel: str, config: Config, dtype: torch.dtype, *, residual: bool = False, tf32: bool = False
) -> list[Entry]:
    """A 1x7 convolution of 17x17x192 to 192."""
    spec = ConvSpec(N, 17, 17, 192, 192, 1, 7, (1, 1), (0, 0, 3, 3), residual=residual, dtype=SHORT[dtype])
    x, y = blank(N, 17, 17, 192, dtype), blank(N, 17, 17, 192, dtype)
    packed = pack([_part(192, 192, 1, 7)], dtype, "meta")
    launches = convolution(
        kernel, spec, x, packed, [y], config, residual=x if residual else None, residual_scale=0.17, tf32=tf32
    )
    label = f"{'tf32' if tf32 else SHORT[dtype]} {config}{' residual' if residual else ''}"
    finish = [Entry("conv_finish", label, launch, False) for launch in launches[1:]]
    arches = HOPPER if config in ON_HOPPER + CACHED else ("sm_90a", "sm_100a") if config.form == "tma" else Entry.arches
    return [Entry(kernel, label, launches[0], dtype is not FLOAT or tf32, arches), *finish]


def _convolutions() -> Iterator[Entry]:
    for config in TILES:
        yield from _conv_entries("conv", config, BRAIN)
    yield from _conv_entries("conv", Config(), HALF, residual=True)
    yield from _conv_entries("conv", Config(block_m=64, block_n=64, split=4), BRAIN)
    yield from _conv_entries("conv", EXACT, FLOAT)
    yield from _conv_entries("conv", Config(block_k=32), FLOAT, tf32=True)
    for config in (Config(block_n=192, warps=8), *CACHED):
        yield from _conv_entries("conv", config, BRAIN)
    for config in (*THROUGH_TMA[:2], *ON_HOPPER):
        yield from _conv_entries("conv_tma", config, BRAIN)
    spec, config = ConvSpec(N, 73, 73, 80, 192, 3, 3, dtype="bfloat16"), Config("rows", 128, 192, 64, warps=8)
    packed = pack([Part(torch.empty(192, 80, 3, 3, device="meta"), None, None, (0, 0), True)], BRAIN, "meta")
    (launch,) = convolution(
        "conv_tma", spec, blank(N, 73, 73, 80, BRAIN), packed, [blank(N, 71, 71, 192, BRAIN)], config
    )
    yield Entry("conv_tma", f"bfloat16 {config}", launch, True, HOPPER)


def _groups() -> Iterator[Entry]:
    """Siblings of 35x35x288, and the parallel split of 8x8x384."""
    spec = ConvSpec(N, 35, 35, 288, 176, 1, 1, dtype="bfloat16")
    packed = pack([_part(oc, 288, 1, 1) for oc in (64, 48, 64)], BRAIN, "meta")
    outputs = [blank(N, 35, 35, oc, BRAIN) for oc in (64, 48, 64)]
    for config in (*TILES[:-1], Config(block_m=64, block_n=64, split=4), *THROUGH_TMA, *TWO_WIDTHS):
        launches = convolution("conv_group", spec, blank(N, 35, 35, 288, BRAIN), packed, outputs, config)
        arches = HOPPER if config in ON_HOPPER else ("sm_90a", "sm_100a") if config.form == "tma" else Entry.arches
        kernel = "conv_group_tma" if config.form == "tma" else "conv_group"
        yield Entry(kernel, f"bfloat16 siblings {config}", launches[0], True, arches)
        for launch in launches[1:]:
            yield Entry("conv_finish", f"bfloat16 siblings {config}", launch, False)
    first = ConvSpec(N, 8, 8, 384, 384, 1, 3, (1, 1), (0, 0, 1, 1), dtype="bfloat16")
    both = pack([_part(384, 384, 1, 3), _part(384, 384, 3, 1)], BRAIN, "meta")
    y = blank(N, 8, 8, 768, BRAIN)
    halves = [y.channels(0, 384), y.channels(384, 384)]
    for config in (WIDE, TURNED[0], TURNED[-1]):
        launch = convolution("split", first, blank(N, 8, 8, 384, BRAIN), both, halves, config)[0]
        kernel, arches = ("split_tma", HOPPER) if config in ON_HOPPER else ("split", Entry.arches)
        yield Entry(kernel, f"bfloat16 {config}", launch, True, arches)


def _pairs() -> Iterator[Entry]:
    first = ConvSpec(N, 17, 17, 192, 192, 1, 7, (1, 1), (0, 0, 3, 3), dtype="bfloat16")
    second = ConvSpec(N, 17, 17, 192, 192, 7, 1, (1, 1), (3, 3, 0, 0), dtype="bfloat16")
    packed = pack([_part(192, 192, 1, 7)], BRAIN, "meta"), pack([_part(192, 192, 7, 1)], BRAIN, "meta")
    maps = [blank(N, 17, 17, 192, BRAIN) for _ in range(3)]
    for config in (Config(), WIDE):
        spec = PairSpec(first, second)
        launch = pairs.chain("pair", spec, maps[0], packed, maps[1], maps[2], lambda _: Config(), fused=config)[0]
        yield Entry("pair", f"bfloat16 {config}", launch, True)


def _stems() -> Iterator[Entry]:
    spec = ConvSpec(N, 299, 299, 3, 32, 3, 3, (2, 2))
    before = torch.empty(3, device="meta")
    for kind in (torch.uint8, FLOAT):
        for dtype in (BRAIN, FLOAT):
            x = torch.empty(N, 3, 299, 299, dtype=kind, device="meta")
            packed, y = pack([_part(32, 3, 3, 3)], dtype, "meta"), blank(N, 149, 149, 32, dtype)
            scale = before if kind is torch.uint8 else None
            launch = stems.convolution("stem", spec, x, packed, y, scale=scale)[0]
            yield Entry("stem", f"{str(kind).removeprefix('torch.')} to {SHORT[dtype]}", launch, dtype is not FLOAT)
    seven, x = ConvSpec(N, 224, 224, 3, 64, 7, 7, (2, 2), (3,) * 4), torch.empty(N, 3, 224, 224, device="meta")
    for dtype in (BRAIN, FLOAT):
        packed, y = pack([_part(64, 3, 7, 7)], dtype, "meta"), blank(N, 112, 112, 64, dtype)
        launch = stems.convolution("stem", seven, x, packed, y)[0]
        yield Entry("stem", f"7x7 float32 to {SHORT[dtype]}", launch, dtype is not FLOAT)


def _rest() -> Iterator[Entry]:
    big, small, wide = blank(N, 35, 35, 288, BRAIN), blank(N, 17, 17, 288, BRAIN), blank(N, 8, 8, 2048, BRAIN)
    one, full = blank(1, 35, 35, 288, BRAIN), blank(N, 35, 35, 288, FLOAT)
    shift = torch.empty(288, device="meta")
    same = PoolSpec(N, 35, 35, 288, 3, 3, (1, 1), (1,) * 4, "avg")
    pools = (
        ("max 3x3 stride 2", PoolSpec(N, 35, 35, 288, 3, 3, (2, 2)), big, small, None),
        ("average 3x3", same, big, big, None),
        ("average, shift", replace(same, count_include_pad=True), big, big, shift),
        ("average of one image", replace(same, n=1), one, one, None),
        ("average of 81 taps", replace(same, kh=9, kw=9, padding=(4,) * 4), big, big, None),
        ("whole map", PoolSpec(N, 8, 8, 2048, 8, 8, kind="avg"), wide, blank(N, 1, 1, 2048, BRAIN), None),
    )
    for label, spec, x, y, added in pools:
        launch = pooled(spec, x, y, added, added is not None)[0]
        yield Entry(launch.name, f"bfloat16 {label}", launch, False)
    yield Entry("pool", "float32 average 3x3", pooled(same, full, full)[0], False)
    step = EltwiseStep("", NOWHERE, NOWHERE, shift, shift, True, None, 0.17)  # type: ignore[arg-type]
    yield Entry("eltwise", "bfloat16 all parts", eltwise(step, big, big, big)[0], False)
    image = torch.empty(N, 3, 299, 299, dtype=torch.uint8, device="meta")
    yield Entry("import", "uint8 to bfloat16", imported(image, blank(N, 299, 299, 3, BRAIN))[0], False)
    yield Entry("lrn", "bfloat16", lrn(LrnStep("", NOWHERE, NOWHERE, 5, 1e-4, 0.75, 1.0), big, big)[0], False)
    yield Entry("normalize", "bfloat16", normalized(NormalizeStep("", NOWHERE, NOWHERE, 1e-12), big, big)[0], False)


def _training() -> Iterator[Entry]:
    """A convolution that leaves its statistics, in the tiles of its class, and batch norm with its ReLU."""
    spec = ConvSpec(N, 35, 35, 288, 64, 1, 1, dtype="bfloat16")
    packed = pack([Part(torch.empty(64, 288, 1, 1, device="meta"), None, None, (0, 0), False)], BRAIN, "meta")
    x, y = blank(N, 35, 35, 288, BRAIN), blank(N, 35, 35, 64, BRAIN)
    for config in TILES[:-1]:
        (launch,), _ = norms.conv_with_statistics("conv_stats", spec, x, packed, y, config)
        yield Entry("conv_stats", f"bfloat16 {config}", launch, True)
    of = norms.Norm(*(torch.empty(288, device="meta") for _ in range(4)))
    sums = [torch.empty(288, device="meta") for _ in range(2)]
    for dtype in (BRAIN, FLOAT):
        x = blank(N, 35, 35, 288, dtype)
        first, parts = norms.statistics(x)
        merge, _ = norms.merged(parts, x.rows, moments=True)
        both = norms.backward(x, x, of, 1e-3, x, *sums)
        for launch in (*first, merge[0], *norms.forward(x, x, of, 1e-3), *(both if dtype is BRAIN else both[::2])):
            yield Entry(launch.name, SHORT[dtype], launch, False)
