"""Where native steps and torch calls meet: layouts, memory, parameters and questions about sizes are those of eager."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

import numerics
from engine_nets import Function, randomised, relative
from inception_fast import optimize
from inception_fast.engine.capture import CaptureError

X = numerics.random(2, 3, 8, 8, seed=3)


def eager(module: nn.Module, *inputs: Tensor) -> Any:
    with torch.no_grad():
        return module(*inputs)


def net(function: Callable[..., object], **modules: nn.Module) -> nn.Module:
    """`function` of (module, input), whose convolution `conv` is a native step."""
    return randomised(Function(function, conv=nn.Conv2d(3, 4, 1), **modules)).eval()


def expect_as_eager(module: nn.Module, *inputs: Tensor) -> None:
    fast, wanted = optimize(module, inputs), eager(module, *inputs)
    for _ in range(2):
        found = fast(*inputs)
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        assert relative(found.double(), wanted.double()) <= numerics.NET_MAX


@torch.library.custom_op("inception_fast_tests::all_in_a_row", mutates_args=())
def all_in_a_row(x: Tensor) -> Tensor:
    """An operator of another library that takes its input for contiguous."""
    return x.view(-1).clone()


@all_in_a_row.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.numel())


VIEWS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "batch and channels as one": lambda m, x: m.conv(x).view(x.shape[0] * 2, 2, 8, 8),
    "as another tensor is": lambda m, x: m.conv(x).view_as(x.new_zeros(x.shape[0], 256)),
    "inside of an exponential": lambda m, x: torch.matrix_exp(m.conv(x) / 10),
    "made contiguous first": lambda m, x: m.conv(x).contiguous().view(-1),
    "ravel": lambda m, x: m.conv(x).ravel(),
    "of arithmetic": lambda m, x: (x * 2).view(6, 8, 8),
    "of the input": lambda m, x: x.view(6, 64) * 2,
    "as halves of numbers": lambda m, x: m.conv(x).view(torch.int16).view(torch.float32),
    "as complex numbers": lambda m, x: torch.view_as_complex(m.conv(x).view(2, 4, 8, 4, 2)).real,
    "by strides": lambda m, x: m.conv(x).as_strided((2, 4, 8), (256, 64, 1)),
    "by its own strides": lambda m, x: (lambda y: y.as_strided(y.shape, y.stride()))(m.conv(x)),
    "by another size": lambda m, x: m.conv(x).resize_(x.shape[0], 3, 8, 8) * 2,
    "inside of attention": lambda m, x: m.more(m.conv(x).flatten(2).transpose(1, 2)),
    "inside of another library": lambda m, x: all_in_a_row(m.conv(x)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_see_the_layout_of_the_capture(name: str) -> None:
    module = net(VIEWS[name], more=nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    expect_as_eager(module, X)


def test_strides_over_a_part_of_a_tensor_are_refused() -> None:
    module = net(lambda m, x: m.conv(x)[:, 1:].as_strided((2, 4), (4, 1)))
    with pytest.raises(CaptureError, match="as_strided of a part of a tensor; allowed: of a whole, dense one"):
        optimize(module, X)


FOLDED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "comparison": lambda m, x: m.conv(x) * (m.bn.running_mean > 0.2).float().view(1, -1, 1, 1),
    "index": lambda m, x: m.conv(x)[:, :, :, (torch.linspace(0, 1, 7) * 6).long()],
    "rounding": lambda m, x: F.conv2d(x, m.conv.weight.bfloat16().float()),
    "bits": lambda m, x: F.conv2d(x, (m.conv.weight.view(torch.int32) & -65536).view(torch.float32)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_parameters_alone_are_computed_in_their_own_format(name: str) -> None:
    module = net(FOLDED[name], bn=nn.BatchNorm2d(4))
    module.bn.running_mean.copy_(torch.tensor([0.1, 0.2, 0.3, 0.2]))  # 0.2 in float32 is above 0.2
    expect_as_eager(module, X)


ASKED: dict[str, tuple[Callable[[Tensor], bool], tuple[int, ...]]] = {
    "above four": (lambda x: x.shape[0] > 4, (2, 4, 5, 6, 1)),
    "even": (lambda x: x.shape[0] % 2 == 0, (2, 3, 4, 5, 1)),
    "a third": (lambda x: x.shape[0] // 3 > 0, (2, 3, 9, 1)),
}


@pytest.mark.parametrize("planned", [False, True], ids=["on demand", "planned"])
@pytest.mark.parametrize("name", ASKED)
def test_batches_that_a_module_treats_otherwise_are_captured_apart(name: str, planned: bool) -> None:
    asks, batches = ASKED[name]
    module = net(lambda m, x: m.conv(x) * 2 if asks(x) else m.conv(x))
    fast = optimize(module, X, batch_sizes=batches if planned else None)
    for batch in (*batches, *batches):
        x = numerics.random(batch, 3, 8, 8, seed=batch)
        assert relative(fast(x), eager(module, x)) <= numerics.NET_MAX


BATCH_BEHIND: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda y: y.mean((2, 3)).T * 2,
    "averaged": lambda y: y.permute(1, 2, 0, 3).mean((2, 3)),
    "pooled": lambda y: F.adaptive_avg_pool2d(y.permute(1, 2, 0, 3), 1),
    "the last image": lambda y: y.transpose(0, 1)[:, -1:].relu(),
    "the first half": lambda y: y.mean((2, 3)).T.chunk(2, 1)[0].relu(),
    "as many channels": lambda y: y[:, : y.shape[0]].relu(),
}


@pytest.mark.parametrize("name", BATCH_BEHIND)
def test_a_batch_that_is_not_the_first_size_is_free_too(name: str) -> None:
    module = randomised(Function(lambda m, x: BATCH_BEHIND[name](m.conv(x)), conv=nn.Conv2d(3, 8, 1))).eval()
    fast = optimize(module, X)
    for batch in (2, 5, 4, 1):
        x = numerics.random(batch, 3, 8, 8, seed=batch)
        found, wanted = fast(x), eager(module, x)
        assert found.shape == wanted.shape and relative(found, wanted) <= numerics.NET_MAX


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_no_part_of_a_program_follows_a_module_that_is_trained_on(backend: str) -> None:
    """Of a group norm, a linear layer over positions, and a parameter as a result, none has a native step."""
    layers = {"norm": nn.GroupNorm(2, 4), "linear": nn.Linear(8, 5), "scale": nn.BatchNorm2d(4)}
    module = net(lambda m, x: (m.linear(m.norm(m.conv(x))), m.scale.weight), **layers)
    fast, wanted = optimize(module, X, backend=backend), [y.clone() for y in eager(module, X)]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    if backend == "torch":
        with pytest.raises(RuntimeError, match="changed after it was optimised"):
            fast(X)
        return
    for found, old in zip(fast(X), wanted, strict=True):
        assert relative(found, old) <= numerics.NET_MAX
    with pytest.raises(RuntimeError, match="changed after it was optimised"):
        fast(X[:, :, :6])


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_results_lie_in_no_memory_of_the_callers(backend: str) -> None:
    module = net(lambda m, x: (m.conv(x), x.flatten(1), x[:, :2], m.bn.weight.expand(2, -1)), bn=nn.BatchNorm2d(4))
    fast, wanted = optimize(module, X, backend=backend), eager(module, X)
    for _ in range(2):
        for found, right in zip(fast(X), wanted, strict=True):
            assert relative(found, right) <= numerics.NET_MAX
            found[:1].zero_()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_autocast_of_the_callers_reaches_no_program(backend: str) -> None:
    """Neither what is captured nor what torch runs in between rounds to another format."""
    module = net(lambda self, x: self.wide(self.conv(x)), wide=nn.Conv2d(4, 4, 3, dilation=2, padding_mode="circular"))
    plain = optimize(module, X, backend=backend)
    wanted, first = plain(X), plain(X[:1])
    with torch.autocast("cpu", torch.bfloat16):
        fast = optimize(module, X, backend=backend)
        assert torch.equal(fast(X), wanted) and torch.is_autocast_enabled("cpu")
        assert torch.equal(fast(X[:1]), first) and torch.equal(plain(X), wanted)
    assert torch.equal(fast(X), wanted)


def test_a_default_device_of_the_callers_reaches_no_program() -> None:
    def numbers(m: Any, x: Tensor) -> Tensor:
        shifted = torch.cat([x[:, i : i + 1] * (i + 1) - 0.5 for i in range(3)], 1)
        return torch.cat([m.conv(shifted), m.bare(shifted).relu(), 2 - m.conv(x)], 1)

    module = net(numbers, bare=nn.Conv2d(3, 4, 1, bias=False))
    module.data_config = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    plain, wanted = optimize(module, X), eager(module, X)
    with torch.device("meta"):
        fast = optimize(module, X).to("cpu")
        assert relative(fast(X), wanted) <= numerics.NET_MAX and torch.equal(fast(pixels), plain(pixels))


def test_a_dropout_that_is_off_is_its_input_where_that_is_written() -> None:
    layers = nn.Sequential(nn.Dropout(0.1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))

    def twice(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return y + m.layers(y)

    expect_as_eager(net(twice, layers=layers), X)


HIDDEN_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda y: F.dropout(y, 0.5, False),
    "dropout of nothing": lambda y: F.dropout(y, 0.0, True),
    "einsum": lambda y: torch.einsum("nchw->ncwh", y),
    "cartesian_prod": lambda y: torch.cartesian_prod(y[0, 0, 0]),
    "unsafe_chunk": lambda y: torch.unsafe_chunk(y, 2, 1)[0],
    "as_strided": lambda y: y.as_strided((2, 4, 2, 2), (256, 64, 8, 1)),
}


HALVES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.half().mean((2, 3)).float(),
    "pool": lambda x: F.adaptive_avg_pool2d(x.half(), 1).float(),
    "by a small number": lambda x: (x.half() * 3e-8).float(),
    "by a large number": lambda x: ((x / 2000).half() * 70000).float(),
    "norm": lambda x: F.batch_norm(x.half(), torch.full((3,), 500.0), torch.zeros(3), torch.ones(3) / 2).float(),
}


@pytest.mark.parametrize("name", HALVES)
def test_halves_are_computed_in_float32(name: str) -> None:
    """As torch does inside of each call: neither a pool's sum nor a number need fit into float16."""
    function, x = HALVES[name], 500 + 100 * numerics.random(2, 3, 16, 16, seed=5)
    module = net(lambda m, x: function(x))
    found, wanted = optimize(module, x)(x), eager(module, x)
    assert relative(found, wanted) <= 2**-9


