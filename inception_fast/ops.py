"""The fused operations as PyTorch operators: schemas, checks, fakes, gradients, autocast and FLOP counts.

    y = conv_bn_relu(x, weight, scale, shift, stride=1, padding=(0, 3))

x is logically NCHW in any layout. y is channels_last when x is channels_last-contiguous and not also contiguous, else
contiguous. weight has x's dtype; scale and shift are float32 (also float64 with float64). Sums are kept in float32 and
rounded once, at the store. Gradients reach x, weight, scale, shift and residual, any number of times. Works under
autocast, torch.compile and export; torch.func and forward-mode gradients are refused.

`backend`: None leaves the choice to `dispatch`, a name (see `backend_status`) runs there or raises RuntimeError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

from . import _batch_norm, _conv_batch_norm, _convolution, _fused, _gradients, dispatch
from ._checks import check_eps, check_flag, check_number, four_sided, pair_of, tensors
from ._trained_layer import asked_while_traced, transformed
from ._when_imported import when_imported
from .backends.casts import casts

__all__ = [
    "asymmetric_pair",
    "batch_norm_relu",
    "conv_batch_norm_relu",
    "conv_bn_relu",
    "convolution",
    "parallel_split",
    "pool_project",
]

Ints: TypeAlias = int | Sequence[int]

NAMESPACE = "inception_fast"
PACKED = (" weight", " w1", " w2")  # what inference packs, once
_CONV = "Tensor x, Tensor weight, Tensor scale, Tensor shift"
_PAIR = "Tensor x, Tensor w1, Tensor scale1, Tensor shift1, Tensor w2, Tensor scale2, Tensor shift2"
SCHEMAS = {
    "conv_bn_relu": f"({_CONV}, Tensor? residual, int[] stride, int[] padding, bool relu=True, "
    "float residual_scale=1.0, str? backend=None, bool winograd=False) -> Tensor",
    "asymmetric_pair": f"({_PAIR}, str? backend=None, bool winograd=False) -> Tensor",
    "parallel_split": f"({_PAIR}, str? backend=None, bool winograd=False) -> Tensor",
    "pool_project": f"({_CONV}, int[] kernel_size, int[] stride, int[] padding, bool count_include_pad=False, "
    "str? backend=None) -> Tensor",
    "conv_batch_norm_relu": _conv_batch_norm.SCHEMA,
}


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    stride: Ints,
    padding: Ints,
    relu: bool = True,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    backend: str | None = None,
    winograd: bool = False,
) -> Tensor:
    """y = act(residual + residual_scale * (scale * conv(x, weight) + shift)), act = ReLU or the identity.

    x [n, c, h, w], weight [oc, c, kh, kw], scale and shift [oc], residual and y [n, oc, oh, ow].

    Args:
        padding: an int, (vertical, horizontal) or (top, bottom, left, right).
        residual_scale: only with a residual.
        winograd: the native CPU kernels may take Winograd's algorithm, as in `optimize`; no gradient does.

    Raises ValueError or TypeError naming what was seen and what is allowed.
    """
    tensors(x=x, weight=weight, scale=scale, shift=shift, residual=x if residual is None else residual)
    relu, residual_scale = check_flag("relu", relu), check_number("residual_scale", residual_scale)
    dispatch.check_name(backend)
    strides, sides = pair_of(stride, "stride"), four_sided(padding)
    winograd = check_flag("winograd", winograd)
    call = (x, weight, scale, shift, residual, strides, sides, relu, residual_scale, backend, winograd)
    return _run(_ops.conv_bn_relu.default, call)


def asymmetric_pair(
    x: Tensor,
    w1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    w2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    *,
    backend: str | None = None,
    winograd: bool = False,
) -> Tensor:
    """y = relu(scale2 * conv(relu(scale1 * conv(x, w1) + shift1), w2) + shift2), SAME padding, stride 1.

    w1 [mid, c, 1, n] and w2 [oc, mid, n, 1], or w1 [mid, c, n, 1] and w2 [oc, mid, 1, n]; n is odd. Whether the
    intermediate of a float16 or bfloat16 pair is rounded once or kept in float32 is the backend's choice. `winograd` is
    that of `conv_bn_relu`.
    """
    tensors(x=x, w1=w1, scale1=scale1, shift1=shift1, w2=w2, scale2=scale2, shift2=shift2)
    dispatch.check_name(backend)
    winograd = check_flag("winograd", winograd)
    return _run(_ops.asymmetric_pair.default, (x, w1, scale1, shift1, w2, scale2, shift2, backend, winograd))


def parallel_split(
    x: Tensor,
    w1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    w2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    *,
    backend: str | None = None,
    winograd: bool = False,
) -> Tensor:
    """y = concat(relu(scale1 * conv(x, w1) + shift1), relu(scale2 * conv(x, w2) + shift2)), SAME padding, stride 1.

    w1 [oc1, c, 1, n] and w2 [oc2, c, n, 1], or the other way round; n is odd; y [n, oc1 + oc2, h, w]. `winograd` is
    that of `conv_bn_relu`.
    """
    tensors(x=x, w1=w1, scale1=scale1, shift1=shift1, w2=w2, scale2=scale2, shift2=shift2)
    dispatch.check_name(backend)
    winograd = check_flag("winograd", winograd)
    return _run(_ops.parallel_split.default, (x, w1, scale1, shift1, w2, scale2, shift2, backend, winograd))


def pool_project(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    kernel_size: Ints = 3,
    stride: Ints = 1,
    padding: Ints = 1,
    count_include_pad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """y = relu(scale * conv(avg_pool(x), weight) + shift), weight [oc, c, 1, 1].

    An average commutes with a 1x1 convolution, so the convolution goes first where the pool then meets fewer channels.
    """
    tensors(x=x, weight=weight, scale=scale, shift=shift)
    count_include_pad = check_flag("count_include_pad", count_include_pad)
    dispatch.check_name(backend)
    kernel, strides = pair_of(kernel_size, "kernel_size"), pair_of(stride, "stride")
    pads = pair_of(padding, "padding")
    call = (x, weight, scale, shift, kernel, strides, pads, count_include_pad, backend)
    return _run(_ops.pool_project.default, call)


def batch_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y = relu(weight * (x - mean) / sqrt(var + eps) + bias), and mean and var of each channel of x over the batch.

    x and y [n, c, h, w]; weight, bias, mean and var [c], float32 (float64 with float64). var is divided by the count.
    Gradients reach x, weight and bias through y, any number of times; mean and var, which running statistics take in,
    have none. Native on the CPU for float32 and bfloat16 in channels_last, else in torch's operations.

    Raises ValueError for a single value a channel, and as `conv_bn_relu` does.
    """
    tensors(x=x, weight=weight, bias=bias)
    eps = check_eps(eps)
    y, mean, var = _run(_ops.batch_norm_relu.default, (x, weight, bias, eps))
    return y, mean, var


