"""Batch norm in training with its ReLU: kernels of every tier, the operator, and the layers that train with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inception_fast.kernels import cpu, reference
from torch import Tensor, nn

import inception_fast as fast
import numerics
from inception_fast import dispatch, ops
from plain_layers import Plain, randomise

EPS = 1e-3
# [n, c, h, w] and the risk: whole vectors; a last vector of one channel; fewer channels than a vector; more than one
# block, the last one short; one pixel in the last group of eight.
SHAPES = {
    "whole": (2, 64, 8, 8),
    "tail": (2, 33, 5, 7),
    "narrow": (3, 3, 16, 15),
    "blocks": (3, 24, 19, 17),
    "odd": (1, 20, 3, 19),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
each_tier = pytest.mark.parametrize("tier", cpu.tiers())


@pytest.fixture
def on_tier(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda tier: monkeypatch.setenv(cpu.ISA_VARIABLE, tier)


def arguments(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, weight, bias: a map whose mean is far from zero, channels open and shut."""
    x = numerics.random(*shape, seed=1, low=-1.0, high=3.0).to(dtype)
    weight, bias = numerics.random(shape[1], seed=2, low=0.2, high=2.0), numerics.random(shape[1], seed=3)
    weight[::3] *= -1
    return [x.contiguous(memory_format=torch.channels_last), weight, bias]


