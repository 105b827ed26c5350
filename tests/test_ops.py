"""The fused operations: equal to the float64 truth on every backend, strict about their input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from inception_fast.kernels import reference
from torch import Tensor

import numerics
from inception_fast import ops
from op_calls import CONVS, conv_arguments, pair_arguments, pool_arguments, wide

BACKENDS = ("cpu", "torch", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# The truth as a backend only hands over to reference.py and rounds: one dtype with rounding, one without.
COMBINATIONS = [("cpu", torch.float32), ("cpu", torch.bfloat16), *(("torch", dtype) for dtype in DTYPES)]
COMBINATIONS += [("reference", torch.bfloat16), ("reference", torch.float64)]


def layouts(backend: str) -> tuple[str, ...]:
    """The native kernels read strides themselves; the others leave that to torch."""
    return numerics.LAYOUTS if backend == "cpu" else ("contiguous", "channels_last")


def between(backend: str, dtype: torch.dtype) -> int:
    """How many roundings an intermediate brings: the native kernels keep it in x's dtype.

    Its errors count double: the shift and the ReLU behind may take away half of the signal's energy, not of theirs.
    """
    return 3 if backend == "cpu" and dtype is torch.bfloat16 else 1


each_backend_and_dtype = pytest.mark.parametrize(("backend", "dtype"), COMBINATIONS)


@each_backend_and_dtype
@pytest.mark.parametrize("case", CONVS)
def test_conv_equals_the_truth(case: str, backend: str, dtype: torch.dtype) -> None:
    arguments, options = conv_arguments(case, dtype)
    expected = reference.conv(*wide(arguments), **options)
    for layout in layouts(backend):
        x = numerics.as_layout(arguments[0], layout)
        with numerics.poisoned_memory():
            y = ops.conv_bn_relu(x, *arguments[1:], **options, backend=backend)
        assert y.dtype is dtype
        numerics.assert_close_budget(y, expected)


@each_backend_and_dtype
@pytest.mark.parametrize("relu", [True, False])
def test_residual_is_added_before_the_relu(relu: bool, backend: str, dtype: torch.dtype) -> None:
    arguments, options = conv_arguments("channels_equal_the_map", dtype)
    residual = numerics.random(2, 8, 8, 8, seed=9, dtype=dtype, low=-30, high=30)
    options |= {"relu": relu, "residual_scale": 0.17}
    expected = reference.conv(*wide(arguments), **options, residual=residual.double())
    assert (expected < 0).any() != relu
    for layout in layouts(backend):
        y = ops.conv_bn_relu(*arguments, **options, residual=numerics.as_layout(residual, layout), backend=backend)
        numerics.assert_close_budget(y, expected)


@pytest.mark.parametrize("layout", numerics.LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CONVS)
def test_whole_numbers_are_exact(case: str, backend: str, layout: str) -> None:
    """|x| <= 8, |w| <= 4 and K <= 200: every partial sum is below 2^24; scale is a power of two, shift whole."""
    c, oc, (h, w), kernel, stride, padding = CONVS[case]
    x, weight = numerics.integers(3, c, h, w, limit=8), numerics.integers(oc, c, *kernel, seed=1, limit=4)
    scale, shift = numerics.powers_of_two(oc, seed=2), numerics.integers(oc, seed=3, limit=9)
    options: dict[str, Any] = {"stride": stride, "padding": padding}
    y = ops.conv_bn_relu(numerics.as_layout(x, layout), weight, scale, shift, **options, backend=backend)
    numerics.assert_exact(y, reference.conv(x.double(), weight, scale, shift, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["chain", "split"])
def test_ternary_pairs_are_exact_on_torch(kind: str, dtype: torch.dtype) -> None:
    """Ternary x and weights of density 0.5 give whole numbers below 256, which all three dtypes hold."""
    x = numerics.integers(2, 8, 6, 9, dtype=dtype, density=0.5)
    w1 = numerics.integers(12, 8, 1, 7, seed=1, dtype=dtype, density=0.5)
    w2 = numerics.integers(10, 12 if kind == "chain" else 8, 7, 1, seed=2, dtype=dtype, density=0.5)
    one, zero = torch.ones(12), torch.zeros(12)
    arguments = (x, w1, one, zero, w2, one[:10], zero[:10])
    expected = reference.pair(*wide(list(arguments)), kind=kind)
    assert expected.max() < 256
    numerics.assert_exact(PAIRS[kind](*arguments, backend="torch"), expected)


PAIRS: dict[str, Callable[..., Tensor]] = {"chain": ops.asymmetric_pair, "split": ops.parallel_split}


@each_backend_and_dtype
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_equal_the_truth(kind: str, turned: bool, backend: str, dtype: torch.dtype) -> None:
    arguments = pair_arguments(kind, dtype)
    if turned:
        arguments[1], arguments[4] = arguments[1].transpose(2, 3), arguments[4].transpose(2, 3)
    expected = reference.pair(*wide(arguments), kind=kind)
    for layout in layouts(backend):
        x = numerics.as_layout(arguments[0], layout)
        with numerics.poisoned_memory():
            y = PAIRS[kind](x, *arguments[1:], backend=backend)
        numerics.assert_close_budget(y, expected, roundings=between(backend, dtype))


@each_backend_and_dtype
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("oc", [6, 20])
def test_pool_project_equals_the_truth(oc: int, counted: bool, stride: int, backend: str, dtype: torch.dtype) -> None:
    """6 channels of 8: convolution first; 20 of 8, or stride 2: pool first."""
    arguments = pool_arguments(dtype, oc)
    expected = reference.pool_project(*wide(arguments), stride=(stride, stride), count_include_pad=counted)
    for layout in layouts(backend):
        x = numerics.as_layout(arguments[0], layout)
        y = ops.pool_project(x, *arguments[1:], stride=stride, count_include_pad=counted, backend=backend)
        numerics.assert_close_budget(y, expected, roundings=between(backend, dtype))


HALF_CALLS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor], dict[str, Any]]] = {
    "conv": (ops.conv_bn_relu, reference.conv, *conv_arguments("channels_equal_the_map", torch.float16)),
    "tiny": (ops.conv_bn_relu, reference.conv, *conv_arguments("one_pixel", torch.float16)),
    "chain": (ops.asymmetric_pair, reference.pair, pair_arguments("chain", torch.float16), {}),
    "split": (ops.parallel_split, partial(reference.pair, kind="split"), pair_arguments("split", torch.float16), {}),
    "pool": (ops.pool_project, reference.pool_project, pool_arguments(torch.float16), {}),
}


@pytest.mark.parametrize("name", HALF_CALLS)
def test_float16_has_the_same_bits_in_any_batch_and_for_any_threads(name: str) -> None:
    """Of torch's convolutions, the library path, neither is so."""
    call, truth, (x, *rest), options = HALF_CALLS[name]
    threads = torch.get_num_threads()
    for layout in ("contiguous", "channels_last"):
        x = numerics.as_layout(torch.cat((x, x.flip(0), -x))[:5], layout)
        y = call(x, *rest, **options)
        assert y.dtype is torch.float16 and y.stride() == call(x, *rest, **options, backend="torch").stride()
        numerics.assert_close_budget(y, truth(*wide([x, *rest]), **options))
        try:
            torch.set_num_threads(3)
            assert torch.equal(call(x, *rest, **options), y)
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(call(x[i : i + 1], *rest, **options), y[i : i + 1]) for i in range(5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_outside_the_tensors_is_read_or_written(backend: str) -> None:
    """Margin 61: the tensors start off every alignment a vector load may hope for."""
    arguments, options = conv_arguments("wide_1x7")
    for layout in ("contiguous", "channels_last"):
        x, block = numerics.guarded(numerics.as_layout(arguments[0], layout), 61)
        others = [numerics.guarded(argument, 61)[0] for argument in arguments[1:]]
        y = ops.conv_bn_relu(x, *others, **options, backend=backend)
        numerics.assert_guarded(block, 61)
        numerics.assert_close_budget(y, reference.conv(*wide(arguments), **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CONVS)
def test_result_has_the_layout_of_the_input(case: str, backend: str) -> None:
    arguments, options = conv_arguments(case)
    for layout in numerics.LAYOUTS:
        x = numerics.as_layout(arguments[0], layout)
        y = ops.conv_bn_relu(x, *arguments[1:], **options, backend=backend)
        nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        memory_format = torch.channels_last if nhwc else torch.contiguous_format
        assert y.stride() == torch.empty(y.shape, memory_format=memory_format).stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_passes_through_the_relu(backend: str) -> None:
    """As torch.relu does: a network that overflowed must not look healthy."""
    arguments, options = conv_arguments("pointwise")
    arguments[0][0, 0, 2, 3] = float("nan")
    y = ops.conv_bn_relu(*arguments, **options, backend=backend)
    assert y[0, :, 2, 3].isnan().all() and int(y.isnan().sum()) == y.shape[1]


def changed(place: int, value: Any) -> Callable[[list[Any], dict[str, Any]], None]:
    return lambda arguments, options: arguments.__setitem__(place, value(arguments[place]))


def option(name: str, value: Any) -> Callable[[list[Any], dict[str, Any]], None]:
    return lambda arguments, options: options.__setitem__(name, value)


def quantized(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)


# name: (what is done to a good call, error, what its message must name: seen, allowed)
BAD_CONVS: dict[str, tuple[Any, type[Exception], tuple[str, str]]] = {
    "rank 3": (changed(0, lambda x: x[0]), ValueError, ("[16, 9, 9]", "[n, c, h, w]")),
    "empty batch": (changed(0, lambda x: x[:0]), ValueError, ("[0, 16, 9, 9]", "n >= 1")),
    "empty map": (changed(0, lambda x: x[:, :, :0]), ValueError, ("[2, 16, 0, 9]", ">= 1")),
    "channels": (changed(0, lambda x: x[:, :5]), ValueError, ("5 input channels", "16")),
    "integer x": (changed(0, Tensor.int), TypeError, ("torch.int32", "torch.float32")),
    "no tensor": (changed(0, Tensor.numpy), TypeError, ("ndarray", "torch.Tensor")),
    "sparse": (changed(0, Tensor.to_sparse), ValueError, ("x is of layout torch.sparse_coo", "torch.strided")),
    "sparse in part": (
        changed(0, lambda x: x.to_sparse(2)),
        ValueError,
        ("x is of layout torch.sparse_coo", "strided"),
    ),
    "sparse weight": (
        changed(1, lambda w: w[0, 0].to_sparse_csr()),
        ValueError,
        ("weight is of layout", "torch.strided"),
    ),
    "of oneDNN": (changed(0, Tensor.to_mkldnn), ValueError, ("x is of layout torch._mkldnn", "torch.strided")),
    "nested": (changed(0, lambda x: torch.nested.nested_tensor(list(x))), ValueError, ("x is nested", "torch.strided")),
    "quantized": (changed(0, quantized), ValueError, ("x is quantized", "torch.strided")),
    "sparse residual": (
        option("residual", torch.zeros(2, 24, 9, 3).to_sparse()),
        ValueError,
        ("residual is", "strided"),
    ),
    "weight dtype": (changed(1, Tensor.half), TypeError, ("weight of dtype torch.float16", "torch.float32")),
    "weight rank": (changed(1, lambda w: w[0]), ValueError, ("[16, 1, 7]", "[oc, c, kh, kw]")),
    "weight elsewhere": (changed(1, lambda w: w.to("meta")), ValueError, ("meta", "cpu")),
    "scale dtype": (changed(2, Tensor.half), TypeError, ("scale of dtype torch.float16", "torch.float32")),
    "scale float64 with float32": (changed(2, Tensor.double), TypeError, ("torch.float64", "torch.float32")),
    "scale length": (changed(2, lambda s: s[:5]), ValueError, ("scale of shape [5]", "[24]")),
    "shift rank": (changed(3, lambda s: s[None]), ValueError, ("shift of shape [1, 24]", "[24]")),
    "stride 0": (option("stride", 0), ValueError, ("stride (0, 0)", ">= 1")),
    "stride of three": (option("stride", (1, 1, 1)), ValueError, ("(1, 1, 1)", "pair")),
    "stride of text": (option("stride", "2"), TypeError, ("stride '2'", "an int or a pair")),
    "stride of truth": (option("stride", True), TypeError, ("stride True", "an int or a pair")),
    "padding by name": (option("padding", "same"), TypeError, ("padding 'same'", "(vertical, horizontal)")),
    "padding of a half": (option("padding", 0.5), TypeError, ("padding 0.5", "an int")),
    "padding of halves": (option("padding", (0.5, 0.5)), TypeError, ("(0.5, 0.5)", "an int")),
    "relu by name": (option("relu", "no"), TypeError, ("relu 'no'", "True or False")),
    "negative padding": (option("padding", -1), ValueError, ("-1", ">= 0")),
    "padding of three": (option("padding", (1, 1, 1)), ValueError, ("(1, 1, 1)", "(top, bottom, left, right)")),
    "kernel too large": (changed(0, lambda x: x[:, :, :, :4]), ValueError, ("[1, 7]", "padded map")),
    "residual shape": (option("residual", torch.zeros(2, 24, 9, 8)), ValueError, ("[2, 24, 9, 8]", "[2, 24, 9, 3]")),
    "residual dtype": (option("residual", torch.zeros(2, 24, 9, 3).half()), TypeError, ("torch.float16", "float32")),
    "scale of no residual": (option("residual_scale", 0.5), ValueError, ("0.5", "1.0")),
    "scale of text": (option("residual_scale", "a"), TypeError, ("residual_scale 'a'", "a number")),
    "scale of nothing": (option("residual_scale", None), TypeError, ("residual_scale None", "a number")),
    "backend of a number": (option("backend", 3), ValueError, ("unknown backend 3", "cpu, cuda, triton, torch")),
    "unknown backend": (option("backend", "tpu"), ValueError, ("'tpu'", "cpu, cuda, triton, torch, reference")),
}


@pytest.mark.filterwarnings("ignore:.*(nested tensors|quantize).*:UserWarning")
@pytest.mark.parametrize("name", BAD_CONVS)
def test_bad_convs_raise_naming_seen_and_allowed(name: str) -> None:
    spoil, error, (seen, allowed) = BAD_CONVS[name]
    arguments, options = conv_arguments("wide_1x7")
    options["padding"] = 0
    spoil(arguments, options)
    with pytest.raises(error) as caught:
        ops.conv_bn_relu(*arguments, **options)
    assert seen in str(caught.value) and allowed in str(caught.value)


X, W = numerics.random(2, 8, 6, 6), numerics.random(4, 8, 3, 3)
BAD_TRAINED: dict[str, tuple[Tensor, Tensor, type[Exception], str]] = {
    "three dimensions": (X[0], W, ValueError, r"of \(3, 4\) dimensions; allowed: 4 each"),
    "a kernel of three": (X, W[0], ValueError, r"of \(4, 3\) dimensions; allowed: 4 each"),
    "integers": (X.long(), W, TypeError, r"x of dtype torch.int64; allowed: torch.float32, torch.bfloat16"),
    "a narrower weight": (X, W.half(), TypeError, r"of dtype torch.float16; allowed with x of torch.float32: torch.fl"),
}
TRAINED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "convolution": lambda x, w: ops.convolution(x, w, stride=1, padding=1),
    "conv_batch_norm": lambda x, w: ops.conv_batch_norm_relu(
        x, w, torch.ones(4), torch.ones(4), stride=1, padding=1, eps=1e-3
    ),
}


@pytest.mark.parametrize("operator", TRAINED)
@pytest.mark.parametrize("name", BAD_TRAINED)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_convolutions_in_training_raise(device: str, name: str, operator: str) -> None:
    x, weight, error, message = BAD_TRAINED[name]
    with pytest.raises(error, match=message):
        TRAINED[operator](x.to(device), weight.to(device))


BAD_PAIRS: dict[str, tuple[Any, tuple[str, str]]] = {
    "even": (lambda a: [a[0], a[1][..., :6], *a[2:4], a[4][:, :, :6], *a[5:]], ("1x6 and 6x1", "odd")),
    "same direction": (lambda a: [*a[:4], a[4].transpose(2, 3), *a[5:]], ("1x7 and 1x7", "nx1")),
    "different n": (lambda a: [*a[:4], a[4][:, :, :5], *a[5:]], ("1x7 and 5x1", "nx1")),
    "intermediate channels": (lambda a: [*a[:4], a[4][:, :9], *a[5:]], ("input channels for w2", "9")),
    "second scale": (lambda a: [*a[:5], a[5][:3], a[6]], ("scale2 of shape [3]", "[10]")),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_sparse_pairs_raise(kind: str) -> None:
    arguments = pair_arguments(kind)
    for place, name in ((0, "x"), (4, "w2")):
        changed = [*arguments[:place], arguments[place].to_sparse(), *arguments[place + 1 :]]
        with pytest.raises(ValueError, match=f"{name} is of layout torch.sparse_coo; allowed: a plain tensor of"):
            PAIRS[kind](*changed)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("name", [name for name in BAD_PAIRS])
def test_bad_pairs_raise(name: str, kind: str) -> None:
    spoil, (seen, allowed) = BAD_PAIRS[name]
    arguments = spoil(pair_arguments(kind))
    if name == "intermediate channels" and kind == "split":
        arguments[4] = arguments[4][:, :7]
        seen, allowed = "input channels for w2", "7"
    with pytest.raises(ValueError) as caught:
        PAIRS[kind](*arguments)
    assert seen in str(caught.value) and allowed in str(caught.value)


@pytest.mark.parametrize(
    ("options", "seen"),
    [({"padding": 2}, "padding (2, 2)"), ({"kernel_size": 0}, "kernel_size (0, 0)"), ({"stride": 0}, "stride (0, 0)")],
)
def test_bad_pools_raise(options: dict[str, int], seen: str) -> None:
    with pytest.raises(ValueError) as caught:
        ops.pool_project(*pool_arguments(), **options)
    assert seen in str(caught.value)


def test_bad_input_raises_while_compiling_too() -> None:
    arguments, options = conv_arguments("wide_1x7")
    compiled = torch.compile(ops.conv_bn_relu, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="input channels"):
        compiled(arguments[0][:, :5], *arguments[1:], **options)
