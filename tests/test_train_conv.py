"""Convolutions in training by tiles, forward and for the gradient of x: kernels, rule, operator, layers."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from inception_fast.kernels import cpu
from inception_fast.kernels.cpu.winograd import DIRECT, TILES
from inception_fast.kernels.spec import ConvSpec
from torch import Tensor, nn
from torch.nn import functional as F

import inception_fast as fast
import numerics
from inception_fast import ops
from inception_fast.backends import train_conv as native
from plain_layers import Plain, randomise

LAST = torch.channels_last
FORMS = [(kernel, tile) for kernel, tiles in TILES.items() for tile in tiles]
every_tier = pytest.mark.parametrize("tier", cpu.tiers())
every_form = pytest.mark.parametrize(("kernel", "tile"), FORMS, ids=lambda pair: "x".join(map(str, pair)))

# n, h, w, c, oc and the risk: one pixel out of a padded kernel; odd maps below a tile, channels below and beyond a
# vector; several images and panels; more tiles than a thread's block, channels beyond what is packed at a time.
SIZES = [(1, 1, 1, 33, 17), (1, 3, 5, 3, 17), (3, 9, 8, 17, 40), (2, 17, 19, 70, 33)]
every_size = pytest.mark.parametrize("size", SIZES, ids=str)


@pytest.fixture
def on_tier(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda tier: monkeypatch.setenv(cpu.ISA_VARIABLE, tier)


def threads(count: int, call: Callable[[], Tensor]) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def pads(kernel: tuple[int, int], same: bool) -> tuple[int, int]:
    return (kernel[0] // 2, kernel[1] // 2) if same else (0, 0)


def operands(size: tuple[int, ...], kernel: tuple[int, int], same: bool, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and grad of y [n, oc, h, w]; small integers where `whole`."""
    n, h, w, c, oc = size
    top, left = pads(kernel, same)
    shape = (n, c, h + kernel[0] - 1 - 2 * top, w + kernel[1] - 1 - 2 * left)
    draws = [shape, (oc, c, *kernel), (n, oc, h, w)]
    if whole:
        found = [numerics.integers(*s, seed=i, limit=3, density=0.7) for i, s in enumerate(draws)]
    else:
        found = [numerics.random(*s, seed=i) for i, s in enumerate(draws)]
    x, weight, grad = (t.contiguous(memory_format=LAST) for t in found)
    return x, weight, grad


def both(x: Tensor, weight: Tensor, grad: Tensor, padding: tuple[int, int], tile: tuple[int, int]) -> list[Tensor]:
    """y and the gradient of x by a tile, whether it pays or not."""
    with pytest.MonkeyPatch.context() as patch, numerics.poisoned_memory():
        patch.setattr(cpu, "training_tile", lambda spec, every, tier: tile)
        native._chosen.cache_clear()
        calls = (native.forward(x, weight, (1, 1), padding, True), native.backward(grad, weight, (1, 1), padding, True))
    native._chosen.cache_clear()
    assert calls[0] is not None and calls[1] is not None
    return list(calls)


def truth(x: Tensor, weight: Tensor, grad: Tensor, padding: tuple[int, int]) -> list[Tensor]:
    wide = x.double().requires_grad_()
    y = F.conv2d(wide, weight.double(), None, 1, padding)
    return [y.detach(), torch.autograd.grad(y, wide, grad.double())[0]]


@every_tier
@pytest.mark.parametrize("size", [*SIZES, (1, 1, 1, 3, 1), (2, 2, 1, 1, 3)], ids=str)
@pytest.mark.parametrize("same", [False, True])
def test_tiles_of_two_by_two_are_exact(tier: str, size: tuple, same: bool, on_tier: Callable[[str], None]) -> None:
    on_tier(tier)
    padding = pads((3, 3), same)
    for memory_format in (LAST, torch.contiguous_format):
        x, weight, grad = operands(size, (3, 3), same, whole=True)
        weight = weight.contiguous(memory_format=memory_format)
        for found, expected in zip(
            both(x, weight, grad, padding, (2, 2)), truth(x, weight, grad, padding), strict=True
        ):
            numerics.assert_exact(found, expected)


