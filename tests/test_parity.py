"""Random weights drawn into each torch reference give the same logits through ours: file, options and net."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import inception_fast as fast
import references
from inception_fast.images import prepare
from references import images, relative, run

BUDGET = 1e-5
"""Relative, float32. Both nets do the same sums, so rounding differs only where one is reassociated (here 0 to 1e-6).
A wrong layer, pad or epsilon moves logits by 1e-3 or more."""

SIZES = (107, 128)
"""Odd and even: strided convolutions and pools round differently there."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(folder: Path, name: str, reference: nn.Module, **options: object) -> nn.Module:
    """Ours from a `.pth` file of the reference's own state dict."""
    path = folder / "weights.pth"
    torch.save(reference.state_dict(), path)
    return fast.create_model(name, weights=path, **options).eval()


def check(net: nn.Module, reference: nn.Module) -> None:
    for size in SIZES:
        assert relative(run(net, images(size)), run(reference, images(size))) <= BUDGET, size


@pytest.mark.parametrize("aux", [False, True], ids=["main", "aux"])
@pytest.mark.parametrize("ours, theirs", [("inception_v1", "googlenet"), ("inception_v3", "inception_v3")])
def test_torchvision(tmp_path: Path, ours: str, theirs: str, aux: bool) -> None:
    reference = references.torchvision_net(theirs, aux=aux, classes=37)
    net = load(tmp_path, ours, reference)
    assert (net.num_classes, net.aux_logits, net.convention) == (37, aux, "torch")
    assert list(net.state_dict()) and set(net.state_dict()) == set(reference.state_dict())
    check(net, reference)


@pytest.mark.parametrize(
    "ours, theirs, size", [("inception_v1", "googlenet", 96), ("inception_v3", "inception_v3", 299)]
)
def test_torchvision_training_outputs(tmp_path: Path, ours: str, theirs: str, size: int) -> None:
    """In training: batch statistics, auxiliary logits and their order. Dropout, which is random, is off."""
    reference = references.torchvision_net(theirs, aux=True, classes=11).train()
    for module in reference.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    options = {"aux_drop_rate": 0.0} if ours == "inception_v1" else {}
    net = load(tmp_path, ours, reference, drop_rate=0.0, **options).train()
    x = images(size)
    for ours_out, theirs_out in zip(run(net, x), run(reference, x), strict=True):
        assert relative(ours_out, theirs_out) <= BUDGET
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_torchvision_transform_input(tmp_path: Path) -> None:
    """torchvision's published weights take images normalised by ImageNet's statistics and rescale them inside."""
    for ours, theirs in (("inception_v1", "googlenet"), ("inception_v3", "inception_v3")):
        reference = references.torchvision_net(theirs, classes=5)
        reference.transform_input = True
        check(load(tmp_path, ours, reference, transform_input=True), reference)


@pytest.mark.parametrize("turned", [False, True], ids=["plain", "transform_input"])
@pytest.mark.parametrize("ours, theirs", [("inception_v1", "googlenet"), ("inception_v3", "inception_v3")])
def test_torchvision_images(tmp_path: Path, ours: str, theirs: str, turned: bool) -> None:
    """The data config of a net is torchvision's own transform; without `transform_input`, less what that undoes."""
    published = references.torchvision().models.get_model_weights(theirs).IMAGENET1K_V1.transforms()
    pixels = np.random.default_rng(0).integers(0, 256, (401, 503, 3), dtype=np.uint8)
    wanted = published(Image.fromarray(pixels))
    net = load(tmp_path, ours, references.torchvision_net(theirs, aux=True, classes=5), transform_input=turned)
    if not turned:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (published.mean, published.std))
        wanted = (wanted * std + mean) * 2 - 1
    torch.testing.assert_close(prepare(Image.fromarray(pixels), net.data_config), wanted, rtol=0, atol=1e-5)


def test_fid(tmp_path: Path) -> None:
    reference = references.fid_net()
    net = load(tmp_path, "inception_v3", reference)
    assert (net.num_classes, net.convention, net.aux_logits) == (1008, "tf", False)
    check(net, reference)


@pytest.mark.parametrize("name", ["inception_v3", "inception_v4", "inception_resnet_v2"])
def test_timm(tmp_path: Path, name: str) -> None:
    reference = references.timm_net(name)
    net = load(tmp_path, name, reference)
    assert set(net.state_dict()) == set(reference.state_dict())
    assert net.data_config.crop_pct == reference.default_cfg["crop_pct"]
    assert net.data_config.input_size == reference.default_cfg["input_size"]
    check(net, reference)


def test_timm_auxiliary_head(tmp_path: Path) -> None:
    reference = references.timm_net("inception_v3", aux_logits=True, num_classes=9)
    net = load(tmp_path, "inception_v3", reference)
    x = images(299)
    features = net.forward_endpoints(x)["Mixed_6e"]
    assert relative(run(net.AuxLogits, features), run(reference.AuxLogits, features)) <= BUDGET


@pytest.mark.parametrize("classes", [None, 13], ids=["embedding", "classes"])
def test_facenet(tmp_path: Path, classes: int | None) -> None:
    reference = references.facenet_net(classes)
    net = load(tmp_path, "inception_resnet_v1", reference)
    assert net.num_classes == (classes or 0)
    assert set(net.state_dict()) == set(reference.state_dict())
    check(net, reference)


def test_facenet_embedding_from_classifier_weights(tmp_path: Path) -> None:
    """The published files have a classifier; num_classes=0 leaves it out and gives facenet's embeddings."""
    classifier = references.facenet_net(13)
    embedder = references.facenet_net()
    embedder.load_state_dict({key: value for key, value in classifier.state_dict().items() if "logits" not in key})
    check(load(tmp_path, "inception_resnet_v1", classifier, num_classes=0), embedder)