IN_PLACE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "comparison": lambda m, x: m.conv(x.sin().gt_(0)),
    "negation": lambda m, x: m.conv(x.sin().relu_().logical_not_()).sum(3),
    "by a wider map": lambda m, x: m.conv(x.sin().mul_(x.double())),
    "scattered": lambda m, x: m.conv(x.sin().masked_scatter_(x[:, :1] > 0, x.abs())),
    "by a wider sum": lambda m, x: x.bfloat16().sin().add_(0.3 * x).float(),
    "bytes past their end": lambda m, x: m.conv((x.abs() * 99).byte().bitwise_not().add_((x > 0).long() * 99).float()),
}


POWERS: dict[str, Callable[[Tensor], Tensor]] = {
    "pow_": lambda y: y.pow_(2),
    "ldexp_": lambda y: y.ldexp_(torch.tensor(1)),
}


@pytest.mark.parametrize("name", POWERS)
def test_calls_whose_name_in_place_takes_other_arguments(name: str) -> None:
    expect_as_eager(net(lambda m, x: m.conv(POWERS[name](x.sin()))), X)


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_is_written_in_place_keeps_its_dtype(name: str) -> None:
    expect_as_eager(net(IN_PLACE[name]), X)


@pytest.mark.parametrize("written", ["view", "base"])
@pytest.mark.parametrize("name", HIDDEN_VIEWS)
def test_writes_reach_views_that_no_schema_names(name: str, written: str) -> None:
    def write(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.conv(x)
        view = HIDDEN_VIEWS[name](y)
        (view if written == "view" else y).add_(1)
        return y * 2, view

    module = net(write)
    for found, wanted in zip(optimize(module, X)(X), eager(module, X), strict=True):
        assert relative(found, wanted) <= numerics.NET_MAX


CALLS: dict[str, Callable[[Any, Tensor], Any]] = {
    "clamp_min": lambda m, x: m.conv(x).clamp_min(0),
    "normalize without a floor": lambda m, x: F.normalize(m.conv(x), eps=0),
    "normalize to more channels": lambda m, x: (
        lambda y: y / y.norm(2, 1, True).clamp_min(1e-12).expand(-1, 3, -1, -1)
    )(m.conv(x)[:, :1]),
    "indices of a pool": lambda m, x: F.max_pool2d(m.conv(x), 2, return_indices=True)[1],
    "a pool undone": lambda m, x: F.max_unpool2d(*F.max_pool2d(m.conv(x), 2, return_indices=True), 2),
    "values that are positive": lambda m, x: (lambda y: y[y > 0])(m.conv(x)),
    "a slice of nothing": lambda m, x: torch.cat([m.conv(x)[:, :0], m.conv(x)], 1),
    "a part of nothing": lambda m, x: m.conv(x).split([0, 4], 1)[1],
    "zeros of the map's size": lambda m, x: m.conv(x) + torch.zeros(x.shape[0], 4, 8, 8),
    "a convolution of places": lambda m, x: m.conv(torch.linspace(-1, 1, x.shape[3]).expand(x.shape)) + m.conv(x),
    "a channel of ones": lambda m, x: torch.cat([m.conv(x), torch.ones(x.shape[0], 1, *x.shape[2:])], 1),
    "a map of nothing": lambda m, x: (F.adaptive_avg_pool2d(m.conv(x), 0).sum((2, 3)) + 1) * m.conv(x).mean((2, 3)),
    "image for image": lambda m, x: torch.vmap(lambda y: m.conv(y[None])[0] * y.sum())(x).relu(),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_without_a_native_step(name: str) -> None:
    expect_as_eager(net(CALLS[name]), X)


@pytest.mark.parametrize("images", [(0,), (1,), (0, 1)], ids=str)
def test_the_images_that_come_as_bytes_are_normalised_and_no_others(images: tuple[int, ...]) -> None:
    module = randomised(Function(lambda m, x, y: m.conv(x) - 2 * m.conv(y), conv=nn.Conv2d(3, 4, 3))).eval()
    module.data_config = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    fast = optimize(module, (X, X))
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = (torch.tensor(module.data_config[k]).view(3, 1, 1) for k in ("mean", "std"))
    given = [pixels if i in images else X for i in range(2)]
    wanted = eager(module, *((pixels / 255 - mean) / std if i in images else X for i in range(2)))
    assert relative(fast(*given), wanted) <= numerics.NET_MAX


def test_weights_that_are_stored_as_their_negatives() -> None:
    module = net(lambda m, x: m.conv(x))
    module.conv.weight = nn.Parameter(torch.complex(torch.ones(4, 3, 1, 1), module.conv.weight.detach()).conj().imag)
    assert module.conv.weight.is_neg()
    expect_as_eager(module, X)


def test_an_image_that_the_module_hands_on_is_normalised_too() -> None:
    module = net(lambda m, x: (x, m.conv(x)))
    module.data_config = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = (torch.tensor(module.data_config[k]).view(3, 1, 1) for k in ("mean", "std"))
    for found, wanted in zip(optimize(module, X)(pixels), eager(module, (pixels / 255 - mean) / std), strict=True):
        assert found.dtype == torch.float32 and relative(found, wanted) <= numerics.NET_MAX


NO_AFFINES: tuple[dict[str, Any], ...] = (
    {"mean": 0.5, "std": 0.5},
    {"mean": (0.5,) * 3, "std": (0.5,) * 2},
    {"mean": (0.5, 0.5, math.nan), "std": (0.5,) * 3},
    {"mean": (0.5,) * 3, "std": (0.5, math.inf, 0.5)},
)


@pytest.mark.parametrize("config", NO_AFFINES, ids=str)
def test_bytes_need_a_mean_and_a_deviation_for_each_channel(config: dict[str, Any]) -> None:
    module = net(lambda m, x: m.conv(x))
    module.data_config = config
    fast = optimize(module, X)
    assert relative(fast(X), eager(module, X)) <= numerics.NET_MAX
    with pytest.raises(ValueError, match=r"dtype torch\.uint8; allowed: torch\.float32"):
        fast(X.byte())


def with_a_tangent(fast: nn.Module) -> None:
    with forward_ad.dual_level():
        fast(forward_ad.make_dual(X, X))


WATCHED: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "make_fx": (lambda fast: make_fx(fast)(X), "make_fx cannot trace"),
    "vmap": (lambda fast: torch.vmap(fast)(torch.stack([X, X])), "input 0 inside of vmap"),
    "a tangent": (with_a_tangent, "input 0 has a tangent"),
    "two tensors in one": (lambda fast: fast(TwoTensor(X, X)), "input 0: a TwoTensor, whose values lie elsewhere"),
    "a nested tensor": (lambda fast: fast(torch.nested.nested_tensor([X[0], X[1]])), "a nested tensor"),
    "an example of one": (
        lambda fast: optimize(nn.ReLU(), torch.nested.nested_tensor([X[0], X[1]])),
        "a nested tensor",
    ),
    "a quantized example": (
        lambda fast: optimize(nn.ReLU(), torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)),
        "a quantized tensor",
    ),
    "optimize": (lambda fast: optimize(nn.Sequential(fast), X), "FakeTensor as input"),
}