@every_tier
@every_form
@every_size
def test_forms_stay_within_their_budget(
    tier: str, kernel: tuple[int, int], tile: tuple[int, int], size: tuple, on_tier: Callable[[str], None]
) -> None:
    on_tier(tier)
    norm, worst = numerics.winograd_budget(kernel, tile)
    for same in (True, False):
        padding = pads(kernel, same)
        x, weight, grad = operands(size, kernel, same, whole=False)
        for found, expected in zip(both(x, weight, grad, padding, tile), truth(x, weight, grad, padding), strict=True):
            assert found.shape == expected.shape and found.is_contiguous(memory_format=LAST)
            assert numerics.rel_l2(found, expected) <= norm and numerics.max_error(found, expected) <= worst


@every_tier
@every_form
@every_size
def test_maps_of_bfloat16_are_those_of_float32_rounded(
    tier: str, kernel: tuple[int, int], tile: tuple[int, int], size: tuple, on_tier: Callable[[str], None]
) -> None:
    """To the bit, of weights that bfloat16 does not hold."""
    on_tier(tier)
    x, weight, grad = operands(size, kernel, True, whole=False)
    x, grad = x.bfloat16(), grad.bfloat16()
    assert not torch.equal(weight.bfloat16().float(), weight)
    expected = both(x.float(), weight, grad.float(), pads(kernel, True), tile)
    for found, wide in zip(both(x, weight, grad, pads(kernel, True), tile), expected, strict=True):
        assert found.dtype == torch.bfloat16 and torch.equal(found, wide.bfloat16())


@every_form
def test_bits_depend_on_neither_threads_nor_batch(kernel: tuple[int, int], tile: tuple[int, int]) -> None:
    x, weight, grad = operands(SIZES[-1], kernel, True, whole=False)
    padding = pads(kernel, True)
    results = [threads(count, lambda: torch.cat(both(x, weight, grad, padding, tile), 1)) for count in (1, 2, 3, 5)]
    assert all(torch.equal(result, results[0]) for result in results)
    alone = both(x[1:], weight, grad[1:], padding, tile)
    assert torch.equal(torch.cat(alone, 1), results[0][1:])


@every_form
def test_tiers_with_fused_multiply_add_agree_bit_for_bit(
    kernel: tuple[int, int], tile: tuple[int, int], on_tier: Callable[[str], None]
) -> None:
    x, weight, grad = operands(SIZES[-1], kernel, True, whole=False)
    results = []
    for tier in cpu.tiers():
        if tier != "generic":
            on_tier(tier)
            results.append(torch.cat(both(x, weight, grad, pads(kernel, True), tile), 1))
    assert all(torch.equal(result, results[0]) for result in results)


def test_wider_pixels_are_read_in_place_and_nothing_beside_them() -> None:
    x, weight, grad = operands(SIZES[2], (3, 3), True, whole=True)
    wide = torch.full((3, 60, 9, 8), math.nan).contiguous(memory_format=LAST)
    wide[:, 11:28], expected = x, truth(x, weight, grad, (1, 1))[0]
    guard, block = numerics.guarded(weight)
    found, _ = both(wide[:, 11:28], guard, grad, (1, 1), (2, 2))
    numerics.assert_exact(found, expected)
    numerics.assert_guarded(block)


def test_callers_at_once_do_not_share_memory() -> None:
    cases = [operands((8, 15 + i, 16, 64, 96), (3, 3), True, whole=True) for i in range(4)]
    wrong: list[int] = []

    def work(i: int) -> None:
        x, weight, grad = cases[i]
        expected = truth(x, weight, grad, (1, 1))
        for _ in range(20):
            found = (f(a, weight, (1, 1), (1, 1), False) for f, a in ((native.forward, x), (native.backward, grad)))
            wrong.extend(i for a, b in zip(found, expected, strict=True) if a is None or not torch.equal(a.double(), b))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sizes": (0, 4, 4, 16, 16, 3, 3, 4, 4)}, "a size of 0"),
        ({"threads": 0}, "on 0 threads"),
        ({"tile": (3, 3)}, "tile 3x3 for kernel 3x3 of float32 at stride 1x1; allowed: 0x0 for bfloat16; at stride 1"),
        ({"tile": (0, 0)}, "tile 0x0 for kernel 3x3 of float32 at stride 1x1"),
        (
            {"dtype": "bfloat16", "stride": (2, 2)},
            "tile 2x2 for kernel 3x3 of bfloat16 at stride 2x2; allowed: 0x0 for",
        ),
        ({"stride": (1, 2)}, "tile 2x2 for kernel 3x3 of float32 at stride 1x2"),
        ({"stride": (0, 1)}, "a size of 0"),
        ({"dtype": "float16"}, "map of dtype float16"),
        ({"maps": ((1, 15), (1, 16))}, "pixels 15 and 16 elements apart; allowed: from 16 and 16"),
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
        "weight": 1,
        "strides": (144, 9, 3, 1),
        "threads": 1,
    } | changed
    with pytest.raises(ValueError, match=said):
        cpu.convolve_in_training(*call.values())