def conv_batch_norm_relu(
    x: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor, *, stride: Ints, padding: Ints, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`batch_norm_relu` of conv(x, kernel): y, mean and var. kernel [oc, c, kh, kw], padding an int or two.

    On a GPU a convolution of ours leaves the statistics while it stores, where that is expected to pay; elsewhere it
    is torch's convolution and `batch_norm_relu`.
    """
    tensors(x=x, kernel=kernel, weight=weight, bias=bias)
    eps = check_eps(eps)
    call = (x, kernel, weight, bias, pair_of(stride, "stride"), pair_of(padding, "padding"), eps)
    y, _, mean, var = _run(_ops.conv_batch_norm_relu.default, call)
    return y, mean, var


def convolution(x: Tensor, weight: Tensor, *, stride: Ints, padding: Ints, winograd: bool = False) -> Tensor:
    """y = conv2d(x, weight), for training: x [n, c, h, w], weight [oc, c, kh, kw] of x's dtype or float32.

    The gradient of the weight is native on the CPU for float32 and bfloat16 in channels_last, summed in float32 and
    rounded to the weight's dtype. So are y and the gradient of x, for float32 at stride 1 where fewer products pay: of
    3x3, all three by tiles whose error is like that of torch's sums, and so the weight's gradient of 1x3 and 3x1; and
    for bfloat16 beside a float32 weight where weights are many beside pixels, 1x1, 1xn and nx1, and y at stride 2. All
    else is torch's. Gradients reach x and weight, any number of times.

    Args:
        winograd: larger tiles too, which err 1.3 to 25 times as much as a direct sum: 3x3, 5x5, 1x3, 3x1, 1x7, 7x1.
    """
    tensors(x=x, weight=weight)
    winograd = check_flag("winograd", winograd)
    sizes = pair_of(stride, "stride"), pair_of(padding, "padding")
    y: Tensor = _run(_ops.convolution.default, (x, weight, *sizes, winograd))
    return y


def _run(operator: Any, arguments: tuple[Any, ...]) -> Any:
    """Goes past the autograd kernel when no gradient can be asked for: being Python, it costs as much as the rest."""
    compiling = torch.compiler.is_compiling()
    if _in_forward_mode() if compiling else transformed() and any(map(_is_transformed, arguments)):
        name = str(operator).split(".")[1]
        raise RuntimeError(
            f"{name} inside of torch.func or forward mode; allowed: torch.nn.functional, it has the rules"
        )
    if compiling:
        return operator(*arguments)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


@asked_while_traced
def _in_forward_mode() -> bool:
    """Whether torch.func takes tangents of what is being compiled, which would be zero: asked while it is traced."""
    return any(level.key() == TransformType.Jvp for level in retrieve_all_functorch_interpreters())


def _is_transformed(argument: Any) -> bool:
    if not isinstance(argument, Tensor):
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(argument):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(argument).tangent is not None


def _autocast(name: str, kind: str) -> Any:
    """Casts x, weights and residual as torch casts a convolution's; scale, shift and batch norm stay float32."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{kind.upper()}"))
    kept = {position for position, part in enumerate(SCHEMAS[name].split(",")) if " scale" in part or " shift" in part}
    kept = {2, 3} if name == "conv_batch_norm_relu" else kept
    packed = {place for place, part in enumerate(SCHEMAS[name].split(",")) if part.endswith(PACKED)}

    def narrowed(value: Any, position: int, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or position in kept or value.dtype is torch.float64:
            return value
        found = casts(value, dtype) if position in packed else None
        if found is None:
            return value.to(dtype)
        learns = torch.is_grad_enabled() and value.requires_grad
        return _gradients.Attached.apply(found, value.to(dtype)) if learns else found

    def cast(*arguments: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(kind)
        with torch._C._ExcludeDispatchKeyGuard(key):
            return getattr(_ops, name)(*(narrowed(value, place, dtype) for place, value in enumerate(arguments)))

    return cast


_library = torch.library.Library(NAMESPACE, "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_PARTS: dict[str, tuple[Any, Any, Any, Any, Any]] = {
    "conv_bn_relu": (
        _fused.conv_kernel,
        _fused.conv_call,
        _gradients.conv_setup,
        _gradients.conv_backward,
        _fused.conv_flops,
    ),
    "asymmetric_pair": (
        _fused.pair_kernel("chain"),
        lambda *arguments: _fused.pair_call("chain", *arguments),
        _gradients.pair_setup,
        _gradients.chain_backward,
        _fused.pair_flops,
    ),
    "parallel_split": (
        _fused.pair_kernel("split"),
        lambda *arguments: _fused.pair_call("split", *arguments),
        _gradients.pair_setup,
        _gradients.split_backward,
        _fused.pair_flops,
    ),
    "pool_project": (
        _fused.pool_project_kernel,
        _fused.pool_project_call,
        _gradients.pool_project_setup,
        _gradients.pool_project_backward,
        _fused.conv_flops,
    ),
}


def _register() -> Any:
    for name, (kernel, call, setup, backward, _) in _PARTS.items():
        qualified = f"{NAMESPACE}::{name}"
        _library.define(name + SCHEMAS[name], tags=_TAGS)
        for kind in ("cpu", "cuda"):
            _library.impl(name, kernel, kind.upper())
            _library.impl(name, _autocast(name, kind), f"Autocast{kind.upper()}")
        torch.library.register_fake(qualified, _fused.fake_of(call), lib=_library)
        torch.library.register_autograd(qualified, backward, setup_context=setup, lib=_library)
    _register_batch_norm()
    _register_convolution()
    # PyTorch's FLOP counter imports Triton where that is installed; whoever counts pays for it.
    when_imported("torch.utils.flop_counter", _register_flops)
    return torch.ops.inception_fast


def _register_flops(counter: Any) -> None:
    counter.register_flop_formula(torch.ops.inception_fast.convolution)(_fused.conv_flops)
    counter.register_flop_formula(torch.ops.inception_fast.conv_batch_norm_relu)(_fused.conv_batch_norm_flops)
    counter.register_flop_formula(torch.ops.inception_fast.conv_weight_gradient)(_fused.gradient_flops)
    counter.register_flop_formula(torch.ops.inception_fast.conv_input_gradient)(_fused.gradient_flops)
    for name, (*_, flops) in _PARTS.items():
        counter.register_flop_formula(getattr(torch.ops.inception_fast, name))(flops)


def _register_batch_norm() -> None:
    name, backward = f"{NAMESPACE}::batch_norm_relu", f"{NAMESPACE}::batch_norm_relu_backward"
    _library.define("batch_norm_relu" + _batch_norm.SCHEMA, tags=_TAGS)
    _library.define("batch_norm_relu_backward" + _batch_norm.BACKWARD_SCHEMA, tags=_TAGS)
    for kind in ("CPU", "CUDA"):
        _library.impl("batch_norm_relu", _batch_norm.kernel, kind)
        _library.impl("batch_norm_relu_backward", _batch_norm.backward_kernel, kind)
    torch.library.register_fake(name, _batch_norm.fake, lib=_library)
    torch.library.register_fake(backward, _batch_norm.backward_fake, lib=_library)
    torch.library.register_autograd(name, _batch_norm.backward, setup_context=_batch_norm.setup, lib=_library)
    _register_conv_batch_norm()


def _register_conv_batch_norm() -> None:
    name, part = "conv_batch_norm_relu", _conv_batch_norm
    _library.define(name + part.SCHEMA, tags=_TAGS)
    for kind in ("cpu", "cuda"):
        _library.impl(name, part.kernel, kind.upper())
        _library.impl(name, _autocast(name, kind), f"Autocast{kind.upper()}")
    torch.library.register_fake(f"{NAMESPACE}::{name}", part.fake, lib=_library)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", part.backward, setup_context=part.setup, lib=_library)


def _register_convolution() -> None:
    name, gradient = f"{NAMESPACE}::convolution", f"{NAMESPACE}::conv_weight_gradient"
    of_input = f"{NAMESPACE}::conv_input_gradient"
    _library.define("convolution" + _convolution.SCHEMA, tags=_TAGS)
    _library.define("conv_input_gradient" + _convolution.INPUT_GRADIENT_SCHEMA, tags=_TAGS)
    _library.define("conv_weight_gradient" + _convolution.GRADIENT_SCHEMA, tags=_TAGS)
    for kind in ("cpu", "cuda"):
        _library.impl("convolution", _convolution.kernel, kind.upper())
        _library.impl("conv_weight_gradient", _convolution.gradient_kernel, kind.upper())
        _library.impl("conv_input_gradient", _convolution.input_gradient_kernel, kind.upper())
        _library.impl("convolution", _autocast_map(kind), f"Autocast{kind.upper()}")
    torch.library.register_fake(name, _convolution.fake, lib=_library)
    torch.library.register_fake(gradient, _convolution.gradient_fake, lib=_library)
    torch.library.register_fake(of_input, _convolution.input_gradient_fake, lib=_library)
    torch.library.register_autograd(name, _convolution.backward, setup_context=_convolution.setup, lib=_library)


def _autocast_map(kind: str) -> Any:
    """Casts x alone: a float32 weight is rounded inside the operation, and its gradient is not."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{kind.upper()}"))

    def cast(x: Tensor, *rest: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(key):
            y: Tensor = _ops.convolution(x if x.dtype is torch.float64 else x.to(torch.get_autocast_dtype(kind)), *rest)
        return y

    return cast


_ops = _register()
