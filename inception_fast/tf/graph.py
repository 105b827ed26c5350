"""A functional Keras model as a torch module: its graph, node by node, in the layers of `translate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from torch import Tensor, nn

from .inputs import Inputs, graph_of
from .translate import LAYERS, Lambda, need

MERGES = ("Add", "Multiply")
"""Layers that take tensors of several ranks."""
SUMS = (*MERGES, "CustomScaleLayer", "Residual")
"""Layers that Keras computes in the integers that they are given, with their wrapping round; others make floats."""

ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {  # keras.ops on the way, as `preprocess_input` leaves them
    "Add": lambda a, b: a + b,
    "Divide": lambda a, b: a / b,
    "Multiply": lambda a, b: a * b,
    "Subtract": lambda a, b: a - b,
    "TrueDivide": lambda a, b: a / b,
}


def arithmetic(operation: Any, node: Any) -> nn.Module:
    """An operator between tensors of equal rank, or a tensor and a number; or a cast."""
    if type(operation).__name__ == "Cast":
        return cast(node)
    sides = (*node.arguments.args, *node.arguments.kwargs.values())
    known = type(operation).__name__ in ARITHMETIC and len(sides) == 2
    number = [None if keras.backend.is_keras_tensor(side) else side for side in sides]
    plain = known and all(side is None or np.ndim(side) == 0 for side in number)
    equal = plain and len({len(t.shape) for t in node.input_tensors}) == 1
    need(equal, operation, f"an operator; allowed: {', '.join(ARITHMETIC)} of tensors of one rank and numbers")
    _need_floats(operation, node.input_tensors)
    function = ARITHMETIC[type(operation).__name__]
    if number[0] is not None:
        left = float(number[0])
        return Lambda(lambda x: function(left, x))
    if number[1] is not None:
        right = float(number[1])
        return Lambda(lambda x: function(x, right))
    return Lambda(lambda a, b: function(a, b))


def cast(node: Any) -> nn.Module:
    """To floats, which all values are here."""
    dtype = keras.backend.standardize_dtype(node.output_tensors[0].dtype)
    need(keras.backend.is_float_dtype(dtype), node.operation, f"a cast to {dtype}; allowed: to floats")
    return nn.Identity()


def _need_floats(operation: Any, sources: list[Any]) -> None:
    seen = {keras.backend.standardize_dtype(t.dtype) for t in sources}
    floats = all(map(keras.backend.is_float_dtype, seen))
    need(
        floats,
        operation,
        f"arithmetic of {', '.join(sorted(seen))}; allowed: of floats, as a Rescaling or a cast makes",
    )


class Translated(nn.Module):
    """Runs the steps of a Keras graph: [n, c, h, w] maps and [n, c] rows -> a tuple of the model's outputs."""

    def __init__(self, model: keras.Model) -> None:
        super().__init__()
        self.inputs = [id(t) for t in model.inputs]
        self.outputs = [id(t) for t in model.outputs]
        self.modules_of = nn.ModuleList()
        self.steps: list[tuple[list[int], list[int]]] = []
        made: dict[tuple[int, int], nn.Module] = {}  # by layer and rank
        for node in _in_order(model):
            operation, sources = node.operation, _sources(node)
            self.steps.append(([id(t) for t in sources], [id(t) for t in node.output_tensors]))
            if not isinstance(operation, keras.layers.Layer):
                self.modules_of.append(
                    cast(node) if type(operation).__name__ == "Cast" else arithmetic(operation, node)
                )
                continue
            ranks = {len(t.shape) for t in sources}
            mixed = len(ranks) == 1 or isinstance(operation, keras.Model) or type(operation).__name__ in MERGES
            need(mixed, operation, f"inputs of ranks {sorted(ranks)}; allowed: of one rank")
            if type(operation).__name__ in SUMS:
                _need_floats(operation, sources)
            key = id(operation), len(sources[0].shape)
            if key not in made:
                made[key] = _module(operation, key[1])
            self.modules_of.append(made[key])

    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(self.inputs, xs, strict=True))
        for module, (sources, results) in zip(self.modules_of, self.steps, strict=True):
            y = module(*(values[source] for source in sources))
            values.update(zip(results, y if isinstance(y, tuple) else (y,), strict=True))
        return tuple(values[output] for output in self.outputs)


def _sources(node: Any) -> list[Any]:
    """What an operation reads, in the order of its native form."""
    operation, sources = node.operation, list(node.input_tensors)
    if not isinstance(operation, keras.layers.Layer):
        return sources
    arguments: list[tuple[Any, Any]] = [*enumerate(node.arguments.args), *node.arguments.kwargs.items()]
    given, *others = arguments
    beside = [str(key) for key, value in others if any(map(keras.backend.is_keras_tensor, keras.tree.flatten(value)))]
    need(not beside, operation, f"tensors as arguments {', '.join(beside)}; allowed: as its input alone")
    return Inputs(graph_of(operation)).flatten(given[1]) if isinstance(operation, keras.Model) else sources


def _in_order(model: keras.Model) -> list[Any]:
    """The nodes between the model's inputs and outputs, each after those that it reads."""
    seen = {id(t) for t in model.inputs}
    done: list[Any] = []
    stack = [(t, False) for t in reversed(model.outputs)]
    while stack:
        tensor, ready = stack.pop()
        if id(tensor) in seen:
            continue
        history = tensor._keras_history
        node = history.operation._inbound_nodes[history.node_index]
        if ready:
            done.append(node)
            seen.update(id(t) for t in node.output_tensors)
        else:
            stack.append((tensor, True))
            stack += [(t, False) for t in reversed(node.input_tensors)]
    return done


def _module(layer: Any, rank: int) -> nn.Module:
    if isinstance(layer, keras.Model):
        return translate(layer)
    name = type(layer).__name__
    # Layers of the same name that someone else wrote may do anything.
    home = type(layer).__module__.partition(".")[0]
    known = name in LAYERS and home in ("keras", "inception_fast")
    need(known, layer, f"no native form; allowed: {', '.join(LAYERS)}")
    made = LAYERS[name](layer, rank)
    return made[0] if len(made) == 1 else nn.Sequential(*made)


def translate(model: keras.Model) -> Translated:
    """A functional or built sequential Keras model as a torch module in eval mode.

    Raises TypeError for another kind of model, UnsupportedLayer (a ValueError) naming the first layer without a torch
    form.
    """
    module = Translated(graph_of(model))
    module.eval().requires_grad_(False)
    return module