def spec(n: int, size: int, c: int, oc: int, kernel: tuple[int, int]) -> ConvSpec:
    top, left = kernel[0] // 2, kernel[1] // 2
    return ConvSpec(n, size, size, c, oc, *kernel, padding=(top, top, left, left))


def rule(spec: ConvSpec, every: bool, tier: str = "generic") -> tuple[int, int]:
    return cpu.training_tile(spec, every, tier)


def test_the_rule() -> None:
    """Large maps of 3x3 take a tile unasked, others on request; few channels and maps of some pixels never."""
    layer = spec(16, 15, 64, 96, (3, 3))
    assert rule(layer, False) == (2, 2) and rule(layer, True) == (4, 4)
    for kernel in ((5, 5), (1, 7), (7, 1)):
        assert rule(spec(16, 15, 64, 96, kernel), False) == DIRECT
        assert rule(spec(16, 15, 64, 96, kernel), True) == TILES[kernel][0]
    assert rule(spec(16, 3, 448, 384, (3, 3)), True) == DIRECT
    assert rule(spec(16, 15, 15, 96, (3, 3)), True) == DIRECT
    assert rule(spec(64, 1, 512, 512, (3, 3)), True) == DIRECT
    assert rule(spec(16, 15, 64, 96, (3, 5)), True) == DIRECT
    assert rule(ConvSpec(16, 15, 15, 64, 96, 3, 3, (2, 2)), True) == DIRECT


def test_the_rule_in_bfloat16() -> None:
    """Unasked, where a tile pays beside direct sums at the tier's rate; a tile unit needs none."""
    layer, small = (replace(spec(16, size, 64, 96, (3, 3)), dtype="bfloat16") for size in (35, 7))
    for every in (False, True):
        assert rule(layer, every, "avx512_bf16") == rule(layer, every, "avx2") == (6, 6)
        assert rule(small, every, "avx512_bf16") == DIRECT != rule(small, every, "avx2")
        assert rule(layer, every, "amx_bf16") == rule(layer, every, "generic") == DIRECT


