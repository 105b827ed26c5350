"""TF-slim checkpoints and Keras files give through ours the logits that TF-slim and Keras compute from them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import inception_fast as fast
import references
from inception_fast import weights
from references import images, relative, run

BUDGET = 1e-5
"""Relative, float32: both sides sum the same products in other orders (measured: below 1.2e-6). Symmetric in
place of SAME padding moves v1 by 2e-2, averages that count the padding move v3 by 6e-2."""

pytest.importorskip("tensorflow", reason="slim checkpoints and Keras nets need tensorflow")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Keras and NumPy 2 disagree about `__array__`


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `slim_graphs` writes."""
    pytest.importorskip("tf_slim", reason="the graphs are tf_slim's")
    folder = tmp_path_factory.mktemp("slim")
    references.write_slim_graphs(folder)
    return folder


def check_slim(net: torch.nn.Module, arrays: Any, first: int) -> None:
    """Logits at every size of the file; `first` is the index of slim's first class in ours."""
    sizes = [key[1:] for key in arrays if key.startswith("x")]
    assert sizes
    for size in sizes:
        x = torch.from_numpy(arrays[f"x{size}"]).permute(0, 3, 1, 2)
        assert relative(run(net, x), arrays[f"logits{size}"][:, first:]) <= BUDGET, size


@pytest.mark.parametrize(
    "file, model, options",
    [
        ("inception_v1.ckpt", "inception_v1", {}),
        ("old.ckpt", "inception_v1", {}),  # V1 format, one file
        ("inception_v2.ckpt", "inception_v2", {"stem": "separable"}),
        ("inception_v2_plain.ckpt", "inception_v2", {"stem": "plain"}),
        ("inception_v3.ckpt", "inception_v3", {"aux_logits": True}),
    ],
)
def test_slim_graph(slim: Path, file: str, model: str, options: dict[str, Any]) -> None:
    arrays = np.load(slim / f"{file.removesuffix('.ckpt').replace('old', 'inception_v1')}.npz")
    source = weights.resolve(slim / file)
    assert (source.layout, source.model) == ("slim", model)
    assert {"num_classes": 1000, "convention": "tf", "bn_eps": 1e-3, **options}.items() <= source.options.items()
    net = fast.create_model(model, weights=slim / file).eval()
    assert net.data_config.mean == net.data_config.std == (0.5, 0.5, 0.5)
    check_slim(net, arrays, first=1)


def test_slim_background_class_on_request(slim: Path) -> None:
    net = fast.create_model("inception_v2", weights=slim / "inception_v2.ckpt", num_classes=1001).eval()
    check_slim(net, np.load(slim / "inception_v2.npz"), first=0)


def test_slim_auxiliary_head(slim: Path) -> None:
    arrays = np.load(slim / "inception_v3.npz")
    net = fast.create_model("inception_v3", weights=slim / "inception_v3.ckpt").eval()
    x = torch.from_numpy(arrays["x299"]).permute(0, 3, 1, 2)
    with torch.inference_mode():
        aux = net.AuxLogits(net.forward_endpoints(x)["Mixed_6e"])
    assert relative(aux, arrays["aux299"][:, 1:]) <= BUDGET


def test_slim_comes_back_from_keras_byte_for_byte(slim: Path, tmp_path: Path) -> None:
    """All of slim's own model variables, and none besides: checkpoint to torch to Keras to checkpoint."""
    import tensorflow

    net = fast.create_model("inception_v2", weights=slim / "inception_v2.ckpt", num_classes=1001).eval()
    model, arrays = fast.tf.from_torch(net), np.load(slim / "inception_v2.npz")
    assert relative(np.array(model(arrays["x224"], training=False)), arrays["logits224"]) <= BUDGET
    fast.tf.save_slim(model, tmp_path / "back.ckpt")
    prefixes = (slim / "inception_v2.ckpt", tmp_path / "back.ckpt")
    before, after = (tensorflow.train.load_checkpoint(str(prefix)) for prefix in prefixes)
    names = {n for n in before.get_variable_to_shape_map() if n.rpartition("/")[2] in weights.slim.LEAVES}
    assert set(after.get_variable_to_shape_map()) == names
    assert all(before.get_tensor(name).tobytes() == after.get_tensor(name).tobytes() for name in names)


def test_slim_paths(slim: Path, tmp_path: Path) -> None:
    """Index, data file and folder stand for the checkpoint, also where its `checkpoint` file names another machine."""
    for file in slim.glob("inception_v1.ckpt.*"):
        shutil.copy(file, tmp_path)
    prefix = weights.resolve(tmp_path / "inception_v1.ckpt").tensors
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/elsewhere/inception_v1.ckpt"\n')
    for path in ("inception_v1.ckpt.index", "inception_v1.ckpt.data-00000-of-00001", ""):
        found = weights.resolve(tmp_path / path).tensors
        assert set(found) == set(prefix)
        assert all(torch.equal(found[key], prefix[key]) for key in prefix)


