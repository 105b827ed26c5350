"""The Keras nets equal the torch ones in numbers, parameters and names; weights move between all unchanged."""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import inception_fast as fast
import references
from inception_fast import weights
from inception_fast.cli import main
from keras_nets import CLASSES, SIZE, image, nchw, nhwc, seeded, torch_net
from numerics import NET_MAX, max_error
from training import small_files

keras = pytest.importorskip("keras", reason="the Keras nets need keras")
pytest.importorskip("tensorflow", reason="the Keras nets run on tensorflow here")

from inception_fast import tf  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Keras and NumPy 2 disagree about `__array__`

PUBLISHED = {  # parameters without gamma, moving statistics, features of the head; slim's and Keras' own counts
    "inception_v1": (6_617_624, 14_560, 1024),
    "inception_v2": (11_178_336, 19_776, 1024),
    "inception_v3": (23_817_352, 34_432, 2048),
    "inception_v4": (42_648_232, 63_168, 1536),
    "inception_resnet_v2": (55_813_192, 60_544, 1536),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same_state(one: Any, other: Any) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    assert set(mine) == set(theirs)
    return all(torch.equal(value, theirs[key]) for key, value in mine.items() if "num_batches" not in key)


@dataclass(frozen=True)
class Evaluated:
    """A seeded net in torch and in Keras on TensorFlow: maps by slim's names and "logits", and what was counted."""

    torch: dict[str, Tensor]
    keras: dict[str, Tensor]
    parameters: int
    moving: int
    came_back: bool
    variables: list[tuple[str, Any]]
    layers_of: set[str]


@cache
def evaluated(name: str) -> Evaluated:
    """Kept without the nets, for every test of this file."""
    net = seeded(name)
    keras.backend.clear_session()
    model = tf.from_torch(net, (SIZE, SIZE, 3))
    maps = keras.Model(model.input, {"logits": model.output, **tf.endpoints(model)})(nhwc(image(SIZE)), training=False)
    with torch.inference_mode():
        expected = net.forward_endpoints(image(SIZE)) | {"logits": net(image(SIZE))}
    return Evaluated(
        expected,
        {key: nchw(value) for key, value in maps.items()},
        model.count_params(),
        sum(int(np.prod(v.shape)) for v in model.non_trainable_variables),
        same_state(tf.to_torch(model), net),
        [(v.path, v.shape) for v in model.variables],
        {type(layer).__module__.partition(".")[0] for layer in model.layers},
    )


@pytest.mark.parametrize("name", fast.list_models())
def test_logits_endpoints_and_counts(name: str) -> None:
    found = evaluated(name)
    assert set(found.keras) == set(found.torch)
    for key, value in found.torch.items():
        assert max_error(found.keras[key], value) <= NET_MAX, key
    assert found.came_back
    assert found.layers_of == {"keras"}  # so that Keras loads a file of it by itself
    if name in PUBLISHED:
        learned, moving, features = PUBLISHED[name]
        assert found.parameters == learned + moving - (1000 - CLASSES) * (features + 1)
        assert found.moving == moving


def test_laid_out_as_keras_own() -> None:
    """Names, order and shapes; InceptionV3's are compared where its files are loaded."""
    keras.backend.clear_session()
    own = keras.applications.InceptionResNetV2(weights=None, classes=CLASSES, input_shape=(SIZE, SIZE, 3))
    assert evaluated("inception_resnet_v2").variables == [(v.path, v.shape) for v in own.variables]


@pytest.mark.parametrize("name, size", [("inception_v1", 107), ("inception_v2", 106), ("inception_v3", 107)])
def test_the_torch_convention(name: str, size: int) -> None:
    """Symmetric padding, pools that round up, averages that count the padding: torchvision's nets in Keras."""
    net = torch_net(name, num_classes=5, convention="torch")
    nn.init.uniform_(net.get_submodule(net.first_layer).bn.weight, 0.5, 1.5) if name != "inception_v2" else None
    model = tf.from_torch(net, (size, size, 3))
    with torch.inference_mode():
        assert max_error(nchw(model(nhwc(image(size)), training=False)), net(image(size))) <= NET_MAX
    back = tf.to_torch(model)
    assert back.convention == "torch" and same_state(back, net)


def test_keras_applications_load_by_name(tmp_path: Path) -> None:
    """Names, order and shapes of the layers with weights are those of Keras' own: every way of loading works."""
    reference = references.keras_net("InceptionV3", 75, classes=9)
    x = nhwc(image(75))
    expected = torch.from_numpy(np.array(references.run_keras(reference, image(75))))
    reference.save_weights(tmp_path / "net.weights.h5")
    loaded = tf.create_model("inception_v3", tmp_path / "net.weights.h5", classes=9, input_shape=(75, 75, 3))
    assert max_error(nchw(loaded(x, training=False)), expected) <= NET_MAX
    values = loaded.get_weights()
    reference.save(tmp_path / "net.h5")
    model = tf.create_model("inception_v3", classes=9, input_shape=(75, 75, 3))
    for load in (
        lambda: model.set_weights(reference.get_weights()),
        lambda: model.load_weights(tmp_path / "net.weights.h5"),
        lambda: model.load_weights(tmp_path / "net.h5", by_name=True),
    ):
        model.set_weights([np.zeros_like(value) for value in values])
        load()
        assert all(map(np.array_equal, model.get_weights(), values))
    assert model.get_layer("mixed7").output.shape == reference.get_layer("mixed7").output.shape
    fast_model = tf.optimize(reference)
    assert max_error(nchw(fast_model(x)), expected) <= NET_MAX
    assert fast_model.report().counts["native_calls"] == 1


def test_top_pooling_and_activation() -> None:
    x = nhwc(image(75))
    bottom = tf.create_model("inception_v1", include_top=False, input_shape=(75, 75, 3))
    assert bottom.output_shape == (None, 3, 3, 1024)
    pooled = tf.create_model("inception_v1", include_top=False, pooling="max")
    pooled.set_weights(bottom.get_weights())
    assert pooled.input_shape == (None, None, None, 3)
    np.testing.assert_array_equal(pooled(x), np.asarray(bottom(x)).max((1, 2)))
    with torch.no_grad():
        assert max_error(tf.to_torch(pooled)(image(75)), nchw(pooled(x))) <= NET_MAX
    model = tf.InceptionV1(classes=np.int64(4), input_shape=(np.int64(75), np.int64(75), np.int32(3)))
    assert np.asarray(model(x)).sum() == pytest.approx(1, abs=1e-6)


def test_the_model_begins_with_what_made_its_image() -> None:
    """As Keras Applications do: what stands before `input_tensor` is run, not cut off."""
    picture = keras.Input((75, 75, 3))
    scaled = keras.layers.Rescaling(1 / 127.5, offset=-1)(picture)
    model = tf.create_model("inception_v1", classes=4, input_tensor=scaled)
    plain = tf.create_model("inception_v1", classes=4, input_shape=(75, 75, 3))
    plain.set_weights(model.get_weights())
    assert model.input is picture
    x = nhwc(image(75))
    np.testing.assert_allclose(model(x * 127.5 + 127.5), plain(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"layer 'rescaling.*' \(Rescaling\) stands before the net"):
        tf.to_torch(model)  # whose input is another than the torch net's
    padded = tf.create_model("inception_v1", classes=4, input_tensor=keras.layers.ZeroPadding2D(3)(picture))
    with pytest.raises(ValueError, match=r"layer 'zero_padding2d.*' \(ZeroPadding2D\) stands before the net"):
        tf.to_torch(padded)  # which was taken for the net's own, of convention "torch"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "inception_v5"}, "unknown model 'inception_v5'"),
        ({"name": "inception_v1", "pooling": "mean"}, "pooling='mean'; allowed: None, 'avg', 'max'"),
        ({"name": "inception_v3", "input_shape": (74, 74, 3)}, r"input_shape=\(74, 74, 3\) .*at least 75"),
        ({"name": "inception_v3", "classes": -1}, "classes=-1; allowed: an integer >= 0"),
        ({"name": "inception_v1", "aux_logits": True}, "aux_logits=True for inception_v1; allowed: inception_v3"),
        ({"name": "inception_v3", "aux_logits": True, "input_shape": (96, 96, 3)}, "17x17 or larger"),
        ({"name": "inception_v3", "aux_logits": True, "input_shape": (299, None, 3)}, r"map \(None, 17, None, 768\)"),
        ({"name": "inception_v3", "aux_logits": "no"}, "aux_logits='no'; allowed: False, True"),
        ({"name": "inception_v3", "bn_scale": "no"}, "bn_scale='no'; allowed: None, False, True"),
        ({"name": "inception_resnet_v1", "embedding_size": 0}, "embedding_size=0; allowed: an integer >= 1"),
        ({"name": "inception_v1", "stem": "plain"}, "stem='plain' for inception_v1; allowed: inception_v2"),
    ],
)
def test_bad_options(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tf.create_model(**arguments)


def test_bad_weights(tmp_path: Path) -> None:
    torch.save(torch_net("inception_v1", num_classes=3).state_dict(), tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"classes=1000, .* has 3; allowed: these, or include_top=False"):
        tf.create_model("inception_v1", tmp_path / "net.pth")
    with pytest.raises(FileNotFoundError, match="looked for"):
        tf.create_model("inception_v1", tmp_path / "gone.pth")
    assert tf.create_model("inception_v1", tmp_path / "net.pth", include_top=False).output_shape[-1] == 1024
    with pytest.raises(ValueError, match=r"fid=True has no Keras net"):
        tf.from_torch(fast.create_model("inception_v3", fid=True))
    net = torch_net("inception_v1", num_classes=3)
    with pytest.raises(ValueError, match=r"input_shape=\(64, 64, 1\) for a net of 3 channels; allowed: \(h, w, 3\)"):
        tf.from_torch(net, (64, 64, 1))
    net.reset_classifier(3, "max")
    with pytest.raises(ValueError, match=r"global_pool='max' has no Keras net; allowed: global_pool='avg'"):
        tf.from_torch(net)
    with pytest.raises(ValueError, match="is no layer of an Inception net"):
        tf.to_torch(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="other")]))


