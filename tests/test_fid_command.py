"""`inception-fast fid`: from files to scores, equal to those of the usual tools on the same files."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import references
from inception_fast.cli import main
from inception_fast.features.shards import write_shard
from inception_fast.fid import inception_score, read_statistics, sides
from inception_fast.weights import convert
from numerics import FID_REL, NET_FID_REL, NET_WINOGRAD_MAX
from pictures import encoded, write_tar
from test_fid_scores import by_gram, gaussian

COUNTS = (12, 9)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders a (with a broken file) and b of PNG files, and weights.pth."""
    root = tmp_path_factory.mktemp("fid")
    for seed, (name, count) in enumerate(zip("ab", COUNTS, strict=True)):
        (root / name).mkdir()
        for i in range(count):
            (root / name / f"{i:02d}.png").write_bytes(encoded(100 * seed + i, "PNG", (40 + i, 32)))
    (root / "a" / "05x.png").write_bytes(b"?")
    torch.save(references.fid_net().state_dict(), root / "weights.pth")
    return root


@pytest.fixture(scope="module")
def features(place: Path) -> dict[str, np.ndarray]:
    """torch-fidelity's, of the same files."""
    references.torchvision()
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    net = module.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(place / "weights.pth"))
    found: dict[str, Any] = {}
    for name in "ab":
        files = sorted(path for path in (place / name).iterdir() if len(path.stem) == 2)
        images = [torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) for path in files]
        found[name] = torch.cat([net(image[None])[0] for image in images]).numpy()
    return found


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["fid", *map(str, arguments), "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


@pytest.fixture(scope="module")
def weights(place: Path) -> tuple[str, ...]:
    return "--weights", str(place / "weights.pth"), "--workers", "0"


@pytest.fixture(scope="module")
def exact(place: Path, weights: tuple[str, ...]) -> float:
    """FID of a and b in float32."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["fid", str(place / "a"), str(place / "b"), *weights, "--json"]) == 0
    found: float = json.loads(printed.getvalue())["fid"]
    return found


def test_all_scores_of_two_folders(
    place: Path, features: dict[str, np.ndarray], weights: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--kid", "--is", "--prdc", "--is-splits", "2", "--neighbours", "3"]
    report = run(capsys, place / "a", place / "b", *weights, *options)
    assert report["fid"] == pytest.approx(by_gram(features["a"], features["b"]), rel=NET_FID_REL)
    assert report["a"]["images"] == COUNTS[0] and report["b"]["images"] == COUNTS[1]
    assert [row["path"] for row in report["a"]["unreadable"]] == [str(place / "a" / "05x.png")]
    assert len(report["warnings"]) == 3 and "rank 8 at most" in report["warnings"][1]
    assert report["kid_subset_size"] == COUNTS[1] and np.isfinite(report["kid_mean"]) and report["is_mean"] >= 1
    assert all(0 <= report[key] <= 1 for key in ("precision", "recall", "coverage")) and report["density"] >= 0
    assert report["settings"]["preprocessing"] == "tensorflow"


def test_every_form_of_a_source_gives_the_same_fid(
    place: Path, weights: tuple[str, ...], exact: float, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Statistics written and read, feature shards, tar shards and another batch size."""
    b, wanted = place / "b", exact
    assert main(["fid", str(place / "a"), str(tmp_path / "a.npz"), "--save-stats", *weights]) == 0
    assert "statistics of 12 images" in capsys.readouterr().out
    assert read_statistics(tmp_path / "a.npz").count == 12
    write_tar(tmp_path / "b.tar", {path.name: path.read_bytes() for path in sorted(b.iterdir())})
    from_tar = run(capsys, place / "a", tmp_path / "b.tar", *weights, "--batch-size", "4")
    assert from_tar["fid"] == wanted, "the same images, the same bits"
    out = tmp_path / "features"
    assert main(["features", str(b), *weights, "--out", str(out), "--shard-size", "4"]) == 0
    capsys.readouterr()
    assert run(capsys, place / "a", out, *weights)["fid"] == wanted
    assert run(capsys, out, tmp_path / "a.npz")["fid"] == pytest.approx(wanted, rel=FID_REL)
    score = run(capsys, out, out, *weights, "--is", "--is-splits", "2")["is_mean"]
    assert score >= 1
    beside = run(capsys, out, tmp_path / "a.npz", *weights, "--is", "--is-splits", "2")
    assert beside["is_mean"] == score and beside["fid"] == pytest.approx(wanted, rel=FID_REL), "of the first side alone"
    state = torch.load(weights[1])
    first = next(iter(state))
    torch.save(state | {first: state[first] + 1}, tmp_path / "other.pth")
    assert main(["fid", str(out), str(out), "--weights", str(tmp_path / "other.pth"), "--is"]) == 2
    assert "allowed for the Inception score: the same" in capsys.readouterr().err
    (out / "features-00001.parquet").unlink()
    assert main(["fid", str(out), str(tmp_path / "a.npz")]) == 2
    assert "holds 2 of 3 shards; run inception-fast features again" in capsys.readouterr().err


def test_bfloat16_says_what_it_does_to_fid(
    place: Path, weights: tuple[str, ...], exact: float, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(capsys, place / "a", place / "b", *weights, "--dtype", "bfloat16")
    effect = report["bfloat16"]
    assert effect["fid"] == pytest.approx(report["fid"]) and effect["fid_float32"] == pytest.approx(exact)
    assert effect["shift"] == pytest.approx(report["fid"] - exact) and effect["images"] == sum(COUNTS)
    assert 1e-4 < effect["feature_error"] < 0.05
    assert (
        main(["fid", str(place / "b"), str(place / "a"), *weights, "--dtype", "bfloat16", "--check-images", "8"]) == 0
    )
    assert "bfloat16   moves FID by " in (printed := capsys.readouterr().out) and "on 16 images" in printed


@pytest.mark.parametrize("dtype, least, most", [("float32", 1e-8, NET_WINOGRAD_MAX), ("bfloat16", 1e-4, 0.05)])
def test_winograd_says_what_it_does_to_fid(
    dtype: str, least: float, most: float,
    place: Path, weights: tuple[str, ...], exact: float, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """And features of a folder by tiles are told from others, in a warning beside them."""
    name, asked = f"{dtype}+winograd", ("--dtype", dtype, "--winograd")
    report = run(capsys, place / "a", place / "b", *weights, *asked)
    effect = report[name]
    assert effect["fid"] == pytest.approx(report["fid"]) and effect["fid_float32"] == pytest.approx(exact)
    assert least < effect["feature_error"] < most and report["settings"]["winograd"] is True
    out = tmp_path / "features"
    assert main(["features", str(place / "b"), *weights, "--out", str(out), *asked]) == 0
    capsys.readouterr()
    assert main(["fid", str(place / "a"), str(out), *weights, "--dtype", dtype]) == 0
    assert f"was computed in {dtype} and {out} in {name}" in capsys.readouterr().err
    assert main(["features", str(place / "b"), *weights, "--out", str(out), "--dtype", dtype]) == 2
    assert main(["fid", str(place / "a"), str(place / "b"), *weights, *asked, "--check-images", "2"]) == 0
    assert f"{name} moves FID by " in capsys.readouterr().out


def test_the_effect_of_bfloat16_is_measured_on_readable_images(
    place: Path, weights: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["05x.png", "00.png", "05x.png", "01.png", "02.png"]
    (tmp_path / "a.txt").write_text("".join(f"{place / 'a' / name}\n" for name in names))
    more = "--dtype", "bfloat16", "--check-images", "2"
    report = run(capsys, tmp_path / "a.txt", tmp_path / "a.txt", *weights, *more)
    assert report["bfloat16"]["images"] == 4 and len(report["a"]["unreadable"]) == 2


def test_weights_without_a_classifier_have_no_inception_score(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, headless = tmp_path / "whole.safetensors", tmp_path / "headless.safetensors"
    convert(place / "weights.pth", whole)
    with safe_open(whole, "pt") as held:
        metadata = held.metadata() | {"num_classes": "0"}
        tensors = {key: held.get_tensor(key) for key in held.keys() if not key.startswith("fc.")}
    metadata["options"] = json.dumps(json.loads(metadata["options"]) | {"num_classes": 0})
    save_file(tensors, headless, metadata)
    with monkeypatch.context() as patch:
        patch.setattr(sides, "stream", None)  # no image is looked at
        given = str(place / "a"), str(place / "b"), "--weights", str(headless)
        assert main(["fid", *given, "--is", "--is-splits", "3", "--workers", "0"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "headless.safetensors has no classifier; allowed for the Inception score: weights with it" in error
    with pytest.raises(TypeError, match=r"weight None, .*; allowed"):
        inception_score(np.zeros((4, 5)), None, splits=2)


@pytest.mark.parametrize(
    "column, said",
    [
        (pyarrow.array(["a", "b"]), "feature of type string; allowed: lists of numbers"),
        (pyarrow.array([1.0, 2.0]), "feature of type double; allowed: lists of numbers"),
        (pyarrow.array([[1.0, 2.0, 3.0], [4.0]]), "features of lengths 3, 1; allowed: one length"),
        (pyarrow.array([[1.0, 2.0], None], pyarrow.list_(pyarrow.float32(), 2)), "allowed: one length, no null"),
        (pyarrow.array([[1.0, 2.0], [3.0, np.nan]]), "odd.parquet: features of row 1 are not finite"),
    ],
)
def test_a_file_of_odd_features(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], column: pyarrow.Array, said: str
) -> None:
    path = tmp_path / "odd.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"path": ["x", "y"], "feature": column}), path)
    assert main(["fid", str(path), str(path)]) == 2
    err = capsys.readouterr().err
    assert str(path) in err and said in err and err.count("\n") == 1


def test_features_that_are_not_comparable_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = np.random.default_rng(0).random((6, 5), np.float32)
    for name, weights, dtype in (("a", "x", "float32"), ("b", "y", "float32"), ("c", "x", "bfloat16")):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "features-00000.parquet", list("abcdef"), rows + len(weights), {})
        settings = {"form": "model", "model": "m", "weights": weights, "preprocessing": None, "dtype": dtype}
        manifest = {"images": 6, "shard_size": 6, "settings": settings}
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    assert main(["fid", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "features with weights 'x' and" in capsys.readouterr().err
    assert main(["fid", str(tmp_path / "a"), str(tmp_path / "a"), "--is"]) == 2
    assert "holds features of m; allowed for the Inception score: features of the FID" in capsys.readouterr().err
    report = run(capsys, tmp_path / "a", tmp_path / "c")
    assert report["fid"] <= 1e-10 and len(report["warnings"]) == 2
    assert "in float32 and" in report["warnings"][0] and "not of the FID network" in report["warnings"][1]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["fid", "~/a", "~/b"]) == 2
    assert "features with weights 'x' and" in capsys.readouterr().err
    (tmp_path / "c" / "._features-00000.parquet").write_bytes(b"as macOS leaves them on foreign disks")
    assert run(capsys, tmp_path / "a", tmp_path / "c") | {"seconds": 0} == report | {"seconds": 0}


@pytest.mark.parametrize("order", [1, -1])
def test_images_beside_features_of_another_network_are_refused_at_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], order: int
) -> None:
    """Not after hours of reading them."""
    monkeypatch.setattr(sides, "stream", None)
    write_shard(tmp_path / "features-00000.parquet", list("ab"), np.ones((2, 5), np.float32), {})
    manifest = {"images": 2, "shard_size": 2, "settings": {"form": "model"}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    np.savez(tmp_path / "x.npz", mu=np.zeros(5), sigma=np.eye(5))
    weights = ["--weights", str(place / "weights.pth")]
    for other, said in (
        (tmp_path, "features with form "),
        (tmp_path / "x.npz", "x.npz holds statistics of 5 features"),
    ):
        assert main(["fid", *[str(place / "b"), str(other)][::order], *weights]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, said",
    [("{}", "has images None; allowed"), ("[]", "has images None; allowed"), ('{"images": 6, "sh', "is damaged (")],
)
def test_a_damaged_manifest_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str) -> None:
    write_shard(tmp_path / "features-00000.parquet", list("abcdef"), np.ones((6, 5), np.float32), {})
    (tmp_path / "manifest.json").write_text(text)
    assert main(["fid", str(tmp_path), str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"{tmp_path / 'manifest.json'} {said}" in err and err.count("\n") == 1


def test_a_file_of_features_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = np.random.default_rng(0).random((40, 5), np.float32)
    table = {"path": ["x"] * 40, "feature": list(rows.astype(np.float64))}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet", row_group_size=7)
    write_shard(tmp_path / "b.parquet", ["x"] * 20, rows[:20] + 1, {})
    found = run(capsys, tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert found["fid"] == pytest.approx(by_gram(rows, rows[:20] + 1), rel=FID_REL)
    assert found["warnings"] == [] and gaussian(rows).count == found["a"]["images"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["a", "b"], "--weights is needed for images"),
        (["a", "nowhere", "--weights", "weights.pth"], "nowhere: no such file or folder"),
        (["nowhere.npz", "b"], "nowhere.npz"),
        (["\udcff.npz", "b"], "the name '\\udcff.npz' is not UTF-8"),
        (["", "b"], "'' is no path"),
        (["broken.npz", "b"], "broken.npz is no readable .npz"),
        (["huge.npz", "huge.npz"], ", means reach 0 and covariances 1e+308; allowed"),
        (["far.npz", "near.npz"], ", means reach 1e+200 and covariances 1; allowed"),
        (["loud.parquet", "loud.parquet", "--kid", "--kid-subset-size", "2"], "kid_std is inf; allowed: features"),
        (["negative.npz", "near.npz"], "negative.npz holds a sigma with -1 on its diagonal; allowed: variances"),
        (["a.npz", "a.npz", "--kid"], "a.npz holds statistics; allowed with KID"),
        (["one", "a.npz", "--weights", "weights.pth"], "one: 1 image(s); allowed: two or more"),
        (["a", "out.txt", "--save-stats"], "out.txt; allowed: a name that ends in .npz"),
        (["a", "out.npz", "--save-stats", "--kid"], "--save-stats with --kid"),
        (["a", "b", "--weights", "weights.pth", "--unreadable", "fail"], "05x.png is not an image"),
        (["b", "b", "--prdc", "--neighbours", "9"], "9 neighbours; allowed: 1 to 8"),
        (["b", "b", "--is"], "10 splits of 9 images"),  # before the weights are missed
        (["quiet.parquet", "b", "--weights", "weights.pth", "--is", "--is-splits", "2"], "Inception score: 2048"),
        (["a", "nowhere/out.npz", "--save-stats"], "no folder nowhere to write out.npz to"),
        (["a", "/proc/out.npz", "--save-stats"], "/proc/out.npz cannot be written ("),  # before the features are made
        (["a", "folder.npz", "--save-stats"], "--save-stats writes folder.npz, a folder; allowed: a file name"),
        (["b", "b", "--neighbours", "5"], "--neighbours without --prdc; allowed: with --prdc"),
        (["b", "b", "--prdc", "--kid-subsets", "9"], "--kid-subsets without --kid; allowed: with --kid"),
        (["b", "b", "--kid-subset-size", "9"], "--kid-subset-size without --kid; allowed: with --kid"),
        (["b", "b", "--is-splits", "2"], "--is-splits without --is; allowed: with --is"),
        (["b", "b", "--check-images", "64"], "--check-images without --dtype bfloat16 or --winograd; allowed: with --"),
        (["b", "b", "--kid", "--kid-subset-size", "10"], "subset size 10; allowed: 2 to 9"),
    ],
)
def test_refuses(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(place)
    (place / "broken.npz").write_bytes(b"PK but no more")
    np.savez(place / "a.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    for name, mean, variance in (("huge", 0, 1e308), ("far", 1e200, 1), ("near", 0, 1), ("negative", 0, -1)):
        np.savez(place / f"{name}.npz", mu=np.full(3, mean), sigma=variance * np.eye(3))
    rows = np.random.default_rng(0).standard_normal((4, 5), np.float32)
    write_shard(place / "loud.parquet", list("abcd"), 1e37 * rows, {})  # float64 does not reach to the 12th power
    write_shard(place / "quiet.parquet", list("abcd"), rows, {})
    (place / "folder.npz").mkdir(exist_ok=True)
    (place / "one").mkdir(exist_ok=True)
    (place / "one" / "x.png").write_bytes(encoded(1, "PNG"))
    assert main(["fid", *arguments, "--workers", "0"]) == 2
    out, err = capsys.readouterr()
    error = err.splitlines()[-1]
    assert out == "" and error.startswith("inception-fast: error: ") and said in error
    assert not (place / "out.npz").exists()