@pytest.mark.parametrize("name", WATCHED)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_who_watches_tensors_is_told_to_take_the_original(name: str) -> None:
    watch, said = WATCHED[name]
    with pytest.raises((RuntimeError, ValueError), match=said):
        watch(optimize(net(lambda m, x: m.conv(x)), X))


def test_a_fake_mode_leaves_nothing_behind() -> None:
    fast = optimize(net(lambda m, x: m.conv(x).sigmoid()), X)
    wanted = fast(X)
    for x in (X, X[:1]):
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="FakeTensor"):
            fast(x)
    assert torch.equal(fast(X), wanted)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_what_torch_func_does_not_transform_may_call(backend: str) -> None:
    """Features of a frozen network, in the function whose gradient of something else is taken."""
    module = net(lambda m, x: m.conv(x).relu().sigmoid())
    fast, both = optimize(module, X, backend=backend), torch.cat([X, X])
    for x in (X, both):  # planned before, and inside
        wanted = eager(module, x).sum()
        found = torch.func.vmap(torch.func.grad(lambda factor, x=x: (factor * fast(x)).sum()))(torch.ones(2))
        assert relative(found, wanted.expand(2)) <= numerics.NET_MAX


def test_planning_follows_each_view_once() -> None:
    """Each swap of halves has two readers of the one before: 2^40 ways lead from the first to the last."""

    def swaps(m: Any, x: Tensor) -> Tensor:
        first = y = m.conv(x)
        for _ in range(40):
            y = torch.cat([y[:, 2:], y[:, :2]], 1)
        return y + first.relu()

    expect_as_eager(net(swaps), X)


@pytest.mark.parametrize("made", ["module", "module and example"])
def test_a_module_made_in_inference_mode(made: str) -> None:
    """Called outside of it, with gradients on too; one of its calls stays with torch, with parameters of its own."""
    with torch.inference_mode():
        norm, deconv = nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 3, 2)
        module = net(lambda m, x: m.deconv(m.norm(m.conv(x)).relu()), norm=norm, deconv=deconv)
        inside = X.clone()
    fast = optimize(module, X if made == "module" else inside)
    for x in (X, X[:1], torch.cat([X, X]), inside):
        assert relative(fast(x).double(), eager(module, x).double()) <= numerics.NET_MAX


def test_one_number_for_all_of_a_buffer() -> None:
    module = net(lambda m, x: m.conv(x) + m.offset)
    module.register_buffer("offset", torch.tensor(0.5).expand(4, 1, 1))
    expect_as_eager(module, X)
