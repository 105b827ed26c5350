"""TensorFlow's tensors and the engine's: whatever comes in is served or refused, and on a GPU all waits are in order.

The GPU's part runs here on stand-ins for both libraries, which write down what is done to them, when.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from numerics import NET_MAX, NET_WINOGRAD_MAX, max_error, rel_l2

keras = pytest.importorskip("keras", reason="the optimised models are Keras models")
tensorflow = pytest.importorskip("tensorflow", reason="the tensors are tensorflow's")

from inception_fast import tf  # noqa: E402
from inception_fast.tf import boundary  # noqa: E402
from inception_fast.tf.runner import OptimizedModel  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Keras and NumPy 2 disagree about `__array__`

GPU = "/job:localhost/replica:0/task:0/device:GPU:1"
CUDA = torch.device("cuda", 1)


@pytest.fixture(scope="module")
def model() -> Any:
    image = keras.Input((None, None, 3))
    x = keras.layers.GlobalAveragePooling2D()(tf.ConvBNReLU(6, 3, padding="same")(image))
    return keras.Model(image, keras.layers.Dense(4)(x))


@pytest.fixture(scope="module")
def fast_model(model: Any) -> Any:
    return tf.optimize(model)


def pixels(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, shape).astype(dtype)


def as_torch(y: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(y, dtype=np.float32))


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "function"])
def test_other_dtypes_are_cast_as_the_model_does(model: Any, fast_model: Any, dtype: str, graph: bool) -> None:
    x = tensorflow.cast(pixels(2, 9, 9, 3), dtype)
    y = (tensorflow.function(fast_model) if graph else fast_model)(x)
    assert max_error(as_torch(y), as_torch(model(tensorflow.cast(x, "float32"), training=False))) <= NET_MAX


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "function"])
@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_an_input_of_integers_cuts_off_what_is_behind_the_point(dtype: str, graph: bool) -> None:
    image = keras.Input((9, 9, 3), dtype=dtype)
    model = keras.Model(image, keras.layers.Rescaling(1 / 127.5, -1)(image))
    x = tensorflow.constant(np.random.default_rng(3).uniform(0, 255, (2, 9, 9, 3)).astype(np.float32))
    fast_model = tf.optimize(model)
    y = (tensorflow.function(fast_model) if graph else fast_model)(x)
    assert max_error(as_torch(y), as_torch(model(x))) <= NET_MAX


def test_the_policy_of_keras_rounds_no_images(model: Any) -> None:
    """Under a mixed policy arrays and symbolic tensors went through bfloat16, eager tensors did not."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        fast_model = tf.optimize(model)
    finally:
        keras.config.set_dtype_policy("float32")
    x = np.random.default_rng(0).normal(size=(2, 9, 9, 3)).astype(np.float32)
    exact = np.array(fast_model(tensorflow.constant(x)))
    for y in (fast_model(x), tensorflow.function(fast_model)(x), fast_model.predict(x, verbose=0)):
        np.testing.assert_array_equal(y, exact)


