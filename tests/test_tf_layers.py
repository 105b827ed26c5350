"""The Keras layers train, are saved, run mixed and compiled; a model optimised equals itself, without a copy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from numerics import BF16_REL_L2, NET_MAX, XLA_GRADIENT_MAX, max_error, rel_l2

keras = pytest.importorskip("keras", reason="the Keras layers need keras")
tensorflow = pytest.importorskip("tensorflow", reason="the Keras layers run on tensorflow here")

from inception_fast import tf  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Keras and NumPy 2 disagree about `__array__`

SIZE = 17


def images(batch: int = 2, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (batch, size, size, 3)).astype(np.float32)


def net(dtype: Any = None, activation: str | None = None) -> Any:
    """All three layers in a small functional model, statistics and factors random."""
    x = image = keras.Input((SIZE, SIZE, 3))
    x = tf.ConvBNReLU(8, 3, strides=2, padding="same", dtype=dtype, name="conv")(x)
    x = tf.AsymmetricPair(6, 10, 7, order="nx1_1xn", scale=True, dtype=dtype, name="pair")(x)
    x = tf.ParallelSplit(5, 7, dtype=dtype, name="split")(x)
    x = keras.layers.GlobalAveragePooling2D(dtype=dtype)(x)
    model = keras.Model(image, keras.layers.Dense(4, activation=activation, dtype="float32", name="head")(x))
    rng = np.random.default_rng(1)
    for variable in model.variables:
        if variable.name in ("moving_variance", "gamma"):
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        elif variable.name in ("moving_mean", "beta"):
            variable.assign(rng.normal(0, 0.1, variable.shape))
    return model


def as_torch(y: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(y, dtype=np.float32))


def assert_same(y: Any, expected: Any) -> None:
    assert max_error(as_torch(y), as_torch(expected)) <= NET_MAX


@pytest.fixture(scope="module")
def model() -> Any:
    return net()


@pytest.fixture(scope="module")
def expected(model: Any) -> np.ndarray:
    return np.array(model(images(), training=False))


@pytest.fixture(scope="module")
def fast_model(model: Any) -> Any:
    return tf.optimize(model)


@pytest.mark.parametrize("policy", [None, "mixed_bfloat16"])
def test_training_lowers_the_loss(policy: str | None) -> None:
    model = net(policy, "softmax")
    assert model.get_layer("pair").first.conv.compute_dtype == ("bfloat16" if policy else "float32")
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    before = [np.array(v) for v in model.get_layer("split").variables]
    model.compile("adam", "sparse_categorical_crossentropy")
    history = model.fit(images(8), np.arange(8) % 4, batch_size=8, epochs=6, verbose=0).history["loss"]
    assert history[-1] < history[0]
    assert all((np.array(v) != old).any() for v, old in zip(model.get_layer("split").variables, before, strict=True))


def test_saved_and_exported_models_are_the_same(model: Any, expected: np.ndarray, tmp_path: Path) -> None:
    model.save(tmp_path / "net.keras")
    loaded = keras.saving.load_model(tmp_path / "net.keras")
    assert isinstance(loaded.get_layer("split"), tf.ParallelSplit) and loaded.get_layer("pair").order == "nx1_1xn"
    np.testing.assert_array_equal(loaded(images(), training=False), expected)
    model.export(tmp_path / "saved", verbose=False)
    served = tensorflow.saved_model.load(str(tmp_path / "saved"))
    assert_same(served.serve(images()), expected)


def test_files_load_after_any_name_was_used(model: Any, tmp_path: Path) -> None:
    """The package loads Keras late, and with it registers all layers, not the one alone that was asked for."""
    model.save(tmp_path / "net.keras")
    program = "import sys, keras; from inception_fast import tf; tf.optimize; keras.saving.load_model(sys.argv[1])"
    command = [sys.executable, "-c", program, str(tmp_path / "net.keras")]
    done = subprocess.run(command, env=os.environ | {"KERAS_BACKEND": "torch"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", ["conv", "pair", "split"])
def test_frozen_layers_stay_frozen(tmp_path: Path, name: str) -> None:
    """Where a layer does not train, the statistics of its batch norms rest: also in a copy, and from the file."""
    model = net()
    layer = model.get_layer(name)
    layer.trainable = False
    model.save(tmp_path / "net.keras")
    fresh = type(layer).from_config(layer.get_config() | {"trainable": False})
    loaded = keras.saving.load_model(tmp_path / "net.keras").get_layer(name)
    cloned = keras.models.clone_model(model).get_layer(name)
    for copy in (fresh, loaded, cloned):
        x = np.random.default_rng(0).normal(1, 1, (2, 9, 9, layer.input.shape[-1])).astype(np.float32)
        np.testing.assert_array_equal(copy(x, training=True), copy(x, training=False))
        copy.trainable = True
        assert (np.array(copy(x, training=True)) != np.array(copy(x, training=False))).any()


def test_compiled_by_xla(model: Any, expected: np.ndarray) -> None:
    assert_same(tensorflow.function(lambda x: model(x, training=False), jit_compile=True)(images()), expected)
    layer, x = tf.ParallelSplit(2), tensorflow.constant(images(2, 4))
    layer.build(x.shape)

    def gradient() -> Any:
        with tensorflow.GradientTape() as tape:
            loss = tensorflow.reduce_sum(layer(x, training=True) ** 2)
        return tape.gradient(loss, layer.first.conv.kernel)

    eager = gradient()
    assert np.abs(eager).max() > 0
    assert max_error(as_torch(tensorflow.function(gradient, jit_compile=True)()), as_torch(eager)) <= XLA_GRADIENT_MAX


def test_batch_norm_folds(model: Any, expected: np.ndarray) -> None:
    plain = keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 3)),
            keras.layers.Conv2D(4, 3),
            keras.layers.BatchNormalization(),
            keras.layers.Activation("relu"),
            keras.layers.BatchNormalization(),  # behind a ReLU: stays
        ]
    )
    plain = keras.Model(plain.inputs, plain.outputs)
    for variable in plain.variables:
        variable.assign(np.random.default_rng(2).uniform(0.5, 1.5, variable.shape))
    folded = tf.fold_batch_norm(plain)
    assert len(plain.weights) - len(folded.weights) == 4
    assert_same(folded(images()), plain(images(), training=False))
    mapped = keras.layers.BatchNormalization()(inputs=keras.layers.Conv2D(4, 3)(plain.inputs[0]))
    by_keyword = keras.Model(plain.inputs, mapped)
    assert_same(tf.fold_batch_norm(by_keyword)(images()), by_keyword(images(), training=False))
    folded = tf.fold_batch_norm(model)
    assert not any(isinstance(layer, tf.ConvBNReLU) for layer in folded.layers)
    assert_same(folded(images()), expected)


class Doubled(tf.ConvBNReLU):
    """A layer of a user's, with a call of its own."""

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return 2 * super().call(inputs, training)


