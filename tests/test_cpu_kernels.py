"""The native convolution: exact on small integers, within its budget on random data, never outside its memory."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from inception_fast.kernels import cpu
from inception_fast.kernels.plan import Output, PairStep, View
from inception_fast.kernels.spec import ConvSpec

from conv_shapes import CONV_SHAPES, ConvShape
from cpu_plans import Conv, Scene, integers, normals
from numerics import BF16_REL_L2, FP32_REL_L2, rel_l2

TIERS = cpu.tiers()
every_tier = pytest.mark.parametrize("tier", TIERS)
every_dtype = pytest.mark.parametrize("dtype", cpu.DTYPES)
# A tile unit takes bfloat16; its float32 kernels are those of the other tiers.
KERNELS = [("float32", tier) for tier in TIERS] + [("bfloat16", tier) for tier in (*TIERS, *cpu.EMULATED)]
every_kernel = pytest.mark.parametrize(("dtype", "tier"), KERNELS)
every_tier_and_emulation = pytest.mark.parametrize("tier", (*TIERS, *cpu.EMULATED))
TILE_TIERS = [*cpu.EMULATED, *(tier for tier in TIERS if tier.startswith("amx"))]


def spec_of(shape: ConvShape, n: int = 1, largest: int = 17) -> ConvSpec:
    """The layer on a map of its own remainder by the stride, at most about `largest` wide: all border cases stay."""

    def size(s: int) -> int:
        return s if s <= largest else largest - 1 + (s - largest + 1) % 2

    sizes = (n, size(shape.h), size(shape.w), shape.c, shape.oc, shape.kh, shape.kw)
    return ConvSpec(*sizes, (shape.stride, shape.stride), shape.padding, shape.groups)


@every_dtype
@pytest.mark.parametrize("shape", CONV_SHAPES, ids=str)
def test_every_layer_of_the_variants_is_exact(shape: ConvShape, dtype: str) -> None:
    conv = integers(replace(spec_of(shape), dtype=dtype))
    truth = conv.reference()
    for kind, tier in KERNELS:
        if kind == dtype:
            assert torch.equal(conv.run(tier, threads=2).double(), truth), tier


# One layer per kind of tile: the stem (three channels, merged taps), columns, rows, both, a wide map in several blocks.
FULL_SIZE = [
    ConvSpec(1, 149, 151, 3, 32, 3, 3, (2, 2)),
    ConvSpec(2, 73, 73, 8, 16, 1, 7, (1, 1), (0, 0, 3, 3)),
    ConvSpec(1, 71, 71, 16, 24, 7, 1, (1, 1), (3, 3, 0, 0)),
    ConvSpec(1, 147, 147, 32, 40, 3, 3, (1, 1), (1, 1, 1, 1)),
    ConvSpec(1, 112, 112, 3, 24, 7, 7, (2, 2), (2, 3, 2, 3), groups=3),
]


@every_kernel
@pytest.mark.parametrize("spec", FULL_SIZE, ids=lambda s: f"{s.h}x{s.w}-{s.kh}x{s.kw}")
def test_large_maps_are_exact(tier: str, dtype: str, spec: ConvSpec) -> None:
    conv = integers(replace(spec, dtype=dtype))
    assert torch.equal(conv.run(tier, threads=3).double(), conv.reference())


EDGES = {
    "one pixel": ConvSpec(1, 1, 1, 5, 7, 1, 1),
    "one pixel, kernel on padding": ConvSpec(1, 1, 1, 3, 17, 3, 3, (1, 1), (1, 1, 1, 1)),
    "channels equal sizes": ConvSpec(3, 5, 5, 5, 5, 3, 3, (1, 1), (1, 1, 1, 1)),
    "one channel": ConvSpec(1, 9, 6, 1, 1, 2, 2),
    "even kernel, one-sided padding": ConvSpec(2, 7, 10, 17, 33, 4, 2, (1, 2), (3, 0, 0, 1)),
    "stride 3": ConvSpec(1, 17, 23, 6, 12, 3, 5, (3, 3), (0, 2, 1, 0)),
    "stride beyond the kernel": ConvSpec(2, 12, 13, 4, 4, 2, 1, (5, 4)),
    "padding beyond the kernel": ConvSpec(1, 4, 4, 9, 9, 2, 2, (1, 1), (5, 4, 3, 6)),
    "wide kernel on a narrow map": ConvSpec(1, 6, 2, 8, 8, 1, 7, (1, 1), (0, 0, 3, 3)),
    "strided columns": ConvSpec(2, 11, 12, 7, 9, 1, 5, (2, 3), (0, 0, 2, 1)),
    "chunks of odd length": ConvSpec(1, 5, 5, 577, 31, 1, 1),
    "chunks and taps": ConvSpec(1, 6, 5, 300, 15, 3, 2, (1, 1), (1, 1, 1, 0)),
    "tiny depth, many taps": ConvSpec(1, 40, 40, 1, 8, 31, 33, (1, 1), (3, 3, 5, 5)),
    "batch of nothing": ConvSpec(0, 8, 8, 16, 16, 3, 3),
    "joined taps": ConvSpec(3, 12, 31, 3, 20, 7, 7, (2, 2), (3, 2, 3, 2)),
    "joined taps, a map inside its padding": ConvSpec(2, 3, 2, 5, 9, 3, 4, (1, 2), (1, 2, 6, 5)),
    "joined taps, a map before its last columns": ConvSpec(2, 5, 19, 1, 6, 2, 3, (1, 7), (0, 1, 0, 0)),
    "depthwise": ConvSpec(2, 9, 9, 12, 12, 3, 3, (1, 1), (1, 1, 1, 1), groups=12),
    "depthwise, panels begin inside a channel": ConvSpec(2, 9, 37, 5, 95, 3, 5, (2, 1), (1, 1, 2, 2), groups=5),
    "depthwise, a channel for several vectors": ConvSpec(1, 6, 5, 2, 110, 2, 3, (1, 1), (0, 1, 1, 1), groups=2),
    "depthwise, chunks of taps": ConvSpec(1, 24, 45, 3, 3, 19, 17, (1, 2), (3, 3, 5, 5), groups=3),
    "depthwise, stride beyond a strip": ConvSpec(1, 5, 1500, 3, 6, 3, 3, (1, 1400), (1, 1, 1, 1), groups=3),
    "depthwise, batch of nothing": ConvSpec(0, 8, 8, 16, 16, 3, 3, groups=16),
    "groups of odd width": ConvSpec(1, 8, 7, 15, 57, 3, 1, (1, 1), (1, 1, 0, 0), groups=3),
}


@every_kernel
@pytest.mark.parametrize("around", [(0, 0), (3, 5)], ids=["dense", "slices"])
@pytest.mark.parametrize("spec", EDGES.values(), ids=EDGES.keys())
def test_edge_shapes_are_exact(tier: str, dtype: str, spec: ConvSpec, around: tuple[int, int]) -> None:
    conv = integers(replace(spec, dtype=dtype), residual=True)
    for threads in (1, 4):
        assert torch.equal(conv.run(tier, threads, around=around).double(), conv.reference())
    assert torch.equal(conv.run(tier, relu=False, around=around).double(), conv.reference(relu=False))


# Sixteen channels of a group are the fewest for a tile unit.
TILE_EDGES = {
    "even kernel, one-sided padding": ConvSpec(2, 7, 10, 17, 33, 4, 2, (1, 2), (3, 0, 0, 1)),
    "stride 3": ConvSpec(2, 17, 23, 22, 12, 3, 5, (3, 3), (0, 2, 1, 0)),
    "stride beyond the kernel": ConvSpec(2, 12, 13, 20, 4, 2, 1, (5, 4)),
    "padding beyond the kernel": ConvSpec(1, 4, 4, 40, 9, 2, 2, (1, 1), (5, 4, 3, 6)),
    "wide kernel on a narrow map": ConvSpec(2, 6, 2, 64, 8, 1, 7, (1, 1), (0, 0, 3, 3)),
    "strided columns": ConvSpec(2, 11, 12, 33, 9, 1, 5, (2, 3), (0, 0, 2, 1)),
    "rows of taps in one": ConvSpec(2, 9, 9, 16, 48, 7, 1, (1, 1), (3, 3, 0, 0)),
    "1x1, padded": ConvSpec(3, 9, 9, 64, 40, 1, 1, (1, 1), (1, 0, 0, 1)),
    "1x1, strided": ConvSpec(3, 9, 9, 64, 40, 1, 1, (2, 2)),
    "1x1 in place, groups": ConvSpec(3, 7, 9, 128, 70, 1, 1, groups=2),
    "groups of odd width": ConvSpec(1, 8, 7, 57, 57, 3, 1, (1, 1), (1, 1, 0, 0), groups=3),
    "several blocks of an image": ConvSpec(2, 60, 50, 96, 20, 3, 3, (1, 1), (1, 1, 1, 1)),
    "batch of nothing": ConvSpec(0, 8, 8, 16, 16, 3, 3),
}


@pytest.mark.parametrize("tier", TILE_TIERS)
@pytest.mark.parametrize("around", [(0, 0), (3, 5)], ids=["dense", "slices"])
@pytest.mark.parametrize("spec", TILE_EDGES.values(), ids=TILE_EDGES.keys())
def test_edges_of_a_tile_unit_are_exact(tier: str, spec: ConvSpec, around: tuple[int, int]) -> None:
    conv = integers(replace(spec, dtype="bfloat16"), residual=True)
    truth = conv.reference()
    for threads in (1, 3):
        assert torch.equal(conv.run(tier, threads, around=around).double(), truth)


@every_kernel
@pytest.mark.parametrize("width", range(1, 70, 4))
def test_every_tail_of_columns_and_pixels(tier: str, dtype: str, width: int) -> None:
    conv = integers(ConvSpec(1, 1, width, 18, width, 1, 1, dtype=dtype))
    assert torch.equal(conv.run(tier, around=(1, 2)).double(), conv.reference())


@every_kernel
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("widths", [(64, 48, 96), (1, 40, 31, 2), (15, 17), (3, 3, 3, 3)], ids=str)
def test_outputs_scatter_to_any_columns(tier: str, dtype: str, widths: tuple[int, ...], groups: int) -> None:
    spec = ConvSpec(2, 7, 9, 34, sum(widths), 1, 1, groups=groups, dtype=dtype)
    conv = integers(spec)
    scene = Scene()
    x = scene.put(conv.x, dtype=dtype)
    rooms = [scene.room(2, 7, 9, width, i, 2 * i + 1, dtype) for i, width in enumerate(widths)]
    outputs = tuple(Output(room, i % 2 == 0) for i, room in enumerate(rooms))
    scene.steps.append(conv.step(x, outputs))
    memory = scene.run(tier, threads=2)
    truths = conv.reference(relu=False).split(widths, dim=1)
    for output, truth in zip(outputs, truths, strict=True):
        assert torch.equal(memory.get(output.view).double(), truth.relu() if output.relu else truth)


@every_tier
def test_outputs_share_a_buffer_like_a_concatenation(tier: str) -> None:
    conv = integers(ConvSpec(1, 5, 5, 8, 37, 3, 3, (1, 1), (1, 1, 1, 1)))
    scene = Scene()
    x = scene.put(conv.x)
    whole = scene.room(1, 5, 5, 60)
    outputs = tuple(Output(View(whole.buffer, at, c), True) for at, c in ((41, 12), (2, 25)))
    scene.steps.append(conv.step(x, outputs))
    memory = scene.run(tier)
    found = torch.cat([memory.get(output.view) for output in outputs], dim=1)
    assert torch.equal(found.double(), conv.reference())


@every_kernel
def test_a_residual_may_be_replaced_in_place(tier: str, dtype: str) -> None:
    conv = integers(ConvSpec(2, 6, 6, 20, 19, 1, 1, dtype=dtype), residual=True)
    scene = Scene()
    x, residual = scene.put(conv.x, dtype=dtype), scene.put(conv.residual, 2, 3, dtype)
    scene.steps.append(conv.step(x, (Output(residual, True),), residual))
    assert torch.equal(scene.run(tier, threads=3).get(residual).double(), conv.reference())


@every_tier_and_emulation
@pytest.mark.parametrize(
    "spec",
    [
        ConvSpec(1, 8, 8, 448, 384, 3, 3, (1, 1), (1, 1, 1, 1)),  # K = 4032, the longest of all variants
        ConvSpec(1, 8, 8, 2080, 64, 1, 1),
        ConvSpec(1, 17, 17, 192, 64, 1, 7, (1, 1), (0, 0, 3, 3)),
        ConvSpec(1, 35, 35, 48, 64, 5, 5, (1, 1), (2, 2, 2, 2)),
        ConvSpec(2, 1, 1, 2048, 1001, 1, 1),
    ],
    ids=lambda s: f"{s.c}-{s.kh}x{s.kw}",
)
def test_sums_stay_within_the_float32_budget(tier: str, spec: ConvSpec) -> None:
    conv = normals(spec, residual=True)
    assert rel_l2(conv.run(tier), conv.reference()) <= FP32_REL_L2
    positive = replace(conv, weight=conv.weight.abs())
    assert rel_l2(positive.run(tier), positive.reference()) <= FP32_REL_L2
    half = replace(conv, spec=replace(spec, dtype="bfloat16"))
    exact = replace(half, x=half.rounded(conv.x), weight=half.rounded(conv.weight), spec=spec)
    exact.residual = half.rounded(conv.residual)  # the result not rounded: what the budget allows is that rounding
    assert rel_l2(half.run(tier), exact.reference()) <= BF16_REL_L2


INVARIANT = [
    ConvSpec(3, 17, 17, 160, 72, 1, 7, (1, 1), (0, 0, 3, 3)),
    ConvSpec(3, 17, 17, 160, 72, 7, 1, (1, 1), (3, 3, 0, 0)),
    ConvSpec(3, 29, 29, 3, 32, 3, 3, (2, 2), (0, 1, 0, 1)),
    ConvSpec(3, 8, 8, 320, 100, 3, 3, (1, 1), (1, 1, 1, 1)),
    ConvSpec(3, 40, 40, 24, 40, 3, 3, (1, 1), (1, 1, 1, 1)),
]


@every_kernel
@pytest.mark.parametrize("spec", INVARIANT, ids=lambda s: f"{s.h}-{s.c}-{s.kh}x{s.kw}")
def test_bits_depend_on_neither_threads_nor_batch_nor_layout(tier: str, dtype: str, spec: ConvSpec) -> None:
    conv = normals(replace(spec, dtype=dtype))
    y = conv.run(tier, threads=1)
    for threads in (2, 3, 5):
        assert torch.equal(conv.run(tier, threads), y)
    assert torch.equal(conv.run(tier, around=(4, 3)), y)
    for i in range(3):
        assert torch.equal(conv.image(i).run(tier), y[i : i + 1])
    scene = Scene()
    x = scene.put(conv.x, dtype=dtype)
    outputs = tuple(Output(scene.room(3, spec.oh, spec.ow, c, dtype=dtype), True) for c in (spec.oc - 21, 21))
    scene.steps.append(conv.step(x, outputs))
    memory = scene.run(tier, threads=2)
    assert torch.equal(torch.cat([memory.get(output.view) for output in outputs], dim=1), y)


def test_tiers_with_fused_multiply_add_agree_bit_for_bit() -> None:
    fused = [tier for tier in TIERS if tier != "generic"]
    conv = normals(ConvSpec(1, 9, 9, 320, 72, 3, 3, (1, 1), (1, 1, 1, 1)), residual=True)
    results = [conv.run(tier) for tier in fused]
    assert all(torch.equal(result, results[0]) for result in results)


@every_tier_and_emulation
def test_types_mix(tier: str) -> None:
    """bfloat16 in, float32 out, a float32 residual; and the other way round."""
    for x_type, y_type in (("bfloat16", "float32"), ("float32", "bfloat16")):
        conv = integers(ConvSpec(1, 7, 9, 21, 35, 3, 3, (1, 1), (1, 1, 1, 1), dtype=x_type), residual=True)
        scene = Scene()
        x, residual = scene.put(conv.x, dtype=x_type), scene.put(conv.residual, dtype=y_type)
        y = scene.room(1, 7, 9, 35, 2, 3, y_type)
        scene.steps.append(conv.step(x, (Output(y, True),), residual))
        truth = replace(conv, spec=replace(conv.spec, dtype=y_type)).reference()
        assert torch.equal(scene.run(tier, threads=2).get(y).double(), truth)


@every_kernel
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("kh", "kw"), [(3, 3), (1, 5), (5, 1)])
def test_specials_reach_just_the_pixels_that_read_them(tier: str, dtype: str, value: float, kh: int, kw: int) -> None:
    conv = integers(ConvSpec(2, 9, 11, 21, 20, kh, kw, (1, 1), (kh // 2, kh // 2, kw // 2, kw // 2), dtype=dtype))
    conv.x[0, 2, 4, 10] = conv.x[1, 0, 0, 0] = value
    y, truth = conv.run(tier, threads=2), conv.reference()
    torch.testing.assert_close(y.double(), truth, rtol=0, atol=0, equal_nan=True)
    assert 0 < int(y.isfinite().sum()) < y.numel()


@every_kernel
def test_weights_that_are_not_finite_spoil_padding_as_in_the_formula(tier: str, dtype: str) -> None:
    conv = integers(ConvSpec(1, 7, 7, 19, 6, 3, 3, (1, 1), (1, 1, 1, 1), dtype=dtype))
    conv.weight[2, 1, 0, 0] = math.inf
    torch.testing.assert_close(conv.run(tier).double(), conv.reference(), rtol=0, atol=0, equal_nan=True)


FUSED = {
    "1x7 7x1": (ConvSpec(3, 9, 11, 12, 20, 1, 7, (1, 1), (0, 0, 3, 3)), (7, 1), (3, 3, 0, 0)),
    "7x1 1x7": (ConvSpec(2, 9, 8, 12, 37, 7, 1, (1, 1), (3, 3, 0, 0)), (1, 7), (0, 0, 3, 3)),
    "one column": (ConvSpec(1, 9, 1, 5, 6, 1, 3, (1, 1), (0, 0, 1, 1)), (3, 1), (1, 1, 0, 0)),
    "strided first": (ConvSpec(4, 12, 13, 6, 9, 3, 3, (2, 2), (1, 0, 0, 1)), (5, 1), (2, 2, 0, 0)),
    "1x1 behind": (ConvSpec(5, 5, 5, 6, 9, 1, 3, (1, 1), (0, 0, 1, 1)), (1, 1), (0, 0, 0, 0)),
    "tiles, 1x7 7x1": (ConvSpec(3, 9, 11, 64, 48, 1, 7, (1, 1), (0, 0, 3, 3)), (7, 1), (3, 3, 0, 0)),
    "tiles, strided first": (ConvSpec(2, 13, 12, 20, 32, 3, 3, (2, 2), (1, 0, 0, 1)), (1, 7), (0, 0, 3, 3)),
    "tiles, 1x1 in front": (ConvSpec(2, 9, 8, 64, 96, 1, 1), (1, 3), (0, 0, 1, 1)),
    "nobody": (ConvSpec(0, 5, 5, 6, 9, 1, 3, (1, 1), (0, 0, 1, 1)), (3, 1), (1, 1, 0, 0)),
}


@every_kernel
@pytest.mark.parametrize("case", FUSED)
def test_a_fused_pair_is_its_two_convolutions_bit_for_bit(tier: str, dtype: str, case: str) -> None:
    spec, kernel, padding = FUSED[case]
    first = normals(replace(spec, dtype=dtype), 1)
    spec = ConvSpec(spec.n, spec.oh, spec.ow, spec.oc, 21, *kernel, (1, 1), padding, dtype=dtype)
    second = normals(spec, 2)
    found = []
    for kind in ("arena", "local"):
        for threads in (1, 2, 3):
            scene = Scene()
            x = scene.put(first.x, 2, 1, dtype)
            middle = scene.room(spec.n, spec.h, spec.w, spec.c, dtype=dtype)
            scene.buffers[-1] = replace(scene.buffers[-1], kind=kind)
            y = scene.room(spec.n, spec.oh, spec.ow, 21, 3, 2, dtype)
            a, b = first.step(x, (Output(middle, True),)), second.step(middle, (Output(y, False),))
            scene.steps.append(PairStep("pair", "chain", a, b))
            found.append(scene.run(tier, threads).get(y))
    assert all(torch.equal(y, found[0]) for y in found)
    if spec.n:
        once = replace(second, x=first.reference().float())
        limit = FP32_REL_L2 if dtype == "float32" else 3 * BF16_REL_L2
        assert rel_l2(found[0], once.reference(relu=False)) <= 2 * limit


# The first kernel and the second, with 7 channels between them.
FEW = {
    "taps of the second": (ConvSpec(2, 30, 30, 32, 7, 3, 1), (1, 3), (0, 0, 0, 0)),
    "taps of the first, strips of columns": (
        ConvSpec(3, 20, 33, 3, 7, 3, 3, (1, 1), (1, 1, 2, 1)),
        (3, 1),
        (1, 1, 0, 0),
    ),
    "strips inside of padding": (ConvSpec(2, 9, 3, 5, 7, 3, 4, (1, 1), (1, 1, 9, 9)), (5, 1), (2, 2, 0, 0)),
    "strips, strided": (ConvSpec(3, 11, 40, 8, 7, 5, 5, (2, 2), (2, 2, 2, 2)), (3, 1), (0, 0, 0, 0)),
    "taps of both, strips of rows": (ConvSpec(2, 31, 12, 5, 7, 3, 3, (2, 1), (1, 0, 1, 1)), (1, 3), (0, 0, 0, 0)),
}


@every_tier_and_emulation
@pytest.mark.parametrize("case", FEW)
def test_a_fused_pair_of_few_channels_is_its_two_convolutions_bit_for_bit(tier: str, case: str) -> None:
    """In bfloat16, whose few channels of neighbouring taps are joined; the result is float32, so that all bits show."""
    spec, kernel, padding = FEW[case]
    first = normals(replace(spec, dtype="bfloat16"), 1)
    spec = ConvSpec(spec.n, spec.oh, spec.ow, spec.oc, 40, *kernel, (1, 1), padding, dtype="bfloat16")
    second, found = normals(spec, 2), []
    for kind in ("arena", "local"):
        for threads in (1, 2, 5):
            scene = Scene()
            x, middle = (
                scene.put(first.x, 1, 2, "bfloat16"),
                scene.room(spec.n, spec.h, spec.w, spec.c, dtype="bfloat16"),
            )
            scene.buffers[-1] = replace(scene.buffers[-1], kind=kind)
            y = scene.room(spec.n, spec.oh, spec.ow, 40)
            a, b = first.step(x, (Output(middle, True),)), second.step(middle, (Output(y, False),))
            scene.steps.append(PairStep("pair", "chain", a, b))
            found.append(scene.run(tier, threads).get(y))
    assert all(torch.equal(y, found[0]) for y in found)


@every_tier
@pytest.mark.parametrize("kind", ["chain", "split"])
def test_pairs_are_their_two_convolutions(tier: str, kind: str) -> None:
    first = integers(ConvSpec(2, 9, 9, 12, 20, 1, 3, (1, 1), (0, 0, 1, 1)), 1)
    c = 20 if kind == "chain" else 12
    second = integers(ConvSpec(2, 9, 9, c, 10, 3, 1, (1, 1), (1, 1, 0, 0)), 2)
    scene = Scene()
    x, middle, y = scene.put(first.x), scene.room(2, 9, 9, 20), scene.room(2, 9, 9, 10, 20)
    left = middle if kind == "chain" else View(y.buffer, 0, 20)
    a = first.step(x, (Output(left, True),))
    b = second.step(left if kind == "chain" else x, (Output(y, False),))
    scene.steps.append(PairStep("pair", kind, a, b))
    memory = scene.run(tier, threads=3)
    truth = first.reference()
    assert torch.equal(memory.get(left).double(), truth)
    second = Conv(second.spec, truth if kind == "chain" else first.x, second.weight, second.scale, second.shift)
    assert torch.equal(memory.get(y).double(), second.reference(relu=False))
