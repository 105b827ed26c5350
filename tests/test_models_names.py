"""State-dict names and shapes are those of the files people have: torchvision, timm, facenet-pytorch, slim."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import references
from inception_fast.models import create_model


def meta(build: Callable[..., nn.Module], *args: Any, **options: Any) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {key: value.shape for key, value in build(*args, **options).state_dict().items()}


@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), [("inception_v1", "googlenet"), ("inception_v3", "inception_v3")])
def test_torchvision(ours: str, theirs: str, aux: bool) -> None:
    build = getattr(references.torchvision().models, theirs)
    expected = meta(build, weights=None, aux_logits=aux, init_weights=False)
    assert meta(create_model, ours, aux_logits=aux) == expected


@pytest.mark.parametrize("name", ["inception_v3", "inception_v4", "inception_resnet_v2"])
def test_timm(name: str) -> None:
    references.torchvision()  # timm imports it
    timm = pytest.importorskip("timm")
    assert meta(create_model, name) == meta(timm.create_model, name)
    with torch.device("meta"):
        theirs, ours = timm.create_model(name).feature_info, create_model(name).feature_info
    assert list(ours) == theirs


@pytest.mark.parametrize("classes", [None, 11])
def test_facenet_pytorch(classes: int | None) -> None:
    references.torchvision()  # facenet-pytorch imports it
    pytest.importorskip("facenet_pytorch")
    build = importlib.import_module("facenet_pytorch").InceptionResnetV1
    expected = meta(build, classify=classes is not None, num_classes=classes)
    assert meta(create_model, "inception_resnet_v1", num_classes=classes or 0) == expected


@pytest.mark.parametrize("name", ["inception_v3", "inception_v4", "inception_resnet_v2"])
def test_auxiliary_heads_have_one_naming(name: str) -> None:
    head = {key.removeprefix("AuxLogits.") for key in meta(create_model, name, aux_logits=True) if "AuxLogits" in key}
    norm = ["conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"]
    assert head == {f"conv{i}.{leaf}" for i in (0, 1) for leaf in norm} | {"fc.weight", "fc.bias"}


def test_v2_has_slims_scopes() -> None:
    keys = meta(create_model, "inception_v2")
    block = r"Mixed_(3[bc]|4[a-e]|5[a-c])\.branch\d(\.\d)?"
    stem = r"Conv2d_2b_1x1|Conv2d_2c_3x3"
    pattern = rf"({stem}|{block})\.(conv\.weight|bn\.\w+)|Conv2d_1a_7x7\.(depthwise|pointwise)\.\w+|fc\.(weight|bias)"
    assert [key for key in keys if not re.fullmatch(pattern, key)] == []
    convolutions = [key.removesuffix(".conv.weight") for key in keys if key.startswith("Mixed_4a") and "conv" in key]
    assert convolutions == [
        f"Mixed_4a.{path}" for path in ("branch0.0", "branch0.1", "branch1.0", "branch1.1", "branch1.2")
    ]
    assert keys["Mixed_5c.branch3.1.conv.weight"] == (128, 1024, 1, 1)
    assert keys["Conv2d_1a_7x7.depthwise.weight"] == (24, 1, 7, 7)