class Halved(keras.layers.BatchNormalization):
    def call(self, inputs: Any, training: bool | None = None) -> Any:  # type: ignore[override]
        return super().call(inputs, training=training) / 2


@pytest.mark.parametrize(
    "made", [lambda: [Doubled(4, 3)], lambda: [keras.layers.Conv2D(4, 3), Halved()]], ids=["conv", "norm"]
)
def test_what_a_user_made_of_a_layer_is_not_folded(made: Callable[[], list[Any]]) -> None:
    model = keras.Sequential([keras.Input((8, 8, 4)), *made()])
    for variable in model.variables:
        variable.assign(np.random.default_rng(2).uniform(0.5, 1.5, variable.shape))
    folded = tf.fold_batch_norm(model)
    assert len(folded.weights) == len(model.weights)
    assert_same(folded(maps()), model(maps(), training=False))


def test_numpys_numbers_are_saved_as_pythons() -> None:
    pair = tf.AsymmetricPair(np.int64(4), np.int64(4), np.int64(7), epsilon=np.float32(0.5))
    config = pair.get_config()
    assert [type(config[name]) for name in ("mid", "filters", "n", "epsilon")] == [int, int, int, float]


def test_bad_layers() -> None:
    with pytest.raises(ValueError, match="kernel length 4; allowed: an odd integer"):
        tf.AsymmetricPair(4, 4, 4)
    with pytest.raises(ValueError, match="order '7x1'; allowed: 1xn_nx1, nx1_1xn"):
        tf.AsymmetricPair(4, 4, 7, order="7x1")


