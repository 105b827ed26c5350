"""The variants as Keras Applications has its models: a function each, softmax by default, ImageNet's class names."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import keras

from .._numbers import is_integer, plain
from .models import create_model

__all__ = [
    "InceptionResNetV1",
    "InceptionResNetV2",
    "InceptionV1",
    "InceptionV2",
    "InceptionV3",
    "InceptionV4",
    "decode_predictions",
    "preprocess_input",
]


def _application(variant: str, function: str) -> Callable[..., keras.Model]:
    def make(
        include_top: bool = True,
        weights: str | os.PathLike[str] | None = None,
        input_tensor: Any = None,
        input_shape: tuple[int | None, int | None, int] | None = None,
        pooling: str | None = None,
        classes: int = 1000,
        classifier_activation: Any = "softmax",
        name: str | None = None,
    ) -> keras.Model:
        return create_model(
            variant,
            weights,
            classes,
            include_top,
            pooling,
            input_shape,
            classifier_activation=classifier_activation,
            input_tensor=input_tensor,
            model_name=name or variant,
        )

    make.__name__ = make.__qualname__ = function
    make.__doc__ = (
        f"{variant} with the arguments of Keras Applications; `weights` is a path or hf:<repo>. See `create_model`."
    )
    return make


InceptionV1 = _application("inception_v1", "InceptionV1")
InceptionV2 = _application("inception_v2", "InceptionV2")
InceptionV3 = _application("inception_v3", "InceptionV3")
InceptionV4 = _application("inception_v4", "InceptionV4")
InceptionResNetV1 = _application("inception_resnet_v1", "InceptionResNetV1")
InceptionResNetV2 = _application("inception_resnet_v2", "InceptionResNetV2")


def preprocess_input(x: Any, data_format: str | None = None) -> Any:
    """x / 127.5 - 1 for images in [0, 255], arrays or tensors: what all six variants expect.

    An array of integers becomes a float32 one; one of floats is changed in place, as in Keras Applications.
    """
    return keras.applications.inception_v3.preprocess_input(x, data_format=data_format)


def decode_predictions(preds: Any, top: int = 5) -> list[list[tuple[str, str, float]]]:
    """The `top` classes of each row of [n, 1000] ImageNet scores: (WordNet id, name, score), best first.

    The names come from timm where it is installed, else from the file that Keras downloads. Raises ValueError for
    another shape.
    """
    scores = keras.ops.convert_to_numpy(preds)
    if scores.ndim != 2 or scores.shape[1] != 1000:
        raise ValueError(f"predictions of shape {scores.shape}; allowed: (n, 1000), ImageNet's classes")
    top = plain(top)
    if not is_integer(top) or not 1 <= top <= 1000:
        raise ValueError(f"top={top!r}; allowed: 1 to 1000")
    names = _imagenet_names()
    if names is None:
        return keras.applications.inception_v3.decode_predictions(scores, top=top)
    best = scores.argsort(axis=1)[:, ::-1][:, :top]
    return [[(*names[index], float(row[index])) for index in chosen] for row, chosen in zip(scores, best, strict=True)]


def _imagenet_names() -> list[tuple[str, str]] | None:
    try:
        from timm.data import ImageNetInfo
    except (ImportError, RuntimeError):  # RuntimeError: timm meets a torchvision built for another torch
        return None
    info = ImageNetInfo()
    return [
        (info.index_to_label_name(index), info.index_to_description(index).split(",")[0].replace(" ", "_"))
        for index in range(1000)
    ]
