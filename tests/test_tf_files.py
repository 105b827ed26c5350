"""What a Keras model has before the net is told apart from the net, in memory and in files."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import inception_fast as fast
from inception_fast import weights
from keras_nets import image, nchw, nhwc
from numerics import NET_MAX, max_error

keras = pytest.importorskip("keras", reason="the files are Keras files")
pytest.importorskip("tensorflow", reason="the Keras nets run on tensorflow here")

from inception_fast import tf  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Keras and NumPy 2 disagree about `__array__`


def beginning(kind: str, x: Any) -> Any:
    if kind == "zeros":
        return keras.layers.ZeroPadding2D(4)(x)
    return keras.layers.Rescaling(1 / 255)(x) if kind == "scale" else x / 255.0


def changed(name: str, layer: str, config: dict[str, Any]) -> Any:
    """A net with another config of one layer."""

    def clone(made: Any) -> Any:
        return type(made).from_config(made.get_config() | (config if made.name == layer else {}))

    net = tf.create_model(name, classes=3, input_shape=(75, 75, 3))
    return keras.models.clone_model(net, clone_function=clone)


@pytest.mark.parametrize(
    "name, convention, kind, seen",
    [
        ("inception_v1", "tf", "zeros", r"layer 'zero_padding2d.*' \(ZeroPadding2D\)"),
        ("inception_v1", "torch", "zeros", r"layer 'zero_padding2d.*' \(ZeroPadding2D\)"),
        ("inception_v1", "tf", "scale", r"layer 'rescaling.*' \(Rescaling\)"),
        ("inception_v1", "tf", "operator", r"layer 'true_divide.*' \(TrueDivide\)"),
        ("inception_v3", "tf", "zeros", r"layer 'zero_padding2d.*' \(ZeroPadding2D\)"),  # whose first one pads nothing
    ],
)
def test_what_stands_before_the_net_is_not_lost(
    tmp_path: Path, name: str, convention: str, kind: str, seen: str
) -> None:
    """A torch net without it gives other scores, and zeros of somebody's own are not those of convention "torch"."""
    picture = keras.Input((75, 75, 3))
    model = tf.create_model(name, classes=3, input_tensor=beginning(kind, picture), convention=convention)
    said = rf"{seen} stands before the net; allowed: models that begin with the net's own layers, or the weights alone"
    with pytest.raises(weights.WeightsError, match=said):
        tf.to_torch(model)
    model.save(tmp_path / "net.keras")
    with pytest.raises(weights.WeightsError, match=rf"net\.keras: {said}"):
        fast.create_model(name, weights=tmp_path / "net.keras")
    keras.Sequential([keras.Input((75, 75, 3)), model]).save(tmp_path / "nested.keras")
    with pytest.raises(weights.WeightsError, match=rf"nested\.keras: {said}"):
        tf.convert(tmp_path / "nested.keras", tmp_path / "copy.keras")
    model.save_weights(tmp_path / "net.weights.h5")
    back = fast.create_model(name, weights=tmp_path / "net.weights.h5", convention=convention).eval()
    given = beginning(kind, nhwc(image(75)))
    with torch.inference_mode():
        assert max_error(back(nchw(given)), nchw(model(nhwc(image(75))))) <= NET_MAX


@pytest.mark.parametrize("convention", ["tf", "torch"])
def test_a_net_inside_a_model_tells_its_convention(tmp_path: Path, convention: str) -> None:
    net = tf.create_model("inception_v1", classes=3, input_shape=(75, 75, 3), convention=convention)
    keras.Sequential([keras.Input((75, 75, 3)), net]).save(tmp_path / "net.keras")
    back = fast.create_model("inception_v1", weights=tmp_path / "net.keras").eval()
    assert back.convention == convention
    with torch.inference_mode():
        assert max_error(back(image(75)), nchw(net(nhwc(image(75))))) <= NET_MAX


def test_a_whole_model_in_hdf5_tells_as_much_as_a_keras_file(tmp_path: Path) -> None:
    options: Any = {"input_shape": (75, 75, 3), "include_top": False}
    net = tf.create_model("inception_v1", pooling="max", convention="torch", **options)
    net.save(tmp_path / "net.h5")
    back = fast.create_model("inception_v1", weights=tmp_path / "net.h5").eval()
    assert back.convention == "torch"
    with torch.inference_mode():
        assert max_error(back(image(75)), nchw(net(nhwc(image(75))))) <= NET_MAX
    picture = keras.Input((75, 75, 3))
    tf.create_model("inception_v1", classes=3, input_tensor=beginning("scale", picture)).save(tmp_path / "scaled.h5")
    with pytest.raises(
        weights.WeightsError, match=r"scaled\.h5: layer 'rescaling.*' \(Rescaling\) stands before the net"
    ):
        weights.resolve(tmp_path / "scaled.h5")


@pytest.mark.parametrize("ending", [".keras", ".h5"])
def test_a_file_that_tells_another_epsilon(tmp_path: Path, ending: str) -> None:
    net = changed("inception_v1", "Conv2d_2b_1x1_bn", {"epsilon": 1e-5})
    net.save(tmp_path / f"net{ending}")
    with pytest.raises(
        weights.WeightsError, match=rf"net\{ending}: .*'Conv2d_2b_1x1_bn' .* has epsilon=1e-05; allowed: 0.001"
    ):
        weights.resolve(tmp_path / f"net{ending}")


