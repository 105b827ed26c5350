"""The Ray engine on a local cluster of two workers: the same output, also where one of them is killed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inception_fast.features.feed import Failure
from inception_fast.features.ray_engine import extract_with_ray, import_ray
from inception_fast.features.run import extract
from inception_fast.features.sources import open_source
from pictures import BrokenWorker, FullWorker, MortalWorker, TinyExtractor, TinyRecipe, write_folder

pytest.importorskip("ray.data")
COUNT, SHARD = 23, 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = import_ray()
    here = str(Path(__file__).parent)
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}}
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="error", runtime_env=environment)
    yield
    ray.shutdown()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    paths = write_folder(tmp_path / "photos", COUNT)
    paths[6].write_bytes(b"?")
    return tmp_path / "photos"


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".features-")}


def test_two_workers_one_of_them_killed(cluster: None, photos: Path, tmp_path: Path) -> None:
    source, whole, out = open_source(str(photos)), tmp_path / "whole", tmp_path / "out"
    local = extract(source, TinyExtractor(), whole, shard_size=SHARD)
    seen: list[tuple[int, int]] = []
    options: dict[str, Any] = {"actors": 2, "shard_size": SHARD, "batch_size": 3}
    options["on_batch"] = lambda *pair: seen.append(pair)
    found = extract_with_ray(source, TinyRecipe(), out, worker=MortalWorker, **options)  # type: ignore[arg-type]
    assert (tmp_path / "killed").exists(), "nobody was killed, so nothing was shown"
    assert content(out) == content(whole) and sum(images for images, _ in seen) == COUNT
    for key in ("images", "features", "unreadable", "images_this_run", "settings"):
        assert found[key] == local[key]
    (out / "features-00002.parquet").unlink()
    seen.clear()
    options["actors"] = 1
    again = extract_with_ray(source, TinyRecipe(), out, **options)  # type: ignore[arg-type]
    assert again["images_this_run"] == SHARD and seen == [(SHARD, 0)] and content(out) == content(whole)


def test_unreadable_images_end_the_run_where_asked(cluster: None, photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"shard_size": SHARD, "unreadable": "fail"}
    before = set(threading.enumerate())
    with pytest.raises(Failure, match="is not an image that Pillow reads"):
        extract_with_ray(open_source(str(photos)), TinyRecipe(), tmp_path / "out", **options)  # type: ignore[arg-type]
    left = [thread.name for thread in threading.enumerate() if thread not in before]
    assert not left, "a thread that asks Ray for a block after its shutdown ends the process"


def test_what_goes_wrong_in_an_actor_is_raised_as_on_one_machine(cluster: None, photos: Path, tmp_path: Path) -> None:
    def refused(error: type, match: str) -> None:
        with pytest.raises(error, match=match) as caught:
            extract_with_ray(open_source(str(photos)), TinyRecipe(), out, shard_size=SHARD, worker=worker)  # type: ignore
        assert caught.type is error

    out, worker = tmp_path / "out", BrokenWorker
    refused(ValueError, r"^the feature of .*\.jpg is NaN or infinite; allowed: finite numbers")
    worker = FullWorker
    refused(OSError, r"^\[Errno 28\] No space left on device: '.*features-0000\d\.parquet'$")


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray.data", None)
    with pytest.raises(ImportError, match=r"--engine ray needs Ray .*inception-fast\[ray\]"):
        import_ray()
