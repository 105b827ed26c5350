"""Weight gradients by Winograd's tiles: kernels of every tier, the rule, the operator and its budgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from inception_fast.kernels import cpu
from inception_fast.kernels.cpu.winograd import DIRECT, TILES
from inception_fast.kernels.cpu.winograd_gradient import LEAST_GAIN, gradient_gain
from inception_fast.kernels.spec import ConvSpec
from torch import Tensor

import inception_fast as fast
import numerics
from inception_fast import ops
from inception_fast.backends import weight_gradient as native

LAST = torch.channels_last
Two = tuple[int, int]
FORMS = [(kernel, tile) for kernel, tiles in TILES.items() for tile in tiles]
every_tier = pytest.mark.parametrize("tier", cpu.tiers())
every_form = pytest.mark.parametrize(("kernel", "tile"), FORMS, ids=lambda pair: "x".join(map(str, pair)))

# n, oh, ow, c, oc and the risk: one output out of a padded kernel; odd maps below a tile, channels below and beyond a
# vector; several images, panels and tiles of rows; more tiles than a block.
SIZES = [(1, 1, 1, 33, 17), (1, 3, 5, 3, 17), (3, 9, 8, 17, 40), (2, 21, 31, 70, 33)]
every_size = pytest.mark.parametrize("size", SIZES, ids=str)
CHUNKS = (3, 41, 39, 17, 13)  # chunks of tiles, each with its sums


@pytest.fixture
def on_tier(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda tier: monkeypatch.setenv(cpu.ISA_VARIABLE, tier)


def pads(kernel: Two, same: bool) -> Two:
    return (kernel[0] // 2, kernel[1] // 2) if same else (0, 0)


def maps(size: tuple[int, ...], kernel: Two, same: bool, whole: bool) -> tuple[Tensor, Tensor]:
    """x and grad [n, oc, oh, ow] in channels_last; small integers where `whole`."""
    n, oh, ow, c, oc = size
    top, left = pads(kernel, same)
    shapes = (n, c, oh + kernel[0] - 1 - 2 * top, ow + kernel[1] - 1 - 2 * left), (n, oc, oh, ow)
    if whole:
        found = [numerics.integers(*s, seed=i, limit=3, density=0.7) for i, s in enumerate(shapes)]
    else:
        found = [numerics.random(*s, seed=i) for i, s in enumerate(shapes)]
    x, grad = (t.contiguous(memory_format=LAST) for t in found)
    return x, grad


def ours(x: Tensor, grad: Tensor, kernel: Two, padding: Two, tile: Two) -> Tensor:
    with numerics.poisoned_memory():
        return native.weight_gradient(grad, x, list(kernel), [1, 1], list(padding), tile)


def torchs(x: Tensor, grad: Tensor, kernel: Two, padding: Two) -> Tensor:
    weight = torch.zeros(grad.shape[1], x.shape[1], *kernel, dtype=x.dtype).contiguous(memory_format=LAST)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], list(padding), [1, 1], False, [0, 0], 1, [False, True, False]
    )[1]


def truth(x: Tensor, grad: Tensor, kernel: Two, padding: Two) -> Tensor:
    return torchs(x.double(), grad.double(), kernel, padding)


@every_tier
@pytest.mark.parametrize("size", [*SIZES, CHUNKS, (1, 1, 1, 3, 1), (2, 2, 1, 1, 3)], ids=str)
@pytest.mark.parametrize("same", [False, True])
def test_tiles_of_two_by_two_are_exact(tier: str, size: tuple, same: bool, on_tier: Callable[[str], None]) -> None:
    on_tier(tier)
    x, grad = maps(size, (3, 3), same, whole=True)
    padding = pads((3, 3), same)
    numerics.assert_exact(ours(x, grad, (3, 3), padding, (2, 2)), truth(x, grad, (3, 3), padding))


@every_tier
@every_form
@every_size
def test_forms_stay_within_their_budget(
    tier: str, kernel: Two, tile: Two, size: tuple, on_tier: Callable[[str], None]
) -> None:
    """The error of a tile's sums grows along an axis as forward: the same terms, in the mean over taps and outputs."""
    on_tier(tier)
    for same in (True, False):
        x, grad = maps(size, kernel, same, whole=False)
        padding = pads(kernel, same)
        found, expected = ours(x, grad, kernel, padding, tile), truth(x, grad, kernel, padding)
        assert found.shape == expected.shape and found.is_contiguous(memory_format=LAST)
        assert numerics.rel_l2(found, expected) <= numerics.winograd_budget(kernel, tile)[0]


@every_tier
@every_form
@pytest.mark.parametrize("size", [*SIZES, CHUNKS], ids=str)
def test_maps_of_bfloat16_are_widened(
    tier: str, kernel: Two, tile: Two, size: tuple, on_tier: Callable[[str], None]
) -> None:
    """The bits of the sums of the same maps in float32."""
    on_tier(tier)
    x, grad = (t.bfloat16() for t in maps(size, kernel, True, whole=False))
    padding = pads(kernel, True)
    expected = ours(x.float(), grad.float(), kernel, padding, tile)
    assert torch.equal(ours(x, grad, kernel, padding, tile), expected)