def test_optimised_in_eager_code_pipelines_and_predict(model: Any, expected: np.ndarray, fast_model: Any) -> None:
    assert_same(fast_model(images()), expected)
    assert_same(fast_model.predict(images(5), batch_size=2, verbose=0), model.predict(images(5), verbose=0))
    data = tensorflow.data.Dataset.from_tensor_slices(images(5)).batch(2)
    assert_same(fast_model.predict(data, verbose=0), model.predict(images(5), verbose=0))
    data = data.map(fast_model, num_parallel_calls=2)
    assert data.element_spec.shape.as_list() == [None, 4]
    assert_same(np.concatenate(list(data.as_numpy_iterator())), model.predict(images(5), verbose=0))
    assert_same(tensorflow.function(fast_model)(images()), expected)
    image = keras.Input((SIZE, SIZE, 3))
    assert_same(keras.Model(image, fast_model(image)).predict(images(), verbose=0), expected)
    assert fast_model.report().counts["native_calls"] == 1


def test_threads_call_it_at_once(fast_model: Any) -> None:
    """Each with a batch size of its own, in eager code and in a graph."""
    graph = tensorflow.function(fast_model)
    with ThreadPoolExecutor(4) as pool:
        calls = [(call, tensorflow.constant(images(n))) for n in (1, 2, 3) for call in (fast_model, graph)] * 4
        results = list(pool.map(lambda job: np.array(job[0](job[1])), calls))
    for (_, x), y in zip(calls, results, strict=True):
        np.testing.assert_array_equal(y, fast_model(x))


def test_the_residual_sum_of_keras_own_nets() -> None:
    from keras.src.applications.inception_resnet_v2 import CustomScaleLayer  # which it does not export

    image = keras.Input((5, 5, 3))
    up = keras.layers.Conv2D(3, 1)(image)
    model = keras.Model(image, keras.layers.Activation("relu")(CustomScaleLayer(0.17)([image, up])))
    assert_same(tf.optimize(model)(images(2, 5)), model(images(2, 5), training=False))


def test_optimised_in_bfloat16(model: Any, expected: np.ndarray) -> None:
    y = tf.optimize(model, "bfloat16")(images())
    # Five layers in a row, of which each rounds its weights and its result.
    assert y.dtype == tensorflow.float32 and rel_l2(as_torch(y), as_torch(expected)) <= BF16_REL_L2 * 10**0.5
    assert (np.array(y) != expected).any()
    assert_same(tf.optimize(model, tensorflow.float32)(images()), expected)


def test_tensors_are_handed_over_without_a_copy(model: Any) -> None:
    """An engine that returns its input gets and gives the memory of TensorFlow's own tensor, maps and rows alike."""
    from inception_fast.tf.runner import OptimizedModel

    def address(tensor: Any) -> int:
        return torch.utils.dlpack.from_dlpack(tensorflow.experimental.dlpack.to_dlpack(tensor)).data_ptr()

    seen: list[torch.Tensor] = []

    class Echo(torch.nn.Module):
        def forward(self, *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            seen.extend(xs)
            return xs

    x = tensorflow.constant(images())
    y = OptimizedModel(model, Echo())._eager(x)[0]
    assert address(x) == seen[0].data_ptr() == address(y)
    assert seen[0].shape == (2, 3, SIZE, SIZE) and seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "function"])
def test_gradients_raise(fast_model: Any, graph: bool) -> None:
    def gradient(x: Any) -> Any:
        with tensorflow.GradientTape() as tape:
            tape.watch(x)
            y = fast_model(x)
        return tape.gradient(y, x)

    with pytest.raises(RuntimeError, match="only infer: no gradient flows through them"):
        (tensorflow.function(gradient) if graph else gradient)(tensorflow.constant(images()))
    for refused in (lambda: fast_model.fit(images()), lambda: fast_model(images(), training=True)):
        with pytest.raises(RuntimeError, match="only infer"):
            refused()
    with pytest.raises(RuntimeError, match="save or export the original model"):
        fast_model.save("net.keras")


