"""`optimize`: a Keras model's inference on the native engine, tensors handed over by DLPack without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import keras
import torch
from torch import Tensor

from .. import engine
from ..engine import Report
from .translate import translate

UNKNOWN_SIZE = 128
"""Height and width of the example where the model leaves them open."""

NO_GRADIENT = "optimised models only infer: no gradient flows through them; train the original model"


class OptimizedModel(keras.Model):
    """A Keras model's inference, made by `optimize`: call it, map it over a tf.data pipeline, or `predict` with it.

    On TensorFlow a call is eager native code; inside `tf.function` and tf.data it becomes a `tf.py_function`, so a
    graph with it can neither be exported nor compiled by XLA. Threads may call it at once.
    """

    def __init__(self, model: keras.Model, engine_module: torch.nn.Module) -> None:
        super().__init__(name=f"{model.name}_optimized", trainable=False)
        # Not a torch submodule, which Keras' torch backend would make of an attribute.
        self._engine = [engine_module]
        self._structure = model.output
        self._shape_of = model.compute_output_shape
        self._rank = [len(x.shape) for x in model.inputs]
        self.supports_jit = False
        self.run_eagerly = True
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        if training:
            raise RuntimeError(f"training=True; {NO_GRADIENT}")
        flat = keras.tree.flatten(inputs)
        if len(flat) != len(self._rank):
            raise ValueError(f"{len(flat)} inputs; allowed: {len(self._rank)}")
        if keras.backend.backend() == "torch":
            outputs = self._on_torch(flat)
        else:
            outputs = self._on_tensorflow(flat, inputs)
        return keras.tree.pack_sequence_as(self._structure, outputs)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return self._shape_of(input_shape)

    def compute_output_spec(self, inputs: Any, training: bool | None = None) -> Any:
        shapes = keras.tree.map_structure(lambda x: tuple(x.shape), inputs)
        shapes = [shapes] if isinstance(self._structure, keras.KerasTensor) else self._shape_of(shapes)
        if isinstance(self._structure, keras.KerasTensor):
            return keras.KerasTensor(self._shape_of(shapes[0]), "float32")
        flat = [keras.KerasTensor(shape, "float32") for shape in shapes]
        return keras.tree.pack_sequence_as(self._structure, flat)

    def _run(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """NHWC or [n, c] in, the same out. Both permutations are views: the engine's maps are channels_last."""
        with torch.inference_mode():
            ys = self._engine[0](*(x.permute(0, 3, 1, 2) if x.ndim == 4 else x for x in xs))
            return [(y.permute(0, 2, 3, 1) if y.ndim == 4 else y).contiguous() for y in ys]

    def _on_torch(self, xs: Sequence[Tensor]) -> list[Tensor]:
        if torch.is_grad_enabled() and any(x.requires_grad for x in xs):
            raise RuntimeError(NO_GRADIENT)
        return [y.clone() if y.is_inference() and torch.is_grad_enabled() else y for y in self._run(xs)]

    def _on_tensorflow(self, xs: Sequence[Any], inputs: Any) -> list[Any]:
        import tensorflow

        @tensorflow.custom_gradient
        def run(*tensors: Any) -> Any:
            def gradient(*_: Any, **__: Any) -> NoReturn:
                raise RuntimeError(NO_GRADIENT)

            if tensorflow.executing_eagerly():
                return self._eager(*tensors), gradient
            shapes = keras.tree.flatten(self._shapes(inputs))
            results = tensorflow.py_function(self._eager, tensors, [tensorflow.float32] * len(shapes))
            for result, shape in zip(results, shapes, strict=True):
                result.set_shape(shape.as_list())
            return results, gradient

        return list(run(*xs))

    def _shapes(self, inputs: Any) -> Any:
        import tensorflow

        specs = keras.tree.flatten(self.compute_output_spec(inputs))
        return [tensorflow.TensorShape(spec.shape) for spec in specs]

    def _eager(self, *tensors: Any) -> list[Any]:
        """Eager TensorFlow tensors through the engine. TensorFlow's allocator and torch's align alike, so views do."""
        import tensorflow
        from tensorflow.experimental import dlpack

        for tensor in tensors:
            if not tensor.device.endswith("CPU:0"):
                raise ValueError(f"tensor on {tensor.device}; allowed: the CPU, as in with tf.device('CPU')")
        shared = [torch.utils.dlpack.from_dlpack(dlpack.to_dlpack(tensor)) for tensor in tensors]
        results = [dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(y)) for y in self._run(shared)]
        return [tensorflow.identity(y) if y.dtype != tensorflow.float32 else y for y in results]

    def report(self) -> Report:
        """What became of every captured layer: the engine's report for the example's sizes."""
        found: Report = self._engine[0].report()  # type: ignore[operator]
        return found

    def fit(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(NO_GRADIENT)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("optimised models hold native code and packed weights; save or export the original model")

    save = save_weights = load_weights = export = get_config = _refuse


def optimize(keras_model: keras.Model, dtype: Any = None) -> OptimizedModel:
    """A model that computes what `keras_model` computes with training=False, as one fused plan on the native engine.

    The weights are copied: later changes of `keras_model` do not show. Outputs are float32.

    Args:
        keras_model: a functional or built sequential model of images [n, h, w, c], or rows [n, c].
        dtype: None or "float32", or "bfloat16": what weights and activations are kept in. A torch or TensorFlow dtype
            works too.

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
    module = translate(keras_model)
    example = tuple(_example(x) for x in keras_model.inputs)
    return OptimizedModel(keras_model, engine.optimize(module, example, dtype=_torch_dtype(dtype)))


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