@every_form
def test_in_bfloat16_tiles_err_by_less_than_a_hundredth_of_what_rounding_has_cost(kernel: Two, tile: Two) -> None:
    x, grad = maps(CHUNKS, kernel, True, whole=False)
    padding = pads(kernel, True)
    exact = truth(x, grad, kernel, padding)
    x, grad = x.bfloat16(), grad.bfloat16()
    rounded = truth(x, grad, kernel, padding)
    error = numerics.rel_l2(ours(x, grad, kernel, padding, tile), rounded)
    assert 0 < error < numerics.rel_l2(rounded, exact) / 100


@every_form
@pytest.mark.parametrize("size", [SIZES[-1], CHUNKS], ids=["shared", "chunks"])
def test_any_number_of_threads_gives_the_same_bits(kernel: Two, tile: Two, size: tuple) -> None:
    x, grad = maps(size, kernel, True, whole=False)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5, 2):
            torch.set_num_threads(threads)
            results.append(ours(x, grad, kernel, pads(kernel, True), tile))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_wider_pixels_are_read_in_place_and_nothing_beside_them() -> None:
    x, grad = maps(SIZES[2], (3, 3), True, whole=True)
    expected = truth(x, grad, (3, 3), (1, 1))
    wide = [torch.full((3, 60, 9, 8), torch.nan).contiguous(memory_format=LAST) for _ in range(2)]
    wide[0][:, 11:28], wide[1][:, 5:45] = x, grad
    found = ours(wide[0][:, 11:28], wide[1][:, 5:45], (3, 3), (1, 1), (2, 2))
    numerics.assert_exact(found, expected)


@every_tier
def test_a_nan_spoils_its_channel_alone(tier: str, on_tier: Callable[[str], None]) -> None:
    on_tier(tier)
    x, grad = maps(SIZES[2], (3, 3), True, whole=True)
    expected = truth(x, grad, (3, 3), (1, 1))
    x[1, 5, 3, 3] = torch.nan
    found = ours(x, grad, (3, 3), (1, 1), (2, 2))
    assert found[:, 5].isnan().all()
    others = [c for c in range(17) if c != 5]
    assert torch.equal(found[:, others].double(), expected[:, others])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"stride": (1, 2)}, "at stride 1x2; allowed: 1x1"),
        ({"tile": (3, 3)}, "by tile 3x3 for kernel 3x3; allowed: 6x6 for 3x3, 4x4 for 3x3, 2x2 for 3x3"),
        ({"tile": (0, 2)}, "by tile 0x2 for kernel 3x3"),
        ({"threads": 0}, "on 0 threads"),
        ({"tier": "mmx"}, "this machine can run"),
    ],
)
def test_a_bad_call_is_refused_before_anything_is_written(changed: dict, said: str) -> None:
    call = {
        "tier": cpu.default_tier(),
        "dtype": "float32",
        "sizes": (1, 4, 4, 16, 16, 3, 3, 4, 4),
        "stride": (1, 1),
        "padding": (1, 1),
        "tile": (2, 2),
        "maps": ((1, 16), (1, 16)),
        "dw": 1,
        "threads": 1,
    } | changed
    with pytest.raises(ValueError, match=said):
        cpu.conv_weight_gradient(*call.values())


def spec(n: int, size: int, c: int, oc: int, kernel: Two, same: bool = True) -> ConvSpec:
    top, left = pads(kernel, same)
    return ConvSpec(n, size, size, c, oc, *kernel, padding=(top, top, left, left))


# v3's layers at stride 1 that have tiles, at 16 images, but for the last of 139x139: size, c, oc, kernel, whether
# padded, and what the rule takes by default and on request. Measured: the table of CONTRIBUTING.md.
V3 = [
    (69, 32, 32, (3, 3), False, (2, 2), (6, 6)),
    (67, 32, 64, (3, 3), True, (2, 2), (6, 6)),
    (33, 80, 192, (3, 3), False, (2, 2), (4, 4)),
    (15, 48, 64, (5, 5), True, DIRECT, (4, 4)),
    (15, 64, 96, (3, 3), True, (2, 2), (4, 4)),
    (15, 96, 96, (3, 3), True, (2, 2), (4, 4)),
    (7, 128, 128, (1, 7), True, DIRECT, (1, 4)),
    (7, 192, 192, (7, 1), True, DIRECT, (4, 1)),
    (3, 384, 384, (1, 3), True, DIRECT, DIRECT),
    (3, 384, 384, (3, 1), True, DIRECT, DIRECT),
    (3, 448, 384, (3, 3), True, DIRECT, DIRECT),
    # At 299x299.
    (8, 384, 384, (1, 3), True, (1, 4), (1, 4)),
    (8, 384, 384, (3, 1), True, (4, 1), (4, 1)),
]