def other_layers() -> Any:
    """What Keras models have beside the Inception nets' own layers, uneven SAME padding included."""
    layers = keras.layers
    x = image = keras.Input((18, 15, 3))
    x = x / 127.5 - 1.0
    x = layers.Rescaling(2.0, 0.5)(x)
    x = layers.Conv2D(8, 4, strides=(2, 1), padding="same", activation="relu")(x)
    y = layers.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=2)(x)
    y = layers.BatchNormalization()(y)
    y = layers.ReLU(6.0)(y)
    z = layers.SeparableConv2D(16, 5, strides=2, padding="same", activation="silu")(x)
    x = layers.Multiply()([y, layers.Add()([y, z, z])])
    x = layers.Concatenate()([layers.MaxPooling2D(3, 2, "same")(x), layers.AveragePooling2D(3, 2, "same")(x)])
    x = layers.SpatialDropout2D(0.5)(layers.Conv2D(6, 3, groups=2)(layers.ZeroPadding2D(((1, 0), (2, 1)))(x)))
    rows = layers.Concatenate()([layers.Flatten()(x), layers.GlobalMaxPooling2D()(x)])
    inner = keras.Sequential([keras.Input((rows.shape[-1],)), layers.Dense(9, "tanh"), layers.UnitNormalization()])
    rows = layers.Dropout(0.5)(inner(rows))
    return keras.Model(image, [x, layers.Softmax()(layers.Dense(3)(rows))])


def test_other_layers_and_several_outputs() -> None:
    model = other_layers()
    x = np.random.default_rng(3).uniform(0, 255, (2, 18, 15, 3)).astype(np.float32)
    found, wanted = tf.optimize(model)(x), model(x, training=False)
    assert [tuple(y.shape) for y in found] == [tuple(y.shape) for y in wanted]
    for y, expected in zip(found, wanted, strict=True):
        assert_same(y, expected)


def test_optimize_refuses() -> None:
    image = keras.Input((8, 8, 3))
    with pytest.raises(ValueError, match=r"layer 'odd' \(Conv2DTranspose\): no native form; allowed: Activation, Add"):
        tf.optimize(keras.Model(image, keras.layers.Conv2DTranspose(4, 3, name="odd")(image)))
    with pytest.raises(ValueError, match=r"'gelu'; allowed: linear, relu"):
        tf.optimize(keras.Model(image, keras.layers.Conv2D(4, 3, activation="gelu")(image)))
    small = keras.Model(image, tf.ConvBNReLU(4, 3)(image))
    with pytest.raises(ValueError, match="dtype='half of it'; allowed: None, 'float32', 'bfloat16'"):
        tf.optimize(small, "half of it")
    with pytest.raises(ValueError, match="optimised already"):
        tf.optimize(tf.optimize(small))
    with pytest.raises(TypeError, match=r"model of type Linear; allowed: keras\.Model"):
        tf.optimize(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_quantised_weights_are_refused_or_left_alone() -> None:
    """Their integers alone are not the weights."""
    row = keras.Input((4,))
    model = keras.Model(row, keras.layers.BatchNormalization()(keras.layers.Dense(3, name="small")(row)))
    model.quantize("int8")
    with pytest.raises(ValueError, match=r"layer 'small' \(Dense\): quantised to int8; allowed: floating point"):
        tf.optimize(model)
    x = maps()[:, 0, 0]
    assert_same(tf.fold_batch_norm(model)(x), model(x))


def test_what_lora_adds_is_folded_and_optimised() -> None:
    image = keras.Input((8, 8, 4))
    conv = keras.layers.Conv2D(3, 3)
    model = keras.Model(image, keras.layers.BatchNormalization()(conv(image)))
    conv.enable_lora(2)
    conv.lora_kernel_b.assign(np.random.default_rng(0).normal(size=conv.lora_kernel_b.shape))
    folded = tf.fold_batch_norm(model)
    assert len(folded.weights) == 2
    assert_same(folded(maps()), model(maps()))
    assert_same(tf.optimize(model)(maps()), model(maps()))


def maps(size: int = 8, channels: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, size, size, channels)).astype(np.float32)


def two_inputs(structure: type = list) -> Any:
    """Whose names are not in the order of the graph; of a sum that tells its sides apart."""
    z, a = (keras.Input((8, 8, 4), name=name) for name in "za")
    y = keras.layers.Add()([keras.layers.Rescaling(3.0)(z), a])
    return keras.Model({"z": z, "a": a} if structure is dict else [z, a], y)


