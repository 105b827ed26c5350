"""A functional Keras model as a torch module, layer by layer: what the engine captures. Maps are NCHW inside.

The module shares no memory with the Keras model. A layer without a torch form is refused by name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import keras
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.blocks import same_padding

Size = Sequence[int]


class UnsupportedLayer(ValueError):
    """A layer of the Keras model, or an option of it, has no torch form here."""


class Lambda(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *xs: Tensor) -> Tensor:
        return self.function(*xs)


class SamePad(nn.Module):
    """TensorFlow's SAME padding in front of an unpadded window of this kernel and stride."""

    def __init__(self, kernel: Size, stride: Size) -> None:
        super().__init__()
        self.kernel, self.stride = tuple(kernel), tuple(stride)

    def forward(self, x: Tensor) -> Tensor:
        top, bottom = same_padding(x.shape[2], self.kernel[0], self.stride[0])
        left, right = same_padding(x.shape[3], self.kernel[1], self.stride[1])
        return F.pad(x, (left, right, top, bottom))


class SamePool(nn.Module):
    """TensorFlow's SAME pool as one torch pool: its rounding up is the surplus pixel behind the map."""

    def __init__(self, kind: str, kernel: Size, stride: Size) -> None:
        super().__init__()
        self.kind, self.kernel, self.stride = kind, tuple(kernel), tuple(stride)

    def forward(self, x: Tensor) -> Tensor:
        sides = (same_padding(x.shape[d + 2], self.kernel[d], self.stride[d]) for d in (0, 1))
        padding = [side[0] for side in sides]
        if self.kind == "max":
            return F.max_pool2d(x, self.kernel, self.stride, padding, ceil_mode=True)
        return F.avg_pool2d(x, self.kernel, self.stride, padding, ceil_mode=True, count_include_pad=False)


def tensor(variable: Any) -> Tensor:
    """A Keras variable's value, float32, in memory of its own."""
    value = keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32"))
    return torch.from_numpy(np.array(value, dtype=np.float32))


def need(condition: Any, layer: Any, what: str) -> None:
    if not condition:
        raise UnsupportedLayer(f"layer {layer.name!r} ({type(layer).__name__}): {what}")


def channels_last(layer: Any) -> None:
    need(getattr(layer, "data_format", "channels_last") == "channels_last", layer, "channels_first; allowed: NHWC")


ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {  # by Keras name, made for tensors of a rank
    "linear": lambda rank: nn.Identity(),
    "relu": lambda rank: nn.ReLU(),
    "relu6": lambda rank: nn.ReLU6(),
    "sigmoid": lambda rank: nn.Sigmoid(),
    "tanh": lambda rank: nn.Tanh(),
    "silu": lambda rank: nn.SiLU(),
    "elu": lambda rank: nn.ELU(),
    "softmax": lambda rank: nn.Softmax(1),
}


def activation(layer: Any, rank: int) -> list[nn.Module]:
    function = layer.activation
    name = getattr(function, "__name__", "?")
    seen = f"activation {name!r}" + (f" of {function.__module__}" if name in ACTIVATIONS else "")
    home = str(getattr(function, "__module__", "")).partition(".")[0]
    own = name in ACTIVATIONS and home in ("keras", "tensorflow")
    need(own, layer, f"{seen}; allowed: {', '.join(ACTIVATIONS)} of Keras or TensorFlow")
    return [] if name == "linear" else [ACTIVATIONS[name](rank)]


