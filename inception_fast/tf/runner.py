"""`optimize`: a Keras model's inference on the native engine, tensors handed over by DLPack without a copy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import keras
import torch
from torch import Tensor, nn

from .. import engine
from ..engine import Report
from . import boundary
from .graph import translate
from .inputs import Inputs, graph_of

UNKNOWN_SIZE = 128
"""Height and width of the example where the model leaves them open."""

NO_GRADIENT = "optimised models only infer: no gradient flows through them; train the original model"


class Engines:
    """One optimised module for each device that tensors came from, made at the first of them."""

    def __init__(self, first: nn.Module, make: Callable[[torch.device], nn.Module] | None = None) -> None:
        self._made = {torch.device("cpu"): first}
        self._make, self._lock = make, threading.Lock()

    def on(self, device: torch.device) -> nn.Module:
        with self._lock:
            if device not in self._made:
                if self._make is None:
                    raise ValueError(f"tensor on {device}; allowed: the CPU")
                self._made[device] = self._make(device)
            return self._made[device]


class OptimizedModel(keras.Model):
    """A Keras model's inference, made by `optimize`: call it, map it over a tf.data pipeline, or `predict` with it.

    On TensorFlow a call is eager native code; inside `tf.function` and tf.data it becomes a `tf.py_function`, so a
    graph with it can neither be exported nor compiled by XLA. Threads may call it at once. Tensors on a GPU run the
    engine's GPU plan; `inception_fast.tf.boundary` says how the two libraries wait for each other there, and what of
    it could not be verified: it was not yet measured on hardware.
    """

    def __init__(
        self,
        model: keras.Model,
        engine_module: nn.Module,
        make: Callable[[torch.device], nn.Module] | None = None,
    ) -> None:
        # Under another policy Keras would round what it is given before it calls.
        super().__init__(name=f"{model.name}_optimized", trainable=False, dtype="float32")
        self._engines = Engines(engine_module, make)
        graph = graph_of(model)
        self._inputs = Inputs(graph)
        self._pack = partial(keras.tree.pack_sequence_as, graph.output)  # as an attribute it would become Keras' own
        dtypes = [keras.backend.standardize_dtype(x.dtype) for x in graph.inputs]
        self._whole = [None if keras.backend.is_float_dtype(dtype) else dtype for dtype in dtypes]
        self._spec_of = graph.compute_output_spec
        self._shapes = graph.input_shape, graph.output_shape
        self._guarded: Any = None
        self.supports_jit = False
        self.run_eagerly = True
        self.built = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # An eager tensor needs nothing of what Keras does around a layer, which takes as long as a small net's kernels.
        if len(args) == 1 and not kwargs and type(args[0]).__name__ == "EagerTensor":
            return self.call(args[0])
        return super().__call__(*args, **kwargs)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        if training:
            raise RuntimeError(f"training=True; {NO_GRADIENT}")
        flat = self._inputs.flatten(inputs)
        self._inputs.check(flat)
        flat = [_as_float32(x, whole) for x, whole in zip(flat, self._whole, strict=True)]
        outputs = self._on_torch(flat) if keras.backend.backend() == "torch" else self._on_tensorflow(flat)
        return self._pack(outputs)

    @property
    def input_shape(self) -> Any:
        """(batch, ...) of the one input, or a structure of such; None where a size is open."""
        return self._shapes[0]

    @property
    def output_shape(self) -> Any:
        return self._shapes[1]

    def compute_output_shape(self, input_shape: Any) -> Any:
        specs = self.compute_output_spec(keras.tree.map_shape_structure(keras.KerasTensor, input_shape))
        return keras.tree.map_structure(lambda y: y.shape, specs)

    def compute_output_spec(self, inputs: Any, training: bool | None = None) -> Any:
        pairs = zip(self._inputs.flatten(inputs), self._inputs.tensors, strict=True)
        specs = self._spec_of(self._inputs.pack([keras.KerasTensor(x.shape, wanted.dtype) for x, wanted in pairs]))
        return keras.tree.map_structure(lambda y: keras.KerasTensor(y.shape, "float32"), specs)

    def _run(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """NHWC or [n, c] in, the same out. Both permutations are views: the engine's maps are channels_last."""
        with torch.inference_mode():
            ys = self._engines.on(xs[0].device)(*(x.permute(0, 3, 1, 2) if x.ndim == 4 else x for x in xs))
            return [(y.permute(0, 2, 3, 1) if y.ndim == 4 else y).contiguous() for y in ys]

    def _on_torch(self, xs: Sequence[Tensor]) -> list[Tensor]:
        if torch.is_grad_enabled() and any(x.requires_grad for x in xs):
            raise RuntimeError(NO_GRADIENT)
        return [y.clone() if y.is_inference() and torch.is_grad_enabled() else y for y in self._run(xs)]

    def _on_tensorflow(self, xs: Sequence[Any]) -> list[Any]:
        import tensorflow

        if self._guarded is None:
            self._guarded = tensorflow.custom_gradient(self._with_gradient)
        return list(self._guarded(*map(tensorflow.convert_to_tensor, xs)))  # DLPack takes no variables

    def _with_gradient(self, *tensors: Any) -> tuple[list[Any], Callable[..., NoReturn]]:
        import tensorflow

        def gradient(*_: Any, **__: Any) -> NoReturn:
            raise RuntimeError(NO_GRADIENT)

        if tensorflow.executing_eagerly():
            return self._eager(*tensors), gradient
        known = [
            default if x.shape.rank is None else keras.KerasTensor(x.shape.as_list())
            for x, default in zip(tensors, self._inputs.tensors, strict=True)
        ]
        specs = keras.tree.flatten(self.compute_output_spec(self._inputs.pack(known)))
        results = tensorflow.py_function(self._late, tensors, [tensorflow.float32] * len(specs))
        for result, spec in zip(results, specs, strict=True):
            result.set_shape(spec.shape)
        return results, gradient

    def _late(self, *tensors: Any) -> list[Any]:
        """What a graph calls: shapes that it left open are known by now."""
        self._inputs.check(tensors)
        return self._eager(*tensors)

    def _eager(self, *tensors: Any) -> list[Any]:
        """Eager TensorFlow tensors through the engine."""
        device = boundary.device_of(tensors)
        if device.type == "cpu":
            return boundary.on_cpu(tensors, self._run)
        return boundary.on_gpu(tensors, device, self._run)

    def report(self) -> Report:
        """What became of every captured layer: the engine's report for the example's sizes."""
        found: Report = self._engines.on(torch.device("cpu")).report()  # type: ignore[operator]
        return found

    def fit(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(NO_GRADIENT)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("optimised models hold native code and packed weights; save or export the original model")

    save = save_weights = load_weights = export = get_config = _refuse


def optimize(keras_model: keras.Model, dtype: Any = None, *, winograd: bool = False) -> OptimizedModel:
    """A model that computes what `keras_model` computes with training=False, as one fused plan on the native engine.

    The weights are copied: later changes of `keras_model` do not show. Outputs are float32.

    Args:
        keras_model: a functional or built sequential model of images [n, h, w, c], or rows [n, c].
        dtype: None or "float32", or "bfloat16": what weights and activations are kept in. A torch or TensorFlow dtype
            works too.
        winograd: as `inception_fast.optimize` has it, on the CPU alone: tensors on a GPU are refused then.

    Raises ValueError naming a layer that has no native form, TypeError for what is no Keras graph, RuntimeError where
    Keras runs on another backend than TensorFlow or torch.

    Example:
        fast_model = optimize(model)
        probabilities = fast_model.predict(images)
    """
    if keras.backend.backend() not in ("tensorflow", "torch"):
        raise RuntimeError(f"Keras runs on {keras.backend.backend()}; allowed: tensorflow, torch")
    if isinstance(keras_model, OptimizedModel):
        raise ValueError("model is optimised already; allowed: the original model")
    module, wanted = translate(keras_model), _torch_dtype(dtype)
    example = tuple(_example(x) for x in keras_model.inputs)

    def on_gpu(device: torch.device) -> nn.Module:
        there = tuple(x.to(device) for x in example)
        return engine.optimize(module, there, dtype=wanted, backend="triton", winograd=winograd)

    return OptimizedModel(keras_model, engine.optimize(module, example, dtype=wanted, winograd=winograd), on_gpu)


def _as_float32(x: Any, whole: str | None) -> Any:
    """As functional models take images of bytes and other precisions: an input of integers has a dtype, `whole`, to
    which what is given to it is cast first.
    """
    if whole is not None and keras.backend.standardize_dtype(x.dtype) != whole:
        x = keras.ops.cast(x, whole)
    return x if keras.backend.standardize_dtype(x.dtype) == "float32" else keras.ops.cast(x, "float32")


def _torch_dtype(dtype: Any) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None)
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype={dtype!r}; allowed: None, 'float32', 'bfloat16'")
    return found


def _example(x: Any) -> Tensor:
    shape = [1, *(UNKNOWN_SIZE if size is None else size for size in x.shape[1:])]
    if len(shape) not in (2, 4):
        raise ValueError(f"input {x.name!r} of shape {tuple(x.shape)}; allowed: (n, h, w, c) or (n, c)")
    example = torch.zeros(shape)
    return example.permute(0, 3, 1, 2) if len(shape) == 4 else example