@pytest.mark.parametrize("structure", [list, dict])
def test_a_dict_of_inputs_goes_by_name(structure: type) -> None:
    model = two_inputs(structure)
    fast_model, given = tf.optimize(model), {"z": maps(), "a": maps(seed=1)}
    expected = 3 * given["z"] + given["a"]
    assert_same(model(given), expected)
    assert_same(fast_model(given), expected)
    assert_same(fast_model.predict(given, verbose=0), expected)
    assert_same(fast_model(given | {"label": np.zeros(2)}), expected)
    data = tensorflow.data.Dataset.from_tensor_slices(given).batch(2).map(fast_model)
    assert_same(next(iter(data)), expected)
    outer = {name: keras.Input((8, 8, 4), name=f"my_{name}") for name in "za"}
    nested = keras.Model(list(outer.values()), model(outer))
    assert_same(tf.optimize(nested)([given["z"], given["a"]]), expected)
    again = keras.Model(list(outer.values()), fast_model(outer))
    assert_same(again([given["z"], given["a"]]), expected)
    with pytest.raises(ValueError, match="a dict of inputs 'z', 'b'; allowed: 'z', 'a'"):
        fast_model({"z": given["z"], "b": given["a"]})
    with pytest.raises(ValueError, match=r"1 inputs; allowed: 2|of type list; allowed: a dict of z, a"):
        fast_model([given["z"]])


def test_dicts_of_outputs_and_of_one_input() -> None:
    image = keras.Input((8, 8, 4), name="image")
    outputs = {"pooled": keras.layers.GlobalMaxPooling2D()(image), "all": keras.layers.Flatten()(image)}
    model = keras.Model(image, outputs)
    fast_model = tf.optimize(model)
    for call in (fast_model, tensorflow.function(fast_model)):
        found = call({"image": maps()})
        assert {key: tuple(value.shape) for key, value in found.items()} == {"pooled": (2, 4), "all": (2, 256)}
    shapes = {key: value.shape for key, value in fast_model(keras.Input((8, 8, 4))).items()}
    assert shapes == {"pooled": (None, 4), "all": (None, 256)}
    assert fast_model.compute_output_shape((5, 8, 8, 4)) == {"pooled": (5, 4), "all": (5, 256)}
    assert (fast_model.input_shape, fast_model.output_shape) == (model.input_shape, model.output_shape)


@pytest.mark.parametrize("kind", ["Add", "Multiply"])
def test_maps_and_rows_meet_as_in_keras(kind: str) -> None:
    """Squeeze and excite. Sizes at which torch would take the rows for columns of the map."""
    image = keras.Input((4, 4, 4))
    rows = keras.layers.GlobalAveragePooling2D()(image)
    merge = getattr(keras.layers, kind)
    column = keras.layers.Conv2D(1, 1)(image)  # [n, h, w, 1]
    model = keras.Model(image, [merge()([image, rows]), merge()([rows, image, column])])
    for y, expected in zip(tf.optimize(model)(maps(4)), model(maps(4)), strict=True):
        assert_same(y, expected)
    with pytest.raises(ValueError, match=r"layer 'sum' \(Residual\): inputs of ranks \[2, 4\]; allowed: of one rank"):
        tf.optimize(keras.Model(image, tf.Residual(0.5, name="sum")([image, rows])))


def test_a_layer_may_meet_maps_and_rows() -> None:
    image, flat, join = keras.Input((4, 4, 4)), keras.layers.Flatten(), keras.layers.Concatenate()
    rows = keras.layers.GlobalAveragePooling2D()(image)
    model = keras.Model(image, join([flat(join([image, image])), flat(rows)]))
    assert_same(tf.optimize(model)(maps(4)), model(maps(4)))


def test_activations_of_a_known_name_are_told_apart() -> None:
    def relu(x: Any) -> Any:
        return 2 * keras.ops.relu(x)

    image = keras.Input((8, 8, 4))
    for layer in (keras.layers.Activation(relu), keras.layers.Conv2D(3, 3, activation=relu)):
        with pytest.raises(ValueError, match=r"activation 'relu' of .*test_tf_layers; allowed: linear, relu"):
            tf.optimize(keras.Model(image, layer(image)))
    for function in (keras.ops.relu, keras.activations.relu, tensorflow.nn.relu):
        model = keras.Model(image, keras.layers.Activation(function)(image))
        assert_same(tf.optimize(model)(maps()), model(maps()))


