"""Weight files: what they are recognised as, what loads from them, and every way in which one is refused."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import inception_fast as fast
from inception_fast import weights
from inception_fast.weights.torch_files import parse_config, recognise

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """A random v1 of 11 classes with auxiliary heads: the smallest net that has all kinds of layers."""
    net = fast.create_model("inception_v1", num_classes=11, aux_logits=True)
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return net.state_dict()


def saved(folder: Path, content: Any, name: str = "weights.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


def assert_holds(net: nn.Module, state: State, but: str = " ") -> None:
    """`net` has exactly the tensors of `state`, except below the prefix `but`."""
    for key, value in net.state_dict().items():
        if not key.startswith(but):
            assert torch.equal(value, state[key]), key


# The options that a state dict alone gives away, for every network that options can make.
@pytest.mark.parametrize(
    "model, options, layout",
    [
        ("inception_v1", {}, "torchvision"),
        ("inception_v1", {"aux_logits": True, "num_classes": 9}, "torchvision"),
        ("inception_v1", {"classic": True, "aux_logits": True}, "torchvision"),
        ("inception_v2", {"stem": "separable"}, "inception_fast"),
        ("inception_v2", {"stem": "plain", "in_chans": 4}, "inception_fast"),
        ("inception_v3", {"aux_logits": True}, "torchvision"),
        ("inception_v3", {"num_classes": 1008, "aux_logits": True}, "torchvision"),
        ("inception_v3", {"num_classes": 0}, "timm"),
        ("inception_v3", {"fid": True}, "pytorch-fid"),
        ("inception_v4", {"in_chans": 1}, "timm"),
        ("inception_v4", {"aux_logits": True}, "timm"),
        ("inception_resnet_v1", {"num_classes": 8631}, "facenet-pytorch"),
        ("inception_resnet_v1", {"num_classes": 0, "embedding_size": 128}, "facenet-pytorch"),
        ("inception_resnet_v1", {"widths": "paper"}, "facenet-pytorch"),
        ("inception_resnet_v2", {}, "timm"),
        ("inception_resnet_v2", {"widths": "paper", "aux_logits": True}, "timm"),
    ],
)
def test_state_dict_tells_model_and_options(model: str, options: dict[str, Any], layout: str) -> None:
    with torch.device("meta"):
        state = fast.create_model(model, **options).state_dict()
        source = recognise("file", state, None)
        again = fast.create_model(source.model, **source.options).state_dict()
    assert (source.model, source.layout) == (model, layout)
    assert {key: value.shape for key, value in again.items()} == {key: value.shape for key, value in state.items()}
    if source.data_config is not None:
        assert source.data_config.input_size[0] == len(source.data_config.mean) == options.get("in_chans", 3)


def test_convention_follows_the_source() -> None:
    """torchvision and timm count the padding in v3's averages, the FID graph does not; v1's pads are torchvision's."""
    seen = {}
    for model, options in (("inception_v1", {}), ("inception_v3", {}), ("inception_v3", {"fid": True})):
        with torch.device("meta"):
            state = fast.create_model(model, **options).state_dict()
        seen[(model, *options)] = recognise("file", state, None).options["convention"]
    assert seen == {("inception_v1",): "torch", ("inception_v3",): "torch", ("inception_v3", "fid"): "tf"}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {
            "state_dict": {key: torch.zeros_like(value) for key, value in state.items()},
            "state_dict_ema": state,
        },
        lambda state: {"state_dict": state, "state_dict_ema": None},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {"state_dict": {"model_state_dict": {f"_orig_mod.module.{k}": v for k, v in state.items()}}},
        lambda state: {"n_averaged": torch.tensor(3)} | {f"module.{key}": value for key, value in state.items()},
        lambda state: {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")},
        lambda state: {key: value.double() if value.is_floating_point() else value for key, value in state.items()},
    ],
    ids=[
        "plain",
        "state_dict",
        "averaged",
        "not averaged",
        "module",
        "nested",
        "AveragedModel",
        "no counters",
        "double",
    ],
)
def test_pth(tmp_path: Path, state: State, wrap: Callable[[State], Any]) -> None:
    net = fast.create_model("inception_v1", weights=saved(tmp_path, wrap(state)))
    assert_holds(net, state)
    assert (net.num_classes, net.aux_logits) == (11, True)