def convolution(layer: Any, kernel: Tensor, bias: Any, groups: int) -> list[nn.Module]:
    """`kernel` is [cout, cin / groups, kh, kw]."""
    channels_last(layer)
    need(layer.padding in ("same", "valid"), layer, f"padding {layer.padding!r}; allowed: 'same', 'valid'")
    size, stride = kernel.shape[2:], tuple(layer.strides)
    need(max(layer.dilation_rate) == 1, layer, f"dilation {layer.dilation_rate}; allowed: 1")
    symmetric = stride == (1, 1) and all(k % 2 for k in size)
    same = layer.padding == "same" and tuple(size) != (1, 1)
    padding = tuple(k // 2 for k in size) if same and symmetric else (0, 0)
    conv = nn.utils.skip_init(
        nn.Conv2d, kernel.shape[1] * groups, kernel.shape[0], tuple(size), stride, padding, groups=groups,
        bias=bias is not None,
    )  # fmt: skip
    conv.weight.data = kernel.contiguous()
    if bias is not None:
        conv.bias.data = tensor(bias)  # type: ignore[union-attr]
    return [conv] if not same or symmetric else [SamePad(size, stride), conv]


def conv2d(layer: Any, rank: int) -> list[nn.Module]:
    kernel = tensor(layer.kernel).permute(3, 2, 0, 1)
    return convolution(layer, kernel, layer.bias, layer.groups) + activation(layer, rank)


def depthwise(layer: Any, rank: int) -> list[nn.Module]:
    kernel = tensor(layer.kernel).permute(2, 3, 0, 1)  # [cin, multiplier, kh, kw]
    made = convolution(layer, kernel.reshape(-1, 1, *kernel.shape[2:]), layer.bias, kernel.shape[0])
    return made + activation(layer, rank)


def separable(layer: Any, rank: int) -> list[nn.Module]:
    kernel = tensor(layer.depthwise_kernel).permute(2, 3, 0, 1)
    made = convolution(layer, kernel.reshape(-1, 1, *kernel.shape[2:]), None, kernel.shape[0])
    weight = tensor(layer.pointwise_kernel).permute(3, 2, 0, 1)
    point = nn.utils.skip_init(nn.Conv2d, weight.shape[1], weight.shape[0], 1, bias=layer.bias is not None)
    point.weight.data = weight.contiguous()
    if layer.bias is not None:
        point.bias.data = tensor(layer.bias)  # type: ignore[union-attr]
    return [*made, point, *activation(layer, rank)]


def batch_norm(layer: Any, rank: int) -> list[nn.Module]:
    axis = layer.axis if isinstance(layer.axis, int) else layer.axis[0]
    need(axis in (-1, rank - 1), layer, f"axis {layer.axis}; allowed: the last")
    mean = tensor(layer.moving_mean)
    bn = (nn.BatchNorm2d if rank == 4 else nn.BatchNorm1d)(mean.numel(), eps=layer.epsilon)
    assert bn.running_mean is not None and bn.running_var is not None
    bn.running_mean, bn.running_var = mean, tensor(layer.moving_variance)
    if layer.gamma is not None:
        bn.weight.data = tensor(layer.gamma)
    if layer.beta is not None:
        bn.bias.data = tensor(layer.beta)
    return [bn]


def pool(kind: str) -> Callable[[Any, int], list[nn.Module]]:
    def make(layer: Any, rank: int) -> list[nn.Module]:
        channels_last(layer)
        size, stride = tuple(layer.pool_size), tuple(layer.strides)
        padding = [0, 0]
        if layer.padding == "same":
            odd = all(k % 2 or s > 1 for k, s in zip(size, stride, strict=True))
            need(odd, layer, f"even size {size} with stride 1, padded; allowed: odd sizes")
            if stride != (1, 1):
                return [SamePool(kind, size, stride)]
            padding = [k // 2 for k in size]
        if kind == "max":
            return [nn.MaxPool2d(size, stride, tuple(padding))]  # type: ignore[arg-type]
        return [nn.AvgPool2d(size, stride, tuple(padding), count_include_pad=False)]  # type: ignore[arg-type]

    return make


def global_pool(kind: str) -> Callable[[Any, int], list[nn.Module]]:
    def make(layer: Any, rank: int) -> list[nn.Module]:
        channels_last(layer)
        keep = bool(layer.keepdims)
        if kind == "max":
            return [Lambda(lambda x: x.amax((2, 3), keepdim=keep))]
        return [nn.AdaptiveAvgPool2d(1)] if keep else [nn.AdaptiveAvgPool2d(1), nn.Flatten(1)]

    return make


def zero_padding(layer: Any, rank: int) -> list[nn.Module]:
    channels_last(layer)
    (top, bottom), (left, right) = layer.padding
    return [nn.ZeroPad2d((left, right, top, bottom))]


def dense(layer: Any, rank: int) -> list[nn.Module]:
    need(rank == 2, layer, f"input of rank {rank}; allowed: 2")
    need(not layer.quantization_mode, layer, f"quantised to {layer.quantization_mode}; allowed: floating point weights")
    weight = tensor(layer.kernel).T
    made = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=layer.bias is not None)
    made.weight.data = weight.contiguous()
    if layer.bias is not None:
        made.bias.data = tensor(layer.bias)
    return [made, *activation(layer, rank)]


def relu(layer: Any, rank: int) -> list[nn.Module]:
    plain = layer.negative_slope == 0 and layer.threshold == 0 and layer.max_value in (None, 6)
    need(plain, layer, "slope or threshold; allowed: a plain ReLU, or one cut off at 6")
    return [nn.ReLU() if layer.max_value is None else nn.ReLU6()]


def softmax(layer: Any, rank: int) -> list[nn.Module]:
    need(layer.axis in (-1, rank - 1), layer, f"axis {layer.axis}; allowed: the last")
    return [nn.Softmax(1)]


def flatten(layer: Any, rank: int) -> list[nn.Module]:
    channels_last(layer)
    return [Lambda(lambda x: x.permute(0, 2, 3, 1).flatten(1))] if rank == 4 else [nn.Flatten(1)]


def concatenate(layer: Any, rank: int) -> list[nn.Module]:
    need(layer.axis % rank, layer, f"axis {layer.axis}; allowed: any but the batch")
    axis = (0, 2, 3, 1)[layer.axis % 4] if rank == 4 else layer.axis % rank
    return [Lambda(lambda *xs: torch.cat(xs, axis))]


def merged(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, int], list[nn.Module]]:
    """Of two or more tensors; rows stand for maps of one pixel where there are maps, as in Keras."""

    def merge(*xs: Tensor) -> Tensor:
        rank = max(x.ndim for x in xs)
        return reduce(function, [x if x.ndim == rank else x[:, :, None, None] for x in xs])

    return lambda layer, rank: [Lambda(merge)]


