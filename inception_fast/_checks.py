"""What the operations accept, checked once per signature, and the spec that each call becomes.

The same functions serve real tensors (cached by signature) and fake ones, whose sizes may be symbols.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ._numbers import is_integer, is_number, plain
from .dispatch import PoolProjectSpec
from .kernels.spec import ConvSpec, PairSpec, PoolSpec, out_size

PLAIN = (Tensor, nn.Parameter)
STAND_INS = (FakeTensor, FunctionalTensor)  # classes of compilers, which take any operator
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Shape: TypeAlias = tuple[int, ...]


class Like(NamedTuple):
    """What the checks read of a tensor."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device


def like(tensor: Tensor) -> Like:
    return Like(tensor.shape, tensor.dtype, tensor.device)


Triple: TypeAlias = tuple[Like, Like, Like]  # weight, scale, shift


def _value(condition: Any, message: Callable[[], str]) -> None:
    torch._check_value(condition, message)


def _type(condition: bool, message: Callable[[], str]) -> None:
    torch._check_type(condition, message)


def _dims(shape: Shape) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def tensors(**named: Any) -> None:
    """Raises TypeError for the first argument that is no tensor, ValueError for one without strides."""
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; allowed: torch.Tensor")
        if not is_strided(value):
            kind = "nested, " if value.is_nested else "quantized, " if value.is_quantized else ""
            raise ValueError(f"{name} is {kind}of layout {value.layout}; allowed: a plain tensor of torch.strided")


def is_strided(x: Tensor) -> bool:
    """Whether x is neither sparse, nested nor quantized, nor in oneDNN's own layout."""
    return x.layout is torch.strided and not x.is_nested and not x.is_quantized


def symbolic(x: Any) -> bool:
    """Whether x stands for a map in a symbolic trace, of which nothing is known."""
    return isinstance(x, fx.Proxy)


def foreign(x: Any) -> bool:
    """Whether x is such a stand-in, or a tensor with rules for torch's own operations and none for ours: a DTensor."""
    kind = type(x)
    if kind in PLAIN or (issubclass(kind, Tensor) and kind.__torch_dispatch__ is Tensor.__torch_dispatch__):
        return False
    return symbolic(x) or (issubclass(kind, Tensor) and not issubclass(kind, STAND_INS) and is_strided(x))


def not_scripted(module: Any) -> NoReturn:
    """torch.jit.script's question what to take in a module's place: `__prepare_scriptable__` of our classes."""
    raise TypeError(f"torch.jit.script of a {type(module).__name__}; allowed: torch.jit.trace, torch.export")


def pair_of(value: int | Sequence[int], name: str) -> list[int]:
    """[vertical, horizontal] of an int or a pair."""
    both = _ints(value, name, "an int or a pair (vertical, horizontal)")
    if len(both) == 1 and not isinstance(value, Sequence):
        return both * 2
    if len(both) != 2:
        raise ValueError(f"{name} {value}; allowed: an int or a pair (vertical, horizontal)")
    return both


def four_sided(padding: int | Sequence[int]) -> list[int]:
    """[top, bottom, left, right] of an int, a pair (vertical, horizontal) or the four."""
    allowed = "an int, (vertical, horizontal) or (top, bottom, left, right)"
    sides = _ints(padding, "padding", allowed)
    if len(sides) == 4:
        return sides
    if len(sides) not in (1, 2):
        raise ValueError(f"padding {padding}; allowed: {allowed}")
    return [sides[0], sides[0], sides[-1], sides[-1]]


def _ints(value: Any, name: str, allowed: str) -> list[int]:
    sequence = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    values = [plain(v) for v in (value if sequence else [value])]
    if not all(is_integer(v) or isinstance(v, torch.SymInt) for v in values):
        raise TypeError(f"{name} {value!r}; allowed: {allowed}")
    return values


def check_flag(name: str, value: Any) -> bool:
    """The bool that `value` is; TypeError for what is none."""
    value = plain(value)
    if not isinstance(value, bool):
        raise TypeError(f"{name} {value!r}; allowed: True or False")
    return value


