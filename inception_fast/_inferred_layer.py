"""A layer's inference in eager code on the CPU, past operator and dispatcher while nothing that it depends on changed.

By its operator a layer checks its arguments, folds batch norm, asks which backend runs it and finds its packed weights:
50 us beside the kernel, and twice that in a network, whose maps leave nothing of Python's in the caches. What that came
to is kept beside what it was found from. Whatever watches or rewrites operations (compilers, exports, dispatch modes,
transforms, the profiler), gradients and autocast are given the operator.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _fused, _trained_layer, dispatch
from ._batch_norm import memory_format
from ._checks import four_sided, is_strided, pair_of
from .backends import Params
from .backends.stamp import Stamp, can_stamp

if TYPE_CHECKING:
    from .backends.native_cpu import Prepared

Asked = Callable[[], tuple[dispatch.Spec, Params]]
Part = tuple[nn.Conv2d, nn.BatchNorm2d]  # relu(bn(conv(x)))
Fold = Callable[[nn.Conv2d, nn.BatchNorm2d], tuple[Tensor, Tensor]]
SIZES = 8  # of maps, whose calls a layer keeps
WINOGRAD = "winograd"  # attribute of a convolution that may take every tile of Winograd's: see ops.convolution


class Tail(NamedTuple):
    """What comes behind a convolution: act(residual + scale * y)."""

    residual: Tensor | None = None
    relu: bool = True
    scale: float = 1.0

    def key(self) -> tuple[Any, ...]:
        residual = self.residual
        place = () if residual is None else (residual.shape, residual.stride(), residual.dtype)
        return self.relu, self.scale, place


PLAIN = Tail()


class Memo:
    """What calls of a layer came to, by how the map lies, while its modules are what they were.

    Packed weights are the cache's: a call whose plan was dropped from there is found again by the operator.
    """

    def __init__(self, parts: tuple[Part, ...]) -> None:
        from .backends import native_cpu  # who imports this package may lack the kernels, or never need them

        self.native = native_cpu
        self._forms = [_form(*part) for part in parts]
        self._stamps = [[None if t is None else Stamp(t) for t in _tensors(*part)] for part in parts]
        self._calls: dict[Any, tuple[weakref.ref[Any], tuple[int, int, int, int], torch.memory_format]] = {}

    def fits(self, parts: tuple[Part, ...]) -> bool:
        """Whether the modules are what they were."""
        for form, stamps, part in zip(self._forms, self._stamps, parts, strict=True):
            if form != _form(*part):
                return False
            for stamp, tensor in zip(stamps, _tensors(*part), strict=True):
                if tensor is not None if stamp is None else tensor is None or not stamp.holds(tensor):
                    return False
        return True

    def again(self, x: Tensor, parts: tuple[Part, ...], tail: Tail = PLAIN) -> Tensor | None:
        """The layer's y for modules without hooks, where `serves` says so; None where it is not known."""
        found = self._calls.get(_key(x, tail))
        if found is None or not self.fits(parts):
            return None
        reference, shape, memory_format = found
        compiled = reference()
        return compiled and self.native.run(self.native.Prepared(compiled, shape), x, tail.residual, memory_format)

    def keep(self, x: Tensor, tail: Tail, prepared: Prepared) -> None:
        if len(self._calls) >= SIZES:
            self._calls.clear()
        self._calls[_key(x, tail)] = weakref.ref(prepared.compiled), prepared.shape, memory_format(x)


def _key(x: Tensor, tail: Tail) -> tuple[Any, ...]:
    place = x.shape, x.stride(), x.dtype
    return place if tail is PLAIN else (*place, *tail.key())


def serves(x: Any) -> bool:
    """Whether a native kernel may be called on `x` without anybody missing the operator."""
    return (
        not torch.is_grad_enabled()
        and _trained_layer.direct()
        and _trained_layer.is_plain(x)
        and is_strided(x)
        and not torch._C._is_any_autocast_enabled()
        and not torch.autograd._profiler_enabled()
        and torch._C._len_torch_function_stack() == 0
    )


def remember(memo: Memo | None, x: Tensor, parts: tuple[Part, ...], asked: Asked, tail: Tail = PLAIN) -> Memo | None:
    """The layer's memo with what its operator was just called for, a new one where the modules changed.

    asked: gives spec and parameters of that call.
    """
    tensors = [_tensors(*part) for part in parts]
    if not serves(x) or any(weight is None for weight, *_ in tensors):
        return memo
    if not all(tensor is None or can_stamp(tensor) for those in tensors for tensor in those):
        return memo
    if memo is None or not memo.fits(parts):
        memo = Memo(parts)  # ahead of the plan: what is written meanwhile is a change
    spec, params = asked()
    if x.dtype is torch.float16 or dispatch.choose(spec, "cpu", dispatch.current_backend()) != "cpu":
        return memo
    prepared = memo.native.find(spec, params, x, tail.residual, tail.scale, takes_tiles(*(conv for conv, _ in parts)))
    if prepared is not None:
        memo.keep(x, tail, prepared)
    return memo


def conv_asked(x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, fold: Fold, tail: Tail = PLAIN) -> Asked:
    """Of `ops.conv_bn_relu`."""

    def asked() -> tuple[dispatch.Spec, Params]:
        params = (conv.weight, *fold(conv, bn))
        padding: Any = conv.padding
        window = pair_of(conv.stride, "stride"), four_sided(padding)
        return _fused.conv_call(x, *params, tail.residual, *window, tail.relu, tail.scale).spec(), (params,)

    return asked


def pair_asked(kind: str, x: Tensor, *layers: Any) -> Asked:
    """Of `ops.asymmetric_pair` or `ops.parallel_split`, by the kind of spec, for two `ConvBNReLU`."""

    def asked() -> tuple[dispatch.Spec, Params]:
        params = tuple(layer.fused_arguments() for layer in layers)
        return _fused.pair_call(kind, x, *params[0], *params[1]).spec(), params

    return asked


def takes_tiles(*convs: nn.Module) -> bool:
    """Whether Winograd's tiles were asked for, for all of them."""
    return all(conv.__dict__.get(WINOGRAD, False) for conv in convs)


def _form(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Any, ...]:
    """What else than tensors decides what is computed."""
    kinds = type(conv), type(bn), bn.training, bn.eps, conv.__dict__.get(WINOGRAD, False)
    return *kinds, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode


def _tensors(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor | None, ...]:
    """All tensors of a convolution and of its batch norm; read where modules keep them, which is twice as fast."""
    own, other, statistics = conv._parameters, bn._parameters, bn._buffers
    learned = own.get("weight"), own.get("bias"), other.get("weight"), other.get("bias")
    return *learned, statistics.get("running_mean"), statistics.get("running_var")
