"""Features of the FID network equal torch-fidelity's and pytorch-fid's, from weight files of their layout."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import inception_fast as fast
import references
from inception_fast.features.batching import batches
from inception_fast.fid import InceptionFeatures, register_with_torch_fidelity
from inception_fast.fid.resize import prepare, resize_like_tensorflow1
from inception_fast.fid.torch_fidelity import _extractor_class
from numerics import BF16_FEATURES, FEATURES_MAX, NET_SCORE_REL, NET_WINOGRAD_MAX, rel_l2

SIZES = [(299, 299), (32, 32), (5, 701), (400, 299), (1, 1)]
"""As is, larger, both ways at once, one way only, and a single pixel."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the layout that both packages publish theirs in."""
    path = tmp_path_factory.mktemp("weights") / "pt_inception.pth"
    torch.save(references.fid_net().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def features(weights: Path) -> InceptionFeatures:
    return InceptionFeatures(weights)


@pytest.fixture(scope="module")
def torch_fidelity(weights: Path) -> nn.Module:
    references.torchvision()
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    wanted = ["2048", "logits_unbiased"]
    return module.FeatureExtractorInceptionV3("reference", wanted, feature_extractor_weights_path=str(weights))


@pytest.fixture(scope="module")
def pytorch_fid(weights: Path) -> nn.Module:
    """pytorch-fid's own loader, with the file where it would reach for its hub."""
    references.torchvision()
    module = pytest.importorskip("pytorch_fid.inception")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: torch.load(weights, weights_only=True))
        return module.InceptionV3([3]).eval()


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """uint8 [count, 3, height, width]: noise of another brightness and contrast in every image, extremes included."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.rand(count, 3, height, width, generator=draw)
    low = torch.rand(count, 3, 1, 1, generator=draw)
    return ((low + (1 - low) * noise) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equal_to_torch_fidelity(features: InceptionFeatures, torch_fidelity: nn.Module, size: tuple[int, int]) -> None:
    images = pictures(2, *size)
    ours = features(images)
    assert ours.shape == (2, 2048) and ours.dtype == torch.float32 and not ours.requires_grad
    assert references.relative(ours, torch_fidelity(images)[0]) <= FEATURES_MAX


@pytest.mark.parametrize("size", [(299, 299), (64, 351)], ids=str)
def test_equal_to_pytorch_fid(weights: Path, pytorch_fid: nn.Module, size: tuple[int, int]) -> None:
    images = pictures(2, *size)
    ours = InceptionFeatures(weights, preprocessing="pytorch-fid")(images)
    with torch.no_grad():
        theirs = pytorch_fid(images.float() / 255)[0].flatten(1)
    assert references.relative(ours, theirs) <= FEATURES_MAX


def bicubic(source: int) -> np.ndarray:
    """[299, source]: Keys' kernel with a = -1/2, as wide as what it averages over, its cut ends made up for."""
    step = source / 299
    centre, reach = (np.arange(299)[:, None] + 0.5) * step, max(step, 1.0)
    t = np.abs(np.arange(source) + 0.5 - centre) / reach
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    weights: np.ndarray = np.where(t < 1, near, np.where(t < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [*SIZES, (700, 33)], ids=str)
def test_clean_preprocessing_is_an_antialiased_bicubic_resize(size: tuple[int, int]) -> None:
    image = pictures(1, *size)[0].numpy()
    image[:, : size[0] // 2] = 255 * (image[:, : size[0] // 2] > 127)  # edges, over which a cubic shoots
    exact = np.clip(bicubic(size[0]) @ image.astype(np.float64) @ bicubic(size[1]).T, 0, 255)
    assert np.abs(prepare(image, "clean-fid") - (exact - 128) / 128).max() <= 1e-5


def test_the_preprocessings_are_not_the_same(features: InceptionFeatures, weights: Path) -> None:
    """What a user would see as a shift of FID; if it were within the budget, the tests above would prove less."""
    images = pictures(1, 64, 64)
    others = [InceptionFeatures(weights, preprocessing=name)(images) for name in ("pytorch-fid", "clean-fid")]
    for one, other in itertools.combinations((features(images), *others), 2):
        assert references.relative(one, other) > 100 * FEATURES_MAX


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_resize_has_the_bits_of_torch_fidelitys(size: tuple[int, int]) -> None:
    references.torchvision()
    module = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    image = pictures(1, *size)
    theirs = module.interpolate_bilinear_2d_like_tensorflow1x(image.float(), size=(299, 299), align_corners=False)
    assert np.array_equal(resize_like_tensorflow1(image[0].numpy()), theirs[0].numpy())
    assert np.array_equal(prepare(image[0].numpy()), ((theirs - 128) / 128)[0].numpy())


def test_resize_is_tensorflows() -> None:
    """TensorFlow's compiler may fuse a product and a sum: one rounding of values up to 255 apart at most."""
    tf = pytest.importorskip("tensorflow")
    for size in ((37, 512), (299, 299)):
        image = pictures(1, *size)
        rows = tf.constant(image.permute(0, 2, 3, 1).float().numpy())
        theirs = tf.compat.v1.image.resize_bilinear(rows, (299, 299), align_corners=False)[0].numpy()
        ours = resize_like_tensorflow1(image[0].numpy()).transpose(1, 2, 0)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3 * 255 * 2**-24)


def test_the_same_bits_in_any_batch(features: InceptionFeatures) -> None:
    images = pictures(64, 24, 40)
    together = features(images)
    assert len({row.numpy().tobytes() for row in together}) == 64, "the images must not all look the same to the net"
    assert torch.equal(features(images[:7]), together[:7])
    for i in (0, 6, 33, 63):
        assert torch.equal(features(images[i : i + 1])[0], together[i])


def test_bfloat16_is_close_and_has_the_same_bits_in_any_batch(features: InceptionFeatures, weights: Path) -> None:
    images = pictures(3, 24, 40)
    half = InceptionFeatures(weights, torch.bfloat16)
    together = half(images)
    assert together.dtype == torch.float32 and torch.equal(half(images[2:])[0], together[2])
    assert 0 < rel_l2(together, features(images)) <= BF16_FEATURES


def test_batches_are_few_kinds() -> None:
    assert batches(75) == [32, 32, 8, 2, 1] and batches(32) == [32] and batches(0) == []
    assert {size for count in range(1, 200) for size in batches(count)} == {1, 2, 4, 8, 16, 32}
    assert all(sum(batches(count)) == count for count in range(200))


def test_torchmetrics_takes_it_as_it_is(features: InceptionFeatures, torch_fidelity: nn.Module) -> None:
    references.torchvision()
    metric = pytest.importorskip("torchmetrics.image.kid").KernelInceptionDistance(
        feature=features, subsets=2, subset_size=6
    )
    other = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance(feature=features)
    for images, real in ((pictures(6, 32, 32, seed=1), True), (pictures(6, 32, 32, seed=2) // 2, False)):
        metric.update(images, real=real)
        other.update(images, real=real)
    assert torch.isfinite(metric.compute()[0])
    assert other.real_features_num_samples == 6 and other.state_dict() == {}
    wanted = torch_fidelity(pictures(6, 32, 32, seed=1))[0].double().sum(0)
    assert references.relative(other.real_features_sum, wanted) <= FEATURES_MAX
    clone = other.clone().double()
    clone.update(pictures(1, 8, 8), real=True)
    assert (clone.real_features_num_samples, other.real_features_num_samples) == (7, 6)


def test_torch_fidelity_takes_it_as_a_registered_extractor(weights: Path) -> None:
    references.torchvision()
    package = pytest.importorskip("torch_fidelity")
    register_with_torch_fidelity("ours")
    with pytest.raises(ValueError, match="already registered"):
        register_with_torch_fidelity("ours")

    class Images(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __init__(self, images: Tensor) -> None:
            self.images = images

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> Tensor:
            return self.images[index]

    options: dict[str, Any] = {"isc": True, "kid": True, "isc_splits": 2, "kid_subsets": 2, "kid_subset_size": 5}
    options |= {"cuda": False, "verbose": False, "cache": False, "save_cpu_ram": True, "batch_size": 4}
    options |= {"input1": Images(pictures(6, 40, 40)), "input2": Images(pictures(6, 40, 40, seed=1) // 3)}
    options["feature_extractor_weights_path"] = str(weights)
    ours = package.calculate_metrics(feature_extractor="ours", **options)
    theirs = package.calculate_metrics(feature_extractor="inception-v3-compat", **options)
    assert ours.keys() == theirs.keys() and len(ours) == 4
    # The spread of two subsets is the difference of sums as large as the mean, whose rounding it is made of here.
    spread, mean = "kernel_inception_distance_std", "kernel_inception_distance_mean"
    assert ours.pop(spread) == pytest.approx(theirs.pop(spread), abs=NET_SCORE_REL * abs(theirs[mean]))
    assert ours == pytest.approx(theirs, rel=NET_SCORE_REL)


@pytest.mark.parametrize(
    "error, said",
    [
        (RuntimeError("operator torchvision::nms does not exist"), r"cannot be imported \(operator .*built for torch"),
        (ModuleNotFoundError("No module", name="torchvision"), "cannot be imported .* a torchvision built for torch"),
        (ModuleNotFoundError("No module", name="torch_fidelity"), "is not installed .*pip install torch-fidelity"),
    ],
    ids=["broken torchvision", "no torchvision", "no torch-fidelity"],
)
def test_torch_fidelity_that_does_not_load(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    def broken(name: str) -> Any:
        raise error

    monkeypatch.setattr("inception_fast.fid.torch_fidelity.importlib.import_module", broken)
    with pytest.raises(ImportError, match=said):
        register_with_torch_fidelity("never")


def test_dtypes_under_torch_fidelity() -> None:
    class Base:
        def __init__(self, name: str, features: list[str]) -> None:
            pass

    extractor = _extractor_class(Base)
    with pytest.raises(ValueError, match="feature_extractor_internal_dtype='float99'; allowed: float32, bfloat16"):
        extractor("name", ["2048"], "weights.pth", "float99")


def test_winograds_tiles(features: InceptionFeatures, weights: Path) -> None:
    images = pictures(3, 150, 40)
    tiles = InceptionFeatures(weights, winograd=True)
    found = tiles(images)
    assert 0 < references.relative(found, features(images)) <= NET_WINOGRAD_MAX
    assert torch.equal(found, torch.cat([tiles(images[i : i + 1]) for i in range(3)]))
    assert torch.equal(pickle.loads(pickle.dumps(tiles))(images), found) and "winograd=True)" in repr(tiles)
    rounded = InceptionFeatures(weights, torch.bfloat16, winograd=True)(images)
    assert rel_l2(rounded, features(images)) <= BF16_FEATURES


def test_winograds_tiles_under_torch_fidelity(weights: Path) -> None:
    class Base(nn.Module):
        def __init__(self, name: str, features: list[str]) -> None:
            super().__init__()

    assert not _extractor_class(Base)("name", ["2048"], weights).features.winograd
    assert _extractor_class(Base, winograd=True)("name", ["2048"], weights).features.winograd


def test_copies_and_pickles(features: InceptionFeatures) -> None:
    images = pictures(1, 16, 16)
    wanted = features(images)
    for twin in (copy.deepcopy(features), pickle.loads(pickle.dumps(features))):
        assert torch.equal(twin(images), wanted)
    assert "InceptionFeatures(dtype=torch.float32, preprocessing='tensorflow')" in repr(features)
    assert list(features.parameters()) == [] and features.num_features == 2048


def test_converted_weights_give_the_same(features: InceptionFeatures, weights: Path, tmp_path: Path) -> None:
    from inception_fast.weights.convert import convert

    convert(weights, tmp_path / "fid.safetensors")
    images = pictures(1, 50, 50)
    assert torch.equal(InceptionFeatures(tmp_path / "fid.safetensors")(images), features(images))


@pytest.mark.parametrize(
    "images, error, said",
    [
        (torch.rand(1, 3, 8, 8), TypeError, r"torch.float32; allowed: torch.uint8, from floats.*round"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), TypeError, r"torch.int64; allowed: torch.uint8$"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), ValueError, r"\(0, 3, 8, 8\); allowed: \[n, 3, h, w\]"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), ValueError, r"\(1, 1, 8, 8\)"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), ValueError, r"\(3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 0, dtype=torch.uint8), ValueError, r"\(1, 3, 8, 0\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8, device="meta"), ValueError, "meta; allowed: cpu"),
        (np.zeros((1, 3, 8, 8), np.uint8), TypeError, "ndarray; allowed: a torch.Tensor"),
    ],
)
def test_refuses_images(features: InceptionFeatures, images: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        features(images)


def test_refuses_other_weights(tmp_path: Path, weights: Path) -> None:
    torch.save(references.torchvision_net("inception_v3", classes=10).state_dict(), tmp_path / "torchvision.pth")
    with pytest.raises(ValueError, match="10 classes, not of the FID network; allowed: the layout of pytorch-fid"):
        InceptionFeatures(tmp_path / "torchvision.pth")
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(fast.weights.WeightsError, match=r"cut.pth"):
        InceptionFeatures(tmp_path / "cut.pth")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        InceptionFeatures(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="preprocessing 'half'; allowed: 'tensorflow', 'pytorch-fid', 'clean-fid'"):
        InceptionFeatures(weights, preprocessing="half")
    with pytest.raises(ValueError, match="float64"):
        InceptionFeatures(weights, torch.float64)