def test_slim_damage(slim: Path, tmp_path: Path) -> None:
    for file in slim.glob("inception_v1.ckpt.*"):
        shutil.copy(file, tmp_path)
    prefix, data = tmp_path / "inception_v1.ckpt", tmp_path / "inception_v1.ckpt.data-00000-of-00001"
    with pytest.raises(ValueError, match=r"InceptionV1/.*; allowed: weights of inception_v3"):
        fast.create_model("inception_v3", weights=prefix)
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(weights.WeightsError, match=r"InceptionV1/\S+ cannot be read"):
        weights.resolve(prefix)
    data.unlink()
    with pytest.raises(FileNotFoundError, match="data-00000-of-00001"):
        weights.resolve(prefix)
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes((slim / "old.ckpt").read_bytes()[:100_000])
    with pytest.raises(weights.WeightsError, match=r"cut\.ckpt"):
        weights.resolve(cut)


@pytest.mark.parametrize("name", ["inception_v4", "inception_resnet_v1", "inception_resnet_v2"])
def test_slim_names_without_a_graph(tmp_path: Path, name: str) -> None:
    """Our random net, written under slim's names by an independent list of scopes, comes back as it was."""
    aux = {} if name == "inception_resnet_v1" else {"aux_logits": True}
    net = references.randomise(fast.create_model(name, num_classes=1001, **aux), seed=3)
    references.write_checkpoint(tmp_path / "model.ckpt", references.slim_variables(name, net))
    if name == "inception_resnet_v1":
        again = fast.create_model(name, weights=tmp_path / "model.ckpt", embedding_size=512)
        assert again.num_classes == 1001  # faces have no background class
    else:
        again = fast.create_model(name, weights=tmp_path / "model.ckpt", num_classes=1001)
    state = again.state_dict()
    assert set(state) == set(net.state_dict())
    for key, value in net.state_dict().items():
        assert key.endswith("num_batches_tracked") or torch.equal(state[key], value), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float16], ids=str)
def test_slim_of_numbers_that_numpy_lacks(tmp_path: Path, dtype: torch.dtype) -> None:
    state = fast.create_model("inception_v1", num_classes=3).state_dict()
    held = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    torch.save(held, tmp_path / "held.pth")
    weights.convert(tmp_path / "held.pth", tmp_path / "held.ckpt")
    again = fast.create_model("inception_v1", weights=tmp_path / "held.ckpt").state_dict()
    assert all(torch.equal(again[key], held[key].to(value.dtype)) for key, value in state.items())


def test_slim_checkpoints_of_numbers_that_numpy_lacks(tmp_path: Path) -> None:
    import tensorflow

    net = references.randomise(fast.create_model("inception_resnet_v1", num_classes=3), seed=3)
    variables = references.slim_variables("inception_resnet_v1", net)
    held = {name: tensorflow.cast(value, "bfloat16").numpy() for name, value in variables.items()}
    references.write_checkpoint(tmp_path / "model.ckpt", held)
    again = fast.create_model("inception_resnet_v1", weights=tmp_path / "model.ckpt").state_dict()
    for key, value in net.state_dict().items():
        assert key.endswith("num_batches_tracked") or torch.equal(again[key], value.bfloat16().float()), key
    beta = "InceptionResnetV1/Conv2d_4b_3x3/BatchNorm/beta"
    references.write_checkpoint(tmp_path / "model.ckpt", variables | {beta: np.array([b"text"])})
    with pytest.raises(weights.WeightsError, match=f"{beta} has dtype .*; allowed: floating point numbers"):
        weights.resolve(tmp_path / "model.ckpt")


def test_slim_variables_that_do_not_fit(tmp_path: Path) -> None:
    net = references.randomise(fast.create_model("inception_resnet_v1", num_classes=3), seed=3)
    variables = references.slim_variables("inception_resnet_v1", net)

    def resolve(changed: dict[str, np.ndarray]) -> weights.Source:
        references.write_checkpoint(tmp_path / "model.ckpt", changed)
        return weights.resolve(tmp_path / "model.ckpt")

    beta = "InceptionResnetV1/Conv2d_4b_3x3/BatchNorm/beta"
    with pytest.raises(weights.WeightsError, match=f"{beta} .*missing"):
        resolve({key: value for key, value in variables.items() if key != beta})
    with pytest.raises(weights.WeightsError, match=r"Conv2d_9z_1x1/weights, shape \(1, 1, 2, 2\), does not belong"):
        resolve(variables | {"InceptionResnetV1/Conv2d_9z_1x1/weights": np.zeros((1, 1, 2, 2), np.float32)})
    with pytest.raises(weights.WeightsError, match="resnet_v1_50/conv1/weights is no variable of an Inception net"):
        resolve({"resnet_v1_50/conv1/weights": np.zeros((7, 7, 3, 64), np.float32)})
    for scope, rank in (("InceptionResnetV1/Conv2d_1a_3x3", "4"), ("Logits", "2 or 4")):
        with pytest.raises(
            weights.WeightsError, match=rf"{scope}/weights has shape \(2, 2, 3\); allowed: rank {rank}$"
        ):
            resolve(variables | {f"{scope}/weights": np.zeros((2, 2, 3), np.float32)})
    gamma = {beta.replace("beta", "gamma"): np.full(256, 2, np.float32)}
    assert resolve(variables | gamma).tensors["conv2d_4b.bn.weight"].eq(2).all()
    wide = {"InceptionResnetV1/Conv2d_1a_3x3/weights": np.zeros((3, 3, 3, 48), np.float32)}
    resolve(variables | wide)
    with pytest.raises(ValueError, match=r"conv2d_1a.conv.weight has shape \(48, 3, 3, 3\); allowed .*\(32, 3, 3, 3\)"):
        fast.create_model("inception_resnet_v1", weights=tmp_path / "model.ckpt")


