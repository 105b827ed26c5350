"""Weights between Keras models, our torch models, TF-slim checkpoints and files, without changing a bit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import torch
from torch import Tensor

from ..models import InceptionNet
from ..models import create_model as create_torch
from ..models._registry import build
from ..weights import Source, WeightsError, resolve, slim
from ..weights._room import make_sure_of_room
from ..weights._source import for_numpy
from ..weights.keras import check_beginning, layer_names, pads
from ..weights.keras import source as keras_source
from ..weights.names import layers, normalised
from .layers import EPSILON

SUFFIXES = (".keras", ".weights.h5")
"""Of the files that `convert` writes: a model that Keras loads by itself, and its weights alone."""


def torch_net(
    name: str, weights: Any, classes: int, channels: int, include_top: bool, options: dict[str, Any]
) -> InceptionNet:
    """Our torch model of a file's weights. Raises ValueError where the file has no classifier of `classes` classes."""
    source = resolve(weights, name)
    if include_top and classes:
        allowed = {source.file_classes, source.options["num_classes"]} - {0}
        if classes not in allowed:
            seen = " or ".join(map(str, sorted(allowed))) or "none"
            raise ValueError(f"classes={classes}, {weights} has {seen}; allowed: these, or include_top=False")
    if not include_top and source.options.get("embedding_size", 0) is None:
        return _trunk(source, channels)
    # How the Keras net pools is its own argument, whatever the file's net did.
    net = create_torch(name, weights=weights, num_classes=classes, in_chans=channels, global_pool="avg", **options)
    assert isinstance(net, InceptionNet)
    options_of(net)
    return net


def _trunk(source: Source, channels: int) -> InceptionNet:
    """The net of a file that ends before the bottleneck, which is random: the Keras net without top has none either."""
    net = build(source.model, **source.options)
    bottleneck = {k: value for k, value in net.state_dict().items() if k.startswith(("last_linear.", "last_bn."))}
    replace(source, tensors={**bottleneck, **source.tensors}).load(net)
    net.adapt_in_chans(channels)
    return net


def options_of(net: InceptionNet) -> dict[str, Any]:
    """What `inception_fast.tf.create_model` must be told to make the same net.

    Raises ValueError for options that have no Keras net.
    """
    only = {"fid": False, "classic": False, "transform_input": False, "widths": "slim", "global_pool": "avg"}
    for option, allowed in only.items():
        value = getattr(net.options, option, allowed)
        if value != allowed:
            raise ValueError(f"{net.variant} with {option}={value!r} has no Keras net; allowed: {option}={allowed!r}")
    if net.options.bn_eps != 1e-3:
        raise ValueError(f"bn_eps={net.options.bn_eps} has no Keras net; allowed: 0.001")
    return {
        "convention": net.convention,
        "stem": getattr(net.options, "stem", None),
        "embedding_size": getattr(net.options, "embedding_size", None),
    }


def needs_scale(state: Mapping[str, Tensor]) -> bool:
    """Whether a batch norm's factor is not one: a Keras net without gamma could not hold it."""
    factors = (state[key.replace("running_mean", "weight")] for key in state if key.endswith("running_mean"))
    return any(bool((factor != 1).any()) for factor in factors)


def assign(model: keras.Model, variant: str, stem: str, state: Mapping[str, Tensor]) -> None:
    """Copies a torch state dict into the Keras net of the same variant."""
    present = {layer.name: layer for layer in model.layers}
    for layer in layers(variant, stem):
        name, norm = layer_names(variant, stem)[layer.path]
        if name not in present:
            continue
        values: dict[str, Tensor]
        if layer.kind == "separable":
            depthwise = state[f"{layer.path}.depthwise.weight"]  # [cin * multiplier, 1, kh, kw]
            kernel = present[name].depthwise_kernel.shape
            values = {
                "depthwise_kernel": depthwise.reshape(kernel[2], kernel[3], *kernel[:2]).permute(2, 3, 0, 1),
                "pointwise_kernel": state[f"{layer.path}.pointwise.weight"].permute(2, 3, 1, 0),
                "bias": state[f"{layer.path}.pointwise.bias"],
            }
        else:
            path, bn = normalised(layer)
            weight = state[f"{path}.weight"]
            values = {"kernel": weight.T if weight.ndim == 2 else weight.permute(2, 3, 1, 0)}
            if bn:
                _set(present[norm], _norm_values(state, bn, present[norm].scale))
            else:
                values["bias"] = state[f"{path}.bias"]
        _set(present[name], values)


