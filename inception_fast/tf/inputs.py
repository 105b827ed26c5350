"""A functional model's inputs: the forms in which callers give them, the order in which its graph takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras


def graph_of(model: Any) -> Any:
    """The functional model behind `model`, which may be a sequential one. Raises TypeError for what has no graph."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"model of type {type(model).__name__}; allowed: keras.Model")
    home = type(model).call.__module__
    if home.partition(".")[0] != "keras":
        raise TypeError(
            f"model {model.name!r} of type {type(model).__name__}, whose call is of {home}; allowed: functional and "
            "sequential models that leave call to Keras"
        )
    graph = getattr(model, "_functional", model) if isinstance(model, keras.Sequential) else model
    if not getattr(graph, "inputs", None) or not getattr(graph, "outputs", None):
        raise TypeError(
            f"model {model.name!r} of type {type(model).__name__} has no graph; allowed: functional models and built "
            "sequential ones"
        )
    return graph


class Inputs:
    """Of a functional model, whose `call` matches dictionaries by key or name, and lists by place."""

    def __init__(self, graph: Any) -> None:
        self.structure, self.tensors = graph.input, list(graph.inputs)

    def flatten(self, given: Any) -> list[Any]:
        """One value for each input, in the graph's order. Raises ValueError where one is missing or there are more."""
        if isinstance(given, Mapping):
            return self._by_key(given) if isinstance(self.structure, Mapping) else self._by_name(given)
        # A list would have to follow the order in which the dictionary was written, which flattening does not keep.
        if isinstance(self.structure, dict) and list(self.structure) != sorted(self.structure):
            raise ValueError(f"inputs of type {type(given).__name__}; allowed: a dict of {', '.join(self.structure)}")
        flat: list[Any] = keras.tree.flatten(given)
        if len(flat) != len(self.tensors):
            raise ValueError(f"{len(flat)} inputs; allowed: {len(self.tensors)}")
        return flat

    def pack(self, flat: Sequence[Any]) -> Any:
        """Values in the graph's order as the model was told its inputs."""
        return keras.tree.pack_sequence_as(self.structure, flat)

    def check(self, flat: Iterable[Any]) -> None:
        """Raises ValueError for no tensor, or for what the model does not leave open; of a graph, what is known."""
        for x, wanted in zip(flat, self.tensors, strict=True):
            if not hasattr(x, "shape"):
                raise ValueError(f"input {wanted.name!r} of type {type(x).__name__}; allowed: a tensor")
            if getattr(x.shape, "rank", 0) is None:  # a graph's tensor of any shape
                continue
            seen, allowed = tuple(x.shape), tuple(wanted.shape)
            fits = len(seen) == len(allowed)
            sizes = zip(seen[1:], allowed[1:], strict=True) if fits else ()
            if not fits or any(size != least and None not in (size, least) for size, least in sizes):
                letters = "nhwc" if len(allowed) == 4 else "nc"
                names = (letter if size is None else str(size) for letter, size in zip(letters, allowed, strict=True))
                shape = ", ".join(("n", *tuple(names)[1:]))
                raise ValueError(f"input {wanted.name!r} of shape {seen}; allowed: ({shape})")

    def _by_name(self, given: Mapping[Any, Any]) -> list[Any]:
        names = [x.name for x in self.tensors]
        self._need(set(names) <= set(given), given, names)
        return [given[name] for name in names]

    def _by_key(self, given: Mapping[Any, Any]) -> list[Any]:
        self._need(set(self.structure) <= set(given), given, self.structure)
        found = [given] * len(self.tensors)
        for index, (path, _) in enumerate(keras.tree.flatten_with_path(self.structure)):
            for key in path:
                found[index] = found[index][key]
        return found

    @staticmethod
    def _need(condition: bool, given: Mapping[Any, Any], names: Iterable[Any]) -> None:
        if not condition:
            seen, allowed = (", ".join(map(repr, some)) or "nothing" for some in (given, names))
            raise ValueError(f"a dict of inputs {seen}; allowed: {allowed}")