@dataclass(frozen=True)
class KerasFiles:
    """A folder with net.h5, net.weights.h5 and net.keras of a random net, its logits, and what net.h5 gives us."""

    model: str
    folder: Path
    logits: np.ndarray
    source: weights.Source


@pytest.fixture(scope="module", params=["InceptionV3", "InceptionResNetV2"])
def keras_files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> KerasFiles:
    pytest.importorskip("keras", reason="the nets are Keras'")
    folder = tmp_path_factory.mktemp(request.param)
    net = references.keras_net(request.param, 107)
    net.save(folder / "net.h5")
    net.save_weights(folder / "net.weights.h5")
    net.save(folder / "net.keras")
    model = {"InceptionV3": "inception_v3", "InceptionResNetV2": "inception_resnet_v2"}[request.param]
    return KerasFiles(model, folder, references.run_keras(net, images(107)), weights.resolve(folder / "net.h5"))


def check_same(source: weights.Source, files: KerasFiles) -> None:
    """`source` is, number for number, what `test_keras_logits` has proved right."""
    assert (source.layout, source.model, source.options) == ("keras", files.model, files.source.options)
    assert set(source.tensors) == set(files.source.tensors)
    for key, value in files.source.tensors.items():
        assert torch.equal(source.tensors[key], value), key


def test_keras_logits(keras_files: KerasFiles) -> None:
    assert keras_files.source.options["num_classes"] == 1000
    net = fast.create_model(keras_files.model, weights=keras_files.folder / "net.h5").eval()
    assert (net.convention, net.aux_logits) == ("tf", False)
    assert relative(run(net, images(107)), keras_files.logits) <= BUDGET


@pytest.mark.parametrize("file", ["net.weights.h5", "net.keras"])
def test_keras_formats(keras_files: KerasFiles, file: str) -> None:
    check_same(weights.resolve(keras_files.folder / file), keras_files)


def test_keras_before_names(keras_files: KerasFiles, tmp_path: Path) -> None:
    """Older Keras 3 and tf.keras number layers by class and position, without a word on which layer is which."""
    h5py = pytest.importorskip("h5py")
    path = shutil.copy(keras_files.folder / "net.weights.h5", tmp_path / "net.weights.h5")
    with h5py.File(path, "r+") as file:
        named = [file["layers"][name]["vars"].attrs for name in file["layers"] if "vars" in file["layers"][name]]
        assert len(named) > 190
        for attributes in named:
            del attributes["name"]
    check_same(weights.resolve(path), keras_files)


def test_keras_2_names(keras_files: KerasFiles, tmp_path: Path) -> None:
    """Weights-only files of Keras 2: numbers from one, `conv2d_1/conv2d_1/kernel:0`, layers at the root."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(keras_files.folder / "net.h5") as old, h5py.File(tmp_path / "net.h5", "w") as new:
        for layer, group in old["model_weights"].items():
            match = re.fullmatch(r"(conv2d|batch_normalization)(?:_(\d+))?", layer)
            name = f"{match[1]}_{int(match[2] or 0) + 1}" if match else layer
            for variable, value in group.get(layer, {}).items():
                new[f"{name}/{name}/{variable}:0"] = value[...]
    check_same(weights.resolve(tmp_path / "net.h5"), keras_files)


def test_keras_without_head_and_later_in_a_session(tmp_path: Path) -> None:
    """Numbers of layers go on from what the session made before; without its top a net is a trunk for any classes."""
    pytest.importorskip("keras")
    reference = references.keras_net("InceptionV3", 75, after=5, include_top=False, pooling="avg")
    assert {"conv2d_5", "batch_normalization"} <= {layer.name for layer in reference.layers}
    reference.save_weights(tmp_path / "notop.weights.h5")
    net = fast.create_model("inception_v3", weights=tmp_path / "notop.weights.h5").eval()
    assert net.num_classes == 0
    assert relative(run(net, images(75)), references.run_keras(reference, images(75))) <= BUDGET
    classifier = fast.create_model("inception_v3", weights=tmp_path / "notop.weights.h5", num_classes=7).eval()
    assert classifier.num_classes == 7
    classifier.reset_classifier(0)
    assert torch.equal(run(classifier, images(75)), run(net, images(75)))
