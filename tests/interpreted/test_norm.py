"""Batch norm in training with its ReLU: the kernels, and the way to them through operators and layers, in the
interpreter, against float64.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from inception_fast.kernels import reference
from inception_fast.kernels.spec import ConvSpec
from inception_fast.kernels.triton import convolve, norms
from inception_fast.kernels.triton.configs import Config
from torch import Tensor, nn

import cancelling
import inception_fast as fast
import numerics
from inception_fast import _batch_norm, dispatch, ops
from inception_fast.backends import batch_norm_gpu
from plain_layers import Plain, randomise

from .maps import DEVICE, empty, put, run, take

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
EPS = 1e-3
# [n, c, h, w] and the risk: one part; a last tile of few rows and a last lane; two levels of merging, the last group
# and its last part short (5 tiles by groups of 2 here, of 128 otherwise).
SHAPES = {"one": (1, 32, 8, 8), "tails": (3, 33, 7, 9), "levels": (2, 4, 17, 17)}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
each_dtype = pytest.mark.parametrize("dtype", (FLOAT, HALF, BRAIN), ids=str)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the layers would find on a GPU, for the maps of this device."""
    status = {**dispatch.backend_status(), "triton": dispatch.Available("interpreted")}
    monkeypatch.setattr(dispatch, "backend_status", lambda: status)
    monkeypatch.setattr(_batch_norm, "is_native", lambda x: x.is_contiguous(memory_format=torch.channels_last))
    monkeypatch.setattr("inception_fast._conv_bn_relu._on_gpu", lambda x: True)


