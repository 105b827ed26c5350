"""Files that we write, and weights from a hub or from a folder laid out like one. Nothing here leaves the machine."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import inception_fast as fast
from inception_fast import weights
from inception_fast.cli.labels import find_labels
from inception_fast.models import DataConfig
from inception_fast.train.loop import Options, train
from inception_fast.train.settings import Settings
from inception_fast.weights.convert import untold
from training import small_files

State = dict[str, Tensor]

GLUON = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "input_size": [3, 299, 299], "crop_pct": 0.9}


@pytest.fixture(scope="module")
def state() -> State:
    return fast.create_model("inception_v1", num_classes=11, aux_logits=True).state_dict()


@pytest.fixture
def source_file(tmp_path: Path, state: State) -> Path:
    torch.save(state, tmp_path / "source.pth")
    return tmp_path / "source.pth"


@pytest.mark.parametrize(
    "model, options, target, missing",
    [
        ("inception_v1", {"convention": "torch"}, "net.ckpt", {"convention": "torch"}),
        ("inception_v3", {"convention": "torch"}, "net.weights.h5", {"convention": "torch"}),
        ("inception_v3", {"convention": "tf", "fid": True}, "net.ckpt", {"fid": True}),
        ("inception_v2", {"convention": "tf", "bn_eps": 1e-5}, "net.ckpt", {"bn_eps": 1e-5}),
        ("inception_v4", {"convention": "tf", "global_pool": "max"}, "net.ckpt", {"global_pool": "max"}),
        ("inception_v1", {"convention": "torch"}, "net.keras", {}),
        ("inception_v1", {"convention": "torch"}, "net.safetensors", {}),
        ("inception_v1", {"convention": "tf", "bn_eps": 1e-3}, "net.ckpt", {}),
        ("inception_v4", {"convention": "torch"}, "net.ckpt", {}),
        ("inception_v4", {"convention": "tf", "num_classes": 1001}, "net.ckpt", {"num_classes": 1001}),
        ("inception_v4", {"convention": "tf", "num_classes": 1001}, "net.weights.h5", {}),
        ("inception_resnet_v1", {"convention": "tf", "num_classes": 1001}, "net.ckpt", {}),
    ],
)
def test_what_a_file_cannot_tell(model: str, options: dict[str, Any], target: str, missing: dict[str, Any]) -> None:
    assert untold(weights.Source("timm", model, options, None, {}), target) == missing


def test_convert(tmp_path: Path, source_file: Path, state: State) -> None:
    target = tmp_path / "target.safetensors"
    written = weights.convert(source_file, target)
    assert (written.layout, written.model) == ("torchvision", "inception_v1")
    assert {key: value.shape for key, value in load_file(target).items()} == {k: v.shape for k, v in state.items()}
    with safe_open(target, framework="pt") as file:
        metadata = file.metadata()
    expected = {"layout": "inception_fast", "model": "inception_v1", "convention": "torch", "num_classes": "11"}
    assert expected.items() <= metadata.items()
    assert float(metadata["bn_eps"]) == 1e-3
    assert json.loads(metadata["options"])["aux_logits"] is True
    again = weights.resolve(target)
    assert (again.layout, again.options, again.data_config) == ("inception_fast", written.options, written.data_config)
    net = fast.create_model("inception_v1", weights=target)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_convert_of_tensors_in_one_memory(tmp_path: Path, state: State) -> None:
    """As where one tensor stands for the factors of many batch norms; safetensors refuses such."""
    ones, whole = torch.ones(64), torch.randn(2 * 64 * 64)
    shared = state | {key: ones for key in state if key.endswith(".bn.weight") and len(state[key]) == 64}
    shared["conv2.conv.weight"] = whole[: 64 * 64].view(64, 64, 1, 1)
    torch.save(shared, tmp_path / "shared.pth")
    weights.convert(tmp_path / "shared.pth", tmp_path / "apart.safetensors")
    found = load_file(tmp_path / "apart.safetensors")
    assert found.keys() == shared.keys()
    assert all(torch.equal(value, shared[key]) for key, value in found.items())


@pytest.mark.parametrize(
    "model, key, said",
    [
        ("inception_resnet_v1", "last_linear.weight", "allowed for inception_resnet_v1: (embedding_size, features)"),
        ("inception_v2", "Conv2d_1a_7x7.depthwise.weight", "allowed for inception_v2: (24, 1, 7, 7)"),
    ],
)
def test_layers_that_options_follow_from(tmp_path: Path, model: str, key: str, said: str) -> None:
    """Numbers in their place have no size to read."""
    with torch.device("meta"):
        net = fast.create_model(model, num_classes=2)
    state = {name: torch.zeros((), dtype=value.dtype).expand(value.shape) for name, value in net.state_dict().items()}
    torch.save(state | {key: torch.zeros(())}, tmp_path / "net.pth")
    with pytest.raises(weights.WeightsError, match=re.escape(f"net.pth: {key} has shape (); {said}")):
        fast.create_model(model, weights=tmp_path / "net.pth")


def test_convert_keeps_what_the_keys_do_not_tell(tmp_path: Path) -> None:
    """The convention and the image statistics of a converted file are those of the source, not the family's habit."""
    with torch.device("meta"):
        options = {"num_classes": 4, "convention": "tf", "bn_eps": 2e-3, "stem": "plain"}
        shapes = fast.create_model("inception_v2", **options).state_dict()
    tensors = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in shapes.items()}
    config = DataConfig((0.1,) * 3, (0.2,) * 3, (3, 192, 192), 0.75, "bilinear")
    source = weights.Source("slim", "inception_v2", options, config, tensors)
    from inception_fast.weights.convert import write

    write(tmp_path / "v2.safetensors", source, source.state_dict())
    net = fast.create_model("inception_v2", weights=tmp_path / "v2.safetensors")
    assert (net.convention, net.options.stem, net.Conv2d_2b_1x1.bn.eps) == ("tf", "plain", 2e-3)
    assert net.data_config == config