@pytest.mark.parametrize("name, channels", [("inception_v1", 1), ("inception_v2", 4)])
def test_files_of_other_images_than_rgb(tmp_path: Path, name: str, channels: int) -> None:
    """v2's first layer, a separable one, cannot be adapted: its file has to tell."""
    net = torch_net(name, num_classes=2, in_chans=channels, convention="tf")
    model = tf.from_torch(net, (107, 107, channels))
    assert same_state(tf.to_torch(model), net)
    tf.save_slim(model, tmp_path / "net.ckpt")
    model.save(tmp_path / "net.keras")
    for file in ("net.ckpt", "net.keras"):
        for options in ({}, {"in_chans": channels}):
            back = fast.create_model(name, weights=tmp_path / file, **options)
            assert same_state(back, net) and back.data_config.input_size[0] == channels
    again = tf.create_model(name, tmp_path / "net.ckpt", classes=2, input_shape=(107, 107, channels))
    assert all(map(np.array_equal, again.get_weights(), model.get_weights()))


@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
def test_files_without_top_of_the_net_with_a_bottleneck(tmp_path: Path, ending: str) -> None:
    """The bottleneck of Inception-ResNet-v1 belongs to the top: a file of the trunk has none, nor has the model."""
    options = {"include_top": False, "input_shape": (75, 75, 3)}
    model = tf.create_model("inception_resnet_v1", bn_scale=True, **options)
    model.get_layer("Conv2d_1a_3x3_bn").gamma.assign(np.linspace(0.5, 1.5, 32))
    file = tmp_path / f"net{ending}"
    (model.save if ending == ".keras" else model.save_weights)(file)
    again = tf.create_model("inception_resnet_v1", file, **options)
    assert all(map(np.array_equal, again.get_weights(), model.get_weights()))
    with pytest.raises(ValueError, match=r"last_linear.weight, shape \(512, 1792\), .* is missing"):
        tf.create_model("inception_resnet_v1", file, classes=0)  # the embedding, which is what is missing