def arguments(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and a gradient: a mean far from zero, channels open and shut."""
    x, grad = numerics.random(*shape, seed=1, low=-1.0, high=3.0), numerics.random(*shape, seed=4)
    weight, bias = numerics.random(shape[1], seed=2, low=0.2, high=2.0), numerics.random(shape[1], seed=3)
    weight[::3] *= -1
    return x.to(dtype), weight, bias, grad.to(dtype)


def budget(y: Tensor, wanted: Tensor) -> None:
    """The interpreter cuts bfloat16 off where hardware rounds."""
    if y.dtype is BRAIN and DEVICE.type == "cpu":
        assert numerics.rel_l2(y, wanted) <= numerics.BF16_CUT_REL_L2
    else:
        numerics.assert_close_budget(y, wanted)


def truth(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    """y, mean, var, dx, dweight, dbias in float64."""
    leaves = [value.double().requires_grad_() for value in (x, weight, bias)]
    y, mean, var = reference.batch_norm_relu(*leaves, EPS)
    y.backward(grad.double())
    return [value.detach() for value in (y, mean, var)] + [leaf.grad for leaf in leaves if leaf.grad is not None]


@each_shape
@each_dtype
def test_forward_and_backward_are_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pitched memory: neighbours are neither read nor written."""
    monkeypatch.setattr(norms, "GROUP", 2)
    x, weight, bias, grad = arguments(shape, dtype)
    n, c, h, w = shape
    source, target, slope, dx = put(x, 3, 5), empty(n, c, h, w, dtype, 2, 4), put(grad, 1, 2), empty(n, c, h, w, dtype)
    launches, parts = norms.statistics(source)
    merges, both = norms.merged(parts, source.rows, moments=True)
    of = norms.Norm(weight.to(DEVICE), bias.to(DEVICE), both[0], both[1])
    dweight, dbias = (torch.full((c,), float("nan"), device=DEVICE) for _ in range(2))
    run([*launches, *merges, *norms.forward(source, target, of, EPS)])
    run(norms.backward(slope, source, of, EPS, dx, dweight, dbias))
    wanted = truth(x, weight, bias, grad)
    assert len(merges) == {64: 1, 189: 1, 578: 3}[source.rows]
    budget(take(target), wanted[0])
    for value, expected in zip(both, wanted[1:3], strict=True):
        numerics.assert_close_budget(value.cpu(), expected)
    mine = [take(dx), dweight.cpu(), dbias.cpu()]
    if dtype is FLOAT:
        for value, expected in zip(mine, wanted[3:], strict=True):
            numerics.assert_close_gradient(value, expected)
    else:
        budget(mine[0], wanted[3])
        for value, expected in zip(mine[1:], wanted[4:], strict=True):
            assert numerics.rel_l2(value, expected) <= numerics.GRAD_REL_L2


@pytest.mark.parametrize(("images", "group", "levels"), [(1, 128, 1), (100, 128, 1), (100, 16, 2)])
def test_means_are_rounded_once_a_level(images: int, group: int, levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every channel, over one tile and over 95."""
    monkeypatch.setattr(norms, "GROUP", group)
    x = numerics.random(images, 32, 11, 11, seed=images, low=-1.0, high=3.0)
    source = put(x)
    launches, parts = norms.statistics(source)
    merges, both = norms.merged(parts, source.rows, moments=True)
    run([*launches, *merges])
    exact = x.double().mean((0, 2, 3))
    worst = ((both[0].cpu() - exact) / exact).abs().max().item()
    assert parts.tiles == (95 if images == 100 else 1) and len(merges) == levels
    assert worst <= numerics.MEAN_MAX


def test_a_large_mean_does_not_cancel() -> None:
    """Values of 1000 with a deviation of 1.2, over several parts and a level of merging."""
    x = arguments((2, 8, 16, 17), FLOAT)[0] + 1000
    source = put(x)
    launches, parts = norms.statistics(source)
    merges, both = norms.merged(parts, source.rows, moments=True)
    run([*launches, *merges])
    _, mean, var = reference.batch_norm_relu(x.double(), torch.ones(8), torch.zeros(8), EPS)
    assert parts.tiles > 1 and numerics.rel_l2(both[0].cpu(), mean) <= numerics.FP32_REL_L2
    assert numerics.rel_l2(both[1].cpu(), var) <= numerics.FAR_VARIANCE_REL_L2


# kernel, stride, padding, and the map: taps on the padding; a stride; a pointwise one. 256 results a channel, so that
# means and variances of whole numbers are exact.
CONVS = {
    "3x3": ((3, 3), 1, (1, 1), (4, 16, 8, 8)),
    "1x7": ((1, 7), 1, (0, 3), (1, 20, 16, 16)),
    "stride": ((3, 3), 2, (1, 1), (4, 16, 16, 16)),
    "1x1": ((1, 1), 1, (0, 0), (16, 32, 4, 4)),
}


def statistics_of(x: Tensor, weight: Tensor, stride: int, padding: tuple[int, int], config: Config) -> Any:
    """The convolution's result, the mean and the variance that it left."""
    spec = batch_norm_gpu.conv_spec(x, weight, (stride, stride), padding)
    packed = convolve.pack([convolve.Part(weight, None, None, padding, False)], x.dtype, DEVICE)
    z = empty(spec.n, spec.oc, spec.oh, spec.ow, x.dtype)
    launches, parts = norms.conv_with_statistics("conv", spec, put(x), packed, z, config)
    merges, both = norms.merged(parts, z.rows, moments=True)
    run([*launches, *merges])
    return take(z), both.cpu(), parts.tiles


@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("dtype", (FLOAT, HALF), ids=str)
def test_statistics_in_the_epilogue_are_exact_on_integers(case: str, dtype: torch.dtype) -> None:
    kernel, stride, padding, shape = CONVS[case]
    x = numerics.integers(*shape, seed=1, dtype=dtype)
    weight = numerics.integers(40, shape[1], *kernel, seed=2, dtype=dtype, density=0.25)
    config = Config(block_m=64, block_n=32, block_k=32, split=4)  # a split is given up, for its parts have no epilogue
    z, both, tiles = statistics_of(x, weight, stride, padding, config)
    wanted = nn.functional.conv2d(x.double(), weight.double(), None, stride, padding)
    assert tiles == 4
    numerics.assert_exact(z, wanted)
    mean = wanted.mean((0, 2, 3))
    numerics.assert_exact(both[0], mean)
    numerics.assert_exact(both[1], (wanted - mean.reshape(1, -1, 1, 1)).square().mean((0, 2, 3)))


def test_statistics_are_those_of_what_is_stored() -> None:
    """float16 results near 2048 lose half a unit; rows beyond the last do not count."""
    x, weight = numerics.random(1, 16, 9, 9, seed=1, dtype=HALF) + 10, numerics.random(8, 16, 3, 3, seed=2, dtype=HALF)
    z, both, _ = statistics_of(x, weight + 1.4, 1, (0, 0), Config(block_m=32, block_n=16, block_k=16))
    var, mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    assert z.shape[2:] == (7, 7) and z.abs().max() > 1024
    numerics.assert_close_budget(both[0], mean)
    assert numerics.rel_l2(both[1], var) <= numerics.FAR_VARIANCE_REL_L2


def test_an_epilogue_with_a_residual_is_refused() -> None:
    spec = ConvSpec(1, 4, 4, 16, 16, 1, 1, residual=True)
    with pytest.raises(ValueError, match="residual True, 0 groups; statistics are of one"):
        norms.conv_with_statistics("conv", spec, None, convolve.Packed(*[torch.empty(0)] * 3, ()), None, Config())  # type: ignore[arg-type]


def nets() -> tuple[cancelling.Net, cancelling.Net, Tensor]:
    layers, plain = cancelling.Net(fast.ConvBNReLU), cancelling.Net(Plain)
    plain.load_state_dict(randomise(layers).state_dict())
    x = cancelling.images().to(DEVICE).contiguous(memory_format=torch.channels_last)
    return layers.to(DEVICE), plain, x


@pytest.mark.parametrize("momentum", [0.1, None])
def test_layers_train_as_torch_does(momentum: float | None, on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, running statistics and the count of batches after two steps, against float64. A failure says how far
    torch is off on the same device, and on the CPU.
    """
    names: list[str] = []
    for name in ("convolved", "backward"):
        kernel = getattr(batch_norm_gpu, name)
        monkeypatch.setattr(batch_norm_gpu, name, lambda *a, kernel=kernel, name=name: names.append(name) or kernel(*a))
    layers, plain, x = nets()
    for module in [*layers.modules(), *plain.modules()]:
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    wide, there = copy.deepcopy(plain).double(), copy.deepcopy(plain).to(DEVICE, memory_format=torch.channels_last)
    exact, allowed = cancelling.gradients(wide, x.double().cpu()), cancelling.budgets(wide, x.double().cpu())
    with fast.use_backend("triton"):
        found = {"ours": cancelling.gradients(layers, x)}
    assert names == (["convolved"] * 3 + ["backward"] * 3) * 2
    found |= {"torch": cancelling.gradients(there, x), "torch on the CPU": cancelling.gradients(plain, x.cpu())}
    wrong = cancelling.verdict(found, exact, allowed)
    if wrong:
        pytest.fail(wrong, pytrace=False)
    for name, value in wide.state_dict().items():
        mine, wanted = layers.state_dict()[name].float().cpu(), value.double()
        norm, worst = numerics.rel_l2(mine, wanted), numerics.max_error(mine, wanted)
        assert norm <= numerics.FP32_REL_L2 and worst <= numerics.FP32_MAX, f"{name}: {norm:.2e}, at worst {worst:.2e}"


def test_half_layers_take_statistics_in_the_epilogue(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, twice: the same bits, and near what torch does in the same dtypes."""
    calls: list[str] = []
    kernel = norms.conv_with_statistics
    monkeypatch.setattr(norms, "conv_with_statistics", lambda *a: calls.append(a[0]) or kernel(*a))
    found = []
    for _ in range(2):
        layers, plain, x = nets()
        with torch.autocast(DEVICE.type, HALF), fast.use_backend("triton"):
            y = layers(x)
        y.float().square().sum().backward()
        found.append([y.detach(), *(p.grad for p in layers.parameters())])
    assert len(calls) == 4, "two of the three layers have few products and enough channels"
    assert y.dtype is HALF and all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    exact = plain.double()
    exact(x.double().cpu()).square().sum().backward()
    for (name, mine), (_, theirs) in zip(layers.named_parameters(), exact.named_parameters(), strict=True):
        assert mine.grad is not None and mine.grad.dtype is FLOAT
        assert numerics.rel_l2(mine.grad.cpu(), theirs.grad) <= numerics.BF16_TRAINING_REL_L2, name


def test_the_cuda_backend_trains_by_the_same_kernels(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the only ones for a GPU; where Triton is missing, the error says so."""
    x, weight, bias, grad = (value.to(DEVICE) for value in arguments((2, 16, 6, 5), HALF))
    x = x.contiguous(memory_format=torch.channels_last)
    kernel = numerics.random(16, 16, 1, 3, seed=5).to(DEVICE, HALF)

    def step(backend: str) -> list[Tensor]:
        leaves = [value.detach().requires_grad_() for value in (x, kernel, weight, bias)]
        with fast.use_backend(backend):
            y = ops.conv_batch_norm_relu(*leaves, stride=1, padding=(0, 1), eps=EPS)[0]
            y.backward(grad)
        return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    status = {**dispatch.backend_status(), "cuda": dispatch.Available("emulated")}
    monkeypatch.setattr(dispatch, "backend_status", lambda: status)
    by_triton, by_cuda = step("triton"), step("cuda")
    assert len(by_cuda) == 5 and all(torch.equal(a, b) for a, b in zip(by_triton, by_cuda, strict=True))
    monkeypatch.setattr(batch_norm_gpu, "convolved", lambda *a: pytest.fail("taken") if a else None)
    with pytest.raises(pytest.fail.Exception, match="taken"):
        step("cuda")
    status["triton"] = dispatch.Unavailable("triton is not installed")
    with pytest.raises(RuntimeError, match="'cuda' cannot run conv_batch_norm_relu: triton is not installed"):
        step("cuda")


def test_frozen_statistics_run_the_fused_operation(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, _, x = nets()
    layers.eval()
    before = copy.deepcopy(layers.state_dict())
    monkeypatch.setattr(batch_norm_gpu, "convolved", lambda *a: pytest.fail("frozen statistics were computed"))
    layers(x).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())


def test_the_operator_names_what_is_wrong() -> None:
    x, kernel, weight = torch.zeros(2, 16, 4, 4), torch.zeros(8, 16, 3, 3), torch.ones(8)
    for change, error, words in (
        ({"kernel": kernel[:, :8]}, ValueError, "kernel of shape .*allowed: .oc, 16, kh, kw."),
        (
            {"kernel": kernel.double()},
            TypeError,
            "kernel of dtype torch.float64; allowed with x of torch.float32: torch.float32",
        ),
        ({"stride": (0, 1)}, ValueError, "stride .0, 1."),
        ({"weight": weight[:3]}, ValueError, "weight of shape"),
    ):
        given = {"kernel": kernel, "weight": weight, "bias": weight, "stride": 1, "padding": 0, "eps": EPS} | change
        with pytest.raises(error, match=words):
            ops.conv_batch_norm_relu(x, **given)