def rule(spec: ConvSpec, every: bool, tier: str = "generic") -> Two:
    return cpu.gradient_tile(spec, every, tier)


@pytest.mark.parametrize("layer", V3, ids=str)
def test_the_rule(layer: tuple) -> None:
    *sizes, default, every = layer
    assert rule(spec(16, *sizes), False) == default
    assert rule(spec(16, *sizes), True) == every
    if every != DIRECT:
        assert gradient_gain(spec(16, *sizes), every) >= LEAST_GAIN


def test_the_rule_refuses() -> None:
    assert rule(spec(16, 15, 15, 96, (3, 3)), True) == DIRECT
    assert rule(spec(64, 1, 512, 512, (3, 3)), True) == DIRECT
    assert rule(spec(16, 15, 64, 96, (3, 5)), True) == DIRECT
    assert rule(ConvSpec(16, 15, 15, 64, 96, 3, 3, (2, 2)), True) == DIRECT


def test_the_rule_in_bfloat16() -> None:
    """Unasked, where a tile pays beside direct sums at the tier's rate; a tile unit needs none."""
    layer, small = (replace(spec(16, size, 96, 96, (3, 3)), dtype="bfloat16") for size in (35, 3))
    for every in (False, True):
        assert rule(layer, every, "avx512_bf16") == rule(layer, every, "avx2") == (6, 6)
        assert rule(small, every, "avx512_bf16") == DIRECT
        assert rule(layer, every, "amx_bf16") == rule(layer, every, "generic") == DIRECT


def as_in_a_step(layer: tuple) -> tuple[Tensor, Tensor]:
    """x behind a ReLU and a small gradient as batch norm hands it on: without a mean in any channel."""
    size, c, oc, kernel, same = layer[:5]
    n, height = 16, size if same else size - kernel[0] + 1
    x = numerics.random(n, c, size, size, seed=1).relu()
    grad = numerics.random(n, oc, height, height, seed=2).mul(1e-4)
    grad = grad - grad.mean((0, 2, 3), keepdim=True)
    return x.contiguous(memory_format=LAST), grad.contiguous(memory_format=LAST)


@pytest.mark.parametrize("layer", [row for row in V3 if row[5] != DIRECT], ids=str)
def test_the_default_errs_as_torchs_sum(layer: tuple) -> None:
    """Of all layers of v3 that take a tile unasked: within the budget of a gradient round float64 and round torch's."""
    kernel, same, tile = layer[3:6]
    x, grad = as_in_a_step(layer)
    found = ours(x, grad, kernel, pads(kernel, same), tile)
    numerics.assert_close_gradient(found, truth(x, grad, kernel, pads(kernel, same)))
    assert numerics.rel_l2(found, torchs(x, grad, kernel, pads(kernel, same))) <= numerics.GRAD_REL_L2


@pytest.mark.parametrize("winograd", [False, True])
def test_the_operator_takes_the_rules_tile(winograd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a map is so large that the direct sum is torch's; strides, backends and layouts that have none."""
    tiles: list[Two] = []
    original = native.weight_gradient
    monkeypatch.setattr(native, "weight_gradient", lambda *a: tiles.append(a[5]) or original(*a))

    def grad_of(x: Tensor, kernel: Two, stride: int = 1) -> list[Two]:
        tiles.clear()
        weight = numerics.random(32, 32, *kernel, seed=2).requires_grad_()
        padding = pads(kernel, True)
        ops.convolution(x, weight, stride=stride, padding=padding, winograd=winograd).square().sum().backward()
        return list(tiles)

    x = numerics.random(2, 32, 52, 50, seed=1).contiguous(memory_format=LAST)
    assert grad_of(x, (3, 3)) == ([(4, 4)] if winograd else [(2, 2)])
    assert grad_of(x, (5, 5)) == ([(4, 4)] if winograd else [])
    small = x[:, :, :20, :20].contiguous(memory_format=LAST)
    assert grad_of(small, (5, 5)) == ([(4, 4)] if winograd else [DIRECT])
    assert grad_of(small, (3, 3), stride=2) == [DIRECT]
    assert grad_of(x.contiguous(), (3, 3)) == []
    with fast.use_backend("torch"):
        assert grad_of(x, (3, 3)) == []


@pytest.mark.parametrize("winograd", [False, True])
def test_opcheck(winograd: bool) -> None:
    x, grad = maps((2, 12, 11, 16, 24), (3, 3), True, whole=False)
    weight = numerics.random(24, 16, 3, 3, seed=4)
    arguments = (grad, x, weight, [1, 1], [1, 1], winograd)
    torch.library.opcheck(torch.ops.inception_fast.conv_weight_gradient.default, arguments)
