"""`inception-fast inspect`: any module, its picture, its flags; wrong requests get one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

import references
from inception_fast.cli import main

NETS = "inception_fast.claims.nets"


def inspected(folder, *arguments: str) -> dict:
    assert main(["inspect", *arguments, "--out", str(folder)]) == 0
    return json.loads((folder / "inspect.json").read_text())


def test_the_articles_example_is_flagged_and_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    document = inspected(tmp_path, f"{NETS}:pool_then_conv", "--input", "320,35,35")
    out = capsys.readouterr().out
    (flag,) = document["bottlenecks"]
    assert (flag["shape"], flag["values"]) == ([320, 17, 17], 92480)
    assert "representational bottleneck: 0 (17x17x320): 392,000 values shrink to 92,480" in out
    with Image.open(tmp_path / "inspect.png") as picture:
        picture.load()
        assert picture.format == "PNG" and min(picture.size) >= 500


def test_it_draws_whatever_backend_the_environment_names(tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ["inspect", f"{NETS}:pool_then_conv", "--input", "320,35,35", "--out", str(tmp_path)]
    environment = os.environ | {"MPLBACKEND": "none-of-these"}
    command = [sys.executable, "-m", "inception_fast", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "inspect.png").exists()


def test_the_parallel_reduction_is_not(tmp_path, capsys):
    document = inspected(tmp_path, f"{NETS}:parallel_reduction", "--input", "320,35,35")
    assert document["bottlenecks"] == [] and "no representational bottleneck" in capsys.readouterr().out
    assert [level["values"] for level in document["levels"]] == [392000, 184960]


def test_a_model_by_name_as_json(tmp_path, capsys):
    document = inspected(tmp_path, "inception_v1", "--image-size", "128", "--json")
    assert json.loads(capsys.readouterr().out) == document
    assert document["input"] == [3, 128, 128] and document["params"] == 6_624_904
    assert sum(level["macs"] for level in document["levels"]) == document["macs"]


def test_a_module_of_the_users(tmp_path, capsys, monkeypatch):
    (tmp_path / "my_net.py").write_text(
        "import sys\n"
        "from torch import nn\n"
        "def make():\n    print('loud')\n    return nn.Conv2d(3, 4, 3)\n"
        "def breaks():\n    raise KeyError('no file')\n"
        "def leaves():\n    sys.exit(3)\n"
        "class Asks(nn.Conv2d):\n    def forward(self, x):\n        assert len(x) > 9, 'more'\n"
        "def asks():\n    return Asks(3, 4, 3)\n"
    )
    monkeypatch.chdir(tmp_path)
    document = inspected(tmp_path, "my_net:make", "--image-size", "9")
    assert document["params"] == 112 and document["macs"] == 49 * 4 * 27
    capsys.readouterr()
    for command in ("inspect", "profile"):
        assert main([command, "my_net:make", "--image-size", "9", "--json"]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["model"] == "my_net:make" and "loud" in err
        for function, said in (("breaks", "KeyError: 'no file'"), ("leaves", "SystemExit: 3")):
            assert main([command, f"my_net:{function}", "--image-size", "9"]) == 2
            assert f"my_net:{function}: {said}; allowed: package.module:function" in capsys.readouterr().err
        assert main([command, "my_net:asks", "--image-size", "9"]) == 2
        assert "my_net:asks cannot take an input of 3x9x9: AssertionError: more\n" in capsys.readouterr().err


def test_a_module_that_reads_values_while_it_is_made(tmp_path, capsys, monkeypatch):
    """As many networks do for the rates of stochastic depth; on the meta device there are no values to read."""
    (tmp_path / "rates.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n"
        "    rates = [x.item() for x in torch.linspace(0, 0.5, 3)]\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), *map(nn.Dropout, rates))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert inspected(tmp_path, "rates:make", "--image-size", "9")["macs"] == 49 * 4 * 27


@pytest.mark.parametrize(
    "module, size, params, flagged",
    [
        ("timm.models.inception_v4:inception_v4", 299, 42_679_816, []),
        ("timm.models.resnet:resnet50", 224, 25_557_032, ["maxpool"]),
        ("torchvision.models:inception_v3", 299, 27_161_264, ["maxpool1"]),  # it brings its auxiliary head
    ],
)
def test_modules_of_other_libraries(tmp_path, module, size, params, flagged):
    references.torchvision()
    pytest.importorskip("timm")
    document = inspected(tmp_path, module, "--image-size", str(size))
    assert document["params"] == params
    assert [flag["name"] for flag in document["bottlenecks"]] == flagged
    assert document["levels"][-1]["values"] == 1000 and len(document["levels"]) > 15


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nothing"], "unknown model 'nothing'; allowed: inception_resnet_v1, "),
        (["inceptoin_v1"], "unknown model 'inceptoin_v1' (did you mean inception_v1 or "),
        (["nothing:at_all"], "No module named 'nothing'"),
        (["os:getcwd"], "os:getcwd makes a str; allowed: a torch.nn.Module"),
        ([f"{NETS}:deep"], "does not tell its input; give --input C,H,W or --image-size S"),
        ([f"{NETS}:deep", "--input", "3,8,8"], "cannot take an input of 3x8x8"),
        (["inception_v3", "--image-size", "20"], "allowed: 75x75 or larger"),
        (["inception_v3", "--input", "3,96,80", "--image-size", "96"], "--input 3,96,80; allowed: one of them"),
        (["inception_v3", "--input", "3,0,9"], "'3,0,9' is no shape; allowed: C,H,W such as 320,35,35"),
    ],
)
def test_wrong_requests_get_one_line(tmp_path, capsys, arguments, said):
    assert main(["inspect", *arguments, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1 and not (tmp_path / "out").exists()
