"""Winograd's algorithm on the CPU: exact where its numbers are, within its own budget elsewhere, on request alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from inception_fast.kernels import cpu
from inception_fast.kernels.cpu.winograd import TILES
from inception_fast.kernels.cpu.winograd import winograd_tile as rule
from inception_fast.kernels.plan import Output, PairStep, View
from inception_fast.kernels.spec import ConvSpec
from torch import nn

import engine_nets
import numerics
from conv_shapes import CONV_SHAPES
from cpu_plans import Conv, Scene, integers, normals
from engine_nets import relative
from inception_fast import optimize
from inception_fast.engine.program import convolutions

TIERS = (*cpu.tiers(), *cpu.EMULATED)
FORMS = [(kernel, tile) for kernel, tiles in TILES.items() for tile in tiles]
every_tier = pytest.mark.parametrize("tier", TIERS)
every_form = pytest.mark.parametrize(("kernel", "tile"), FORMS, ids=lambda pair: "x".join(map(str, pair)))


def spec_of(kernel: tuple[int, int], h: int, w: int, c: int, oc: int, n: int = 1, same: bool = True) -> ConvSpec:
    pads = (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2) if same else (0, 0, 0, 0)
    return ConvSpec(n, h, w, c, oc, *kernel, (1, 1), pads)


def check(conv: Conv, tier: str, threads: int = 2, relu: bool = True, around: tuple[int, int] = (0, 0)) -> None:
    kernel = conv.spec.kh, conv.spec.kw
    norm, worst = numerics.winograd_budget(kernel, conv.tile)
    y, truth = conv.run(tier, threads, relu, around), conv.reference(relu)
    assert truth.abs().max() > 0
    terms = conv.terms() * (truth > 0) if relu else conv.terms()
    error = y.double() - truth
    assert error.norm() <= norm * max(truth.norm(), terms.norm())
    assert error.abs().max() <= worst * max(truth.abs().max(), terms.max())


@every_tier
@pytest.mark.parametrize("size", [1, 2, 5, 8, 17])
@pytest.mark.parametrize("same", [False, True])
def test_tiles_of_two_by_two_are_exact(tier: str, size: int, same: bool) -> None:
    """Their transforms halve and add: on small integers no number is ever rounded."""
    for channels, columns in ((3, 7), (33, 48)):
        spec = spec_of((3, 3), size + 2 * (not same), size + 3, channels, columns, 2, same)
        conv = replace(integers(spec, residual=True), tile=(2, 2))
        for threads in (1, 3):
            assert torch.equal(conv.run(tier, threads, around=(3, 2)).double(), conv.reference())
        assert torch.equal(conv.run(tier, relu=False).double(), conv.reference(relu=False))


# What a tile may meet: maps below, at and beyond a whole number of tiles, channels and columns with remainders.
SIZES = [(1, 1, 5, 3), (4, 4, 16, 32), (7, 9, 17, 33), (8, 17, 48, 70), (17, 8, 300, 15)]


@every_tier
@every_form
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forms_stay_within_their_budget(
    tier: str, kernel: tuple[int, int], tile: tuple[int, int], size: tuple[int, int, int, int]
) -> None:
    check(replace(normals(spec_of(kernel, *size, n=2), residual=True), tile=tile), tier, around=(3, 2))
    h, w, c, oc = size
    spec = spec_of(kernel, h + kernel[0] - 1, w + kernel[1] - 1, c, oc, 1, same=False)
    check(replace(normals(spec), tile=tile), tier, threads=3, relu=False)


@every_form
@pytest.mark.parametrize("kind", ["independent", "cancelling"])
def test_random_layers_stay_within_the_budget_of_their_terms(
    kernel: tuple[int, int], tile: tuple[int, int], kind: str
) -> None:
    """Few products cancel by chance; weights that sum to zero over a map that is nearly one value, nearly all."""
    g = torch.Generator().manual_seed(7)
    for seed in range(25):
        h, w, c, oc = (int(torch.randint(1, most, (), generator=g)) for most in (19, 19, 40, 12))
        conv = replace(normals(spec_of(kernel, h, w, c, oc), seed), shift=torch.zeros(oc), tile=tile)
        x = torch.randn(conv.x.shape, generator=g)
        weight = conv.weight
        if kind == "cancelling":
            x, weight = 1 + x / 10, weight - weight.mean((1, 2, 3), keepdim=True)
        check(replace(conv, x=x, weight=weight), cpu.tiers()[-1], relu=False)


LAYERS = [s for s in CONV_SHAPES if s.stride == 1 and s.groups == 1 and (s.kh, s.kw) in TILES]


def test_every_layer_of_the_variants_within_budget() -> None:
    """Every distinct layer that may take a tile, by the best tier; on maps of at most 35x35, whose borders are all."""
    assert len(LAYERS) > 60
    for shape in LAYERS:
        h, w = (s if s <= 35 else 35 - (s - 35) % 2 for s in (shape.h, shape.w))
        spec = ConvSpec(1, h, w, shape.c, shape.oc, shape.kh, shape.kw, (1, 1), shape.padding)
        for tile in TILES[shape.kh, shape.kw]:
            check(replace(normals(spec), tile=tile), cpu.tiers()[-1])


@every_tier
@every_form
def test_bits_depend_on_neither_threads_nor_batch_nor_place(
    tier: str, kernel: tuple[int, int], tile: tuple[int, int]
) -> None:
    conv = replace(normals(spec_of(kernel, 17, 19, 40, 72, n=3)), tile=tile)
    y = conv.run(tier, threads=1)
    for threads in (2, 3, 5):
        assert torch.equal(conv.run(tier, threads), y)
    assert torch.equal(conv.run(tier, around=(4, 3)), y)
    for i in range(3):
        assert torch.equal(conv.image(i).run(tier, threads=2), y[i : i + 1])
    scene = Scene()
    x = scene.put(conv.x)
    outputs = tuple(Output(scene.room(3, 17, 19, c), True) for c in (72 - 21, 21))
    scene.steps.append(conv.step(x, outputs))
    memory = scene.run(tier, threads=2)
    assert torch.equal(torch.cat([memory.get(output.view) for output in outputs], dim=1), y)


@every_form
def test_tiers_with_fused_multiply_add_agree_bit_for_bit(kernel: tuple[int, int], tile: tuple[int, int]) -> None:
    fused = [tier for tier in cpu.tiers() if tier != "generic"]
    conv = replace(normals(spec_of(kernel, 9, 11, 50, 40), residual=True), tile=tile)
    results = [conv.run(tier) for tier in fused]
    assert all(torch.equal(result, results[0]) for result in results)


@every_tier
@every_form
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_maps_of_bfloat16_are_those_of_float32_rounded(
    tier: str, kernel: tuple[int, int], tile: tuple[int, int], size: tuple[int, int, int, int]
) -> None:
    """To the bit: all between the maps is float32, and so are the weights, whose bits bfloat16 does not hold."""
    wide = replace(normals(spec_of(kernel, *size, n=2), residual=True), tile=tile)
    assert not torch.equal(wide.weight.bfloat16().float(), wide.weight) and wide.residual is not None
    wide = replace(wide, x=wide.x.bfloat16().float(), residual=wide.residual.bfloat16().float())
    narrow = replace(wide, spec=replace(wide.spec, dtype="bfloat16"))
    expected = wide.run(tier)
    for threads in (1, 3):
        y = narrow.run(tier, threads, around=(3, 2))
        assert torch.equal(y.float(), expected.bfloat16().float())
    assert not torch.equal(expected.bfloat16().float(), expected)


@every_form
def test_in_bfloat16_tiles_err_less_than_direct_sums(kernel: tuple[int, int], tile: tuple[int, int]) -> None:
    """Whose weights are rounded: both beside the float64 sums of weights that are not."""
    conv = replace(normals(spec_of(kernel, 17, 17, 48, 70)), tile=tile)
    conv = replace(conv, x=conv.x.bfloat16().float())
    truth, narrow = conv.reference(), replace(conv, spec=replace(conv.spec, dtype="bfloat16"))
    tiled, direct = (one.run(cpu.tiers()[-1]) for one in (narrow, replace(narrow, tile=(0, 0))))
    assert 0 < numerics.rel_l2(tiled, truth) < numerics.rel_l2(direct, truth)


@every_tier
@every_form
def test_a_batch_of_nothing_and_a_poisoned_pixel(tier: str, kernel: tuple[int, int], tile: tuple[int, int]) -> None:
    """A NaN reaches every output that reads it, and none of a tile that does not."""
    nothing = replace(normals(spec_of(kernel, 5, 5, 8, 8, n=0)), tile=tile)
    assert nothing.run(tier).shape == (0, 8, 5, 5)
    conv = replace(normals(spec_of(kernel, 12, 12, 20, 16, n=2)), tile=tile)
    conv.x[1, 2, 0, 0] = math.nan
    y, truth = conv.run(tier, threads=2), conv.reference()
    assert not y[truth.isnan()].isfinite().any()
    assert y[0].isfinite().all() and y[1, :, 6:, :].isfinite().all() and y[1, :, :, 6:].isfinite().all()


@pytest.mark.parametrize(
    ("spec", "tile", "said"),
    [
        (spec_of((3, 3), 8, 8, 8, 8), (3, 3), r"tile \(3, 3\) for kernel \(3, 3\)"),
        (spec_of((1, 5), 8, 8, 8, 8), (1, 4), r"tile \(1, 4\) for kernel \(1, 5\)"),
        (ConvSpec(1, 8, 8, 8, 8, 3, 3, (2, 2)), (4, 4), r"stride \(2, 2\)"),
        (ConvSpec(1, 8, 8, 8, 8, 3, 3, groups=2), (4, 4), "2 groups"),
    ],
)
def test_tiles_without_a_kernel_are_refused(spec: ConvSpec, tile: tuple[int, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(integers(spec), tile=tile).run("generic")


def test_a_fused_pair_has_no_tiles() -> None:
    first = replace(normals(spec_of((1, 3), 6, 6, 8, 8)), tile=(1, 4))
    scene = Scene()
    x, middle, y = scene.put(first.x), scene.room(1, 6, 6, 8), scene.room(1, 6, 6, 8)
    scene.buffers[middle.buffer] = replace(scene.buffers[middle.buffer], kind="local")
    second = normals(spec_of((3, 1), 6, 6, 8, 8))
    steps = first.step(x, (Output(middle, True),)), second.step(middle, (Output(y, True),))
    scene.steps.append(PairStep("pair", "chain", *steps))
    with pytest.raises(ValueError, match=r"tile \(1, 4\) in a fused pair"):
        scene.run("generic")
    assert isinstance(y, View)


@pytest.mark.parametrize("name", ["inception_v3", "inception_resnet_v2"])
def test_networks(name: str) -> None:
    """Within the budget of a network, the same bits alone and in a batch and for any threads; the report says where."""
    net, x = engine_nets.built(name), engine_nets.images(name, 4)
    fast, exact = optimize(net, x, winograd=True), engine_nets.optimised(name)
    y = fast(x)
    assert relative(y, exact(x)) <= numerics.NET_WINOGRAD_MAX and not torch.equal(y, exact(x))
    assert torch.equal(torch.cat([fast(x[i : i + 1]) for i in range(4)]), y)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(fast(x), y)
    finally:
        torch.set_num_threads(before)
    report = fast.report()
    taken = [s for s in report.steps if "tiles of" in s.winograd]
    assert taken and 0 < report.counts["winograd_convolutions"] < report.counts["convolutions"]
    assert all(s.winograd for s in report.steps if s.kind in ("conv", "pair")), "a convolution without a word"
    assert "Winograd's algorithm:" in str(report) and "direct: kernel 1x1" in str(report)
    assert not any(s.winograd for s in exact.report().steps)


def test_a_network_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """About as far from float64 as direct sums, for maps are rounded alike; the same bits alone and in a batch."""
    monkeypatch.setenv(cpu.ISA_VARIABLE, [tier for tier in cpu.tiers() if not tier.startswith("amx")][-1])
    net, x = engine_nets.built("inception_v3"), numerics.random(2, 3, 171, 171)
    fast = optimize(net, x, winograd=True, dtype=torch.bfloat16)
    exact, truth = (optimize(net, x, **how) for how in ({"dtype": torch.bfloat16}, {"backend": "reference"}))
    y = fast(x)
    assert y.dtype == torch.float32 and not torch.equal(y, exact(x))
    assert relative(y, truth(x)) <= min(numerics.NET_BF16_REL_L2, 1.2 * relative(exact(x), truth(x)))
    assert torch.equal(torch.cat([fast(x[i : i + 1]) for i in range(2)]), y)
    assert fast.report().counts["winograd_convolutions"] >= 10


def test_a_tile_unit_is_faster_than_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.ISA_VARIABLE, "amx_bf16_emulated")
    spec = spec_of((3, 3), 35, 35, 96, 96)
    assert cpu.winograd_tile(spec) == ((6, 6), "")
    tile, why = cpu.winograd_tile(replace(spec, dtype="bfloat16"))
    assert tile == (0, 0) and why.startswith("saves too little")


@pytest.mark.parametrize(
    ("kernel", "size", "channels", "columns", "tile"),
    [
        ((3, 3), 149, 32, 32, (6, 6)),
        ((3, 3), 35, 96, 96, (6, 6)),
        ((3, 3), 28, 96, 128, (4, 4)),  # tiles of six save as much, and take more weights
        ((3, 3), 14, 128, 256, (4, 4)),
        ((3, 3), 8, 448, 384, (2, 2)),  # four larger tiles wait for their weights
        ((3, 3), 3, 448, 384, (0, 0)),
        ((5, 5), 35, 48, 64, (4, 4)),
        ((5, 5), 7, 48, 128, (2, 2)),
    ],
)
def test_the_rule(kernel: tuple[int, int], size: int, channels: int, columns: int, tile: tuple[int, int]) -> None:
    assert cpu.winograd_tile(spec_of(kernel, size, size, channels, columns))[0] == tile


def test_the_rule_counts_what_direct_sums_of_bfloat16_cost() -> None:
    """Half as much as in float32 where the processor multiplies pairs, as much where it widens them first."""
    spec = replace(spec_of((5, 5), 7, 7, 48, 128), dtype="bfloat16")
    assert rule(spec, "avx512")[0] == rule(spec, "generic")[0] == (2, 2) and rule(spec, "avx512_bf16")[0] == (0, 0)


@pytest.mark.parametrize(("size", "outputs"), [(7, 4), (8, 4), (12, 6), (17, 6)])
def test_seven_taps_take_the_tile_that_fits_the_map(size: int, outputs: int) -> None:
    """Three tiles of six cover a row of 17 by 36 products, five of four by 50; two of four cover one of 8 by 20."""
    for kernel, tile in (((1, 7), (1, outputs)), ((7, 1), (outputs, 1))):
        assert cpu.winograd_tile(spec_of(kernel, size, size, 128, 160)) == (tile, "")


@pytest.mark.parametrize("name", ["inception_v3", "inception_resnet_v2"])
def test_weights_are_packed_once(name: str) -> None:
    """A convolution by tiles keeps the points' weights and not the direct sum's beside them."""
    net, x = engine_nets.built(name), engine_nets.images(name, 1)
    fast = optimize(net, x, winograd=True)
    executable, _ = fast._session.executable([x])
    steps = [step for call in convolutions(executable.program) for step in call]
    direct = sum(4 * math.prod(step.whole.shape) for step in steps)
    packed = sum(4 * step.spec.c * step.spec.oc * taps(step.spec, step.tile) for step in steps)
    assert any(any(step.tile) for step in steps)
    assert direct < packed <= executable.packed_bytes <= packed * 1.1


def taps(spec: ConvSpec, tile: tuple[int, int]) -> int:
    """Weights of a channel: the kernel's, or one a point of the tile."""
    return (tile[0] + spec.kh - 1) * (tile[1] + spec.kw - 1) if any(tile) else spec.kh * spec.kw


def test_it_is_refused_where_there_is_none() -> None:
    net, x = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match="backend 'torch'; allowed: 'cpu'"):
        optimize(net, x, winograd=True, backend="torch")
    with pytest.raises(TypeError, match="winograd of type str"):
        optimize(net, x, winograd="yes")  # type: ignore[arg-type]


def test_torch_compile_takes_the_option() -> None:
    net, x = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()).eval(), torch.randn(2, 64, 36, 36)
    with torch.no_grad():
        y = torch.compile(net, backend="inception_fast", options={"winograd": True})(x)
        assert torch.equal(y, optimize(net, x, winograd=True)(x)) and not torch.equal(y, optimize(net, x)(x))