def check_number(name: str, value: Any) -> Any:
    """The number that `value` is, a float, an int or a symbol of one; TypeError for what is none."""
    value = plain(value)
    if not (is_number(value) or isinstance(value, (torch.SymInt, torch.SymFloat))):
        raise TypeError(f"{name} {value!r}; allowed: a number")
    return value


def check_eps(value: Any) -> Any:
    """The number that batch norm adds to a variance; TypeError for what is none, ValueError for one below 0."""
    eps = check_number("eps", value)
    if is_number(eps) and not 0 <= eps < float("inf"):
        raise ValueError(f"eps {eps}; allowed: at least 0")
    return eps


def check_channels(**named: Any) -> None:
    """Raises ValueError for the first that is no number of channels."""
    for name, channels in named.items():
        if not is_integer(plain(channels)) or channels < 1:
            raise ValueError(f"{name}={channels!r}; allowed: an integer >= 1")


def check_layer(cin: Any, cout: Any, kernel_size: Any, stride: Any, padding: Any, eps: Any, momentum: Any) -> None:
    """Raises ValueError or TypeError for what torch would accept and then fail on at the first image."""
    check_channels(cin=cin, cout=cout)
    for name, value, least in (("kernel_size", kernel_size, 1), ("stride", stride, 1), ("padding", padding, 0)):
        if name == "padding" and value in ("same", "valid"):
            continue
        if min(pair_of(value, name)) < least:
            raise ValueError(f"{name} {value}; allowed: at least {least}")
    check_eps(eps)
    if momentum is not None:  # with None torch averages over all batches
        check_number("momentum", momentum)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum {momentum}; allowed: 0 to 1, or None")


def check_average(kernel_size: Any, padding: Any, count_include_pad: Any) -> None:
    """The same of an average pool."""
    kernel = pair_of(kernel_size, "kernel_size")
    if any(side > size // 2 for side, size in zip(pair_of(padding, "padding"), kernel, strict=True)):
        raise ValueError(f"padding {padding}; allowed: from 0 to half of kernel_size {kernel_size}")
    check_flag("count_include_pad", count_include_pad)


def check_residual_scale(residual: Any, residual_scale: float) -> None:
    if residual is None and residual_scale != 1.0:
        raise ValueError(f"residual_scale {residual_scale} without a residual; allowed: 1.0")


def _check_x(x: Like) -> None:
    _type(x.dtype in DTYPES, lambda: f"x of dtype {x.dtype}; allowed: {', '.join(map(str, DTYPES))}")
    _value(len(x.shape) == 4, lambda: f"x of shape {_dims(x.shape)}; allowed: four dimensions, [n, c, h, w]")
    _value(x.shape[0] >= 1, lambda: f"an empty batch, x of shape {_dims(x.shape)}; allowed: n >= 1")
    for size in x.shape[1:]:
        _value(size >= 1, lambda: f"an empty map, x of shape {_dims(x.shape)}; allowed: sizes >= 1")


def check_learning(x: Any, weight: Tensor, channels: int) -> None:
    """What a layer with such a weight takes in training, where autocast may see to dtypes."""
    tensors(x=x)
    _check_x(like(x))
    _value(x.shape[1] == channels, lambda: f"{x.shape[1]} channels, x of shape {_dims(x.shape)}; allowed: {channels}")
    cast = torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)
    _type(x.dtype is weight.dtype or cast, lambda: f"x of dtype {x.dtype}; allowed: {weight.dtype}, the weight's")


def check_operands(x: Tensor, name: str, weight: Tensor, *others: torch.dtype) -> None:
    """Raises for what are no map and weight of a convolution in training, whose sizes torch looks at.

    The weight has x's dtype, or one of `others`.
    """
    ranks, dtypes = (x.dim(), weight.dim()), tuple(dict.fromkeys((x.dtype, *others)))
    if ranks == (4, 4) and x.dtype in DTYPES and weight.dtype in dtypes:  # in every call of training
        return
    _value(ranks == (4, 4), lambda: f"x and {name} of {ranks} dimensions; allowed: 4 each")
    _type(x.dtype in DTYPES, lambda: f"x of dtype {x.dtype}; allowed: {', '.join(map(str, DTYPES))}")
    _check_tensor(like(x), name, like(weight), dtypes)


