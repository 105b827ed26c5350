"""What the six functional nets are built with: named convolutions in slim's order of creation, pools, joins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras

from ..weights.keras import layer_names
from ..weights.names import layers
from .layers import EPSILON, MOMENTUM

FORMAT = "channels_last"
Kernel = int | tuple[int, int]
Line = list[tuple[int, Kernel]]
"""A branch: (filters, kernel) of each convolution, stride 1, padded SAME."""


class Net:
    """Makes the layers of one net under the names of its weights; calls must come in the order of `weights.names`.

    convention: "tf" or "torch", as in the torch models: padding of strided SAME operations, counting of average pools.
    scale: whether batch norms have a factor (gamma).
    """

    def __init__(self, model: str, stem: str, convention: str, scale: bool) -> None:
        self.model, self.convention, self.scale = model, convention, scale
        names = layer_names(model, stem)
        self.trunk: Iterator[Any] = iter([names[x.path] for x in layers(model, stem) if not x.aux])
        self.aux: Iterator[Any] = iter([names[x.path] for x in layers(model, stem) if x.aux])

    def conv(
        self, x: Any, filters: int, kernel: Kernel, strides: int = 1, padding: str = "same", names: Any = None
    ) -> Any:
        """Convolution without bias, batch norm, ReLU."""
        name, norm = next(names or self.trunk)
        options = {"use_bias": False, "kernel_initializer": "he_uniform", "data_format": FORMAT}
        x = keras.layers.Conv2D(filters, kernel, strides, padding, name=name, **options)(x)
        x = keras.layers.BatchNormalization(momentum=MOMENTUM, epsilon=EPSILON, scale=self.scale, name=norm)(x)
        return keras.layers.Activation("relu", name=activation_name(name))(x)

    def valid(self, x: Any, filters: int, kernel: Kernel, strides: int = 1) -> Any:
        return self.conv(x, filters, kernel, strides, "valid")

    def line(self, x: Any, *convs: tuple[int, Kernel]) -> Any:
        """Convolutions in a row, (filters, kernel) each, padded SAME."""
        for filters, kernel in convs:
            x = self.conv(x, filters, kernel)
        return x

    def halve(self, x: Any, filters: int, kernel: int) -> Any:
        """A convolution of stride 2, padded by the convention."""
        x, padding = self._pad(x, kernel // 2)
        return self.conv(x, filters, kernel, 2, padding)

    def separable(self, x: Any, filters: int, kernel: int, multiplier: int) -> Any:
        """Depthwise convolution of stride 2, biased 1x1, ReLU; no batch norm."""
        x, padding = self._pad(x, kernel // 2)
        name, _ = next(self.trunk)
        options: dict[str, Any] = {"depthwise_initializer": "he_uniform", "pointwise_initializer": "he_uniform"}
        convolution = keras.layers.SeparableConv2D(
            filters, kernel, 2, padding, FORMAT, depth_multiplier=multiplier, name=name, **options
        )
        return keras.layers.Activation("relu", name=activation_name(name))(convolution(x))

    def _pad(self, x: Any, size: int | tuple[tuple[int, int], tuple[int, int]]) -> tuple[Any, str]:
        """The map and the padding of the strided operation behind it."""
        if self.convention == "tf":
            return x, "same"
        return keras.layers.ZeroPadding2D(size, data_format=FORMAT)(x), "valid"

    def max_pool(self, x: Any, name: str | None = None) -> Any:
        """3x3, stride 2, unpadded."""
        return keras.layers.MaxPooling2D(3, 2, data_format=FORMAT, name=name)(x)

    def halving_pool(self, x: Any, name: str | None = None, size: int = 3) -> Any:
        """Max pool of stride 2, padded by the convention.

        torch's rounds sizes up: one row beyond the map, of zeros here, which do not win over what a ReLU returned.
        """
        x, padding = self._pad(x, ((0, 1), (0, 1)))
        return keras.layers.MaxPooling2D(size, 2, padding, FORMAT, name=name)(x)

    def same_pool(self, x: Any) -> Any:
        """3x3 max pool of stride 2, SAME in both conventions: at odd sizes only this one meets padded convolutions."""
        return keras.layers.MaxPooling2D(3, 2, "same", FORMAT)(x)

    def average(self, x: Any) -> Any:
        """3x3 average of stride 1 that keeps the map's size; convention "torch" counts the padding in v2 and v3."""
        x, padding = self._pad(x, 1) if self.model in ("inception_v2", "inception_v3") else (x, "same")
        return keras.layers.AveragePooling2D(3, 1, padding, FORMAT)(x)

    def branch_max(self, x: Any) -> Any:
        return keras.layers.MaxPooling2D(3, 1, "same", FORMAT)(x)

    def join(self, branches: list[Any], name: str | None = None) -> Any:
        return keras.layers.Concatenate(axis=-1, name=name)(branches)

    def residual(self, x: Any, branches: list[Any], block: str, scale: float, relu: bool = True) -> Any:
        """relu(x + scale * conv1x1(join(branches))), the 1x1 biased; layers named after the block."""
        name, _ = next(self.trunk)
        up = keras.layers.Conv2D(x.shape[-1], 1, kernel_initializer="he_uniform", data_format=FORMAT, name=name)(
            self.join(branches, f"{block}_mixed")
        )
        scaled = up if scale == 1 else keras.layers.Rescaling(scale, name=f"{block}_scale")(up)
        x = keras.layers.Add(name=block)([x, scaled])
        return keras.layers.Activation("relu", name=f"{block}_ac")(x) if relu else x

    def aux_head(self, x: Any, classes: int) -> Any:
        """Auxiliary classifier: [n, 17, 17, c] -> [n, classes]."""
        if None in x.shape[1:3] or min(x.shape[1:3]) < 17:
            raise ValueError(f"the auxiliary head got a map {x.shape}; allowed: 17x17 or larger, a 299x299 input_shape")
        x = keras.layers.AveragePooling2D(5, 3, data_format=FORMAT, name="AuxLogits_pool")(x)
        x = self.conv(self.conv(x, 128, 1, names=self.aux), 768, 5, padding="valid", names=self.aux)
        x = keras.layers.GlobalAveragePooling2D(FORMAT, name="AuxLogits_avg_pool")(x)
        return keras.layers.Dense(classes, name=next(self.aux)[0])(x)


def activation_name(conv: str) -> str:
    """The activation behind a convolution of that name, as Keras' applications call theirs."""
    return conv.replace("conv2d", "activation") if conv.startswith("conv2d") else f"{conv}_ac"