def test_legacy_pth(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_holds(fast.create_model("inception_v1", weights=tmp_path / "old.pth"), state)


def test_safetensors(tmp_path: Path, state: State) -> None:
    save_file(state, tmp_path / "model.safetensors")
    assert_holds(fast.create_model("inception_v1", weights=str(tmp_path / "model.safetensors")), state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_safetensors_of_a_wrapped_module(tmp_path: Path, state: State, prefix: str) -> None:
    file, own = tmp_path / "model.safetensors", tmp_path / "own.safetensors"
    save_file({prefix + key: value for key, value in state.items()}, file)
    net = fast.create_model("inception_v1", weights=file)
    assert_holds(net, state)
    assert (net.num_classes, net.aux_logits) == (11, True)
    weights.convert(file, own)
    with safe_open(own, "pt") as held:
        save_file({prefix + key: held.get_tensor(key) for key in held.keys()}, own, held.metadata())
    assert_holds(fast.create_model("inception_v1", weights=own), state)


def test_content_decides_not_extension(tmp_path: Path, state: State) -> None:
    save_file(state, tmp_path / "weights.pth")
    assert_holds(fast.create_model("inception_v1", weights=tmp_path / "weights.pth"), state)


def test_other_number_of_classes_loads_all_but_classifiers(tmp_path: Path, state: State) -> None:
    path = saved(tmp_path, state)
    net = fast.create_model("inception_v1", weights=path, num_classes=3)
    heads = {"fc", "aux1.fc2", "aux2.fc2"}
    for key, value in net.state_dict().items():
        if key.rpartition(".")[0] in heads:
            assert value.shape[0] == 3
        else:
            assert torch.equal(value, state[key]), key
    trunk = fast.create_model("inception_v1", weights=path, num_classes=0, aux_logits=False)
    assert_holds(trunk, state)
    assert not any(key.startswith(("fc.", "aux")) for key in trunk.state_dict())


def test_explicit_arguments_win(tmp_path: Path, state: State) -> None:
    net = fast.create_model(
        "inception_v1", weights=saved(tmp_path, state), aux_logits=False, convention="tf", bn_eps=1e-5
    )
    assert (net.convention, net.aux_logits, net.conv1.bn.eps) == ("tf", False, 1e-5)
    assert_holds(net, state)


def test_background_class(tmp_path: Path) -> None:
    """Ports of slim's v3, v4 and Inception-ResNet-v2 may still have the background class; other 1001 are one's own."""
    ported = [(name, False, 1000) for name in ("inception_v3", "inception_v4", "inception_resnet_v2")]
    for model, aux, kept in [*ported, ("inception_v1", False, 1001), ("inception_v3", True, 1001)]:
        with torch.device("meta"):
            source = recognise("file", fast.create_model(model, num_classes=1001, aux_logits=aux).state_dict(), None)
        assert (source.file_classes, source.options["num_classes"]) == (1001, kept)
    head = torch.arange(1001.0)
    tensors = {"last_linear.weight": head[:, None].expand(1001, 4), "last_linear.bias": head}
    source = weights.Source("timm", "inception_v4", {"num_classes": 1000}, None, tensors)
    assert source.state_dict()["last_linear.bias"].tolist() == list(range(1, 1001))
    assert source.state_dict(1001)["last_linear.bias"].shape == (1001,)
    assert source.state_dict(12) == {}


@pytest.mark.parametrize("model, head", [("inception_resnet_v2", "classif"), ("inception_v3", "fc")])
def test_cadene_names_the_classifier_otherwise(model: str, head: str) -> None:
    state = fast.create_model(model, aux_logits=True).state_dict()
    renamed = {re.sub(f"^{head}\\.", "last_linear.", key): value for key, value in state.items()}
    assert set(recognise("file", renamed, None).tensors) == set(state)


def test_grey_images(tmp_path: Path, state: State) -> None:
    grey = dict(state) | {"conv1.conv.weight": state["conv1.conv.weight"].sum(1, keepdim=True)}
    path = saved(tmp_path, grey)
    assert weights.resolve(path).options["in_chans"] == 1
    net = fast.create_model("inception_v1", weights=path, in_chans=1)
    assert_holds(net, grey)
    assert net.data_config.input_size == (1, 224, 224)


def test_missing_heads(tmp_path: Path, state: State) -> None:
    path = saved(tmp_path, {key: value for key, value in state.items() if not key.startswith("aux")})
    assert not fast.create_model("inception_v1", weights=path).aux_logits
    with pytest.raises(ValueError, match="auxiliary heads"):
        fast.create_model("inception_v1", weights=path, aux_logits=True)


def test_wrong_architecture(tmp_path: Path, state: State) -> None:
    with pytest.raises(ValueError, match=r"weights\.pth holds inception_v1, as inception3a\.\S+ shows; .*inception_v4"):
        fast.create_model("inception_v4", weights=saved(tmp_path, state))


def test_foreign_network(tmp_path: Path) -> None:
    path = saved(tmp_path, {"layer1.0.conv1.weight": torch.zeros(4, 4, 3, 3), "fc.weight": torch.zeros(10, 4)})
    with pytest.raises(weights.WeightsError, match=r"layer1\.0\.conv1\.weight is no key of an Inception net"):
        weights.resolve(path)


@pytest.mark.parametrize(
    "key", ["conv1.conv.weight", "inception4c.branch3.1.bn.running_var", "fc.bias", "aux2.fc1.bias"]
)
def test_missing_key(tmp_path: Path, state: State, key: str) -> None:
    path = saved(tmp_path, {other: value for other, value in state.items() if other != key})
    with pytest.raises(weights.WeightsError, match=f"{key}, shape .* missing"):
        fast.create_model("inception_v1", weights=path)


def test_key_too_many(tmp_path: Path, state: State) -> None:
    path = saved(tmp_path, state | {"inception5c.branch1.conv.weight": torch.zeros(1)})
    with pytest.raises(
        weights.WeightsError, match=r"inception5c\.branch1\.conv\.weight does not belong to inception_v1"
    ):
        fast.create_model("inception_v1", weights=path)


def test_other_shape_leaves_the_model_alone(tmp_path: Path, state: State) -> None:
    """Even where the last key alone differs, nothing has been copied before."""
    source = weights.resolve(saved(tmp_path, state | {"aux2.fc1.weight": torch.zeros(1024, 2049)}))
    net = fast.create_model("inception_v1", num_classes=11, aux_logits=True)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    message = r"aux2\.fc1\.weight has shape \(1024, 2049\); allowed for inception_v1: \(1024, 2048\)"
    with pytest.raises(weights.WeightsError, match=message):
        source.load(net)
    assert_holds(net, before)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x: x.to(torch.int8), "dtype torch.int8; allowed: a floating point dtype"),
        (lambda x: x.to(torch.complex64), "dtype torch.complex64; allowed: a floating point dtype"),
        (lambda x: x.to_sparse(), "layout torch.sparse_coo; allowed: torch.strided"),
        (lambda x: x.to("meta"), "no values, device meta; allowed: a device that holds them"),
    ],
    ids=["integer", "complex", "sparse", "meta"],
)
def test_tensors_of_another_kind_leave_the_model_alone(
    tmp_path: Path, state: State, change: Callable[[Tensor], Tensor], said: str
) -> None:
    key = "aux2.fc2.bias"  # the last one
    path = saved(tmp_path, state | {key: change(state[key])})
    net = fast.create_model("inception_v1", num_classes=11, aux_logits=True)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(weights.WeightsError, match=f"{key} has {said}"):
        weights.resolve(path).load(net)
    assert_holds(net, before)
    for target in ("out.safetensors", "out.ckpt"):
        with pytest.raises(weights.WeightsError, match=f"{key} has {said}"):
            weights.convert(path, tmp_path / target)