def _norm_values(state: Mapping[str, Tensor], bn: str, scale: bool) -> dict[str, Tensor]:
    values = {"beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
    found = {name: state[f"{bn}.{leaf}"] for name, leaf in values.items()}
    factor = state[f"{bn}.weight"]
    if scale:
        found["gamma"] = factor
    elif bool((factor != 1).any()):
        raise ValueError(f"{bn}.weight is not one everywhere; allowed: that, or bn_scale=True")
    return found


def _set(layer: keras.layers.Layer, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        getattr(layer, name).assign(np.ascontiguousarray(for_numpy(value).numpy()))


def source_of(model: keras.Model) -> Source:
    """The weights of a Keras net, ours or Keras' own InceptionV3 or InceptionResNetV2, under our torch names.

    Raises WeightsError (a ValueError) for another model.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model of type {type(model).__name__}; allowed: keras.Model")
    variables = {layer.name: _variables(layer) for layer in model.layers if layer.weights}
    return keras_source(f"model {model.name!r}", variables, padded=pads(_kinds(model)))


def _kinds(model: keras.Model) -> list[tuple[str, str]]:
    """(kind, name) of the layers and operators of a model, in order."""
    return [(type(operation).__name__, operation.name) for operation in getattr(model, "operations", model.layers)]


def _variables(layer: keras.layers.Layer) -> dict[str, Tensor]:
    """A layer's variables by name; what LoRA adds to a kernel is in it. Raises WeightsError for quantised ones."""
    if isinstance(layer, keras.layers.Dense) and layer.quantization_mode:
        seen = f"layer {layer.name!r} is quantised to {layer.quantization_mode}"
        raise WeightsError(f"{seen}; allowed: floating point weights")
    values = {v.path.rpartition("/")[2]: v for v in layer.weights}
    if getattr(layer, "lora_enabled", False):
        values = {name: v for name, v in values.items() if not name.startswith("lora_")} | {"kernel": layer.kernel}
    return {name: _tensor(v) for name, v in values.items()}


def _tensor(variable: Any) -> Tensor:
    """The values of a variable; of a type that torch cannot take from NumPy, as bfloat16, in float32."""
    array = np.array(keras.ops.convert_to_numpy(variable))
    return torch.from_numpy(array if array.dtype.kind == "f" else array.astype(np.float32))


def to_torch(model: keras.Model) -> InceptionNet:
    """Our torch model with the weights of a Keras net, ours or Keras' own, in eval mode.

    Without the top it ends in pooled features: averages, or maxima where the Keras net has these.

    Raises WeightsError (a ValueError) for another model, and for layers before the net, which have no place in it.
    """
    source = source_of(model)
    _check_epsilon(model)
    check_beginning(f"model {model.name!r}", source, _kinds(model))
    if source.options.get("embedding_size", 0) is None:
        raise WeightsError(f"model {model.name!r} has no top; allowed for {source.model}: include_top=True")
    maxima = any(isinstance(layer, keras.layers.GlobalMaxPooling2D) for layer in model.layers)
    net = build(source.model, **source.options, global_pool="max" if maxima else "avg")
    source.load(net)
    return net.eval()  # type: ignore[return-value]


def _check_epsilon(model: keras.Model) -> None:
    """Raises WeightsError for a batch norm whose epsilon is not that of the variants: weights alone do not tell it."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization) and layer.epsilon != EPSILON:
            seen = f"model {model.name!r}: layer {layer.name!r} has epsilon={layer.epsilon}"
            raise WeightsError(f"{seen}; allowed: {EPSILON}")


def from_torch(net: InceptionNet, input_shape: tuple[int | None, int | None, int] | None = None) -> keras.Model:
    """The Keras net of one of our torch models, with its weights.

    Args:
        input_shape: (h, w, c); by default the size of the model's `data_config`.

    Raises ValueError for options that have no Keras net, such as `fid`, `classic` and `global_pool="max"`.
    """
    from .models import create_model

    if not isinstance(net, InceptionNet):
        raise TypeError(f"net of type {type(net).__name__}; allowed: models of inception_fast.create_model")
    state = net.state_dict()
    options = options_of(net)
    shape = input_shape or (*net.data_config.input_size[1:], net.in_chans)
    if len(shape) == 3 and shape[2] != net.in_chans:
        raise ValueError(f"input_shape={shape!r} for a net of {net.in_chans} channels; allowed: (h, w, {net.in_chans})")
    model = create_model(
        net.variant,
        classes=net.num_classes,
        input_shape=shape,
        aux_logits=net.aux_logits,
        bn_scale=needs_scale(state),
        **options,
    )
    assign(model, net.variant, options["stem"] or "separable", state)
    return model


def save_slim(model: keras.Model, prefix: str | os.PathLike[str]) -> None:
    """Writes a Keras net's weights as a TF-slim checkpoint of the V2 format: PREFIX.index, PREFIX.data-00000-of-00001.

    Raises WeightsError (a ValueError) for a model that is none of the variants.
    """
    source = source_of(model)
    _check_epsilon(model)
    slim.write(Path(prefix), source)


def convert(src: str | os.PathLike[str], dst: str | os.PathLike[str], model: str | None = None) -> Source:
    """Writes the weights of `src`, a path or "hf:<repo>", as a Keras file and returns what was written.

    `dst` ends in ".keras", a model that Keras loads by itself, or in ".weights.h5", the weights alone. The file appears
    when it is complete; until then an existing one stays as it was.

    Weights alone do not tell the convention: who loads a ".weights.h5" of a net of convention "torch" must pass
    `convention="torch"`. A ".keras" tells. Both are float32, whatever the dtype policy of Keras.

    Raises WeightsError (a ValueError) or FileNotFoundError as `inception_fast.weights.resolve` does, ValueError for
    another suffix.
    """
    target = Path(dst)
    suffix = next((s for s in SUFFIXES if target.name.endswith(s)), None)
    if suffix is None:
        raise ValueError(f"{target} is no Keras file; allowed: {', '.join(SUFFIXES)}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {target.parent} to write {target.name} to")
    if target.is_dir():
        raise ValueError(f"{target} is a folder; allowed: a file name")
    source = resolve(src, model)
    net = build(source.model, **source.options)
    source.load(net)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")  # another one may round the weights
    try:
        made = from_torch(net)
    finally:
        keras.config.set_dtype_policy(policy)
    make_sure_of_room(target, net.state_dict())
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        scratch = Path(folder) / f"model{suffix}"
        made.save(scratch) if suffix == ".keras" else made.save_weights(scratch)
        os.replace(scratch, target)
    return source