def _check_params(x: Like, params: Triple, channels: int, suffix: str = "") -> None:
    """weight [oc, channels, kh, kw] of x's dtype, scale and shift [oc] of the epilogue's, all on x's device."""
    weight, scale, shift = params
    name = f"w{suffix}" if suffix else "weight"
    shape = weight.shape
    _check_tensor(x, name, weight, (x.dtype,))
    _value(len(shape) == 4 and min(shape) >= 1, lambda: f"{name} of shape {_dims(shape)}; allowed: [oc, c, kh, kw]")
    _value(
        shape[1] == channels,
        lambda: f"{channels} input channels for {name} {_dims(shape)}; allowed: {shape[1]} channels",
    )
    wide = (torch.float32, torch.float64) if x.dtype is torch.float64 else (torch.float32,)
    _check_vector(x, f"scale{suffix}", scale, wide, shape[0])
    _check_vector(x, f"shift{suffix}", shift, wide, shape[0])


def _check_vector(x: Like, name: str, tensor: Like, dtypes: tuple[torch.dtype, ...], length: int) -> None:
    shape = tensor.shape
    _check_tensor(x, name, tensor, dtypes)
    _value(len(shape) == 1 and shape[0] == length, lambda: f"{name} of shape {_dims(shape)}; allowed: [{length}]")


def _check_tensor(x: Like, name: str, tensor: Like, dtypes: tuple[torch.dtype, ...]) -> None:
    allowed = " or ".join(map(str, dtypes))
    _type(tensor.dtype in dtypes, lambda: f"{name} of dtype {tensor.dtype}; allowed with x of {x.dtype}: {allowed}")
    _value(tensor.device == x.device, lambda: f"{name} on {tensor.device}; allowed: {x.device}, where x is")


def _check_window(x: Like, kernel: Shape, stride: Shape, padding: Shape) -> Shape:
    """[oh, ow] of a kernel that fits."""
    _value(len(stride) == 2 and min(stride) >= 1, lambda: f"stride {stride}; allowed: two ints >= 1")
    _value(
        len(padding) == 4 and min(padding) >= 0,
        lambda: f"padding {padding}; allowed: four ints >= 0, (top, bottom, left, right)",
    )
    _, _, h, w = x.shape
    top, bottom, left, right = padding
    for size, reach in ((h + top + bottom, kernel[0]), (w + left + right, kernel[1])):
        _value(
            size >= reach,
            lambda: f"kernel {_dims(kernel)} on x {_dims(x.shape)} padded by {padding}; allowed: up to the padded map",
        )
    return out_size(h, kernel[0], stride[0], top, bottom), out_size(w, kernel[1], stride[1], left, right)


class Conv(NamedTuple):
    """A call of conv_bn_relu."""

    x: Like
    params: Triple
    residual: Like | None
    stride: Shape
    padding: Shape
    relu: bool

    def shape(self) -> Shape:
        """Checks the call; [n, oc, oh, ow]."""
        x, weight = self.x, self.params[0]
        _check_x(x)
        _check_params(x, self.params, x.shape[1])
        oh, ow = _check_window(x, weight.shape[2:], self.stride, self.padding)
        y = (x.shape[0], weight.shape[0], oh, ow)
        residual = self.residual
        if residual is not None:
            _check_tensor(x, "residual", residual, (x.dtype,))
            _value(len(residual.shape) == 4, lambda: f"residual of shape {_dims(residual.shape)}; allowed: {_dims(y)}")
            for seen, allowed in zip(residual.shape, y, strict=True):
                _value(seen == allowed, lambda: f"residual of shape {_dims(residual.shape)}; allowed: {_dims(y)}")
        return y

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - keyed by the call's values, bounded
    def spec(self) -> ConvSpec:
        self.shape()
        return _conv_spec(self.x, self.params[0], self.stride, self.padding, self.relu, self.residual is not None)