# x [n, c, h, w], oc, kernel, padding: layers of v3 whose sums are long and short, and the stem's unpadded one, with the
# tiles of y and of the gradient of x on request.
LAYERS = [
    ((2, 80, 34, 33), 64, (3, 3), (0, 0), [(4, 4), (6, 6)]),
    ((4, 64, 15, 15), 96, (3, 3), (1, 1), [(4, 4), (4, 4)]),
    ((2, 48, 15, 15), 64, (5, 5), (2, 2), [(4, 4), (4, 4)]),
    ((4, 192, 17, 17), 192, (1, 7), (0, 3), [(1, 6), (1, 6)]),
    ((4, 160, 17, 17), 192, (7, 1), (3, 0), [(6, 1), (6, 1)]),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("winograd", [False, True])
def test_operator_gradients_keep_their_budgets(layer: tuple, winograd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default those of any float32 gradient, round float64 and round torch's own; on request the tile's."""
    shape, oc, kernel, padding, tiles = layer
    calls: list[tuple[int, int]] = []
    original = native._run
    monkeypatch.setattr(native, "_run", lambda x, call, *a: calls.append(call.tile) or original(x, call, *a))
    x = numerics.random(*shape, seed=1, low=0).contiguous(memory_format=LAST)
    weight = numerics.random(oc, shape[1], *kernel, seed=2)
    y_shape = F.conv2d(x, weight, None, 1, padding).shape
    grad = numerics.random(*y_shape, seed=3).contiguous(memory_format=LAST)
    results = []
    for dtype, call in (
        (torch.float32, lambda a, b: ops.convolution(a, b, stride=1, padding=padding, winograd=winograd)),
        (torch.float64, lambda a, b: F.conv2d(a, b, None, 1, padding)),
        (torch.float32, lambda a, b: F.conv2d(a, b, None, 1, padding)),
    ):
        a, b = (t.to(dtype).detach().requires_grad_() for t in (x, weight))
        y = call(a, b)
        results.append((y.detach(), *torch.autograd.grad(y, (a, b), grad.to(dtype))))
    (y, dx, dw), expected, torchs = results
    if winograd:
        norm, _ = numerics.winograd_budget(kernel, TILES[kernel][0])
        assert calls == tiles
        assert all(numerics.rel_l2(mine, wide) <= norm for mine, wide in zip((y, dx, dw), expected, strict=True))
    else:
        assert calls == ([(2, 2)] * 2 if kernel == (3, 3) else [])
        assert numerics.rel_l2(y, expected[0]) <= numerics.FP32_REL_L2 * 1.3**2
        for mine, theirs, wide in zip((dx, dw), torchs[1:], expected[1:], strict=True):
            numerics.assert_close_gradient(mine, wide)
            assert numerics.rel_l2(mine, theirs) <= numerics.GRAD_REL_L2


@pytest.mark.parametrize("winograd", [False, True])
def test_result_of_a_picture_lies_where_the_fake_says(winograd: bool) -> None:
    """NumPy's [h, w, c] as a batch of one, whose stride torch's own convolution takes for another layout's."""
    x = numerics.random(1, 16, 16, 32, seed=3)[0].permute(2, 0, 1).unsqueeze(0)
    assert x.is_contiguous(memory_format=LAST) and x.stride(0) == 32
    call = (x, numerics.random(24, 32, 3, 3, seed=4), [1, 1], [1, 1], winograd)
    torch.library.opcheck(torch.ops.inception_fast.convolution.default, call, test_utils=("test_faketensor",))
    y = ops.convolution(*call[:2], stride=1, padding=1, winograd=winograd)
    assert y.is_contiguous(memory_format=LAST)
    numerics.assert_close_gradient(y, F.conv2d(x.double(), call[1].double(), padding=1))


@pytest.mark.parametrize("winograd", [False, True])
def test_operator_checks_and_differentiates_twice(winograd: bool) -> None:
    x = numerics.random(2, 16, 12, 11, seed=3).contiguous(memory_format=LAST).requires_grad_()
    weight = numerics.random(24, 16, 3, 3, seed=4).requires_grad_()
    torch.library.opcheck(torch.ops.inception_fast.convolution.default, (x, weight, [1, 1], [1, 1], winograd))
    grad = numerics.random(2, 24, 12, 11, seed=5).contiguous(memory_format=LAST)
    arguments = (grad, x.detach(), weight.detach(), [1, 1], [1, 1], winograd)
    torch.library.opcheck(torch.ops.inception_fast.conv_input_gradient.default, arguments)
    firsts = []
    for call in (ops.convolution, lambda *a, stride, padding, **_: F.conv2d(*a, None, stride, padding)):
        y = call(x, weight, stride=1, padding=1, winograd=winograd)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        firsts.append(torch.autograd.grad(dx.square().sum(), (x, weight)))
    for mine, theirs in zip(*firsts, strict=True):
        assert numerics.rel_l2(mine, theirs) <= 4 * numerics.winograd_budget((3, 3), (4, 4))[0]


def test_other_inputs_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another dtype, layout, stride or backend, an empty batch, a kernel beyond the map: to the bit, or its error."""
    monkeypatch.setattr(native, "_run", lambda *a: pytest.fail("tiles for what they are not for"))
    x = numerics.random(4, 32, 12, 12, seed=1).contiguous(memory_format=LAST)
    weight = numerics.random(32, 32, 3, 3, seed=2).contiguous(memory_format=LAST)
    for a, stride in ((x.double(), 1), (x.bfloat16(), 1), (x.contiguous(), 1), (x, 2), (x[:0], 1)):
        w = weight.to(a.dtype)
        y = ops.convolution(a, w, stride=stride, padding=1, winograd=True)
        assert torch.equal(y, F.conv2d(a, w, None, stride, 1))
    with fast.use_backend("torch"):
        assert torch.equal(ops.convolution(x, weight, stride=1, padding=1), F.conv2d(x, weight, None, 1, 1))
    with pytest.raises(RuntimeError, match="Kernel size"):
        ops.convolution(x[:, :, :2, :2], weight, stride=1, padding=0)
    with pytest.raises(RuntimeError, match="channels"):
        ops.convolution(x[:, :16], weight, stride=1, padding=1)
    with pytest.raises(TypeError, match="winograd 'yes'; allowed: True or False"):
        ops.convolution(x, weight, stride=1, padding=1, winograd="yes")  # type: ignore[arg-type]


def net() -> nn.Module:
    """A block, a Sequential and a pair, on maps that pay; its ReLUs are far from their kinks, where gradients jump."""
    pair = nn.Sequential(Plain(48, 48, (1, 7), padding=(0, 3)), Plain(48, 32, (7, 1), padding=(3, 0)))
    run = nn.Sequential(nn.Conv2d(48, 48, 5, padding=2, bias=False), nn.BatchNorm2d(48), nn.ReLU(), nn.Identity())
    model = randomise(nn.Sequential(Plain(32, 48, 3), run, pair).to(memory_format=LAST))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 1)
            nn.init.constant_(module.bias, 6)
    return model


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    y = model.train()(x)
    loss = (y * numerics.random(*y.shape, seed=7, dtype=y.dtype, low=0)).mean()
    return loss.detach(), list(torch.autograd.grad(loss, [p for p in model.parameters() if p.dim() == 4]))


def test_layers_take_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of swapped layers beside float64: the default errs as torch's step, the option by its tiles' growth."""
    kernels: list[tuple[int, ...]] = []
    original = native._run
    monkeypatch.setattr(
        native, "_run", lambda x, call, *a: kernels.append((call.spec.kh, call.spec.kw)) or original(x, call, *a)
    )
    model = net()
    x = numerics.random(4, 32, 22, 21, seed=9).contiguous(memory_format=LAST)
    loss, grads = step(copy.deepcopy(model).double(), x.double())
    _, torchs = step(copy.deepcopy(model), x)
    cases = (False, {(3, 3)}, numerics.CANCELLING), (True, {(3, 3), (5, 5), (1, 7), (7, 1)}, 15.1)
    for winograd, taken, growth in cases:
        kernels.clear()
        swapped = fast.replace_layers(copy.deepcopy(model), winograd=winograd)
        assert len(swapped.replacement_report.left) == 0
        found, mine = step(copy.deepcopy(swapped), x)
        assert set(kernels) == taken
        assert abs(found - loss) <= growth * numerics.FP32_REL_L2 * loss
        for a, b, theirs in zip(mine, grads, torchs, strict=True):
            assert numerics.rel_l2(a, b) <= growth * numerics.rel_l2(theirs, b)
    with pytest.raises(TypeError, match="winograd 1; allowed: True or False"):
        fast.replace_layers(model, winograd=1)  # type: ignore[arg-type]


def test_autocast_takes_tiles_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step in bfloat16, on the best tier without a tile unit, is no further from float64 than torch's."""
    monkeypatch.setenv(cpu.ISA_VARIABLE, [tier for tier in cpu.tiers() if not tier.startswith("amx")][-1])
    tiles: list[tuple[int, int]] = []
    original = native._run
    monkeypatch.setattr(native, "_run", lambda x, call, *a: tiles.append(call.tile) or original(x, call, *a))
    model = net()
    x = numerics.random(4, 32, 34, 33, seed=9).contiguous(memory_format=LAST)
    loss, grads = step(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        theirs, torchs = step(copy.deepcopy(model), x)
        found, mine = step(fast.replace_layers(model), x)
    assert tiles.count((4, 4)) >= 3 or cpu.default_tier() == "generic"
    assert abs(found - loss) <= max(abs(theirs - loss), numerics.BF16_REL_L2 * loss)
    for a, b, torch_s in zip(mine, grads, torchs, strict=True):
        assert numerics.rel_l2(a, b) <= 1.1 * numerics.rel_l2(torch_s, b)


def test_compile_goes_past_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fast.replace_layers(net(), winograd=True).train()
    x = numerics.random(2, 32, 22, 21, seed=9).contiguous(memory_format=LAST)
    expected, _ = step(model, x)
    monkeypatch.setattr(native, "_run", lambda *a: pytest.fail("tiles where they have no part"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert abs(step(compiled, x)[0] - expected) <= 1e-4 * expected


def test_an_operator_in_a_compiled_graph_keeps_its_tiles() -> None:
    x = numerics.random(2, 16, 22, 21, seed=9).contiguous(memory_format=LAST).requires_grad_()
    weight = numerics.random(32, 16, 3, 3, seed=2).requires_grad_()

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return ops.convolution(x, weight, stride=1, padding=1, winograd=True).square().sum()

    expected = torch.autograd.grad(call(x, weight), (x, weight))
    found = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(x, weight), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_flops_of_the_gradient_are_those_of_the_sum() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.rand(2, 16, 12, 12).contiguous(memory_format=LAST).requires_grad_()
    weight = torch.rand(16, 16, 3, 3)
    with FlopCounterMode(display=False) as counter:
        ops.convolution(x, weight, stride=1, padding=1).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * (2 * 144 * 16 * 16 * 9)