def test_counters_of_complex_numbers(tmp_path: Path, state: State) -> None:
    """Counters of batches may be of any real dtype, as a cast of all tensors leaves them."""
    key = "conv1.bn.num_batches_tracked"
    assert_holds(fast.create_model("inception_v1", weights=saved(tmp_path, state | {key: state[key].half()})), state)
    with pytest.raises(weights.WeightsError, match=f"{key} has dtype torch.complex64; allowed: torch.int64"):
        fast.create_model("inception_v1", weights=saved(tmp_path, state | {key: state[key].to(torch.complex64)}))


@pytest.mark.parametrize("shape", [(), (0, 2048), (2048,), (11, 2048, 1, 1)])
def test_classifier_that_is_no_matrix(shape: tuple[int, ...]) -> None:
    """The number of classes follows from it, so that no head beside it may be blamed."""
    with torch.device("meta"):
        state = fast.create_model("inception_v3", aux_logits=True).state_dict()
        state["fc.weight"] = torch.empty(shape)
    said = f"file: fc.weight has shape {shape}; allowed for inception_v3: (classes, features)"
    with pytest.raises(weights.WeightsError, match=re.escape(said)):
        recognise("file", state, None)


@pytest.mark.parametrize("gone, there", [("fc.", "AuxLogits.fc.weight"), ("fc.weight", "fc.bias")])
def test_missing_classifier_is_named(gone: str, there: str) -> None:
    with torch.device("meta"):
        whole = fast.create_model("inception_v3", aux_logits=there != "fc.bias", num_classes=11).state_dict()
    held = {key: torch.zeros(()).expand(x.shape) for key, x in whole.items() if not key.startswith(gone)}
    source = recognise("file", held, None)
    with torch.device("meta"):
        target = fast.create_model("inception_v3", **source.options).state_dict()
    with pytest.raises(weights.WeightsError, match=f"fc.weight of inception_v3 is missing, {there} is there"):
        source.check(target, source.state_dict())


