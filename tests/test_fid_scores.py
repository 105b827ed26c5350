"""The scores against pytorch-fid, torch-fidelity and prdc on the same features, and the edges where those fail."""

from __future__ import annotations

import io
import os
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import references
from inception_fast.fid import (
    Gaussian,
    Statistics,
    frechet_distance,
    inception_score,
    kernel_inception_distance,
    precision_recall_density_coverage,
    read_statistics,
    write_statistics,
)
from numerics import FID_REL, SCORE_REL


def rows(count: int, width: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    """float32 features like the net's: not negative, far from zero on average, correlated."""
    draw = np.random.default_rng(seed)
    mixed = draw.standard_normal((count, width)) @ draw.standard_normal((width, width)) / width**0.5
    return np.maximum(mixed + 1 + shift, 0).astype(np.float32)


def gaussian(features: np.ndarray) -> Gaussian:
    statistics = Statistics()
    statistics.update(features)
    return statistics.gaussian()


def by_gram(a: np.ndarray, b: np.ndarray) -> float:
    """FID from the features themselves: an n x n problem that has no zero eigenvalues to blur. Another way, float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    x, y = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (a, b))
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + (x * x).sum() + (y * y).sum() - 2 * root)


def test_distance_is_pytorch_fids_and_torch_fidelitys() -> None:
    references.torchvision()
    a, b = rows(700, 192), rows(600, 192, seed=1, shift=0.1)
    ours = frechet_distance(gaussian(a), gaussian(b))
    theirs = pytest.importorskip("torch_fidelity.metric_fid")
    held = [theirs.fid_features_to_statistics(torch.from_numpy(f).double()) for f in (a, b)]
    assert ours == pytest.approx(theirs.fid_statistics_to_metric(*held, False)[theirs.KEY_METRIC_FID], rel=FID_REL)
    assert ours == pytest.approx(by_gram(a, b), rel=FID_REL)
    module = pytest.importorskip("pytorch_fid.fid_score")
    try:
        reference = module.calculate_frechet_distance(*(v for s in held for v in (s["mu"], s["sigma"])))
    except (TypeError, ValueError) as error:
        pytest.skip(f"pytorch-fid does not run with this SciPy: {error}")
    assert ours == pytest.approx(reference, rel=FID_REL)


@pytest.mark.parametrize("counts", [(2, 2), (5, 300), (40, 30)], ids=str)
def test_distance_of_few_images(counts: tuple[int, int]) -> None:
    """Covariances without full rank, where a general matrix root loses half of the digits."""
    a, b = rows(counts[0], 128), rows(counts[1], 128, seed=1)
    x, y = gaussian(a), gaussian(b)
    assert x.factor is not None and frechet_distance(x, y) == pytest.approx(by_gram(a, b), rel=FID_REL)
    x, y = (replace(g, factor=None) for g in (x, y))
    assert frechet_distance(x, y) == pytest.approx(by_gram(a, b), rel=FID_REL), "from the covariances alone"


def test_distance_takes_seconds_at_full_width() -> None:
    """As some decompositions of a symmetric matrix; threads that wait for a busy machine count in both."""
    draw = np.random.default_rng(0)
    a, b = (gaussian(draw.random((2100, 2048), np.float32)) for _ in range(2))
    start = time.process_time()
    np.linalg.eigh(a.covariance)
    between = time.process_time()
    assert frechet_distance(a, b) > 0
    assert time.process_time() - between < 20 * (between - start), "minutes belong to sqrtm"


def test_distance_to_itself_and_its_symmetry() -> None:
    a, b = gaussian(rows(50, 64)), gaussian(rows(80, 64, seed=1))
    assert frechet_distance(a, a) <= 1e-12 * np.trace(a.covariance)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    still = Gaussian(np.zeros(3), np.zeros((3, 3)))
    assert frechet_distance(still, Gaussian(np.ones(3), np.zeros((3, 3)))) == 3.0
    with pytest.raises(ValueError, match="of 64 and of 3 features"):
        frechet_distance(a, still)


GOOD = Gaussian(np.zeros(2), np.eye(2))


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ((np.zeros(2), np.eye(2)), TypeError, "is a tuple; allowed: a Gaussian"),
        (np.zeros((5, 2)), TypeError, "is a ndarray; allowed: a Gaussian"),
        (None, TypeError, "is a NoneType; allowed: a Gaussian"),
        (Statistics(), TypeError, r"is a Statistics; allowed: a Gaussian, as Statistics\.gaussian\(\)"),
        (Gaussian(0.0, 1.0), ValueError, r"mean \(\) and covariance \(\); allowed: \[d\]"),  # type: ignore[arg-type]
        (Gaussian(np.zeros(2), np.eye(3)), ValueError, r"mean \(2,\) and covariance \(3, 3\); allowed"),
        (Gaussian(np.zeros(2), None), ValueError, "covariance of dtype object; allowed: real"),  # type: ignore[arg-type]
        (Gaussian(np.zeros(2), np.eye(2) * 1j), ValueError, "covariance of dtype complex128; allowed: real"),
        (Gaussian(np.zeros(2), np.eye(2) * np.nan), ValueError, "NaN or infinity; allowed: numbers"),
        (Gaussian(np.zeros(2), np.array([[1, 0.9], [0, 1]])), ValueError, "covariance that is not symmetric; allowed"),
        (Gaussian(np.zeros(2), np.array([[1, 2], [2, 1]])), ValueError, "covariance with the eigenvalue -1; allowed"),
    ],
)
def test_distance_is_of_gaussians_alone(given: Any, error: type[Exception], said: str) -> None:
    for place, arguments in (("a", (given, GOOD)), ("b", (GOOD, given))):
        with pytest.raises(error, match=f"^{place} .*{said}"):
            frechet_distance(*arguments)


def test_gaussians_hold_any_arrays_of_numbers() -> None:
    lists: Any = [0, 1], [[2, 0], [0, 2]]
    for kind in (lambda x: x, np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.bfloat16)):
        assert frechet_distance(Gaussian(*map(kind, lists)), Gaussian(np.zeros(2), 2 * np.eye(2))) == pytest.approx(1)


@pytest.mark.parametrize("count", [5, 300])
def test_rounded_covariances_are_covariances(count: int) -> None:
    """With zero eigenvalues that rounding turns negative, too."""
    exact = gaussian(rows(count, 128))
    rounded = Gaussian(exact.mean, exact.covariance.astype(np.float32))
    assert np.linalg.eigvalsh(rounded.covariance)[0] < 0 or count == 300
    assert frechet_distance(rounded, replace(exact, factor=None)) <= 1e-4 * np.trace(exact.covariance)


def test_statistics_do_not_depend_on_the_portions() -> None:
    features = rows(1300, 32)
    whole = gaussian(features)
    np.testing.assert_allclose(whole.mean, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9)
    for portion in (1, 7, 64, 513):
        parts = Statistics()
        for start in range(0, len(features), portion):
            parts.update(torch.from_numpy(features[start : start + portion]))
        found = parts.gaussian()
        assert np.array_equal(found.mean, whole.mean) and np.array_equal(found.covariance, whole.covariance)
        assert np.array_equal(parts.gaussian().covariance, whole.covariance), "asking changes nothing"


def test_statistics_of_large_means_keep_their_digits() -> None:
    """Sums of squares round 1e6 with a spread of 1 would lose twelve of sixteen digits."""
    features = rows(200, 8).astype(np.float64)
    np.testing.assert_allclose(gaussian(features + 1e6).covariance, np.cov(features, rowvar=False), rtol=1e-7)


def test_statistics_hold_no_features() -> None:
    statistics = Statistics()
    for _ in range(20):
        statistics.update(rows(512, 16))
    assert statistics.count == 10240 and not statistics._pending


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_features_of_any_precision(dtype: torch.dtype) -> None:
    features = torch.from_numpy(rows(20, 4)).to(dtype).requires_grad_()
    statistics = Statistics()
    statistics.update(features)
    np.testing.assert_array_equal(statistics.gaussian().mean, gaussian(features.detach().double().numpy()).mean)


def test_statistics_refuse() -> None:
    statistics = Statistics()
    with pytest.raises(ValueError, match=r"0 image\(s\); allowed: two or more"):
        statistics.gaussian()
    statistics.update(rows(1, 4))
    with pytest.raises(ValueError, match=r"1 image\(s\); allowed: two or more"):
        statistics.gaussian()
    with pytest.raises(ValueError, match="width 5; allowed: 4"):
        statistics.update(rows(1, 5))
    with pytest.raises(ValueError, match="row 2 are not finite"):
        Statistics().update(np.array([[1.0] * 4, [1.0] * 4, [np.nan] * 4]))
    with pytest.raises(ValueError, match="row 3 are not finite"):
        statistics.update(np.array([[1.0] * 4, [1.0] * 4, [np.nan] * 4]))
    with pytest.raises(ValueError, match=r"shape \(4,\); allowed: \[n, d\]"):
        statistics.update(np.zeros(4))
    for values in (np.ones((2, 4), complex), torch.ones(2, 4, dtype=torch.complex128)):
        with pytest.raises(ValueError, match="dtype complex128; allowed: real numbers"):
            Statistics().update(values)


def test_rank_is_warned_about() -> None:
    few = gaussian(rows(10, 16)).rank_warning("A")
    assert few is not None and "A has 10 images for 16 features" in few and "rank 9" in few
    assert gaussian(rows(17, 16)).rank_warning("A") is None
    assert Gaussian(np.zeros(4), np.eye(4)).rank_warning("A") is None


def test_files_of_pytorch_fid_are_read_and_written(tmp_path: Path) -> None:
    held = gaussian(rows(30, 8))
    np.savez_compressed(tmp_path / "theirs.npz", mu=held.mean, sigma=held.covariance)
    theirs = read_statistics(tmp_path / "theirs.npz")
    assert np.array_equal(theirs.mean, held.mean) and theirs.count is None
    write_statistics(tmp_path / "ours.npz", held)
    with np.load(tmp_path / "ours.npz") as file:  # as pytorch-fid opens it
        assert np.array_equal(file["mu"], held.mean) and np.array_equal(file["sigma"], held.covariance)
    assert read_statistics(tmp_path / "ours.npz").count == 30
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.npz", "theirs.npz"]
    with pytest.raises(ValueError, match=r"a name that ends in \.npz"):
        write_statistics(tmp_path / "ours.txt", held)


def test_damaged_archives_of_statistics_are_refused(tmp_path: Path) -> None:
    """Whatever byte of one is wrong: packed data that does not unpack, a method nobody knows, sizes without end."""
    path = tmp_path / "x.npz"
    np.savez_compressed(path, mu=np.zeros(2), sigma=np.eye(2))
    whole = path.read_bytes()
    packed = whole.index(b"PK\x03\x04", 4) - zipfile.ZipFile(path).infolist()[0].compress_size
    method = whole.index(b"PK\x01\x02") + 10
    for place, content in ((packed, b"\xff" * 8), (method, b"\x63\x00")):
        path.write_bytes(whole[:place] + content + whole[place + len(content) :])
        with pytest.raises(ValueError, match=r"x\.npz is no readable \.npz of statistics"):
            read_statistics(path)
    for shape in ((1 << 50,), (1 << 70,)):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("mu.npy", "sigma.npy"):
                archive.writestr(name, header.getvalue())
        with pytest.raises(ValueError, match=r"x\.npz is no readable \.npz of statistics"):
            read_statistics(path)


def test_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    mean, covariance = np.zeros(2), np.eye(2)
    for arrays, said in (
        ({"mu": mean}, r"holds \['mu'\]; allowed: mu and sigma"),
        ({"mu": mean, "sigma": np.eye(3)}, r"mu \(2,\) and sigma \(3, 3\)"),
        ({"mu": mean * np.nan, "sigma": covariance}, "NaN or infinity"),
        ({"mu": mean, "sigma": np.array([[1.0, 2.0], [0.0, 1.0]])}, "not symmetric"),
        ({"mu": mean, "sigma": np.array([[1.0, 2.0], [2.0, 1.0]])}, "sigma with the eigenvalue -1; allowed: 0 or more"),
        ({"mu": mean, "sigma": 1e300 * np.array([[1, 2], [2, 1]])}, "eigenvalue -1e.300; allowed: 0 or more"),
        ({"mu": mean + 1j, "sigma": covariance}, "mu of dtype complex128; allowed: real numbers"),
        ({"mu": mean, "sigma": covariance * 1j}, "sigma of dtype complex128; allowed: real numbers"),
        ({"mu": mean, "sigma": covariance, "count": -4}, r"count array\(-4\); allowed: an integer, 2 or more"),
        ({"mu": mean, "sigma": covariance, "count": 2.5}, r"count array\(2.5\); allowed: an integer"),
        ({"mu": mean, "sigma": covariance, "count": [3, 4]}, r"count array\(\[3, 4\]\); allowed: an integer"),
        ({"mu": np.array([print, print]), "sigma": covariance}, "no readable .npz"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=said):
            read_statistics(path)
    array = io.BytesIO()
    np.save(array, covariance)
    for content in (path.read_bytes()[:100], b"", b"<html>Not found</html>", array.getvalue()):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"no readable \.npz of statistics \(it is no zip archive, or a part of one\)"
        ):
            read_statistics(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"no readable \.npz of statistics \(it is a pipe or a device\)"):
        read_statistics(path)
    with pytest.raises(FileNotFoundError):
        read_statistics(tmp_path / "none.npz")


def test_kernel_distance_is_torch_fidelitys() -> None:
    references.torchvision()
    module = pytest.importorskip("torch_fidelity.metric_kid")
    a, b = rows(90, 32), rows(70, 32, seed=1, shift=0.3)
    options = {"kid_subsets": 5, "kid_subset_size": 40, "rng_seed": 2020, "verbose": False}
    theirs = module.kid_features_to_metric(torch.from_numpy(a).double(), torch.from_numpy(b).double(), **options)
    ours = kernel_inception_distance(a, b, subsets=5, subset_size=40)
    assert ours.mean == pytest.approx(theirs[module.KEY_METRIC_KID_MEAN], rel=SCORE_REL)
    assert ours.std == pytest.approx(theirs[module.KEY_METRIC_KID_STD], rel=SCORE_REL)
    for size in (1, 71):
        with pytest.raises(ValueError, match=f"subset size {size}; allowed: 2 to 70"):
            kernel_inception_distance(a, b, subset_size=size)


def test_inception_score_is_torch_fidelitys() -> None:
    references.torchvision()
    module = pytest.importorskip("torch_fidelity.metric_isc")
    features, weight = rows(95, 16), rows(11, 16, seed=1)
    theirs = module.isc_features_to_metric(torch.from_numpy(features).double() @ torch.from_numpy(weight).double().T)
    ours = inception_score(features, weight)
    assert ours.mean == pytest.approx(theirs[module.KEY_METRIC_ISC_MEAN], rel=SCORE_REL)
    assert ours.std == pytest.approx(theirs[module.KEY_METRIC_ISC_STD], rel=SCORE_REL) and ours.std > 0
    with pytest.raises(ValueError, match="10 splits of 9 images"):
        inception_score(features[:9], weight)


def test_inception_score_of_certain_classes() -> None:
    """Two classes in halves, and two whose probability underflows in every row."""
    logits = np.repeat(1000 * np.eye(4)[:2], 5, axis=0)
    assert inception_score(logits, np.eye(4), splits=1) == (pytest.approx(2), 0)


@pytest.mark.parametrize("repeats", [2, 8], ids=["balls", "points"])
def test_repeated_features_count_alike_in_all_blocks(repeats: int) -> None:
    """Points on the rim of a ball, and balls of radius 0, far from the origin: the differences are exact there."""
    real = np.repeat(np.random.default_rng(0).integers(0, 99, (20, 64)) + 1 / 3 + 100, repeats, axis=0)
    generated = np.random.default_rng(1).permutation(real)[:33]
    k = 5
    between, among, own = (
        ((x[:, None] - y[None]) ** 2).sum(axis=2) for x, y in ((real, generated), (real, real), (generated, generated))
    )
    real_radius, generated_radius = (np.sort(d, axis=1)[:, k] for d in (among, own))
    balls = between < real_radius[:, None]
    wanted = (
        balls.any(0).mean(),
        (between < generated_radius).any(1).mean(),
        balls.sum() / (k * 33),
        balls.any(1).mean(),
    )
    for block in (2048, 16, 7):
        found = precision_recall_density_coverage(generated, real, neighbours=k, block=block)
        assert found == pytest.approx(wanted), block


@pytest.mark.parametrize("block", [7, 1000], ids=["blocks", "whole"])
@pytest.mark.parametrize("offset, far", [(0, 0), (1e6, 0), (1e8, 0), (0, 1e8), (0, 1e13)])
def test_neighbours_are_those_of_the_definition(block: int, offset: float, far: float) -> None:
    """Whatever all features share, however far one lies out: squares of it would leave few digits of the distances."""
    generated, real = rows(60, 8) + np.float64(offset), rows(50, 8, seed=1, shift=0.2) + np.float64(offset)
    real[0] += far
    k = 4
    between, among, own = (
        np.linalg.norm(x[:, None] - y[None], axis=2)
        for x, y in ((real, generated), (real, real), (generated, generated))
    )
    real_radius, generated_radius = (np.sort(d, axis=1)[:, k] for d in (among, own))
    found = precision_recall_density_coverage(generated, real, neighbours=k, block=block)
    assert found.precision == (between < real_radius[:, None]).any(axis=0).mean()
    assert found.recall == (between < generated_radius).any(axis=1).mean()
    assert found.density == pytest.approx((between < real_radius[:, None]).sum() / (k * len(generated)))
    assert found.coverage == (between.min(axis=1) < real_radius).mean()
    assert 0 < found.precision < 1 and 0 < found.recall < 1 and 0 < found.coverage < 1


def test_precision_and_recall_are_torch_fidelitys() -> None:
    references.torchvision()
    module = pytest.importorskip("torch_fidelity.metric_prc")
    generated, real = rows(80, 8), rows(70, 8, seed=1, shift=0.2)
    theirs = module.calculate_precision_recall_full(*(torch.from_numpy(f).double() for f in (generated, real)))
    ours = precision_recall_density_coverage(generated, real, neighbours=3)
    assert (ours.precision, ours.recall) == pytest.approx(theirs, abs=1e-6)
    with pytest.raises(ValueError, match="70 neighbours; allowed: 1 to 69"):
        precision_recall_density_coverage(generated, real, neighbours=70)


@pytest.mark.parametrize("broken", ["first", "second"])
def test_a_row_that_is_not_finite_is_named_by_its_number(broken: str) -> None:
    """Not by its place in a subset, a block or a split."""
    pair = [rows(60, 4), rows(50, 4)]
    pair[broken == "second"][41] = np.nan
    calls: list[Any] = [
        lambda: kernel_inception_distance(*pair, subset_size=40),
        lambda: precision_recall_density_coverage(*pair, block=16),
        lambda: inception_score(pair[broken == "second"], rows(3, 4), splits=7),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="row 41 are not finite"):
            call()


@pytest.mark.parametrize(
    ("features", "error", "said"),
    [
        ([[1.0, 2.0]] * 9, TypeError, "features of type list; allowed: an array or a tensor"),
        (None, TypeError, "features of type NoneType; allowed"),
        (np.ones(9), ValueError, r"features of shape \(9,\); allowed: \[n, d\]"),
    ],
)
def test_features_without_rows_are_refused(features: Any, error: type[Exception], said: str) -> None:
    """They ended in errors of indexing."""
    with pytest.raises(error, match=said):
        kernel_inception_distance(features, rows(9, 2), subset_size=3)
    with pytest.raises(error, match=said):
        inception_score(features, rows(3, 2), splits=2)


def test_features_of_two_widths_are_refused() -> None:
    wide, narrow = rows(20, 8), rows(20, 6)
    with pytest.raises(ValueError, match="width 8 and of width 6; allowed: the same"):
        precision_recall_density_coverage(wide, narrow)
    with pytest.raises(ValueError, match="width 6 and of width 8; allowed: the same"):
        kernel_inception_distance(narrow, wide, subset_size=5)
    with pytest.raises(ValueError, match="blocks of -1 rows; allowed: 1 or more"):
        precision_recall_density_coverage(wide, wide, block=-1)
