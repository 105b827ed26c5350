"""The drop-in layers for Keras: trainable, savable, NHWC. Each is built of plain Keras layers, its children.

With statistics that do not move, XLA and TensorFlow's own rewriter fuse each convolution with the scale, shift and ReLU
behind it; `fold_batch_norm` makes that one convolution with a bias, `optimize` one native step.
"""

from __future__ import annotations

from typing import Any

import keras

from .._numbers import odd_length, plain

__all__ = ["AsymmetricPair", "ConvBNReLU", "ParallelSplit", "Residual"]

PACKAGE = "inception_fast"
ORDERS = ("1xn_nx1", "nx1_1xn")
EPSILON, MOMENTUM = 1e-3, 0.99
"""Of batch norm, as Keras and its applications have them; Keras' momentum is one minus torch's."""

KernelSize = int | tuple[int, int]


def _inherited(layer: keras.layers.Layer) -> dict[str, Any]:
    """What children take from their layer. Keras hands `trainable` down where it is set, not where layers are made."""
    return {"dtype": layer.dtype_policy, "trainable": layer.trainable}


@keras.saving.register_keras_serializable(PACKAGE)
class ConvBNReLU(keras.layers.Layer):
    """y = relu(bn(conv(x))): [n, h, w, c] -> [n, oh, ow, filters]. Children `conv`, without bias, and `bn`.

    Args:
        padding: "valid" or "same".
        scale: whether batch norm has a factor (gamma) of its own; without, as in Keras' nets, by default.

    Example:
        y = ConvBNReLU(32, 3, padding="same")(x)
    """

    def __init__(
        self,
        filters: int,
        kernel_size: KernelSize,
        strides: KernelSize = 1,
        padding: str = "valid",
        epsilon: float = EPSILON,
        momentum: float = MOMENTUM,
        scale: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.filters, self.kernel_size, self.strides, self.padding = filters, kernel_size, strides, padding
        self.epsilon, self.momentum, self.scale = epsilon, momentum, scale
        self.conv = keras.layers.Conv2D(
            filters,
            kernel_size,
            strides,
            padding,
            data_format="channels_last",
            use_bias=False,
            kernel_initializer="he_uniform",
            name="conv",
            **_inherited(self),
        )
        self.bn = keras.layers.BatchNormalization(
            momentum=momentum, epsilon=epsilon, scale=scale, name="bn", **_inherited(self)
        )

    def build(self, input_shape: Any) -> None:
        self.conv.build(input_shape)
        self.bn.build(self.conv.compute_output_shape(input_shape))

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return keras.ops.relu(self.bn(self.conv(inputs), training=training))

    def compute_output_shape(self, input_shape: Any) -> Any:
        return self.conv.compute_output_shape(input_shape)

    def get_config(self) -> dict[str, Any]:
        names = ("filters", "kernel_size", "strides", "padding", "epsilon", "momentum", "scale")
        return super().get_config() | {name: plain(getattr(self, name)) for name in names}


class _Two(keras.layers.Layer):
    """Two ConvBNReLU children, `first` and `second`, padded SAME, with kernels of `length` along one axis each."""

    def _child(self, name: str, filters: int, kernel_size: tuple[int, int], options: dict[str, Any]) -> ConvBNReLU:
        return ConvBNReLU(filters, kernel_size, padding="same", name=name, **_inherited(self), **options)


@keras.saving.register_keras_serializable(PACKAGE)
class AsymmetricPair(_Two):
    """A 1xn and an nx1 ConvBNReLU in a row, padded SAME: [n, h, w, c] -> [n, h, w, filters].

    Args:
        mid: channels between the two.
        n: the kernel's length, odd.
        order: "1xn_nx1" or "nx1_1xn".
        options: epsilon, momentum and scale of both batch norms.
    """

    def __init__(
        self,
        mid: int,
        filters: int,
        n: int,
        order: str = "1xn_nx1",
        epsilon: float = EPSILON,
        momentum: float = MOMENTUM,
        scale: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if order not in ORDERS:
            raise ValueError(f"order {order!r}; allowed: {', '.join(ORDERS)}")
        n = odd_length(n)
        self.mid, self.filters, self.n, self.order = mid, filters, n, order
        self.epsilon, self.momentum, self.scale = epsilon, momentum, scale
        options = {"epsilon": epsilon, "momentum": momentum, "scale": scale}
        kernels = ((1, n), (n, 1)) if order == ORDERS[0] else ((n, 1), (1, n))
        self.first = self._child("first", mid, kernels[0], options)
        self.second = self._child("second", filters, kernels[1], options)

    def build(self, input_shape: Any) -> None:
        self.first.build(input_shape)
        self.second.build(self.first.compute_output_shape(input_shape))

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.second(self.first(inputs, training=training), training=training)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (*input_shape[:-1], self.filters)

    def get_config(self) -> dict[str, Any]:
        names = ("mid", "filters", "n", "order", "epsilon", "momentum", "scale")
        return super().get_config() | {name: plain(getattr(self, name)) for name in names}


@keras.saving.register_keras_serializable(PACKAGE)
class ParallelSplit(_Two):
    """A 1xn and an nx1 ConvBNReLU side by side, padded SAME: [n, h, w, c] -> [n, h, w, filters1 + filters2].

    Args:
        filters1: output channels of the 1xn layer, `first`.
        filters2: those of the nx1 layer, `second`; as many as filters1 by default.
        n: the kernel's length, odd.
    """

    def __init__(
        self,
        filters1: int,
        filters2: int | None = None,
        n: int = 3,
        epsilon: float = EPSILON,
        momentum: float = MOMENTUM,
        scale: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        n = odd_length(n)
        self.filters1, self.filters2, self.n = filters1, filters1 if filters2 is None else filters2, n
        self.epsilon, self.momentum, self.scale = epsilon, momentum, scale
        options = {"epsilon": epsilon, "momentum": momentum, "scale": scale}
        self.first = self._child("first", self.filters1, (1, n), options)
        self.second = self._child("second", self.filters2, (n, 1), options)

    def build(self, input_shape: Any) -> None:
        self.first.build(input_shape)
        self.second.build(input_shape)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        halves = [self.first(inputs, training=training), self.second(inputs, training=training)]
        return keras.ops.concatenate(halves, axis=-1)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (*input_shape[:-1], self.filters1 + self.filters2)

    def get_config(self) -> dict[str, Any]:
        names = ("filters1", "filters2", "n", "epsilon", "momentum", "scale")
        return super().get_config() | {name: plain(getattr(self, name)) for name in names}


@keras.saving.register_keras_serializable(PACKAGE)
class Residual(keras.layers.Layer):
    """y = x + scale * up, of the two inputs [x, up]."""

    def __init__(self, scale: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scale = scale

    def call(self, inputs: Any) -> Any:
        x, up = inputs
        return x + up * self.scale

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape[0]

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"scale": self.scale}
