"""Batch norm folded into the convolution before it: a Keras model for inference with fewer layers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import keras
import numpy as np

from .inputs import graph_of
from .layers import ConvBNReLU

FOLDABLE = (keras.layers.Conv2D, keras.layers.Dense)


def fold_batch_norm(model: keras.Model) -> keras.Model:
    """A copy of a functional model in which each batch norm behind a convolution or dense layer became its bias.

    A batch norm is folded where it alone reads a layer without activation; the others stay, and so does what derives
    from these layers, whose call may be another. The copy computes what `model` computes with training=False, up to
    rounding, and is not for training. `model` stays as it is.

    A built sequential model has a functional copy.

    The folded weights are float32 products, computed in float64 and rounded once.

    Raises TypeError for a model without a graph.
    """
    graph = graph_of(model)
    model = model if graph is model else keras.Model(graph.inputs, graph.outputs, name=model.name)
    folded = _pairs(model)
    layers = {id(conv): bn for conv, bn in folded}
    gone = {bn.name for _, bn in folded}

    def clone(layer: Any) -> Any:
        if type(layer) is ConvBNReLU:
            return _conv(layer.conv, layer.name, "relu")
        if id(layer) in layers:
            return _conv(layer, layer.name)
        return type(layer).from_config(layer.get_config())

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if layer.name not in gone:
            return layer(*args, **kwargs)
        return args[0] if args else kwargs["inputs"]

    copy = keras.models.clone_model(model, clone_function=clone, call_function=call)
    for layer in model.layers:
        if layer.name in gone or not layer.weights:
            continue
        twin = copy.get_layer(layer.name)
        if type(layer) is ConvBNReLU:
            twin.set_weights(_fold(layer.conv, layer.bn))
        elif id(layer) in layers:
            twin.set_weights(_fold(layer, layers[id(layer)]))
        else:
            twin.set_weights(layer.get_weights())
    return copy


def _pairs(model: keras.Model) -> list[tuple[Any, Any]]:
    """(layer, batch norm) that can become one."""
    found = []
    kept = {id(t) for t in model.outputs}
    # Only of this model: its layers may have been called in others, as each `add` of a sequential model does.
    nodes = [node for level in model._nodes_by_depth.values() for node in level]
    calls = Counter(id(node.operation) for node in nodes)
    reads = Counter(id(t) for node in nodes for t in node.input_tensors)
    for node in nodes:
        bn = node.operation
        if type(bn) is not keras.layers.BatchNormalization or calls[id(bn)] != 1:
            continue
        y = node.input_tensors[0]
        source = y._keras_history.operation
        alone = calls[id(source)] == reads[id(y)] == 1 and id(y) not in kept
        linear = type(source) in FOLDABLE and source.activation is keras.activations.linear
        plain = linear and not (isinstance(source, keras.layers.Dense) and source.quantization_mode)
        last = getattr(source, "data_format", "channels_last") == "channels_last"
        if alone and plain and last and bn.axis in (-1, len(y.shape) - 1):
            found.append((source, bn))
    return found


def _conv(layer: Any, name: str, activation: str | None = None) -> Any:
    # The kernel is whole: what LoRA adds to it is in it.
    config = {key: value for key, value in layer.get_config().items() if not key.startswith("lora_")}
    config |= {"use_bias": True, "name": name}
    return type(layer).from_config(config | ({"activation": activation} if activation else {}))


def _fold(layer: Any, bn: Any) -> list[np.ndarray]:
    def value(variable: Any) -> Any:
        return np.asarray(keras.ops.convert_to_numpy(variable), dtype=np.float64)

    scale = 1 / np.sqrt(value(bn.moving_variance) + bn.epsilon)
    scale = scale if bn.gamma is None else scale * value(bn.gamma)
    bias = 0.0 if layer.bias is None else value(layer.bias)
    shift = (bias - value(bn.moving_mean)) * scale
    shift = shift if bn.beta is None else shift + value(bn.beta)
    return [(value(layer.kernel) * scale).astype(np.float32), shift.astype(np.float32)]