def slim_files(folder: Path, name: str) -> list[Path]:
    return [folder / f"{name}.index", folder / f"{name}.data-00000-of-00001"]


@pytest.mark.parametrize(
    "name, options",
    [
        ("inception_v1", {}),
        ("inception_v3", {"aux_logits": True, "input_shape": (299, 299, 3)}),
    ],
)
def test_slim_torch_keras_slim_gives_the_same_bytes(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """With slim's background class, the auxiliary head and the files' own order: the checkpoints are equal as files."""
    aux = {"aux_logits": True} if "aux_logits" in options else {}
    net = torch_net(name, num_classes=1001, convention="tf", **aux)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    weights.convert(tmp_path / "net.pth", tmp_path / "first.ckpt", model=name)
    again = fast.create_model(name, weights=tmp_path / "first.ckpt", num_classes=1001)
    assert same_state(again, net)
    model = tf.from_torch(again, options.get("input_shape", (107, 107, 3)))
    tf.save_slim(model, tmp_path / "second.ckpt")
    for one, other in zip(slim_files(tmp_path, "first.ckpt"), slim_files(tmp_path, "second.ckpt"), strict=True):
        assert one.stat().st_size > 0 and filecmp.cmp(one, other, shallow=False)


@pytest.mark.parametrize("name", ["inception_v4", "inception_resnet_v1", "inception_resnet_v2"])
def test_torch_slim_torch(tmp_path: Path, name: str) -> None:
    net = torch_net(name, num_classes=3)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    weights.convert(tmp_path / "net.pth", tmp_path / "net.ckpt", model=name)
    assert same_state(fast.create_model(name, weights=tmp_path / "net.ckpt"), net)


def test_bfloat16_models_cross_both_ways(tmp_path: Path) -> None:
    net = torch_net("inception_v1", num_classes=3).bfloat16()
    model = tf.from_torch(net, (64, 64, 3))
    assert same_state(tf.to_torch(model), net)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("bfloat16")
    try:
        small = tf.from_torch(net, (64, 64, 3))
    finally:
        keras.config.set_dtype_policy(before)
    assert {str(weight.dtype) for weight in small.weights} == {"bfloat16"}
    assert same_state(tf.to_torch(small), net)
    for file in ("net.keras", "net.h5"):
        small.save(tmp_path / file)
        assert same_state(fast.create_model("inception_v1", weights=tmp_path / file), net)
    small.save_weights(tmp_path / "net.weights.h5")
    assert same_state(fast.create_model("inception_v1", weights=tmp_path / "net.weights.h5"), net)


def test_a_file_tells_that_its_net_ends_in_maxima(tmp_path: Path) -> None:
    options: Any = {"include_top": False, "pooling": "max", "input_shape": (75, 75, 3)}
    model = tf.create_model("inception_v1", **options)
    model.save(tmp_path / "net.keras")
    back = fast.create_model("inception_v1", weights=tmp_path / "net.keras").eval()
    with torch.no_grad():
        assert max_error(back(image(75)), nchw(model(nhwc(image(75))))) <= NET_MAX
    again = tf.create_model("inception_v1", tmp_path / "net.keras", **options)
    assert np.array_equal(again(nhwc(image(75))), model(nhwc(image(75))))


def test_weights_that_keras_changed(tmp_path: Path) -> None:
    """What LoRA adds crosses with the kernel; a quantised classifier and another epsilon do not cross at all."""
    net = torch_net("inception_v1", num_classes=3, convention="tf")
    model = tf.from_torch(net, (75, 75, 3))
    for name in ("Conv2d_2b_1x1", "predictions"):
        layer = model.get_layer(name)
        layer.enable_lora(2)
        layer.lora_kernel_b.assign(np.random.default_rng(0).normal(size=layer.lora_kernel_b.shape))
    back = tf.to_torch(model)
    assert not same_state(back, net)
    with torch.no_grad():
        assert max_error(back(image(75)), nchw(model(nhwc(image(75))))) <= NET_MAX
    small = tf.from_torch(net, (75, 75, 3))
    small.quantize("int8")
    for cross in (tf.to_torch, lambda model: tf.save_slim(model, tmp_path / "net.ckpt")):
        with pytest.raises(weights.WeightsError, match="layer 'predictions' is quantised to int8; allowed: floating"):
            cross(small)
        model.get_layer("Conv2d_2b_1x1_bn").epsilon = 1e-5
        with pytest.raises(weights.WeightsError, match=r"'Conv2d_2b_1x1_bn' has epsilon=1e-05; allowed: 0\.001"):
            cross(model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["inception_v2"])
def test_convert_reaches_every_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    net = torch_net(name, num_classes=6, convention="tf")
    source = tmp_path / "net.safetensors"
    torch.save(net.state_dict(), tmp_path / "net.pth")
    assert main(["convert", str(tmp_path / "net.pth"), str(source)]) == 0
    files = ("net.safetensors", "net.keras", "net.weights.h5", "n.ckpt")
    for before, after in pairwise(files):
        capsys.readouterr()
        assert main(["convert", str(tmp_path / before), str(tmp_path / after), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["model"] == name
    back = fast.create_model(name, weights=tmp_path / "n.ckpt")
    assert back.num_classes == 6 and same_state(back, net)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    loaded = keras.saving.load_model(tmp_path / "net.keras")
    assert same_state(tf.to_torch(loaded), net)


@pytest.mark.parametrize("name, size", [("inception_v1", 107), ("inception_v3", 75)])
def test_convert_tells_the_convention_or_that_it_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, size: int
) -> None:
    """A .keras file holds it; who loads a checkpoint as it is has another net, and is told so when it is written."""
    net = torch_net(name, num_classes=6, convention="torch")
    torch.save(net.state_dict(), tmp_path / "net.pth")

    def logits(file: str, **options: str) -> Tensor:
        made = fast.create_model(name, weights=tmp_path / file, **options).eval()
        with torch.inference_mode():
            return made(image(size))

    said = {}
    for file in ("net.keras", "net.ckpt"):
        assert main(["convert", str(tmp_path / "net.pth"), str(tmp_path / file), "--json"]) == 0
        out, said[file] = capsys.readouterr()
        assert json.loads(out)["options"]["convention"] == "torch"
    wanted = logits("net.pth")
    assert said["net.keras"] == "" and torch.equal(logits("net.keras"), wanted)
    assert "cannot hold convention='torch': pass convention='torch' to create_model" in said["net.ckpt"]
    assert said["net.ckpt"].count("\n") == 1 and torch.equal(logits("net.ckpt", convention="torch"), wanted)
    assert not torch.equal(logits("net.ckpt"), wanted)


def test_convert_makes_sure_of_room_first(tmp_path: Path) -> None:
    """HDF5 would crash the process at its end over a file that the disk did not take."""
    torch.save(torch_net("inception_v1", num_classes=2).state_dict(), tmp_path / "net.pth")
    with small_files(1_000_000), pytest.raises(OSError, match=r"MB are needed: .*net\.weights\.h5"):
        tf.convert(tmp_path / "net.pth", tmp_path / "net.weights.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["net.pth"]


@pytest.mark.parametrize("layout, target", [("keras", "x.pth"), ("slim", "x.safetensors"), ("onnx", "x.onnx")])
def test_convert_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str, target: str) -> None:
    torch.save(torch_net("inception_v1", num_classes=2).state_dict(), tmp_path / "net.pth")
    assert main(["convert", str(tmp_path / "net.pth"), str(tmp_path / target), "--layout", layout]) == 2
    message = capsys.readouterr().err
    assert "allowed: " in message and message.count("\n") == 1
    assert not (tmp_path / target).exists()


def test_preprocess_and_decode() -> None:
    pixels = np.array([[[[0, 127.5, 255]]]], dtype=np.float32)
    assert tf.preprocess_input(pixels.copy()).tolist() == [[[[-1, 0, 1]]]]
    references.torchvision()  # lets timm load beside a torchvision that was built for another torch
    pytest.importorskip("timm", reason="the names come from timm")
    scores = np.zeros((2, 1000), np.float32)
    scores[0, 207], scores[0, 3], scores[1, 0] = 2, 1, 1
    first, second = tf.decode_predictions(scores, top=np.int64(2))
    assert first == [("n02099601", "golden_retriever", 2.0), ("n01491361", "tiger_shark", 1.0)]
    assert second[0] == ("n01440764", "tench", 1.0)
    with pytest.raises(ValueError, match=r"shape \(2, 10\); allowed: \(n, 1000\)"):
        tf.decode_predictions(np.zeros((2, 10)))


OTHER_BACKEND = """
import sys, numpy as np, torch, inception_fast as fast, keras
from inception_fast import tf
from keras_nets import SIZE, image, nhwc, seeded
assert keras.backend.backend() == sys.argv[1] and "tensorflow" not in sys.modules
# The random values would be replaced at once, and some backends compile their making for every shape.
keras.initializers.VarianceScaling.__call__ = lambda self, shape, dtype=None: np.zeros(shape, dtype)
torch.set_num_threads(1)
logits = {}
for name in sys.argv[3:]:
    model = tf.from_torch(seeded(name), (SIZE, SIZE, 3))
    logits[name] = keras.ops.convert_to_numpy(model(nhwc(image(SIZE)), training=False))
    keras.backend.clear_session()
image = keras.Input((9, 9, 3))
model = keras.Model(image, tf.ConvBNReLU(4, 3)(image))
model.set_weights([np.linspace(0.1, 0.9, w.size, dtype=w.dtype).reshape(w.shape) for w in model.get_weights()])
if sys.argv[1] == "torch":
    x = torch.rand(2, 9, 9, 3)
    y, expected = tf.optimize(model)(x), model(x, training=False)
    assert y.shape == expected.shape and 0 < expected.max() and (y - expected).abs().max() <= 1e-5 * expected.max()
    try:
        tf.optimize(model)(x.requires_grad_())
    except RuntimeError as error:
        assert "no gradient flows" in str(error), error
    else:
        raise AssertionError("no error")
else:
    try:
        tf.optimize(model)
    except RuntimeError as error:
        assert str(error) == "Keras runs on jax; allowed: tensorflow, torch", error
    else:
        raise AssertionError("no error")
assert "tensorflow" not in sys.modules
np.savez(sys.argv[2], **logits)
"""


# JAX compiles each shape of each operation, seconds a net: one without and one with residuals stand for all.
@pytest.mark.parametrize(
    ("backend", "names"), [("torch", fast.list_models()), ("jax", ["inception_v1", "inception_resnet_v1"])]
)
def test_the_same_logits_on_every_backend(tmp_path: Path, backend: str, names: list[str]) -> None:
    """In a process that never loads TensorFlow, against torch's nets and Keras' on TensorFlow."""
    pytest.importorskip(backend, reason=f"Keras runs on {backend} here")
    tests = Path(__file__).parent
    environment = {**os.environ, "KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests)}
    command = [sys.executable, "-c", OTHER_BACKEND, backend, str(tmp_path / "logits.npz"), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(tmp_path / "logits.npz")
    assert set(found) == set(names)
    for name, logits in found.items():
        for other in (evaluated(name).torch, evaluated(name).keras):
            assert max_error(torch.from_numpy(logits), other["logits"]) <= NET_MAX, name


@pytest.mark.parametrize("package", ["keras", "tensorflow"])
def test_without_tensorflow_the_extra_is_named(package: str) -> None:
    program = f"""
import sys
sys.modules[{package!r}] = None
import inception_fast as fast
assert "keras" not in sys.modules or sys.modules["keras"] is None
try:
    fast.tf.create_model("inception_v1")
except ImportError as error:
    assert "pip install inception-fast[tensorflow]" in str(error), error
else:
    raise AssertionError("no error")
fast.create_model("inception_v1", num_classes=2)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("version", ["3.9.2", "2.15.0"])
def test_an_old_keras_is_named(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFlow 2.16 takes Keras 3.0, whose batch norms without a gamma, for one, are others."""
    import keras

    monkeypatch.setattr(keras, "__version__", version)
    with pytest.raises(ImportError, match=rf"Keras {version}; .* needs 3\.10 or newer"):
        tf.__getattr__("create_model")
