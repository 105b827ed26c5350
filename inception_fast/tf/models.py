"""`create_model`: a variant as a functional Keras model, its options checked, its weights loaded."""

from __future__ import annotations

import os
from typing import Any

import keras
import torch

from .._numbers import is_integer, plain
from ..models._options import check, check_choice, check_count
from ..models._registry import build, find_family
from .blocks import FORMAT, Net
from .families import AUX_ENDPOINTS, ENDPOINTS, TRUNKS

POOLINGS = (None, "avg", "max")
SIZES = {"inception_v1": 224, "inception_v2": 224, "inception_resnet_v1": 160}
"""Default height and width where it is not 299."""


def create_model(
    name: str,
    weights: str | os.PathLike[str] | None = None,
    classes: int = 1000,
    include_top: bool = True,
    pooling: str | None = None,
    input_shape: tuple[int | None, int | None, int] | None = None,
    *,
    classifier_activation: Any = None,
    aux_logits: bool = False,
    convention: str | None = None,
    stem: str | None = None,
    embedding_size: int | None = None,
    bn_scale: bool | None = None,
    input_tensor: Any = None,
    model_name: str | None = None,
) -> keras.Model:
    """A variant as a functional Keras model: [n, h, w, c] images, x / 127.5 - 1, -> [n, classes] logits.

    Args:
        weights: a path or "hf:<repo>", any layout that `inception_fast.create_model` reads; random ones by default.
        classes: width of the classifier; 0 leaves it out (Inception-ResNet-v1 then returns normalised embeddings).
        include_top: without it, the last map, or what `pooling` makes of it.
        pooling: None, "avg" or "max"; only without the top.
        input_shape: (h, w, c); h and w may be None. By default the variant's own size, any size without the top.
        classifier_activation: None for logits, else as in `keras.layers.Dense`.
        aux_logits: the auxiliary head as second output (v3, v4, Inception-ResNet-v2; 299x299 or larger).
        convention: "tf", as in TF-slim and Keras, or "torch"; by default that of the weights, else "tf".
        stem: "separable" or "plain", v2 only; by default that of the weights, else "separable".
        embedding_size: width of the bottleneck, v1 of the ResNets only; by default that of the weights, else 512.
        bn_scale: whether batch norms have a factor (gamma), as slim's and Keras' have not; by default where weights do.
        input_tensor: a Keras tensor to use as the image; the model begins with what that was made of.

    Raises ValueError or TypeError naming what was seen and what is allowed.
    """
    classes, aux_logits, embedding_size, bn_scale = plain((classes, aux_logits, embedding_size, bn_scale))
    _check(name, classes, include_top, pooling, convention, aux_logits, stem, embedding_size, bn_scale)
    shape = _input_shape(name, input_shape, include_top, input_tensor)
    options: dict[str, Any] = {"convention": convention, "stem": stem, "embedding_size": embedding_size}
    state = None
    if weights is not None:
        from . import transfer  # it makes torch models, which random nets do not need

        wanted = {key: value for key, value in options.items() if value is not None}
        aux = {"aux_logits": aux_logits} if name in AUX_ENDPOINTS else {}
        net = transfer.torch_net(name, weights, classes if include_top else 0, shape[2], include_top, wanted | aux)
        options, state = options | transfer.options_of(net), net.state_dict()
        bn_scale = transfer.needs_scale(state) if bn_scale is None else bn_scale
    image = keras.Input(shape, name="image") if input_tensor is None else input_tensor
    stem = options["stem"] or "separable"
    builder = Net(name, stem, options["convention"] or "tf", bool(bn_scale))
    x = TRUNKS[name](builder, image, stem)
    x = _end(builder, x, include_top, pooling, classes, options["embedding_size"] or 512, classifier_activation)
    model = _model(image, x, model_name or name)
    if aux_logits:
        tap = model.get_layer(AUX_ENDPOINTS[name]).output
        model = _model(image, [x, builder.aux_head(tap, classes)], model.name)
    if state is not None:
        transfer.assign(model, name, stem, state)
    return model


def _pool(kind: str, name: str | None = None) -> keras.layers.Layer:
    made = keras.layers.GlobalAveragePooling2D if kind == "avg" else keras.layers.GlobalMaxPooling2D
    return made(FORMAT, name=name)


