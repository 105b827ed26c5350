"""The command line: exit codes, one line for every refusal, nothing but JSON where JSON was asked for."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import inception_fast
import references
from inception_fast import dispatch, images
from inception_fast.cli import COMMANDS, build_parser, main
from inception_fast.cli.common import CommandError, one_line
from inception_fast.cli.labels import find_labels
from inception_fast.models._registry import build

MODELS = [f"inception_{v}" for v in ("resnet_v1", "resnet_v2", "v1", "v2", "v3", "v4")]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def small_net(monkeypatch):
    """Stands in for every model: ten classes whose answers follow from a bias, without the big nets' cost."""
    config = SimpleNamespace(
        mean=(0.5,) * 3, std=(0.5,) * 3, input_size=(3, 32, 32), crop_pct=0.875, interpolation="bicubic"
    )

    def create(name, weights=None):
        if weights == "broken":
            raise ValueError("broken: the file ends\nafter 3 bytes")
        net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 10))
        torch.nn.init.zeros_(net[2].weight)
        net[2].bias.data = torch.arange(10.0)
        net.num_classes, net.data_config = 10, config
        return net

    monkeypatch.setattr(inception_fast, "create_model", create)


def refused(capsys, *argv: str) -> str:
    """Runs a command that must be refused; returns its one line."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("inception-fast: error: ") and "Traceback" not in err
    return last


def test_list(capsys):
    assert main(["list"]) == 0
    assert capsys.readouterr().out.split() == MODELS
    assert main(["list", "*resnet*", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == ["inception_resnet_v1", "inception_resnet_v2"]
    assert "no model matches 'vgg*'" in refused(capsys, "list", "vgg*")


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["package"]["version"] == inception_fast.__version__
    assert report["torch"]["version"] == torch.__version__ and report["machine"]["cores"] >= 1
    assert set(inception_fast.backend_status()) == set(report["backends"])
    for state in report["backends"].values():
        assert isinstance(state["available"], bool) and state["detail"]
    assert report["isa"]["default"] in report["isa"]["runs"] and "generic" in report["isa"]["runs"]
    assert {"eager", "compile", "onnxruntime", "openvino"} == set(report["peers"])
    assert all(peer["available"] != bool(peer["reasons"]) for peer in report["peers"].values())
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "backends" in text and "does not run: " in text


def test_info_reports_what_is_broken(capsys, monkeypatch):
    def broken():
        raise RuntimeError("the native module is\nbuilt for another Python")

    monkeypatch.setattr(inception_fast, "backend_status", broken)
    assert main(["info", "--json"]) == 0
    assert "another Python" in json.loads(capsys.readouterr().out)["backends"]["error"]
    assert main(["info"]) == 0
    assert "broken: RuntimeError: the native module is built" in capsys.readouterr().out


def test_every_command_has_json_and_help(capsys):
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        assert "--json" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"inception-fast {inception_fast.__version__}"


@pytest.mark.parametrize(
    "argv, said",
    [
        ([], "COMMAND"),
        (["frobnicate"], "'frobnicate'"),
        (["list", "--frobnicate"], "--frobnicate"),
        (["bench"], "MODEL"),
        (["bench", "inception_v1", "--out", ""], "argument --out: '' is no path; name a folder"),
        (["features", "photos", "--out", ""], "argument --out: '' is no path; name a folder"),
        (["train", "--model", "tiny_inception", "--out", ""], "argument --out: '' is no path; name a folder"),
        (["bench", "inception_v3", "--batch", "0"], "0 is out of range; allowed: 1 to"),
        (["bench", "inception_v3", "--batch", "two"], "'two' is not an integer"),
        (["bench", "inception_v3", "--batch", ","], "the list is empty"),
        (["bench", "inception_v3", "--dtype", "float31"], "'float31' is not known; allowed: float32, bfloat16"),
        (["bench", "inception_v3", "--against", "tensorrt"], "allowed: eager, compile, onnxruntime, openvino"),
        (["bench", "inception_v3", "--against", "none,eager"], "none stands alone"),
        (["bench", "inception_v3", "--threads", "0"], "0 is out of range"),
        (["bench", "inception_v3", "--seconds", "-1"], "out of range"),
        (["bench", "inception_v3", "--seconds", "nan"], "out of range"),
        (["bench", "inception_v3", "--quick", "--repeats", "3"], "not allowed with"),
        (["bench", "inception_v3", "inceptoin_v4"], "unknown model 'inceptoin_v4' (did you mean inception_v4 or "),
        (["bench", "inception_v3", "vgg"], "unknown model 'vgg'; allowed: inception_resnet_v1"),
        (["bench", "inception_v3", "--image", "nowhere"], "nowhere: no such file or folder"),
        (["bench", "inception_v3", "--image-size", "1"], "out of range"),
        (["classify"], "IMAGE"),
        (["classify", "nowhere.jpg"], "nowhere.jpg: no such file"),
        (["classify", ""], "'' is no path"),
        (["classify", "x.jpg", "--topk", "0"], "0 is out of range"),
        (["convert", "nowhere.pth", "there.safetensors"], "nowhere.pth"),
        (["convert", "nowhere.pth"], "DST"),
    ],
)
def test_impossible_requests(capsys, monkeypatch, tmp_path, argv, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "argv", [["bench", "inception_v1"], ["bench", "inception_v1", "--cpu-suite"], ["claims", "--only", "published"]]
)
def test_instructions_that_this_machine_lacks(capsys, monkeypatch, tmp_path, argv):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INCEPTION_FAST_ISA", "neon")
    dispatch._probe.cache_clear()
    line = refused(capsys, *argv)
    assert f"{argv[0]}: INCEPTION_FAST_ISA=neon; this machine can run: generic" in line
    assert list(tmp_path.iterdir()) == []


def test_bench_refuses_what_only_the_run_can_tell(capsys, tmp_path):
    taken = tmp_path / "file"
    taken.touch()
    assert "is a file; name a folder" in refused(capsys, "bench", "inception_v1", "--out", str(taken))
    assert "cannot be written to" in refused(capsys, "bench", "inception_v1", "--out", str(taken / "below"))
    out = ["--out", str(tmp_path / "out")]
    small = refused(capsys, "bench", "inception_v3", "--image-size", "40", "--against", "none", *out)
    assert "larger --image-size" in small and "40x40" in small
    missing = refused(capsys, "bench", "inception_v3", "--weights", str(tmp_path / "no.pth"), *out)
    assert "no.pth" in missing
    assert list((tmp_path / "out").iterdir()) == []


def test_bench_refuses_what_a_later_network_cannot_take_before_it_times_the_first(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("inception_fast.cli.bench._subject", None)
    options = ["--against", "none", "--out", str(tmp_path)]
    small = refused(capsys, "bench", "inception_v1", "inception_v3", "--image-size", "64", *options)
    assert "inception_v3 cannot take 64x64 images (allowed: 75x75 or larger)" in small
    save_file(build("inception_v1", num_classes=2).state_dict(), tmp_path / "v1.safetensors")
    weights = ["--weights", str(tmp_path / "v1.safetensors")]
    other = refused(capsys, "bench", "inception_v1", "inception_v3", *weights, *options)
    assert "allowed: weights of inception_v3" in other


def test_classify(capsys, photo, small_net):
    assert main(["classify", str(photo), str(photo), "--topk", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert len(rows) == 2 and rows[0] == rows[1]
    assert rows[0]["image"] == str(photo) and rows[0]["model"] == "inception_v3" and rows[0]["weights"] is None
    expected = torch.arange(10.0).softmax(0).flip(0)[:3].tolist()
    assert [p["index"] for p in rows[0]["predictions"]] == [9, 8, 7]
    assert [p["label"] for p in rows[0]["predictions"]] == ["9", "8", "7"]
    assert [p["probability"] for p in rows[0]["predictions"]] == pytest.approx(expected)
    assert len(err.splitlines()) == 1 and "weights are random" in err


def test_classify_holds_the_pixels_of_one_picture_at_a_time(capsys, photo, small_net, monkeypatch):
    """A folder of photographs may have more of them than there is memory for."""
    read, decoded = images.load_photo, []

    def watched(path):
        found = read(path)
        decoded.append(weakref.ref(found.image))
        assert sum(image() is not None for image in decoded) <= 2  # this one, and the one that is let go for it
        return found

    monkeypatch.setattr(images, "load_photo", watched)
    assert main(["classify", *[str(photo)] * 12, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 12 and len(decoded) == 24


def test_classify_prints_all_of_few_classes(capsys, photo, small_net, monkeypatch):
    net = inception_fast.create_model("inception_v3")
    net[2], net.num_classes = torch.nn.Linear(3, 3), 3
    monkeypatch.setattr(inception_fast, "create_model", lambda name, weights=None: net)
    assert main(["classify", str(photo), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert sorted(p["index"] for p in row["predictions"]) == [0, 1, 2]


def test_classify_prints_labels(capsys, photo, small_net, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join("abcdefghij") + "\n\n")
    assert main(["classify", str(photo.parent), "--labels", str(labels), "--topk", "1"]) == 0
    out = capsys.readouterr().out.split()
    assert out[0] == str(photo) and out[-1] == "j"


def test_classify_refuses(capsys, photo, small_net, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    assert "cut.jpg" in refused(capsys, "classify", str(photo), str(tmp_path / "cut.jpg"))
    assert "--topk 11; the model has 10 classes" in refused(capsys, "classify", str(photo), "--topk", "11")
    line = refused(capsys, "classify", str(photo), "--model", "inception_v3", "--weights", "broken")
    assert "the file ends after 3 bytes" in line


def test_classify_needs_a_classifier(capsys, photo, tmp_path):
    """Such a network answers with features; there were no lines below the picture's name."""
    path = tmp_path / "headless.pth"
    torch.save(inception_fast.create_model("inception_v1", num_classes=0).state_dict(), path)
    assert f"--weights {path} have no classifier" in refused(capsys, "classify", str(photo), "--weights", str(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_classify_refuses_an_output_that_is_no_number(capsys, photo, small_net, monkeypatch, value, flags):
    create = inception_fast.create_model

    def broken(name, weights=None):
        net = create(name)
        net[2].bias.data[3] = value
        return net

    monkeypatch.setattr(inception_fast, "create_model", broken)
    line = refused(capsys, "classify", str(photo), *flags)
    assert f"{photo}: the network's output is NaN or infinite" in line


@pytest.mark.parametrize("command", ["classify", "bench inception_v1 --against none --image", "features --out out"])
def test_a_network_of_four_channels_takes_no_pictures(capsys, photo, tmp_path, monkeypatch, command):
    """Said once, and not of every image."""
    monkeypatch.chdir(tmp_path)
    torch.save(inception_fast.create_model("inception_v1", num_classes=7, in_chans=4).state_dict(), "four.pth")
    before = sorted(tmp_path.iterdir())
    line = refused(capsys, *command.split(), str(photo), "--weights", "four.pth")
    assert "a network of 4 channels; allowed for images: 3 (RGB), 1 (grey)" in line
    left = [path for path in tmp_path.rglob("*") if path not in before]
    assert left == ([tmp_path / "bench-results"] if "bench" in command else [])


@pytest.mark.parametrize("mode", ["CMYK", "I;16", "RGBA", "LA", "P", "1x1", "animated"])
def test_classify_takes_odd_pictures(capsys, small_net, tmp_path, mode):
    path = tmp_path / {"CMYK": "a.jpg", "animated": "a.gif"}.get(mode, "a.png")
    if mode == "I;16":
        Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(path)
    elif mode == "animated":
        Image.new("RGB", (9, 9), "red").save(path, save_all=True, append_images=[Image.new("RGB", (9, 9), "blue")])
    else:
        Image.new("RGB" if mode == "1x1" else mode, (1, 1) if mode == "1x1" else (9, 9)).save(path)
    assert main(["classify", str(path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1


def test_classify_with_a_real_model(capsys, photo):
    assert main(["classify", str(photo), "--model", "inception_v1", "--topk", "2", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["model"] == "inception_v1" and len(row["predictions"]) == 2
    assert 0 < row["predictions"][1]["probability"] <= row["predictions"][0]["probability"] < 1
    assert "unknown model" in refused(capsys, "classify", str(photo), "--model", "inception_v9")


def test_labels_from_a_file(tmp_path):
    def file(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    assert find_labels(file("a.txt", "cat\n dog \n"), None, 2) == ["cat", "dog"]
    assert find_labels(file("a.json", '["cat", "dog"]'), None, 2) == ["cat", "dog"]
    assert find_labels(file("b.json", '{"1": "dog", "0": "cat"}'), None, 2) == ["cat", "dog"]
    assert find_labels(file("mark.txt", "\ufeffcat\ndog"), None, 2) == ["cat", "dog"]
    for name, text, said in (
        ("c.txt", "cat\n", "holds 1 labels; the model has 2 classes"),
        ("c.json", "{", "cannot be read"),
        ("deep.json", "[" * 100_000, "cannot be read"),
        ("d.json", "3", "not a list of names"),
        ("e.json", '{"0": "cat", "2": "dog"}', "index '1' is missing"),
    ):
        with pytest.raises(CommandError, match=said):
            find_labels(file(name, text), None, 2)
    with pytest.raises(CommandError, match="no such file"):
        find_labels(str(tmp_path / "none.txt"), None, 2)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\ndog\n")
    with pytest.raises(CommandError, match="cannot be read"):
        find_labels(str(tmp_path / "latin.txt"), None, 2)


def test_labels_from_the_weights(tmp_path):
    path = str(tmp_path / "w.safetensors")
    save_file({"x": torch.zeros(1)}, path, {"labels": '["cat", "dog"]'})
    assert find_labels(None, path, 2) == ["cat", "dog"]
    with pytest.raises(CommandError, match="2 labels for 3 classes"):
        find_labels(None, path, 3)
    save_file({"x": torch.zeros(1)}, path)
    assert find_labels(None, path, 3) == ["0", "1", "2"]


def test_labels_of_imagenet():
    references.torchvision()
    pytest.importorskip("timm.data")
    names = find_labels(None, None, 1000)
    assert "goldfish" in names[1] and find_labels(None, None, 1001)[1:] == names


def test_convert(capsys, tmp_path):
    source, target = tmp_path / "in.pth", tmp_path / "out.safetensors"
    net = inception_fast.create_model("inception_v1", num_classes=10)
    torch.save(net.state_dict(), source)
    assert main(["convert", str(source), str(target), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == "inception_v1" and report["target"] == str(target)
    assert report["options"]["num_classes"] == 10
    assert report["parameters"] == sum(p.numel() for p in net.parameters())
    again = inception_fast.create_model("inception_v1", num_classes=10, weights=str(target))
    assert torch.equal(again.get_classifier().weight, net.get_classifier().weight)
    assert "allowed: .safetensors" in refused(capsys, "convert", str(source), str(tmp_path / "out.zip"))


def test_convert_looks_at_the_ending_before_it_loads_keras(capsys, monkeypatch):
    monkeypatch.setattr(inception_fast, "tf", None, raising=False)
    line = refused(capsys, "convert", "in.pth", "out.safetensors", "--layout", "keras")
    assert "out.safetensors is no Keras file; allowed: .keras, .weights.h5" in line


def test_an_interrupt_ends_with_130(capsys, monkeypatch):
    def interrupted(pattern=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(inception_fast, "list_models", interrupted)
    assert main(["list"]) == 130
    assert capsys.readouterr() == ("", "inception-fast: interrupted\n")


def test_a_bug_keeps_its_traceback(monkeypatch):
    def buggy(pattern=None):
        raise ZeroDivisionError

    monkeypatch.setattr(inception_fast, "list_models", buggy)
    with pytest.raises(ZeroDivisionError):
        main(["list"])


def test_a_full_disk_is_one_line(capsys, monkeypatch):
    def full(pattern=None):
        raise OSError(errno.ENOSPC, "No space left on device", "/results/claims.json")

    monkeypatch.setattr(inception_fast, "list_models", full)
    assert main(["list"]) == 2
    said = "inception-fast: error: list: [Errno 28] No space left on device: '/results/claims.json'\n"
    assert capsys.readouterr() == ("", said)


def test_a_disk_without_room_for_temporary_files_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
    monkeypatch.setattr(inception_fast, "list_models", lambda pattern=None: [tempfile.gettempdir()])
    assert main(["list"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and "list: [Errno 2] No usable temporary directory found" in err


@pytest.mark.parametrize("empty", [torch.empty, np.empty])
def test_more_memory_than_there_is_is_one_line(capsys, monkeypatch, empty):
    monkeypatch.setattr(inception_fast, "list_models", lambda pattern=None: empty(1 << 50))
    line = refused(capsys, "list")
    assert "list: more memory than there is; choose a smaller batch or image: " in line


def test_one_line():
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert len(one_line("x" * 5000)) == 400


def test_building_the_parser_imports_no_torch():
    code = "import sys; from inception_fast.cli import build_parser; build_parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_as_a_module_and_into_a_closed_pipe():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "inception_fast", "list"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, MODELS, "")
    read, write = os.pipe()
    os.close(read)
    try:
        piped = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    finally:
        os.close(write)
    assert (piped.returncode, piped.stderr) == (141, "")


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_stream_is_no_error_and_the_other_is_left_alone(capsys, monkeypatch, small_net, photo, closed):
    monkeypatch.setattr(sys, closed, None)
    assert main(["classify", str(photo), "--json"]) == 0
    getattr(sys, closed).close()
    out, err = capsys.readouterr()
    if closed == "stdout":
        assert "the weights are random" in err
    else:
        assert json.loads(out)[0]["image"] == str(photo)


def test_no_option_is_missing_its_help():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser = build_parser()
    (commands,) = (a for a in parser._actions if hasattr(a, "choices") and isinstance(a.choices, dict))
    for name, command in commands.choices.items():
        assert all(action.help for action in command._actions), name


def test_the_help_of_an_option_names_its_default():
    (commands,) = (a for a in build_parser()._actions if isinstance(a.choices, dict))
    for name, command in commands.choices.items():
        for action in command._actions:
            if action.default in (None, False, [], "==SUPPRESS=="):
                continue
            values = action.default if isinstance(action.default, list) else [action.default]
            text = ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
            assert text in action.help and "default" in action.help, (name, action.option_strings, action.help)