def test_values_that_are_no_tensors(tmp_path: Path, state: State) -> None:
    with pytest.raises(weights.WeightsError, match="'conv9' is a list; allowed: tensors"):
        weights.resolve(saved(tmp_path, state | {"conv9": [1, 2]}))
    with pytest.raises(weights.WeightsError, match="holds a Tensor; allowed: a state dict"):
        weights.resolve(saved(tmp_path, torch.zeros(3)))


class Hostile:
    """Unpickling it writes the file `proof`."""

    def __init__(self, proof: Path) -> None:
        self.proof = str(proof)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.proof, "w")


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle", "bare pickle of protocol 4", "zip of protocol 4"])
def test_hostile_pickle_runs_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder, form: str) -> None:
    proof, path = tmp_path / "proof", tmp_path / "weights.pth"
    content = {"inception3a.branch1.conv.weight": Hostile(proof)}
    protocol = 4 if form.endswith("4") else 2
    if form.startswith("bare"):
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    else:
        zipped = form.startswith("zip")
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        weights.WeightsError, match=r"plain tensors: it asks for \w+\.open; allowed: .*, no code"
    ) as caught:
        weights.resolve(path)
    assert "weights_only" not in str(caught.value)  # torch's message tells how to run it all the same
    assert not proof.exists()
    assert not recwarn.list
    pickle.loads(path.read_bytes()) if form.startswith("bare") else torch.load(path, weights_only=False)
    assert proof.exists(), "the pickle of this test does nothing, so it proves nothing"


def test_a_name_of_the_memo_is_told_too(tmp_path: Path) -> None:
    """The second module is only pointed at; what plain tensors ask for is no reason."""
    (tmp_path / "odd.pth").write_bytes(pickle.dumps([OrderedDict, Counter], protocol=4))
    with pytest.raises(weights.WeightsError, match=r"it asks for collections\.Counter; allowed"):
        weights.resolve(tmp_path / "odd.pth")
    torch.save(OrderedDict(x=torch.zeros(2)), tmp_path / "plain.pth", pickle_protocol=4)
    with pytest.raises(weights.WeightsError, match="its pickle protocol is 4, torch's is 2; allowed"):
        weights.resolve(tmp_path / "plain.pth")


def test_whole_modules_are_refused(tmp_path: Path) -> None:
    with pytest.raises(weights.WeightsError, match=r"allowed: torch\.save\(model\.state_dict\(\)"):
        weights.resolve(saved(tmp_path, nn.Linear(2, 2)))
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "scripted.pt")
    with pytest.raises(weights.WeightsError, match=r"scripted\.pt is a TorchScript program"):
        weights.resolve(tmp_path / "scripted.pt")


@pytest.mark.parametrize("kind", ["pth", "legacy", "safetensors"])
@pytest.mark.parametrize("part", [0.0, 1e-6, 0.001, 0.3, 0.9, 0.9999])
def test_truncated(tmp_path: Path, state: State, kind: str, part: float) -> None:
    path = tmp_path / f"weights.{kind}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "pth")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(weights.WeightsError, match="weights"):
        fast.create_model("inception_v1", weights=path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs pointer"),
        (b"<!doctype html><title>404</title>", r"begins with b'<!doctyp'; allowed: safetensors"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "not a readable Keras file"),
        (b"PK\x03\x04" + bytes(100), "damaged archive"),
        (bytes(8) + b"{}", "not a readable safetensors file"),
        (b"\x80\x02}q\x00.", r"plain tensors: .*\S; allowed"),
        (bytes(100) + bytes.fromhex("57fb808b247547db"), "not a readable TensorFlow checkpoint"),
    ],
    ids=["empty", "lfs", "html", "hdf5", "zip", "safetensors", "pickle", "tensorflow"],
)
def test_foreign_content(tmp_path: Path, content: bytes, message: str) -> None:
    if "TensorFlow" in message:
        pytest.importorskip("tensorflow")
    if "Keras" in message:
        pytest.importorskip("h5py")
    (tmp_path / "weights.bin").write_bytes(content)
    with pytest.raises(weights.WeightsError, match=message):
        weights.resolve(tmp_path / "weights.bin")