def truth(inputs: list[Tensor], grad: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """(y, mean, var) and the gradients of the inputs, in float64."""
    wide = [value.double().requires_grad_() for value in inputs]
    y, mean, var = reference.batch_norm_relu(*wide, EPS)
    y.backward(grad.double())
    return [y.detach(), mean.detach(), var.detach()], [value.grad for value in wide if value.grad is not None]


def ours(inputs: list[Tensor], grad: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [value.detach().requires_grad_() for value in inputs]
    y, mean, var = ops.batch_norm_relu(*leaves, eps=EPS)
    y.backward(grad)
    return [y.detach(), mean, var], [value.grad for value in leaves if value.grad is not None]


@each_tier
@each_shape
def test_float32_is_the_reference(tier: str, shape: tuple[int, ...], on_tier: Callable[[str], None]) -> None:
    on_tier(tier)
    inputs, grad = arguments(shape), numerics.random(*shape, seed=4).contiguous(memory_format=torch.channels_last)
    with numerics.poisoned_memory():
        results, gradients = ours(inputs, grad)
    expected, expected_gradients = truth(inputs, grad)
    for value, wanted in zip(results, expected, strict=True):
        numerics.assert_close_budget(value, wanted)
    assert results[0].is_contiguous(memory_format=torch.channels_last)
    for value, wanted in zip(gradients, expected_gradients, strict=True):
        numerics.assert_close_gradient(value, wanted)


@each_tier
@each_shape
def test_bfloat16_is_the_reference_rounded_once(
    tier: str, shape: tuple[int, ...], on_tier: Callable[[str], None]
) -> None:
    on_tier(tier)
    inputs = arguments(shape, torch.bfloat16)
    grad = numerics.random(*shape, seed=4, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    results, gradients = ours(inputs, grad)
    expected, expected_gradients = truth(inputs, grad)
    for value, wanted in zip([results[0], gradients[0]], [expected[0], expected_gradients[0]], strict=True):
        assert value.dtype is torch.bfloat16
        numerics.assert_close_budget(value, wanted)
    for value, wanted in zip([*results[1:], *gradients[1:]], [*expected[1:], *expected_gradients[1:]], strict=True):
        assert value.dtype is torch.float32 and numerics.rel_l2(value, wanted) <= numerics.GRAD_REL_L2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    inputs = arguments((3, 40, 19, 17), dtype)
    grad = numerics.random(3, 40, 19, 17, seed=4, dtype=dtype).contiguous(memory_format=torch.channels_last)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results, gradients = ours(inputs, grad)
            found.append([*results, *gradients])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_workers_take_the_callers_denormal_mode() -> None:
    """The threads are there before the caller's mode changes."""
    inputs = arguments((3, 40, 19, 17))
    inputs[0] *= 1e-39
    inputs[2].zero_()
    threads, found = torch.get_num_threads(), []
    try:
        for count, flush in ((3, False), (1, True), (3, True)):
            torch.set_num_threads(count)
            if torch.set_flush_denormal(flush) < flush:
                pytest.skip("this machine cannot flush denormals")
            found.append(ours(inputs, torch.ones_like(inputs[0]))[0])
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    assert bool(found[0][0].any()) and not found[1][0].any()
    assert all(torch.equal(a, b) for a, b in zip(found[1], found[2], strict=True))


def test_a_large_mean_does_not_cancel() -> None:
    """Values of 1000 with a deviation of 1.2, which a sum of squares in float32 would lose altogether."""
    inputs = arguments((2, 24, 16, 16))
    inputs[0] += 1000
    results, _ = ours(inputs, torch.ones_like(inputs[0]))
    _, mean, var = reference.batch_norm_relu(*(value.double() for value in inputs), EPS)
    assert numerics.rel_l2(results[1], mean) <= numerics.FP32_REL_L2
    assert numerics.rel_l2(results[2], var) <= numerics.FAR_VARIANCE_REL_L2


def test_the_gradient_of_a_branch_is_read_where_it_lies() -> None:
    """Behind a concatenation it is a slice of a wider map; its neighbours must not be read or written."""
    shape, (x, weight, bias) = (2, 20, 7, 9), arguments((2, 20, 7, 9))
    wide = numerics.random(2, 50, 7, 9, seed=4).contiguous(memory_format=torch.channels_last)
    before = wide.clone()
    grad = wide[:, 17:37]
    _, sliced = ours([x, weight, bias], grad)
    _, dense = ours([x, weight, bias], grad.contiguous(memory_format=torch.channels_last))
    assert grad.shape == shape and torch.equal(wide, before)
    assert all(torch.equal(a, b) for a, b in zip(sliced, dense, strict=True))
    _, spread = ours([x, weight, bias], torch.ones(()).expand(shape))
    _, ones = ours([x, weight, bias], torch.ones(shape))
    assert all(torch.equal(a, b) for a, b in zip(spread, ones, strict=True))


def test_what_the_kernels_do_not_take_runs_in_torch() -> None:
    inputs = arguments((2, 12, 5, 6))
    grad = numerics.random(2, 12, 5, 6, seed=4)
    native, _ = ours(inputs, grad)
    expected, expected_gradients = truth(inputs, grad)
    for x in (inputs[0].contiguous(), numerics.as_layout(inputs[0], "sliced")):
        results, gradients = ours([x, *inputs[1:]], grad)
        numerics.assert_close_budget(results[0], expected[0])
        numerics.assert_close_gradient(gradients[0], expected_gradients[0])
    with fast.use_backend("cpu"), pytest.raises(RuntimeError, match="not in channels_last"):
        ops.batch_norm_relu(inputs[0].contiguous(), *inputs[1:], eps=EPS)
    with fast.use_backend("cpu"):
        assert torch.equal(ops.batch_norm_relu(*inputs, eps=EPS)[0], native[0])


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_named_gpu_backend_never_falls_back(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    status = {**dispatch.backend_status(), backend: dispatch.Unavailable("no NVIDIA driver")}
    monkeypatch.setattr(dispatch, "backend_status", lambda: status)
    with (
        fast.use_backend(backend),
        pytest.raises(RuntimeError, match=f"'{backend}' cannot run batch_norm_relu: no NVIDIA"),
    ):
        ops.batch_norm_relu(*arguments((2, 12, 5, 6)), eps=EPS)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_operator_is_well_formed(layout: str) -> None:
    inputs = arguments((2, 12, 5, 6))
    inputs[0] = numerics.as_layout(inputs[0], layout)
    leaves = [value.detach().requires_grad_() for value in inputs]
    torch.library.opcheck(torch.ops.inception_fast.batch_norm_relu.default, (*leaves, EPS))
    x, weight, bias = inputs
    grad, statistics = numerics.random(2, 12, 5, 6, seed=4), [torch.var_mean(x, (0, 2, 3))[i] for i in (1, 0)]
    backward = torch.ops.inception_fast.batch_norm_relu_backward.default
    torch.library.opcheck(backward, (grad, x, weight, bias, *statistics, EPS))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_operator_with_its_convolution_is_well_formed(layout: str) -> None:
    x, weight, bias = arguments((2, 5, 6, 7))
    kernel = numerics.random(5, 5, 3, 3, seed=5).requires_grad_()
    x = numerics.as_layout(x, layout).requires_grad_()
    call = (x, kernel, weight.requires_grad_(), bias.requires_grad_(), [2, 1], [1, 1], EPS)
    torch.library.opcheck(torch.ops.inception_fast.conv_batch_norm_relu.default, call)


def test_the_operator_with_its_convolution_lays_a_picture_out_as_the_fake_says() -> None:
    """NumPy's [h, w, c] as a batch of one, whose stride torch's own convolution takes for another layout's."""
    x = numerics.random(1, 6, 7, 5, seed=3)[0].permute(2, 0, 1).unsqueeze(0)
    _, weight, bias = arguments((2, 5, 6, 7))
    call = (x, numerics.random(5, 5, 3, 3, seed=5), weight, bias, [1, 1], [1, 1], EPS)
    operator = torch.ops.inception_fast.conv_batch_norm_relu.default
    torch.library.opcheck(operator, call, test_utils=("test_faketensor",))
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in operator(*call)[:2])


def test_gradients_of_the_operator_with_its_convolution() -> None:
    x, weight, bias = (value.double().requires_grad_() for value in arguments((2, 3, 4, 4)))
    kernel = numerics.random(3, 3, 1, 3, seed=5).double().requires_grad_()

    def y(*values: Tensor) -> Tensor:
        return ops.conv_batch_norm_relu(*values, stride=1, padding=(0, 1), eps=EPS)[0]

    assert torch.autograd.gradcheck(y, (x, kernel, weight, bias))
    assert torch.autograd.gradgradcheck(y, (x, kernel, weight, bias))
    twice = y(y(x, kernel, weight, bias), kernel, weight, bias).square().sum()
    inputs = (x, kernel, weight, bias)
    plain = torch.autograd.grad(twice, inputs, retain_graph=True)
    for mine, expected in zip(torch.autograd.grad(twice, inputs, create_graph=True), plain, strict=True):
        torch.testing.assert_close(mine, expected)


def test_autocast_casts_what_a_convolution_reads() -> None:
    x, weight, bias = arguments((2, 8, 5, 6))
    kernel = numerics.random(8, 8, 1, 1, seed=5)
    with torch.autocast("cpu", torch.bfloat16):
        y, mean, var = ops.conv_batch_norm_relu(x, kernel, weight, bias, stride=1, padding=0, eps=EPS)
    assert y.dtype is torch.bfloat16 and mean.dtype is var.dtype is torch.float32


def test_gradients_in_float64_once_and_twice() -> None:
    inputs = [value.double().requires_grad_() for value in arguments((2, 3, 3, 4))]

    def y(*values: Tensor) -> Tensor:
        return ops.batch_norm_relu(*values, eps=EPS)[0]

    assert torch.autograd.gradcheck(y, inputs)
    assert torch.autograd.gradgradcheck(y, inputs)


def test_double_backward_of_the_native_form() -> None:
    """A gradient penalty, as in float64."""
    found = []
    for dtype in (torch.float32, torch.float64):
        x, weight, bias = (value.to(dtype).requires_grad_() for value in arguments((2, 12, 5, 6)))
        (dx,) = torch.autograd.grad(
            ops.batch_norm_relu(x, weight, bias, eps=EPS)[0].square().sum(), x, create_graph=True
        )
        dx.square().sum().backward()
        found.append([x.grad, weight.grad, bias.grad])
    for mine, expected in zip(*found, strict=True):
        assert numerics.rel_l2(mine, expected) <= numerics.GRAD_REL_L2 * 10


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda x, w, b: (x[0], w, b), ValueError, "dimensions; allowed: 4"),
        (lambda x, w, b: (x[:1, :, :1, :1], w, b), ValueError, "more than one"),
        (lambda x, w, b: (x, w[:3], b), ValueError, "weight of shape"),
        (lambda x, w, b: (x, w, b.double()), TypeError, "bias of dtype"),
        (lambda x, w, b: (x.int(), w, b), TypeError, "x of dtype"),
    ],
)
def test_impossible_calls_raise(change: Callable[..., Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ops.batch_norm_relu(*change(*arguments((2, 8, 3, 4))), eps=EPS)


@pytest.mark.parametrize("eps", [-1e-3, float("nan"), float("inf")])
def test_an_eps_that_makes_no_variance_raises(eps: float) -> None:
    x, weight, bias = arguments((2, 8, 3, 4))
    with pytest.raises(ValueError, match=f"eps {eps}; allowed: at least 0"):
        ops.batch_norm_relu(x, weight, bias, eps=eps)
    with pytest.raises(ValueError, match=f"eps {eps}; allowed: at least 0"):
        ops.conv_batch_norm_relu(x, torch.ones(8, 8, 1, 1), weight, bias, stride=1, padding=0, eps=eps)


class Net(nn.Module):
    def __init__(self, block: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.a, self.b, self.c = block(3, 24, 3, 2, 1), block(24, 20, 1), block(24, 12, (1, 3), 1, (0, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return torch.cat([self.b(y), self.c(y)], 1)


def nets() -> tuple[Net, Net, Tensor]:
    layers, plain = Net(fast.ConvBNReLU), Net(Plain)
    plain.load_state_dict(randomise(layers).state_dict())
    return layers, plain, numerics.random(4, 3, 17, 17, seed=9).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that run, by name."""
    from inception_fast.backends import batch_norm

    names: list[str] = []
    for name in ("forward", "backward"):
        kernel = getattr(batch_norm, name)
        monkeypatch.setattr(batch_norm, name, lambda *a, kernel=kernel, name=name: names.append(name) or kernel(*a))
    return names


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("compiled", [False, True])
def test_layers_train_as_torch_does(momentum: float | None, compiled: bool, native_calls: list[str]) -> None:
    layers, plain, x = nets()
    for module in [*layers.modules(), *plain.modules()]:
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    wide = copy.deepcopy(plain).double()
    narrow = copy.deepcopy(plain)
    run = torch.compile(layers, backend="aot_eager", fullgraph=True) if compiled else layers
    for _ in range(2):
        run(x).square().sum().backward()
        narrow(x).square().sum().backward()
        wide(x.double()).square().sum().backward()
    assert native_calls == ["forward"] * 3 + ["backward"] * 3 + ["forward"] * 3 + ["backward"] * 3
    for name, exact in wide.named_parameters():
        mine, theirs = layers.get_parameter(name).grad, narrow.get_parameter(name).grad
        assert mine is not None and theirs is not None and exact.grad is not None
        # Where the sums of a gradient cancel, torch's own float32 is further off than the budget: so may ours be.
        allowed = max(numerics.GRAD_REL_L2, numerics.rel_l2(theirs, exact.grad))
        assert numerics.rel_l2(mine, exact.grad) <= allowed, name
    for name, value in wide.state_dict().items():
        numerics.assert_close_budget(layers.state_dict()[name].float(), value.double(), dtype=torch.float32)


def test_layers_train_under_autocast(native_calls: list[str]) -> None:
    layers, plain, x = nets()
    with torch.autocast("cpu", torch.bfloat16):
        y = layers(x)
    assert y.dtype is torch.bfloat16 and native_calls == ["forward"] * 3
    y.float().square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(x)
    expected.float().square().sum().backward()
    for (name, mine), (_, theirs) in zip(layers.named_parameters(), plain.named_parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None and mine.grad.dtype is torch.float32
        assert numerics.rel_l2(mine.grad, theirs.grad) <= numerics.BF16_TRAINING_REL_L2, name


def test_activation_checkpointing_repeats_the_bits(native_calls: list[str]) -> None:
    from torch.utils.checkpoint import checkpoint

    layers, _, x = nets()
    twin = copy.deepcopy(layers)
    layers(x.requires_grad_()).square().sum().backward()
    first, x.grad = x.grad, None
    checkpoint(twin, x, use_reentrant=False).square().sum().backward()
    assert first is not None and torch.equal(first, x.grad)
    for mine, theirs in zip(layers.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_less_is_kept_than_by_torch() -> None:
    """What autograd keeps between forward and backward: neither a mask nor the ends of branches."""

    def kept(model: nn.Module, x: Tensor) -> int:
        seen: dict[int, int] = {}

        def note(t: Tensor) -> Tensor:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            y = model(x)
        assert y.requires_grad
        return sum(seen.values())

    layers, plain, x = nets()
    maps = 4 * 9 * 9 * 4
    assert kept(layers, x) <= kept(plain, x) - 30 * maps


def test_frozen_and_odd_batch_norms_stay_torchs(native_calls: list[str]) -> None:
    for norm in (
        nn.BatchNorm2d(8, affine=False),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.BatchNorm2d(8).eval(),
        nn.BatchNorm2d(8).double(),
    ):
        layer = fast.ConvBNReLU(8, 8, 1).to(norm.weight.dtype if norm.affine else torch.float32)
        layer.bn = norm
        x = numerics.random(2, 8, 4, 5).to(layer.conv.weight.dtype).contiguous(memory_format=torch.channels_last)
        layer(x).sum().backward()
    assert not native_calls