def residual(layer: Any, rank: int) -> list[nn.Module]:
    scale = float(layer.scale)
    return [Lambda(lambda x, up: x + scale * up)]


def rescaling(layer: Any, rank: int) -> list[nn.Module]:
    scalars = np.ndim(layer.scale) == 0 and np.ndim(layer.offset) == 0
    need(scalars, layer, "a scale or offset for each channel; allowed: numbers")
    scale, offset = float(layer.scale), float(layer.offset)
    if not offset:  # as ahead of a residual sum, whose form the engine knows
        return [Lambda(lambda x: x * scale)]
    return [Lambda(lambda x: x * scale + offset)]


def unit_norm(layer: Any, rank: int) -> list[nn.Module]:
    need(layer.axis in (-1, rank - 1), layer, f"axis {layer.axis}; allowed: the last")
    return [Lambda(lambda x: F.normalize(x, p=2.0, dim=1))]


def conv_bn_relu(layer: Any, rank: int) -> list[nn.Module]:
    return [*conv2d(layer.conv, rank), *batch_norm(layer.bn, rank), nn.ReLU()]


def asymmetric_pair(layer: Any, rank: int) -> list[nn.Module]:
    return conv_bn_relu(layer.first, rank) + conv_bn_relu(layer.second, rank)


class Split(nn.Module):
    """Two branches on one input, concatenated."""

    def __init__(self, first: Sequence[nn.Module], second: Sequence[nn.Module]) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(*first), nn.Sequential(*second)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x), self.second(x)], 1)


def identity(layer: Any, rank: int) -> list[nn.Module]:
    return []


LAYERS: dict[str, Callable[[Any, int], list[nn.Module]]] = {
    "Activation": activation,
    "Add": merged(operator.add),
    "AsymmetricPair": asymmetric_pair,
    "AveragePooling2D": pool("avg"),
    "BatchNormalization": batch_norm,
    "Concatenate": concatenate,
    "Conv2D": conv2d,
    "ConvBNReLU": conv_bn_relu,
    "CustomScaleLayer": residual,  # the residual sum of Keras' own InceptionResNetV2
    "Dense": dense,
    "DepthwiseConv2D": depthwise,
    "Dropout": identity,
    "Flatten": flatten,
    "GaussianNoise": identity,
    "GlobalAveragePooling2D": global_pool("avg"),
    "GlobalMaxPooling2D": global_pool("max"),
    "Identity": identity,
    "InputLayer": identity,
    "MaxPooling2D": pool("max"),
    "Multiply": merged(operator.mul),
    "ParallelSplit": lambda layer, rank: [Split(conv_bn_relu(layer.first, rank), conv_bn_relu(layer.second, rank))],
    "ReLU": relu,
    "Rescaling": rescaling,
    "Residual": residual,
    "SeparableConv2D": separable,
    "Softmax": softmax,
    "SpatialDropout2D": identity,
    "UnitNormalization": unit_norm,
    "ZeroPadding2D": zero_padding,
}
