"""bfloat16 convolutions in training by direct sums, and their gradients of x: kernels, rule, operator, layers."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable

import pytest
import torch
from inception_fast.kernels import cpu
from inception_fast.kernels.spec import ConvSpec
from torch import Tensor, nn
from torch.nn import functional as F

import inception_fast as fast
import numerics
from inception_fast import ops
from inception_fast.backends import train_conv as native
from plain_layers import Plain, randomise

LAST = torch.channels_last
TIERS = (*cpu.tiers(), *cpu.EMULATED)

# x [n, c, h, w], oc, kernel, stride, padding and the risk: one channel more than pairs, columns beyond a vector; taps
# of one row that are neighbours; padding that whole tiles lie on; channels beyond what is packed at a time; more than a
# chunk of K; a stride that leaves rows out; padding as wide as the kernel; few pixels, shared out by panels; one pixel;
# an image.
CASES = {
    "odd": ((1, 17, 5, 6), 33, (3, 3), (1, 1), (1, 1)),
    "row": ((3, 24, 7, 9), 40, (1, 7), (1, 1), (0, 3)),
    "column": ((3, 24, 9, 7), 40, (7, 1), (1, 1), (3, 0)),
    "long": ((2, 150, 4, 5), 20, (1, 1), (1, 1), (0, 0)),
    "chunks": ((1, 203, 6, 6), 17, (3, 2), (1, 1), (0, 1)),
    "stride": ((2, 35, 11, 10), 65, (3, 3), (2, 2), (0, 1)),
    "uneven": ((2, 20, 9, 11), 12, (2, 3), (1, 3), (1, 2)),
    "many": ((16, 130, 3, 3), 100, (1, 3), (1, 1), (0, 1)),
    "pixel": ((1, 16, 1, 1), 3, (1, 1), (1, 1), (0, 0)),
    "image": ((2, 3, 13, 11), 20, (3, 3), (2, 2), (0, 0)),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_tier = pytest.mark.parametrize("tier", TIERS)


@pytest.fixture
def on_tier(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda tier: monkeypatch.setenv(cpu.ISA_VARIABLE, tier)


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every convolution takes the direct sum, whether it pays or not, but where a test sets the rule again."""
    native._chosen.cache_clear()
    monkeypatch.setattr(cpu, "trains_directly", lambda spec, tier: True)
    monkeypatch.setattr(cpu, "training_tile", lambda spec, every, tier: cpu.DIRECT)
    yield
    native._chosen.cache_clear()