def test_optimised_by_winograds_tiles() -> None:
    image = keras.Input((26, 26, 16))
    model = keras.Model(image, keras.layers.Conv2D(16, 3, activation="relu")(image))
    x = np.random.default_rng(0).standard_normal((2, 26, 26, 16), np.float32)
    tiles = tf.optimize(model, winograd=True)
    assert any(step.winograd for step in tiles.report().steps)
    exact = model(x, training=False)
    assert 0 < rel_l2(as_torch(tiles(x)), as_torch(exact)) <= NET_WINOGRAD_MAX
    with pytest.raises(TypeError, match="winograd of type str; allowed: bool"):
        tf.optimize(model, winograd="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (3, 1, 7, 3), (2, 20, 5, 3)])
def test_every_way_to_call_at_every_size(model: Any, fast_model: Any, shape: tuple[int, ...]) -> None:
    x = pixels(*shape)
    expected = as_torch(model(x, training=False))
    graph = tensorflow.function(fast_model, input_signature=[tensorflow.TensorSpec(None)])
    tensors = (tensorflow.constant(x), tensorflow.constant(x)[:, ::1], tensorflow.Variable(x), keras.Variable(x))
    for given in (x, *tensors, x[::-1].copy()[::-1]):
        for call in (fast_model, graph, lambda value: fast_model(value, training=False)):
            assert max_error(as_torch(call(given)), expected) <= NET_MAX


@pytest.mark.parametrize(
    "shape, said",
    [
        ((9, 9, 3), r"shape \(9, 9, 3\); allowed: \(n, h, w, 3\)"),
        ((0, 9, 9, 3), "allowed: .* at least 1"),
        ((1, 9, 9, 4), "allowed: "),
        ((1, 0, 9, 3), "allowed: "),
    ],
)
def test_tensors_that_do_not_fit(fast_model: Any, shape: tuple[int, ...], said: str) -> None:
    for x in (pixels(*shape), tensorflow.constant(pixels(*shape))):
        with pytest.raises(ValueError, match=said):
            fast_model(x)


@pytest.mark.parametrize("kind", ["list", "dict"])
def test_outputs_come_in_the_containers_of_the_model(kind: str) -> None:
    """Not in those with which Keras watches attributes, whose type its own functions tell from a list's or dict's."""
    image = keras.Input((4, 4, 3))
    found = [keras.layers.Flatten()(image), {"x": keras.layers.GlobalMaxPooling2D()(image)}]
    model = keras.Model(image, found if kind == "list" else {"b": found[0], "a": found})
    fast_model, x = tf.optimize(model), tensorflow.constant(pixels(2, 4, 4, 3))
    for call in (fast_model, lambda x: fast_model(x, training=False), fast_model.predict):
        keras.tree.map_structure(np.testing.assert_array_equal, model(x), call(x))


class Log:
    """Stands for both libraries: an engine, two allocators and a GPU whose waits are counted."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.freed: list[str] = []
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "synchronize", lambda device: self.events.append(f"wait for {device}"))
        patch.setattr(boundary, "to_torch", self.note("view of input", "input"))
        patch.setattr(boundary, "to_tensorflow", self.note("view of result", "view"))
        patch.setattr(boundary, "copied", self.note("copy", "copy"))
        for name in ("list_physical_devices", "get_visible_devices", "list_logical_devices"):
            patch.setattr(tensorflow.config, name, lambda kind: ["GPU:0", "GPU:1"])

    def tensor(self, name: str) -> Any:
        log = self

        class Watched(SimpleNamespace):
            def __del__(self) -> None:
                log.events.append(f"free {name}")

        return Watched(device=CUDA, ndim=2, name=name)

    def note(self, event: str, made: str) -> Callable[[Any], Any]:
        def call(given: Any) -> Any:
            self.events.append(event)
            return self.tensor(made)

        return call

    def run(self, xs: Any) -> Any:
        assert [x.name for x in xs] == ["input"]
        self.events.append("engine")
        return [self.tensor("result")]


def test_the_gpu_is_waited_for_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the engine's memory is let go only when TensorFlow's copy of it is complete."""
    log = Log(monkeypatch)
    given = SimpleNamespace(device=GPU)
    device = boundary.device_of([given])
    assert device == CUDA
    results = boundary.on_gpu([given], device, log.run)
    wait = "wait for cuda:1"
    events = [event for event in log.events if event != "free view"]
    assert events[:7] == ["view of input", wait, "engine", wait, "view of result", "copy", wait]
    assert sorted(events[7:]) == ["free input", "free result"] and [y.name for y in results] == ["copy"]


def test_a_gpu_tensor_runs_the_plan_of_its_gpu(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    """One plan a GPU, made for Triton at the first tensor from there; the CPU's is left alone."""
    log, made = Log(monkeypatch), []

    def optimized(module: Any, example: Any, **options: Any) -> Any:
        made.append((example[0].device.type, options))
        return log.run

    example = torch.zeros(1, 3, 4, 4)
    monkeypatch.setattr("inception_fast.tf.runner.engine.optimize", optimized)
    monkeypatch.setattr("inception_fast.tf.runner._example", lambda x: example)
    fast_model = tf.optimize(model, "bfloat16")
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: SimpleNamespace(device=device))
    monkeypatch.setattr(OptimizedModel, "_run", lambda self, xs: self._engines.on(xs[0].device)(xs))
    for _ in range(2):
        (result,) = fast_model._eager(SimpleNamespace(device=GPU))
        assert result.name == "copy"
    assert made == [
        ("cpu", {"dtype": torch.bfloat16, "winograd": False}),
        ("cuda", {"dtype": torch.bfloat16, "backend": "triton", "winograd": False}),
    ]


def test_a_gpu_that_cannot_be_served(monkeypatch: pytest.MonkeyPatch, fast_model: Any) -> None:
    given = SimpleNamespace(device=GPU)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="this torch has no CUDA; allowed: the CPU, or a torch with CUDA"):
            fast_model._eager(given)
    log = Log(monkeypatch)
    with pytest.raises(ValueError, match=r"tensors on .*CPU:0, .*GPU:1; allowed: all on one device"):
        boundary.device_of([given, tensorflow.constant(1.0)])
    with pytest.raises(ValueError, match=r"tensor on .*TPU:0; allowed: the CPU, .* or an NVIDIA GPU"):
        boundary.device_of([SimpleNamespace(device="/device:TPU:0")])
    with pytest.raises(RuntimeError, match="DLPack says cuda:1 of a tensor that TensorFlow has on cuda:0"):
        boundary.on_gpu([given], torch.device("cuda", 0), log.run)
    monkeypatch.setattr(tensorflow.config, "get_visible_devices", lambda kind: ["GPU:1"])
    with pytest.raises(ValueError, match="TensorFlow sees 1 of 2 GPUs as 2 devices, so its numbers are not CUDA's"):
        boundary.device_of([given])


def test_a_copy_is_another_memory() -> None:
    y = tensorflow.constant(pixels(2, 3))
    twin = boundary.copied(y)
    np.testing.assert_array_equal(twin, y)
    assert boundary.to_torch(twin).data_ptr() != boundary.to_torch(y).data_ptr()