def test_variables_that_the_nets_have_not(tmp_path: Path) -> None:
    """A bias before a batch norm, and what LoRA adds, which HDF5 holds beside the kernel."""
    net = changed("inception_v1", "Conv2d_2b_1x1", {"use_bias": True})
    net.save(tmp_path / "net.keras")
    said = r"Conv2d_2b_1x1/bias has no place in the net; allowed of this layer: kernel$"
    with pytest.raises(weights.WeightsError, match=said):
        tf.to_torch(net)
    with pytest.raises(weights.WeightsError, match=said):
        weights.resolve(tmp_path / "net.keras")
    net = tf.create_model("inception_v1", classes=3, input_shape=(75, 75, 3))
    net.get_layer("predictions").enable_lora(2)
    net.save(tmp_path / "net.h5")
    with pytest.raises(weights.WeightsError, match=r"predictions/lora_kernel_a has no place in the net"):
        weights.resolve(tmp_path / "net.h5")


@pytest.mark.parametrize("name", ["inception_v1", "inception_resnet_v1"])
def test_a_checkpoint_without_a_classifier_is_read_again(tmp_path: Path, name: str) -> None:
    options: Any = {"include_top": False, "input_shape": (75, 75, 3)}
    model = tf.create_model(name, **options)
    tf.save_slim(model, tmp_path / "trunk.ckpt")
    again = tf.create_model(name, tmp_path / "trunk.ckpt", **options)
    assert all(map(np.array_equal, again.get_weights(), model.get_weights()))
    net = fast.create_model(name, num_classes=0)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    if name == "inception_resnet_v1":
        with pytest.raises(weights.WeightsError, match=r"last_linear.weight, shape \(512, 1792\), .* is missing"):
            fast.create_model(name, weights=tmp_path / "trunk.ckpt")
    weights.convert(tmp_path / "net.pth", tmp_path / "net.ckpt")
    back = fast.create_model(name, weights=tmp_path / "net.ckpt")
    assert back.num_classes == 0
    assert all(map(torch.equal, back.state_dict().values(), net.state_dict().values()))


def test_a_config_that_is_no_text(tmp_path: Path) -> None:
    tf.create_model("inception_v1", classes=3, input_shape=(75, 75, 3)).save(tmp_path / "net.keras")
    with zipfile.ZipFile(tmp_path / "net.keras") as before, zipfile.ZipFile(tmp_path / "bad.keras", "w") as after:
        for item in before.namelist():
            after.writestr(item, b'{"config": ' if item == "config.json" else before.read(item))
    with pytest.raises(weights.WeightsError, match=r"bad\.keras is not a readable Keras file"):
        weights.resolve(tmp_path / "bad.keras")


def test_convert_in_a_process_that_loaded_tensorflow_first(tmp_path: Path) -> None:
    """Triton bound to TensorFlow's LLVM ends the process."""
    torch.save(fast.create_model("inception_v1", num_classes=3).state_dict(), tmp_path / "net.pth")
    code = "import sys, tensorflow, inception_fast.weights as weights; weights.convert(*sys.argv[1:])"
    files = [str(tmp_path / name) for name in ("net.pth", "net.safetensors")]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "net.safetensors").is_file()


@pytest.mark.parametrize("order", ["tensorflow, inception_fast", "inception_fast, tensorflow"])
def test_compile_in_a_process_that_loaded_tensorflow(order: str) -> None:
    """torch imports Triton before it asks the backend for anything."""
    code = f"""import {order}, torch
net = torch.compile(torch.nn.Sequential(inception_fast.ConvBNReLU(3, 8, 3)).eval(), backend="inception_fast")
with torch.no_grad():
    assert net(torch.zeros(1, 3, 9, 9)).shape == (1, 8, 7, 7)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_shards_are_read_where_their_list_is_given(tmp_path: Path) -> None:
    model = tf.create_model("inception_v1", classes=3, input_shape=(75, 75, 3))
    model.save_weights(tmp_path / "net.weights.json", max_shard_size=0.004)
    assert len(list(tmp_path.iterdir())) > 3
    wanted = tf.to_torch(model).state_dict()
    for where in (tmp_path / "net.weights.json", tmp_path):
        found = fast.create_model("inception_v1", weights=where).state_dict()
        assert all(torch.equal(found[key], value) for key, value in wanted.items())
    (tmp_path / "net_00001.weights.h5").unlink()
    with pytest.raises(weights.WeightsError, match=r"net\.weights\.json is not a readable .*net_00001\.weights\.h5"):
        weights.resolve(tmp_path / "net.weights.json")
    for text, said in (('{"weight_map": 3}', "lists no .h5 files"), ("{", "not a readable"), ('{"a": 1}', "lists no")):
        (tmp_path / "net.weights.json").write_text(text)
        with pytest.raises(weights.WeightsError, match=rf"net\.weights\.json.*{said}"):
            weights.resolve(tmp_path / "net.weights.json")


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_float16"])
def test_convert_keeps_float32_under_any_policy(tmp_path: Path, policy: str) -> None:
    net = fast.create_model("inception_v1", num_classes=3)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        for name in ("net.keras", "net.weights.h5"):
            tf.convert(tmp_path / "net.pth", tmp_path / name)
        assert keras.config.dtype_policy().name == policy
    finally:
        keras.config.set_dtype_policy(before)
    for name in ("net.keras", "net.weights.h5"):
        back = fast.create_model("inception_v1", weights=tmp_path / name)
        assert all(map(torch.equal, back.state_dict().values(), net.state_dict().values()))
    assert keras.saving.load_model(tmp_path / "net.keras").dtype_policy.name == "float32"
