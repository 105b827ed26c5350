"""Features by a network on another device: what is asked of the engine, what comes back where, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import numerics
from inception_fast.cli import main
from inception_fast.dispatch import Available, Unavailable
from inception_fast.features import placed
from inception_fast.features.extractors import ModelExtractor, Recipe
from inception_fast.features.placed import Placed, device_of
from inception_fast.fid import InceptionFeatures
from inception_fast.fid.extractor import check_images


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1)).eval()


def test_the_engine_is_asked_for_the_same_bits_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """For an example on the device, in the given format; parts go there and results come back, in float32."""
    asked: list[tuple[Tensor, dict[str, Any]]] = []
    parts: list[Tensor] = []

    def optimize(module: nn.Module, example: Tensor, **options: Any) -> Any:
        asked.append((example, options))

        def plan(x: Tensor) -> Tensor:
            assert x.device.type == "meta"
            parts.append(x)
            return torch.ones(len(x), 8, 1, 1, dtype=torch.bfloat16)

        return plan

    monkeypatch.setattr(placed, "optimize", optimize)
    monkeypatch.setattr(placed, "device_of", torch.device)
    there = Placed(net(), (3, 9, 9), torch.bfloat16, "meta")
    ((example, options),) = asked
    assert example.device.type == "meta" and example.shape == (1, 3, 9, 9)
    assert options == {"dtype": torch.bfloat16, "winograd": False, "batch_invariant": True}
    y = there(torch.zeros(71, 3, 9, 9))
    assert y.shape == (71, 8) and y.dtype is torch.float32 and y.device.type == "cpu"
    assert [len(part) for part in parts] == [32, 32, 4, 2, 1]


def test_on_the_cpu_it_is_the_engine() -> None:
    module, x = net(), numerics.random(5, 3, 9, 9)
    here = Placed(module, (3, 9, 9), None)
    assert here.settings == {} and here.device == torch.device("cpu")
    assert torch.equal(here(x), torch.cat([here(x[i : i + 1]) for i in range(5)]))
    assert numerics.rel_l2(here(x), module(x).flatten(1)) <= numerics.NET_MAX


def test_tiles_are_another_sum_in_any_batch() -> None:
    """So features by them are told apart, and no folder of the others goes on with them."""
    module, x = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Flatten()).eval(), numerics.random(5, 16, 26, 26)
    tiles = Placed(module, (16, 26, 26), None, winograd=True)
    assert tiles.settings == {"winograd": True}
    assert any(step.winograd for step in tiles.plan.report().steps)
    assert torch.equal(tiles(x), torch.cat([tiles(x[i : i + 1]) for i in range(5)]))
    assert not torch.equal(tiles(x), Placed(module, (16, 26, 26), None)(x))
    assert numerics.rel_l2(tiles(x), module(x)) <= numerics.NET_WINOGRAD_MAX


def test_every_gpu_has_settings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of features goes on with the GPU that began it, and the CPU's stay what they were."""
    here = Placed(net(), (3, 9, 9), None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU, {device}")
    here.device = torch.device("cuda", 1)
    assert here.settings == {"device": "a GPU, cuda:1"}
    assert "device" not in ModelExtractor("inception_v1", None).settings


def test_tiles_are_the_cpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inception_fast.engine.runner._device_of", lambda example: torch.device("cuda"))
    monkeypatch.setattr("inception_fast.engine.runner._checked_backend", lambda backend, device: ("triton", False))
    with pytest.raises(ValueError, match="winograd=True on backend 'triton'; allowed: 'cpu'"):
        Placed(net(), (3, 9, 9), None, winograd=True)


@pytest.mark.parametrize("device", ["tpu", "meta", "", "cuda:x", 1.5, None])
def test_what_is_no_device_is_refused(device: Any) -> None:
    with pytest.raises(ValueError, match=r"allowed: cpu, cuda, cuda:N"):
        device_of(device)


def test_a_gpu_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    status = {"triton": Unavailable("no NVIDIA driver")}
    monkeypatch.setattr(placed, "backend_status", lambda: status)
    with pytest.raises(ValueError, match=r"device 'cuda'; allowed here: cpu, for no NVIDIA driver"):
        device_of("cuda")
    status["triton"] = Available("sm_90")  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of("cuda:1") == torch.device("cuda", 1) and device_of("cuda") == torch.device("cuda")
    with pytest.raises(ValueError, match=r"device 'cuda:2'; allowed here: cpu, and cuda:N below 2"):
        device_of("cuda:2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("command", ["features", "fid"])
def test_the_command_says_so(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    line: Sequence[Any] = [command, folder, "--out", tmp_path / "out", "--model", "inception_v1"]
    if command == "fid":
        line = [command, folder, folder, "--weights", tmp_path / "fid.pth"]
    assert main([*map(str, line), "--device", "cuda"]) == 2
    assert f"{command}: device 'cuda'; allowed here: cpu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_recipe_says_where() -> None:
    """Ray's actors make the extractor of it."""
    assert Recipe("inception_v1", None).device == "cpu"
    with pytest.raises(ValueError, match="device 'tpu'"):
        Recipe("inception_v1", None, device="tpu").make()
    with pytest.raises(ValueError, match="device 'tpu'"):
        InceptionFeatures("nowhere.pth", device="tpu")


def test_images_may_come_where_the_network_is() -> None:
    x = torch.zeros(1, 3, 4, 4, dtype=torch.uint8, device="meta")
    with pytest.raises(ValueError, match=r"images on meta; allowed: cpu$"):
        check_images(x)
    check_images(x, ("cpu", "meta"))