def operands(case: tuple, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
    """bfloat16 x and grad, float32 weight; small integers where `whole`."""
    shape, oc, kernel, stride, padding = case
    y_shape = F.conv2d(torch.zeros(shape), torch.zeros(oc, shape[1], *kernel), None, stride, padding).shape
    draws = [shape, (oc, shape[1], *kernel), tuple(y_shape)]
    if whole:
        # Sums of up to 256 stay whole in bfloat16: few of the operands are not zero.
        limits, density = (2, 1, 2), 0.35 if y_shape.numel() > 3 else 1.0
        found = [numerics.integers(*s, seed=i, limit=limits[i], density=density) for i, s in enumerate(draws)]
    else:
        found = [numerics.random(*s, seed=i) for i, s in enumerate(draws)]
    x, weight, grad = (t.contiguous(memory_format=LAST) for t in found)
    return x.bfloat16(), weight, grad.bfloat16()


def ours(case: tuple, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """y and, at stride 1, the gradient of x."""
    *_, stride, padding = case
    with numerics.poisoned_memory():
        found = [native.forward(x, weight, stride, padding, False)]
        if stride == (1, 1):
            found.append(native.backward(grad, weight, stride, padding, False))
    assert all(t is not None and t.dtype is torch.bfloat16 and t.is_contiguous(memory_format=LAST) for t in found)
    return found


def truth(case: tuple, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """The same in float64, the weight rounded to bfloat16."""
    *_, stride, padding = case
    wide = x.double().requires_grad_()
    y = F.conv2d(wide, weight.bfloat16().double(), None, stride, padding)
    (dx,) = torch.autograd.grad(y, wide, grad.double())
    return [y.detach(), dx] if stride == (1, 1) else [y.detach()]


@each_tier
@each_case
@pytest.mark.parametrize("memory_format", [LAST, torch.contiguous_format], ids=["channels_last", "contiguous"])
def test_integers_are_exact(
    tier: str, case: tuple, memory_format: torch.memory_format, on_tier: Callable[[str], None]
) -> None:
    on_tier(tier)
    x, weight, grad = operands(case, whole=True)
    expected = truth(case, x, weight, grad)
    assert max(float(t.abs().max()) for t in expected) <= 256
    for found, wanted in zip(
        ours(case, x, weight.contiguous(memory_format=memory_format), grad), expected, strict=True
    ):
        numerics.assert_exact(found, wanted)


@each_tier
@each_case
def test_random_stays_in_the_budget_of_one_rounding(tier: str, case: tuple, on_tier: Callable[[str], None]) -> None:
    on_tier(tier)
    x, weight, grad = operands(case, whole=False)
    for found, wanted in zip(ours(case, x, weight, grad), truth(case, x, weight, grad), strict=True):
        if found.numel() > 100:
            numerics.assert_close_budget(found, wanted)


@each_tier
def test_weights_are_rounded_to_nearest_even(tier: str, on_tier: Callable[[str], None]) -> None:
    """Halfway between two bfloat16 values, just above and just below it, in both orders of packing."""
    on_tier(tier)
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF, 0x7F7FFFFF, 0x00800000], dtype=torch.int32)
    weight = bits.view(torch.float32).repeat(48)[: 16 * 17].reshape(16, 17, 1, 1).clone()
    x, grad = (torch.zeros(17, c, 1, 1, dtype=torch.bfloat16) for c in (17, 16))
    x[range(17), range(17)] = 1
    grad[range(16), range(16)] = 1
    case = ((17, 17, 1, 1), 16, (1, 1), (1, 1), (0, 0))
    y, dx = ours(case, x, weight, grad)
    narrow = weight.bfloat16()[:, :, 0, 0]
    narrow = torch.where(narrow.isinf(), narrow.new_tensor(math.inf), narrow)
    finite = narrow.isfinite().all(1)  # an infinity times the other pixels' zeros is none of this test's
    assert torch.equal(y[:, finite, 0, 0].T, narrow[finite])
    columns = narrow.isfinite().all(0)
    assert torch.equal(dx[:16, columns, 0, 0], narrow[:, columns])


@each_case
def test_bits_depend_on_neither_threads_nor_batch(case: tuple) -> None:
    x, weight, grad = operands(case, whole=False)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(ours(case, x, weight, grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
    alone = ours(case, x[-1:], weight, grad[-1:])
    assert all(torch.equal(a, b[-1:]) for a, b in zip(alone, results[0], strict=True))


def test_wider_pixels_are_read_in_place_and_nothing_beside_them() -> None:
    case = CASES["row"]
    x, weight, grad = operands(case, whole=True)
    expected = truth(case, x, weight, grad)
    wide_x, wide_grad = (
        torch.full((t.shape[0], t.shape[1] + 31, *t.shape[2:]), math.nan, dtype=t.dtype).contiguous(memory_format=LAST)
        for t in (x, grad)
    )
    for wide, t in ((wide_x, x), (wide_grad, grad)):
        wide[:, 11 : 11 + t.shape[1]] = t
    guard, block = numerics.guarded(weight)
    found = ours(case, wide_x[:, 11 : 11 + x.shape[1]], guard, wide_grad[:, 11 : 11 + grad.shape[1]])
    for mine, wanted in zip(found, expected, strict=True):
        numerics.assert_exact(mine, wanted)
    numerics.assert_guarded(block)


@each_tier
def test_padding_adds_nothing_and_a_nan_spoils_what_reads_it_alone(tier: str, on_tier: Callable[[str], None]) -> None:
    on_tier(tier)
    case = CASES["odd"]
    x, weight, grad = operands(case, whole=True)
    expected = truth(case, x, weight, grad)[0]
    x[0, 3, 0, 0] = math.nan
    y = ours(case, x, weight, grad)[0]
    touched = torch.zeros_like(expected, dtype=torch.bool)
    touched[0, :, :2, :2] = True
    assert torch.equal(y.isnan(), touched) and torch.equal(y[~touched].double(), expected[~touched])


def test_callers_at_once_do_not_share_memory() -> None:
    cases = [((8, 64, 7 + i, 8), 96, (1, 3), (1, 1), (0, 1)) for i in range(4)]
    wrong: list[int] = []

    def work(i: int) -> None:
        x, weight, grad = operands(cases[i], whole=True)
        expected = truth(cases[i], x, weight, grad)
        for _ in range(10):
            found = (
                native.forward(x, weight, (1, 1), (0, 1), False),
                native.backward(grad, weight, (1, 1), (0, 1), False),
            )
            wrong.extend(i for a, b in zip(found, expected, strict=True) if a is None or not torch.equal(a.double(), b))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def spec(n: int, size: int, c: int, oc: int, kernel: tuple[int, int], stride: int = 1) -> ConvSpec:
    top, left = (kernel[0] // 2, kernel[1] // 2) if stride == 1 else (0, 0)
    return ConvSpec(n, size, size, c, oc, *kernel, (stride, stride), (top, top, left, left), dtype="bfloat16")


def test_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    from inception_fast.kernels.cpu.direct import trains_directly

    taken = [
        spec(16, 7, 768, 192, (1, 1)),
        spec(16, 3, 384, 384, (1, 3)),
        spec(16, 3, 384, 384, (3, 1)),
        spec(16, 3, 2048, 320, (1, 1)),
        spec(16, 15, 288, 384, (3, 3), stride=2),
    ]
    left = [
        spec(16, 15, 288, 64, (1, 1)),
        spec(16, 7, 192, 192, (1, 7)),
        spec(16, 3, 448, 384, (3, 3)),
        spec(16, 67, 32, 64, (3, 3)),
        spec(16, 139, 3, 32, (3, 3), stride=2),
        spec(16, 7, 768, 12, (1, 1)),
    ]
    assert all(trains_directly(s, "avx512_bf16") for s in taken)
    assert not any(trains_directly(s, "avx512_bf16") for s in left)
    *wide, image, narrow = left
    assert all(trains_directly(s, tier) for s in [*taken, *wide] for tier in ("avx2", "avx512"))
    assert all(trains_directly(s, "avx2") and not trains_directly(s, "avx512") for s in (image, narrow))
    others = set(TIERS) - {"avx2", "avx512", "avx512_bf16"}
    assert not any(trains_directly(s, tier) for s in taken for tier in others)


def test_what_is_not_for_them_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 weights, another layout or dtype, an empty batch, a backend by name, a gradient at stride 2."""
    monkeypatch.setattr(native, "_run", lambda *a: pytest.fail("kernels for what they are not for"))
    x, weight, grad = operands(CASES["odd"], whole=False)
    for a, w in ((x, weight.bfloat16()), (x.contiguous(), weight), (x[:0], weight), (x.half(), weight)):
        y = ops.convolution(a, w, stride=1, padding=1)
        assert torch.equal(y, F.conv2d(a, w.to(a.dtype), None, 1, 1))
    with fast.use_backend("torch"):
        assert torch.equal(ops.convolution(x, weight, stride=1, padding=1), F.conv2d(x, weight.bfloat16(), None, 1, 1))
    assert native.backward(grad, weight, (2, 2), (1, 1), False) is None


@pytest.mark.parametrize("name", ["odd", "row", "stride", "many"])
def test_operator_gradients_keep_their_budgets(name: str) -> None:
    case = CASES[name]
    *_, stride, padding = case
    x, weight, grad = operands(case, whole=False)
    a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = ops.convolution(a, w, stride=stride, padding=padding)
    dx, dw = torch.autograd.grad(y, (a, w), grad)
    wide_x, wide_w = x.double().requires_grad_(), weight.bfloat16().double().requires_grad_()
    wide_y = F.conv2d(wide_x, wide_w, None, stride, padding)
    wide_dx, wide_dw = torch.autograd.grad(wide_y, (wide_x, wide_w), grad.double())
    numerics.assert_close_budget(y.detach(), wide_y.detach())
    numerics.assert_close_budget(dx, wide_dx)
    assert dw.dtype is torch.float32 and dw.stride() == weight.stride()
    numerics.assert_close_gradient(dw, wide_dw)


def test_operator_checks_and_differentiates_twice() -> None:
    x = numerics.random(2, 16, 6, 5, seed=3, dtype=torch.bfloat16).contiguous(memory_format=LAST).requires_grad_()
    weight = numerics.random(24, 16, 1, 1, seed=4).requires_grad_()
    # Its comparison with a traced backward is left out: the gradient of a sum is one number, expanded, which eager mode
    # leaves to torch and a traced graph does not, and torch rounds the weight's gradient to bfloat16.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    call = (x, weight, [1, 1], [0, 0])
    torch.library.opcheck(torch.ops.inception_fast.convolution.default, call, test_utils=checks)
    grad = numerics.random(2, 24, 6, 5, seed=5, dtype=torch.bfloat16).contiguous(memory_format=LAST)
    arguments = (grad, x.detach(), weight.detach(), [1, 1], [0, 0])
    torch.library.opcheck(torch.ops.inception_fast.conv_input_gradient.default, arguments)
    torch.library.opcheck(torch.ops.inception_fast.conv_weight_gradient.default, arguments)
    y = ops.convolution(x, weight, stride=1, padding=0)
    (dx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    found = torch.autograd.grad(dx.float().square().sum(), (x, weight))
    wide_x, wide_w = x.detach().double().requires_grad_(), weight.detach().bfloat16().double().requires_grad_()
    (wide_dx,) = torch.autograd.grad(F.conv2d(wide_x, wide_w).square().sum(), wide_x, create_graph=True)
    for mine, wanted in zip(found, torch.autograd.grad(wide_dx.square().sum(), (wide_x, wide_w)), strict=True):
        assert numerics.rel_l2(mine, wanted) <= numerics.BF16_TRAINING_REL_L2


@pytest.mark.parametrize("memory_format", [LAST, torch.contiguous_format], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_weight_gradient_is_laid_out_as_its_weight(kernel: int, memory_format: torch.memory_format) -> None:
    x = numerics.random(2, 16, 6, 5, seed=1, dtype=torch.bfloat16).contiguous(memory_format=LAST)
    grad = numerics.random(2, 24, 6, 5, seed=2, dtype=torch.bfloat16).contiguous(memory_format=LAST)
    for weight in (
        torch.empty(24, 16, kernel, kernel, memory_format=memory_format),
        torch.empty(16, 24, kernel, kernel).transpose(0, 1),
    ):
        pad = [kernel // 2] * 2
        dw = torch.ops.inception_fast.conv_weight_gradient(grad, x, weight, [1, 1], pad)
        assert dw.stride() == torch.empty_like(weight).stride()
        expected = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), 1, pad)
        numerics.assert_close_gradient(dw, expected)


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    with torch.autocast("cpu", torch.bfloat16):
        y = model.train()(x)
    loss = (y.float() * numerics.random(*y.shape, seed=7, low=0)).mean()
    return loss.detach(), list(torch.autograd.grad(loss, [p for p in model.parameters() if p.dim() == 4]))


def test_layers_take_them_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of swapped layers beside float64, not worse than torch's own under autocast; compiled, torch's kernels."""
    taken: list[tuple[int, ...]] = []
    original = native._run
    monkeypatch.setattr(
        native, "_run", lambda x, call, *a: taken.append((call.spec.kh, *call.spec.stride)) or original(x, call, *a)
    )
    model = randomise(
        nn.Sequential(Plain(32, 48, 3, stride=2), Plain(48, 48, 1), Plain(48, 32, (1, 3), padding=(0, 1))).to(
            memory_format=LAST
        )
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 1)
            nn.init.constant_(module.bias, 6)
    x = numerics.random(4, 32, 11, 12, seed=9).contiguous(memory_format=LAST)
    wide = copy.deepcopy(model).double()
    y = wide.train()(x.double())
    loss = (y * numerics.random(*y.shape, seed=7, low=0).double()).mean()
    grads = torch.autograd.grad(loss, [p for p in wide.parameters() if p.dim() == 4])
    _, torchs = step(copy.deepcopy(model), x)
    swapped = fast.replace_layers(copy.deepcopy(model))
    found, mine = step(copy.deepcopy(swapped), x)
    assert sorted(taken) == [(1, 1, 1)] * 4 + [(3, 2, 2)]
    assert abs(found - loss) <= numerics.BF16_TRAINING_REL_L2 * loss
    for a, b, theirs in zip(mine, grads, torchs, strict=True):
        assert numerics.rel_l2(a, b) <= numerics.CANCELLING * numerics.rel_l2(theirs, b)
    taken.clear()
    compiled = torch.compile(copy.deepcopy(swapped), fullgraph=True, backend="aot_eager")
    assert abs(step(compiled, x)[0] - found) <= numerics.BF16_TRAINING_REL_L2 * found and taken == []