def test_damaged_keras_files(tmp_path: Path) -> None:
    """A packed member that does not unpack, a variable of text, and a name that is no text."""
    h5py = pytest.importorskip("h5py")
    packed = zlib.compress(bytes(1000))[2:-4]
    with zipfile.ZipFile(tmp_path / "net.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", bytes(1000))
    whole = (tmp_path / "net.keras").read_bytes()
    assert packed in whole
    (tmp_path / "net.keras").write_bytes(whole.replace(packed, b"\xff" * len(packed)))
    with h5py.File(tmp_path / "net.weights.h5", "w") as file:
        file["model/conv2d/kernel:0"] = "text"
    with h5py.File(tmp_path / "net.h5", "w") as file:
        file[b"conv2d/kern\xffel:0"] = 1.0
    messages = (
        "not a readable Keras file",
        "kernel.* has dtype object",
        r"name b'conv2d/kern\\xffel:0'; allowed: UTF-8",
    )
    for name, message in zip(("net.keras", "net.weights.h5", "net.h5"), messages, strict=True):
        with pytest.raises(weights.WeightsError, match=message):
            weights.resolve(tmp_path / name)


def test_archives_with_a_name_that_is_no_text_and_without_two_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("\u00e9/data.pkl", b"")
    path.write_bytes(path.read_bytes().replace("\u00e9".encode(), b"\xff\xff"))
    with pytest.raises(weights.WeightsError, match=r"x\.pth is a damaged archive"):
        weights.resolve(path)
    torch.save({"fc.weight": torch.zeros(2)}, path, pickle_protocol=4)
    path.write_bytes(path.read_bytes()[:2] + path.read_bytes()[4:])  # torch finds the pickle, Python seeks before 0
    with pytest.raises(weights.WeightsError, match=r"x\.pth does not load as plain tensors"):
        weights.resolve(path)


def test_a_state_dict_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, object] = {}
    content["state_dict"] = {"model": content}
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(weights.WeightsError, match="'state_dict' is a dict; allowed: tensors under names"):
        weights.resolve(tmp_path / "x.pth")


ODD = {"input_size": ([3, 1e999, 9], [3, 0, 9], [3, 9, 9000]), "std": ([1e999] * 3,), "interpolation": ("random", None)}


@pytest.mark.parametrize("key, value", [(k, x) for k, xs in (ODD | {"crop_pct": (0, 1e-9)}).items() for x in xs])
def test_a_data_config_without_sense(key: str, value: Any) -> None:
    config = {"input_size": [3, 9, 9], "mean": [0] * 3, "std": [1] * 3, "crop_pct": 1, "interpolation": "bicubic"}
    assert parse_config("here", config) is not None
    for odd in (value, [float("nan")] * 3):
        with pytest.raises(weights.WeightsError, match="here: data config"):
            parse_config("here", config | {key: odd})


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights at .*: looked for .*gone\.pth and .*gone\.pth\.index"):
        fast.create_model("inception_v3", weights=tmp_path / "gone.pth")
    with pytest.raises(FileNotFoundError, match=r"has no weights: looked for model\.safetensors"):
        weights.resolve(tmp_path)


@pytest.mark.parametrize("argument", ["", b"weights.pth", 5])
def test_weights_argument(argument: Any) -> None:
    with pytest.raises(TypeError, match="allowed: a path or hf:<repo>"):
        weights.resolve(argument)


def test_unknown_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown model 'resnet50'; allowed: inception_v1"):
        weights.resolve(tmp_path / "weights.pth", "resnet50")


@pytest.mark.parametrize(
    "package, head, extra",
    [
        ("tensorflow", bytes(100) + bytes.fromhex("57fb808b247547db"), "tensorflow"),
        ("h5py", b"\x89HDF\r\n\x1a\n", "keras-files"),
    ],
)
def test_missing_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, head: bytes, extra: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "weights").write_bytes(head)
    with pytest.raises(ImportError, match=rf"pip install inception-fast\[{extra}\]"):
        weights.resolve(tmp_path / "weights")


def test_heavy_readers_stay_out_of_torch_files(tmp_path: Path, state: State) -> None:
    program = (
        "import sys; from inception_fast import weights; weights.resolve(sys.argv[1]); "
        "print(sorted({'tensorflow', 'h5py', 'keras', 'huggingface_hub', 'timm', 'torchvision'} & set(sys.modules)))"
    )
    path = saved(tmp_path, state)
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