def test_convert_drops_the_background_class(tmp_path: Path) -> None:
    net = fast.create_model("inception_v4", num_classes=1001)
    torch.save(net.state_dict(), tmp_path / "cadene.pth")
    weights.convert(tmp_path / "cadene.pth", tmp_path / "v4.safetensors")
    bias = load_file(tmp_path / "v4.safetensors")["last_linear.bias"]
    assert torch.equal(bias, net.last_linear.bias[1:])
    assert weights.resolve(tmp_path / "v4.safetensors").options["num_classes"] == 1000


def test_convert_in_place(tmp_path: Path, source_file: Path, state: State) -> None:
    target = tmp_path / "same.safetensors"
    save_file(state, target)
    weights.convert(target, target)
    assert weights.resolve(target).layout == "inception_fast"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["same.safetensors", "source.pth"]


def test_convert_respects_the_umask(tmp_path: Path, source_file: Path) -> None:
    before = os.umask(0o027)
    try:
        weights.convert(source_file, tmp_path / "target.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "target.safetensors").stat().st_mode) == 0o640


def test_convert_is_all_or_nothing(tmp_path: Path, source_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk leaves the old file, and no half of the new one."""
    target = tmp_path / "target.safetensors"
    target.write_bytes(b"old")
    from inception_fast.weights import convert as module

    def fail(tensors: Any, name: str, metadata: Any) -> None:
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules[module.__module__], "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        weights.convert(source_file, target)
    assert target.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.pth", "target.safetensors"]


@pytest.mark.parametrize("name", ["target.safetensors", "target.ckpt"])
def test_convert_makes_sure_of_room(tmp_path: Path, name: str) -> None:
    """The system itself refuses a file of that size; the file, the reason and the room wanted are told."""
    torch.save(fast.create_model("inception_v1", num_classes=11).state_dict(), tmp_path / "source.pth")
    with small_files(1_000_000), pytest.raises(OSError, match=r"File too large, 2\d\.\d MB are needed: '.*/target\."):
        weights.convert(tmp_path / "source.pth", tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["source.pth"]


def test_convert_refuses(tmp_path: Path, source_file: Path, state: State) -> None:
    target = tmp_path / "target.safetensors"
    with pytest.raises(ValueError, match=r"ends in '\.h5'; allowed: \.safetensors, \.ckpt, .*\.keras"):
        weights.convert(source_file, tmp_path / "target.h5")
    with pytest.raises(ValueError, match="layout='keras'; allowed: inception_fast"):
        weights.convert(source_file, target, layout="keras")
    with pytest.raises(FileNotFoundError, match="no folder"):
        weights.convert(source_file, tmp_path / "nowhere" / "target.safetensors")
    with pytest.raises(weights.WeightsError, match="for a pattern and finds no checkpoint; allowed: names"):
        weights.convert(source_file, tmp_path / "net[1].ckpt")
    (tmp_path / "net[1].ckpt.index").write_bytes(b"index")
    with pytest.raises(weights.WeightsError, match="for a pattern and finds"):
        weights.convert(tmp_path / "net[1].ckpt.index", target)
    (tmp_path / "net[1].ckpt.index").unlink()
    with pytest.raises(weights.WeightsError, match="holds inception_v1"):
        weights.convert(source_file, target, model="inception_v3")
    torch.save(state | {"conv2.conv.weight": torch.zeros(64, 63, 1, 1)}, source_file)
    with pytest.raises(weights.WeightsError, match=r"conv2\.conv\.weight has shape \(64, 63, 1, 1\)"):
        weights.convert(source_file, target)
    torch.save(fast.create_model("inception_v1", classic=True, num_classes=3).state_dict(), source_file)
    with pytest.raises(
        weights.WeightsError, match=r"conv1\.bn\.weight of .* is missing; allowed: nets with batch norm"
    ):
        weights.convert(source_file, tmp_path / "classic.ckpt")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        weights.convert(source_file, tmp_path / "folder.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.safetensors", "source.pth"]


OPTIONS = '{"num_classes": %d, "in_chans": %d, "convention": "tf", "bn_eps": 0.001}'


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": "9"}, "metadata version '9'; allowed: '1'"),
        ({"model": "resnet50"}, "metadata model 'resnet50'; allowed: inception_v1"),
        ({"options": "{"}, "metadata is damaged"),
        ({"options": "[" * 100_000}, "metadata is damaged"),
        ({"options": OPTIONS % (10**11, 3)}, "metadata option num_classes=100000000000; allowed: 11, as its tensors"),
        ({"options": OPTIONS % (11, 10**9)}, "metadata option in_chans=1000000000; allowed: 3, as its tensors"),
        ({"options": "[]"}, "allowed: an object with num_classes"),
        (
            {"options": '{"num_classes": 11, "convention": "tf", "bn_eps": 0.001, "conv_block": "os.system"}'},
            "conv_block",
        ),
        ({"options": '{"num_classes": "11", "convention": "tf", "bn_eps": 0.001}'}, "num_classes='11'"),
        ({"data_config": '{"mean": [0.5]}'}, "data config .* damaged"),
        ({"data_config": json.dumps(GLUON | {"interpolation": "bicubic", "std": [0, 1, 1]})}, "allowed: input_size"),
    ],
)
def test_metadata_that_lies(tmp_path: Path, source_file: Path, change: dict[str, str], message: str) -> None:
    target = tmp_path / "target.safetensors"
    weights.convert(source_file, target)
    with safe_open(target, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(target), target, metadata | change)
    with pytest.raises(weights.WeightsError, match=message):
        weights.resolve(target)


def repository(folder: Path, state: State, **config: Any) -> dict[str, Path]:
    """A folder like a repository of timm's: {name: path}."""
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "README.md").write_text("weights")
    if config:
        (folder / "config.json").write_text(json.dumps({"architecture": "inception_v1", "pretrained_cfg": config}))
    return {path.name: path for path in folder.iterdir()}


def test_folder_of_a_repository(tmp_path: Path, state: State) -> None:
    repository(tmp_path / "repo", state, **GLUON)
    source = weights.resolve(tmp_path / "repo")
    assert source.data_config == DataConfig((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (3, 299, 299), 0.9, "bicubic")
    assert fast.create_model("inception_v1", weights=tmp_path / "repo").data_config == source.data_config
    (tmp_path / "repo" / "config.json").write_text("[" * 100_000)
    with pytest.raises(weights.WeightsError, match=r"config\.json is not JSON"):
        weights.resolve(tmp_path / "repo")
    repository(tmp_path / "small", state, **GLUON | {"input_size": [3, 14, 299]})
    with pytest.raises(ValueError, match="small: images of 14x299 for inception_v1; allowed: 15x15 or larger"):
        fast.create_model("inception_v1", weights=tmp_path / "small")


def test_a_config_of_rgb_beside_weights_for_grey_images(tmp_path: Path) -> None:
    """timm writes the config of the net that was trained further, whatever `in_chans` it was made with."""
    repository(tmp_path / "grey", fast.create_model("inception_v1", in_chans=1).state_dict(), **GLUON)
    config = fast.create_model("inception_v1", weights=tmp_path / "grey").data_config
    assert (config.input_size, len(config.mean), config.crop_pct) == ((1, 299, 299), 1, 0.9)


class Hub:
    """Stands in for huggingface_hub's two functions and remembers what was asked of them."""

    def __init__(self, files: dict[str, Path]) -> None:
        self.files = files
        self.asked: list[tuple[str, ...]] = []

    def list_repo_files(self, repo: str, *, revision: str | None = None) -> list[str]:
        self.asked.append(("list", repo, str(revision)))
        return sorted(self.files)

    def hf_hub_download(self, repo: str, name: str, *, revision: str | None = None) -> str:
        self.asked.append((name, repo, str(revision)))
        return str(self.files[name])


def install(monkeypatch: pytest.MonkeyPatch, files: dict[str, Path]) -> Hub:
    library = pytest.importorskip("huggingface_hub")
    hub = Hub(files)
    monkeypatch.setattr(library, "list_repo_files", hub.list_repo_files)
    monkeypatch.setattr(library, "hf_hub_download", hub.hf_hub_download)
    return hub


def test_folder_without_a_choice(tmp_path: Path) -> None:
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"2 files \.pth; choose one of a\.pth, b\.pth by its path, not the folder's$"):
        weights.resolve(tmp_path)


def test_hub(tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = install(monkeypatch, repository(tmp_path / "repo", state, **GLUON))
    net = fast.create_model("inception_v1", weights="hf:owner/net")
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert net.data_config.mean == (0.485, 0.456, 0.406)
    assert hub.asked == [
        ("list", "owner/net", "None"),
        ("model.safetensors", "owner/net", "None"),
        ("config.json", "owner/net", "None"),
    ]


def test_hub_revision_and_file(tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = install(monkeypatch, repository(tmp_path / "repo", state))
    weights.resolve("hf:owner/net@v1.0:pytorch_model.bin", "inception_v1")
    assert hub.asked == [("list", "owner/net", "v1.0"), ("pytorch_model.bin", "owner/net", "v1.0")]
    with pytest.raises(FileNotFoundError, match=r"no file gone\.pth; it has README\.md, model\.safetensors"):
        weights.resolve("hf:owner/net:gone.pth")


def test_hub_without_a_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"README.md": tmp_path})
    with pytest.raises(FileNotFoundError, match="hf:owner/net has no weights"):
        weights.resolve("hf:owner/net")
    install(monkeypatch, {"a.pth": tmp_path, "b.pth": tmp_path})
    with pytest.raises(ValueError, match=r"2 files \.pth; choose one of a\.pth, b\.pth"):
        weights.resolve("hf:owner/net")


@pytest.mark.parametrize("spec", ["hf:", "hf:a b", "hf:owner/net@", "hf:owner/net:"])
def test_hub_spec(spec: str) -> None:
    with pytest.raises(ValueError, match="allowed: hf:<repo>"):
        weights.resolve(spec)


@pytest.mark.parametrize("client", ["httpx", "httpx2", "requests.exceptions"])
def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, client: str) -> None:
    """Errors of the hub's HTTP client, which are no OSErrors; others are bugs and pass."""
    library = pytest.importorskip("huggingface_hub")

    def unreachable(kind: type[Exception]) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise kind("Name or service not known\nand more")

        monkeypatch.setattr(library, "list_repo_files", fail)

    unreachable(type("ConnectError", (Exception,), {"__module__": client}))
    with pytest.raises(FileNotFoundError, match=r"hf:owner/net cannot be fetched .*ConnectError: Name or .*known$"):
        weights.resolve("hf:owner/net")
    unreachable(ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        weights.resolve("hf:owner/net")


def test_hub_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install inception-fast\[hub\]"):
        weights.resolve("hf:owner/net")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def loopback(files: dict[str, Path]) -> Iterator[str]:
    """A server on this machine that answers the hub's requests about one repository, owner/net."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            name = path.rpartition("/")[2]
            if path.startswith("/api/models/owner/net/tree/"):
                rows = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": "0"} for n, p in files.items()]
                self.answer(200, json.dumps(rows).encode(), Content_Type="application/json")
            elif path.startswith("/api/models/owner/net"):
                rows = [{"rfilename": n} for n in files]
                about = {"id": "owner/net", "modelId": "owner/net", "sha": COMMIT, "siblings": rows, "tags": []}
                self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
            elif path.startswith("/owner/net/resolve/") and name in files:
                body = files[name].read_bytes()
                self.answer(200, body, ETag=f'"{sha256(body).hexdigest()}"', X_Repo_Commit=COMMIT)
            else:
                code = "RepoNotFound" if "/owner/net" not in path else "EntryNotFound"
                self.answer(404, b"{}", X_Error_Code=code, Content_Type="application/json")

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_hub_over_http(tmp_path: Path, state: State) -> None:
    """huggingface_hub itself, which reads its settings once and so gets a process, against a server on this machine."""
    pytest.importorskip("huggingface_hub")
    program = (
        "from inception_fast import weights\n"
        "source = weights.resolve('hf:owner/net', 'inception_v1')\n"
        "print(source.model, source.file_classes, source.data_config.crop_pct)\n"
        "for spec in ('hf:owner/other', 'hf:owner/net:gone.pth'):\n"
        "    try:\n"
        "        weights.resolve(spec)\n"
        "    except FileNotFoundError as error:\n"
        "        print('FileNotFoundError', spec in str(error) or 'gone.pth' in str(error))\n"
    )
    with loopback(repository(tmp_path / "repo", state, **GLUON)) as address:
        environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
        environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[:3] == ["inception_v1 11 0.9", "FileNotFoundError True", "FileNotFoundError True"]


def test_names_of_classes_go_along(tmp_path: Path) -> None:
    """From a training's data into its weights, and from there into what `convert` writes: `classify` prints them."""
    settings = Settings("inception_v1", steps=1, batch_size=2, image_size=16, aux="off")
    classes = train(settings, tmp_path, Options(eval_images=2))["data"]["classes"]
    file, converted = tmp_path / "model.safetensors", tmp_path / "converted.safetensors"
    weights.convert(file, converted)
    for written in (file, converted):  # the digits' names are those of no names at all, so the metadata is asked
        with safe_open(written, framework="pt") as opened:
            assert json.loads(opened.metadata()["labels"]) == classes
        assert find_labels(None, str(written), 10) == classes


def test_a_net_of_another_variant_is_named(tmp_path: Path) -> None:
    save_file(fast.create_model("inception_v1", num_classes=2).state_dict(), tmp_path / "v1.safetensors")
    source = weights.resolve(tmp_path / "v1.safetensors")
    with pytest.raises(weights.WeightsError, match=r"holds inception_v1, as conv1\..* shows; allowed: .* inception_v2"):
        source.load(fast.create_model("inception_v2", num_classes=2))