class Pair(NamedTuple):
    """A call of asymmetric_pair ("chain") or parallel_split ("split")."""

    kind: str
    x: Like
    first: Triple
    second: Triple

    def shape(self) -> Shape:
        """Checks the call; [n, oc, h, w], padded SAME."""
        x, w1, w2 = self.x, self.first[0], self.second[0]
        chain = self.kind == "chain"
        _check_x(x)
        _check_params(x, self.first, x.shape[1], "1")
        _check_params(x, self.second, w1.shape[0] if chain else x.shape[1], "2")
        a, b = tuple(w1.shape[2:]), tuple(w2.shape[2:])
        _value(
            1 in a and a == b[::-1] and max(a) % 2 == 1,
            lambda: f"kernels {a[0]}x{a[1]} and {b[0]}x{b[1]}; allowed: 1xn and nx1, in either order, n odd",
        )
        return (x.shape[0], w2.shape[0] + (0 if chain else w1.shape[0]), x.shape[2], x.shape[3])

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def spec(self) -> PairSpec:
        self.shape()
        w1, w2 = self.first[0], self.second[0]
        middle = self.x._replace(shape=(self.x.shape[0], w1.shape[0], *self.x.shape[2:]))
        first = _conv_spec(self.x, w1, (1, 1), same_padding(w1.shape), True, False)
        second_x = middle if self.kind == "chain" else self.x
        return PairSpec(first, _conv_spec(second_x, w2, (1, 1), same_padding(w2.shape), True, False), self.kind)


class PoolProject(NamedTuple):
    """A call of pool_project."""

    x: Like
    params: Triple
    kernel: Shape
    stride: Shape
    padding: Shape  # (vertical, horizontal)
    count_include_pad: bool

    def shape(self) -> Shape:
        """Checks the call; [n, oc, oh, ow]."""
        x, weight = self.x, self.params[0]
        _check_x(x)
        _check_params(x, self.params, x.shape[1])
        kh, kw = weight.shape[2:]
        _value((kh, kw) == (1, 1), lambda: f"weight of kernel {kh}x{kw}; allowed: 1x1")
        kernel, padding = self.kernel, self.padding
        _value(len(kernel) == 2 and min(kernel) >= 1, lambda: f"kernel_size {kernel}; allowed: two ints >= 1")
        _value(
            len(padding) == 2 and all(0 <= p <= k // 2 for p, k in zip(padding, kernel, strict=True)),
            lambda: f"padding {padding}; allowed: from 0 to half of kernel_size {kernel}",
        )
        oh, ow = _check_window(x, kernel, self.stride, tuple(four_sided(padding)))
        return (x.shape[0], weight.shape[0], oh, ow)

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def spec(self) -> PoolProjectSpec:
        """The convolution goes first where that is less work: it always commutes with an average."""
        n, oc, oh, ow = self.shape()
        x, weight = self.x, self.params[0]
        _, c, h, w = x.shape
        conv_first = oc <= c and self.stride == (1, 1)
        padding: Any = tuple(four_sided(self.padding))
        sizes = (n, h, w, oc) if conv_first else (n, h, w, c)
        kh, kw = self.kernel
        stride: Any = self.stride
        pool = PoolSpec(*sizes, kh, kw, stride, padding, "avg", self.count_include_pad, dtype=dtype_name(x.dtype))
        conv_x = x if conv_first else x._replace(shape=(n, c, oh, ow))
        return PoolProjectSpec(pool, _conv_spec(conv_x, weight, (1, 1), (0, 0, 0, 0), True, False), conv_first)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def same_padding(weight_shape: Sequence[int]) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) that keeps the map's size under an odd kernel."""
    kh, kw = weight_shape[2:]
    return (kh // 2, kh // 2, kw // 2, kw // 2)


def _conv_spec(x: Like, weight: Like, stride: Any, padding: Any, relu: bool, residual: bool) -> ConvSpec:
    n, c, h, w = x.shape
    oc, _, kh, kw = weight.shape
    return ConvSpec(n, h, w, c, oc, kh, kw, stride, padding, 1, relu, residual, dtype_name(x.dtype))