def test_models_with_a_call_of_their_own_are_refused() -> None:
    class Tripled(keras.Model):  # type: ignore[misc]
        def call(self, x: Any, training: bool | None = None) -> Any:
            return 3 * super().call(x)

    class Named(keras.Model):  # type: ignore[misc]
        pass

    image = keras.Input((8, 8, 4))
    model = Tripled(image, keras.layers.ReLU()(image), name="mine")
    for given in (model, keras.Model(image, model(image))):
        with pytest.raises(
            TypeError, match=r"model 'mine' of type Tripled, whose call is of .*test_tf_layers; allowed: "
        ):
            tf.optimize(given)
    plain = Named(image, keras.layers.ReLU()(image))
    assert_same(tf.optimize(plain)(maps()), plain(maps()))


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "function"])
def test_sizes_that_the_model_fixed(graph: bool) -> None:
    image = keras.Input((8, None, 4), name="image")
    model = keras.Model(image, keras.layers.Dense(3)(keras.layers.GlobalMaxPooling2D()(image)))
    fast_model = tf.optimize(model)
    call = tensorflow.function(fast_model, input_signature=[tensorflow.TensorSpec(None)]) if graph else fast_model
    assert_same(call(maps()[:, :, :5]), model(maps()[:, :, :5]))
    said = r"input 'image' of shape \(2, 9, 9, 4\); allowed: \(n, 8, w, 4\)"
    with pytest.raises((ValueError, tensorflow.errors.InvalidArgumentError), match=said):
        call(maps(9))
    with pytest.raises(ValueError, match="input 'image' of type NoneType; allowed: a tensor"):
        fast_model(None)


def test_masks_are_refused() -> None:
    row, mask = keras.Input((4,)), keras.Input((4,), dtype="bool")
    model = keras.Model([row, mask], keras.layers.Softmax(name="chosen")(row, mask=mask))
    with pytest.raises(ValueError, match=r"layer 'chosen' \(Softmax\): tensors as arguments mask; allowed: as its"):
        tf.optimize(model)


def test_arithmetic_of_integers_is_refused() -> None:
    """Keras computes it in the integers, which wrap round."""
    image = keras.Input((8, 8, 4), dtype="uint8")
    for y in ((image - 128) / 2, keras.layers.Add()([image, image]), tf.Residual(0.5)([image, image])):
        with pytest.raises(ValueError, match="arithmetic of uint8; allowed: of floats, as a Rescaling or a cast makes"):
            tf.optimize(keras.Model(image, y))
    with pytest.raises(ValueError, match="a cast to int32; allowed: to floats"):
        tf.optimize(keras.Model(image, keras.ops.cast(image, "int32")))
    x = np.arange(512, dtype=np.int64).astype(np.uint8).reshape(2, 8, 8, 4)
    for floats in (keras.ops.cast(image, "float32"), keras.layers.Rescaling(0.5)(image)):
        model = keras.Model(image, (floats - 128) / 2)
        assert_same(tf.optimize(model)(x), model(x))


def test_batch_norm_of_another_axis_stays() -> None:
    """Of a map with channels first the last axis, which is batch norm's default, is the width, as large here."""
    image = keras.Input((3, 10, 10))
    y = keras.layers.Conv2D(8, 3, use_bias=False, data_format="channels_first")(image)  # [n, 8, 8, 8]
    model = keras.Model(image, keras.layers.BatchNormalization()(y))
    rng = np.random.default_rng(2)
    model.set_weights([rng.uniform(0.5, 1.5, weight.shape) for weight in model.weights])
    pictures = rng.uniform(-1, 1, (2, 3, 10, 10)).astype(np.float32)
    assert_same(tf.fold_batch_norm(model)(pictures), model(pictures, training=False))


def test_batch_norm_folds_in_a_sequential() -> None:
    layers = keras.layers
    model = keras.Sequential([keras.Input((8, 8, 4)), layers.Conv2D(4, 3)], name="mine")
    model.add(layers.BatchNormalization())
    for variable in model.variables:
        variable.assign(np.random.default_rng(2).uniform(0.5, 1.5, variable.shape))
    folded = tf.fold_batch_norm(model)
    assert folded.name == "mine" and len(folded.weights) == 2
    assert_same(folded(maps()), model(maps(), training=False))
    with pytest.raises(TypeError, match=r"type Sequential has no graph; allowed: functional models and built"):
        tf.fold_batch_norm(keras.Sequential([layers.Conv2D(4, 3)]))