def _end(net: Net, x: Any, top: bool, pooling: str | None, classes: int, embedding: int, activation: Any) -> Any:
    if not top:
        return x if pooling is None else _pool(pooling)(x)
    x = _pool("avg", "avg_pool")(x)
    if net.model == "inception_resnet_v1":
        dense, norm = next(net.trunk)
        x = keras.layers.Dense(embedding, use_bias=False, name=dense)(x)
        x = keras.layers.BatchNormalization(epsilon=1e-3, scale=net.scale, name=norm)(x)
        if not classes:
            return keras.layers.UnitNormalization(name="embedding")(x)
    return keras.layers.Dense(classes, activation=activation, name="predictions")(x) if classes else x


def _check(
    name: str,
    classes: Any,
    include_top: Any,
    pooling: Any,
    convention: Any,
    aux: Any,
    stem: Any,
    embedding: Any,
    bn_scale: Any,
) -> None:
    find_family(name)
    check_count("classes", classes, 0)
    check_choice("include_top", include_top, (True, False))
    check_choice("pooling", pooling, POOLINGS)
    check_choice("convention", convention, (None, "tf", "torch"))
    check_choice("stem", stem, (None, "separable", "plain"))
    check_choice("aux_logits", aux, (False, True))
    check_choice("bn_scale", bn_scale, (None, False, True))
    check(not aux or name in AUX_ENDPOINTS, f"aux_logits=True for {name}", ", ".join(AUX_ENDPOINTS))
    check(not aux or (include_top and classes), "aux_logits=True without a classifier", "include_top=True, classes > 0")
    check(stem is None or name == "inception_v2", f"stem={stem!r} for {name}", "inception_v2")
    resnet1 = name == "inception_resnet_v1"
    check(embedding is None or resnet1, f"embedding_size={embedding} for {name}", "inception_resnet_v1")
    if embedding is not None:
        check_count("embedding_size", embedding, 1)


def _input_shape(name: str, shape: Any, include_top: bool, tensor: Any) -> tuple[int | None, int | None, int]:
    least = find_family(name).smallest
    shape = plain(shape)
    if tensor is not None:
        check(keras.backend.is_keras_tensor(tensor), f"input_tensor of type {type(tensor).__name__}", "a Keras tensor")
        shape = tuple(tensor.shape[1:])
    if shape is None:
        size = SIZES.get(name, 299) if include_top else None
        return size, size, 3
    good = isinstance(shape, (tuple, list)) and len(shape) == 3 and is_integer(shape[2]) and shape[2] >= 1
    good = good and all(size is None or (is_integer(size) and size >= least) for size in shape[:2])
    check(good, f"input_shape={shape!r} for {name}", f"(height, width, channels), sizes None or at least {least}")
    return shape[0], shape[1], shape[2]


def _model(image: Any, outputs: Any, name: str) -> keras.Model:
    """The model from what `image` was made of to the outputs."""
    sources = keras.utils.get_source_inputs(image)
    return keras.Model(sources[0] if len(sources) == 1 else sources, outputs, name=name)


def endpoints(model: keras.Model) -> dict[str, Any]:
    """Slim's name of every map of the trunk -> its Keras tensor in `model`, a net of `create_model`.

    Raises ValueError for another model.

    Example:
        maps = keras.Model(model.input, endpoints(model))
    """
    variant, _ = variant_of(model)
    table = ENDPOINTS.get(variant, {})
    present = {layer.name: layer for layer in model.layers}
    with torch.device("meta"):
        names = [name for name, _ in build(variant, num_classes=0).steps if name]
    found = {}
    for name in names:
        layer = table.get(name) or next((c for c in (f"{name}_ac", name) if c in present), name)
        if layer not in present:
            raise ValueError(f"model {model.name!r} has no layer {layer!r}; allowed: models of create_model")
        found[name] = present[layer].output
    return found


def variant_of(model: keras.Model) -> tuple[str, str]:
    """The variant and the stem of a model by the names of its layers. Raises ValueError for another model."""
    from . import transfer

    source = transfer.source_of(model)
    return source.model, source.options.get("stem", "separable")
