"""The pipeline: order, workers, unreadable images, shards, and what a kill leaves behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch

import inception_fast as fast
from checkout import ROOT
from inception_fast.cli import main, progress
from inception_fast.features import feed as feeding
from inception_fast.features.extractors import ConfigPrepare, FidPrepare, Recipe
from inception_fast.features.feed import Failure
from inception_fast.features.run import extract
from inception_fast.features.shards import Shards, find_features, read_features
from inception_fast.features.sources import open_source
from inception_fast.features.stream import stream
from pictures import TinyExtractor, TinyPrepare, encoded, write_folder

COUNT = 23


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_folder(tmp_path / "photos", COUNT)
    return tmp_path / "photos"


def table(out: Path) -> dict[str, list[Any]]:
    """path and feature of every row of all shards, in order."""
    tables = [pyarrow.parquet.read_table(path).to_pydict() for path in sorted(out.glob("features-*.parquet"))]
    return {key: [value for t in tables for value in t[key]] for key in ("path", "feature")}


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_rows_are_the_images_in_order_whatever_the_batch(photos: Path, tmp_path: Path) -> None:
    source = open_source(str(photos))
    found = []
    for number, (batch, workers) in enumerate([(1, 0), (7, 0), (64, 0), (4, 2)]):
        out = tmp_path / f"out{number}"
        summary = extract(source, TinyExtractor(), out, batch_size=batch, workers=workers, shard_size=10)
        assert (summary["images"], summary["features"], summary["unreadable"]) == (COUNT, COUNT, [])
        assert summary["images_per_second"] > 0 and summary["waiting_seconds"] + summary["computing_seconds"] > 0
        found.append(content(out))
    assert found[0].keys() == {f"features-0000{i}.parquet" for i in range(3)} | {
        ".lock",
        "manifest.json",
        "unreadable.json",
    }
    assert all(other == found[0] for other in found[1:]), "the files do not tell how they were made"
    rows = table(out)
    assert rows["path"] == list(source.names)
    wanted = np.concatenate([part.values for part in stream(source, TinyExtractor(), batch_size=5)])
    assert np.array_equal(np.array(rows["feature"], np.float32), wanted) and len({*map(tuple, wanted)}) == COUNT
    assert np.array_equal(np.concatenate(list(read_features(find_features(str(out))))), wanted)


def test_threads_decode_in_order_and_not_far_ahead(photos: Path) -> None:
    class Counting(TinyPrepare):
        done = 0

        def __call__(self, image: Any) -> Any:
            Counting.done += 1
            return super().__call__(image)

    extractor, source = TinyExtractor(), open_source(str(photos))
    wanted = np.concatenate([part.values for part in stream(source, extractor, batch_size=2)])
    extractor.prepare = Counting()
    found = []
    for part in stream(source, extractor, batch_size=2, threads=1):
        found.append(part.values)
        assert Counting.done <= 2 * (len(found) + feeding.AHEAD + 1), "memory would follow the number of images"
    assert np.array_equal(np.concatenate(found), wanted)


def test_progress_counts_images_of_this_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there is no terminal: a line now and then, with the rate and the time left."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Counter("features") as counter:
        counter.start(100, 400)
        for _ in range(5):
            now[0] += 4
            counter.add(20, 1)
    assert capsys.readouterr().err.splitlines() == [
        "features: 100 of 400 images are there",
        "features: 160/400 images, 5.0 images/s, 48 s left, 3 unreadable",
    ]


def test_unreadable_images_are_listed_with_the_reason(photos: Path, tmp_path: Path) -> None:
    names = sorted(photos.rglob("*.jpg"), key=lambda path: path.as_posix())
    names[2].write_bytes(b"no picture")
    names[3].write_bytes(names[3].read_bytes()[:300])
    names[11].write_bytes(b"")
    source = open_source(str(photos))
    summary = extract(source, TinyExtractor(), tmp_path / "out", batch_size=4, workers=1, shard_size=10)
    assert summary["features"] == COUNT - 3
    bad = json.loads((tmp_path / "out" / "unreadable.json").read_text())
    assert bad == summary["unreadable"] and [row["path"] for row in bad] == [str(names[i]) for i in (2, 3, 11)]
    for row, reason in zip(bad, ("not an image", "damaged or cut short", "is empty"), strict=True):
        assert reason in row["reason"]
    assert table(tmp_path / "out")["path"] == [n for n in source.names if n not in {row["path"] for row in bad}]
    for workers in (0, 1):
        with pytest.raises(Failure, match="is not an image that Pillow reads"):
            extract(source, TinyExtractor(), tmp_path / "other", workers=workers, shard_size=10, unreadable="fail")


@pytest.mark.parametrize("names", ["whole", "part"])
def test_what_an_earlier_run_left_out_ends_one_that_is_to_fail(photos: Path, tmp_path: Path, names: str) -> None:
    """With and without anything left to do; else the run would say that all is well."""
    (photos / "a.jpg").write_bytes(b"?")
    source, out = open_source(str(photos)), tmp_path / "out"
    extract(source, TinyExtractor(), out, shard_size=8)
    if names == "part":
        (out / "features-00000.parquet").unlink()
    with pytest.raises(
        Failure, match=r"a\.jpg is not an image.*; an earlier run left it out of .*out, name another --out"
    ):
        extract(source, TinyExtractor(), out, shard_size=8, unreadable="fail")


def test_a_source_of_nothing_but_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"?")
    summary = extract(open_source(str(tmp_path / "photos")), TinyExtractor(), tmp_path / "out")
    assert summary["features"] == 0 and table(tmp_path / "out")["path"] == []
    monkeypatch.setattr(Recipe, "make", lambda self: TinyExtractor())
    command = ["features", str(tmp_path / "photos"), "--out", str(tmp_path / "again"), "--workers", "0"]
    assert main(command) == 1
    fine = encoded(1)
    (tmp_path / "photos" / "b.jpg").write_bytes(fine)
    assert main([*command[:-3], str(tmp_path / "third"), "--workers", "0"]) == 0


def test_what_is_there_is_not_done_again(photos: Path, tmp_path: Path) -> None:
    source, out = open_source(str(photos)), tmp_path / "out"
    extract(source, TinyExtractor(), out, shard_size=10)
    whole = content(out)
    (out / "features-00001.parquet").unlink()
    (out / ".features-00001-x7.parquet").write_bytes(b"half a shard")
    again = TinyExtractor()
    started: list[tuple[int, int]] = []
    options: dict[str, Any] = {"shard_size": 10, "on_start": lambda *pair: started.append(pair)}
    assert extract(source, again, out, **options)["images_this_run"] == 10
    assert again.seen == [10] and started == [(13, COUNT)] and content(out) == whole


def test_a_folder_belongs_to_one_run(photos: Path, tmp_path: Path) -> None:
    source, out = open_source(str(photos)), tmp_path / "out"
    extract(source, TinyExtractor(), out, shard_size=10)
    before = content(out)

    def refused(match: str, source: Any = source, size: int = 10, **settings: str) -> None:
        other = TinyExtractor()
        other.settings |= settings
        with pytest.raises(ValueError, match=match):
            extract(source, other, out, shard_size=size)

    refused("holds a run with shard_size 10, this one has 11; name another --out", size=11)
    refused("holds a run with weights 'none', this one has 'others'", weights="others")
    refused("holds a run with device None, this one has 'a GPU'", device="a GPU")
    (photos / "new.jpg").write_bytes(encoded(99))
    refused("holds a run with images 23, this one has 24", source=open_source(str(photos)))
    assert content(out) == before
    (out / "manifest.json").unlink()
    refused("holds features without manifest.json")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        extract(source, TinyExtractor(), photos / "new.jpg")


def test_what_a_run_does_not_say_of_itself_is_another_setting(photos: Path, tmp_path: Path) -> None:
    """A run on a GPU names it, and one on the CPU nothing."""
    source, out, first = open_source(str(photos)), tmp_path / "out", TinyExtractor()
    first.settings |= {"device": "a GPU"}
    extract(source, first, out, shard_size=10)
    with pytest.raises(ValueError, match="holds a run with device 'a GPU', this one has None; name another --out"):
        extract(source, TinyExtractor(), out, shard_size=10)


@pytest.mark.parametrize("name", ["manifest.json", "features-00001.parquet"])
def test_a_damaged_file_of_a_run_is_named_before_anything_is_computed(photos: Path, tmp_path: Path, name: str) -> None:
    source, out = open_source(str(photos)), tmp_path / "out"
    extract(source, TinyExtractor(), out, shard_size=10)
    (out / "features-00002.parquet").unlink()
    (out / name).write_bytes((out / name).read_bytes()[:-30])
    again = TinyExtractor()
    with pytest.raises(ValueError, match=rf"{re.escape(str(out / name))} is (damaged|no shard of this run) \("):
        extract(source, again, out, shard_size=10)
    assert again.seen == []


KILLED = """
import sys, time
sys.path[:0] = [{tests!r}]
from inception_fast.features.run import extract
from inception_fast.features.sources import open_source
from pictures import TinyExtractor

class Slow(TinyExtractor):
    def run(self, x):
        time.sleep(0.05)
        return super().run(x)

print("ready", flush=True)
extract(open_source(sys.argv[1]), Slow(), sys.argv[2], batch_size=2, workers=1, shard_size=3)
"""


def test_killed_and_run_again_it_ends_with_every_row_once(photos: Path, tmp_path: Path) -> None:
    """SIGKILL at three different moments; two runs at once are refused, or they could write the same shard."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    source = open_source(str(photos))
    extract(source, TinyExtractor(), whole, shard_size=3)
    command = [sys.executable, "-c", KILLED.format(tests=str(ROOT / "tests")), str(photos), str(out)]
    for shards in (1, 5):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 60
        while len(list(out.glob("features-*.parquet"))) < shards and time.monotonic() < deadline:
            time.sleep(0.005)
        if shards == 5:
            with pytest.raises(ValueError, match="another run writes to"):
                extract(source, TinyExtractor(), out, shard_size=3)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        done = len(list(out.glob("features-*.parquet")))
        assert shards <= done < 8, "it was to be killed in the middle"
    again = TinyExtractor()
    extract(source, again, out, shard_size=3)
    assert 0 < sum(again.seen) <= COUNT - 3 * 5
    assert content(out) == content(whole)


class Dying(TinyExtractor):
    """Its worker process is killed at the third image."""

    class Prepare:
        shape, plain, count = (3, 2, 2), True, 0

        def __call__(self, image: Any) -> Any:
            self.count += 1
            if self.count == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return np.zeros(self.shape, np.float32)

    prepare = Prepare()  # type: ignore[assignment]


def test_a_worker_that_dies_ends_the_run_and_loses_nothing(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ChildProcessError, match=r"a decoding process died .*run the same command again"):
        extract(open_source(str(photos)), Dying(), tmp_path / "out", workers=1, batch_size=2, shard_size=4)
    assert table(tmp_path / "out")["path"] == []


def test_what_a_run_has_forked_does_not_hold_its_folder(tmp_path: Path) -> None:
    def hold() -> Shards:
        return Shards(tmp_path, {}, COUNT, 4)

    def idle() -> None:
        begun.set()
        time.sleep(60)

    context = multiprocessing.get_context("fork")
    begun = context.Event()
    child = context.Process(target=idle, daemon=True)
    with hold():
        child.start()
        assert begun.wait(60)
        with pytest.raises(ValueError, match="another run writes to"):
            hold().__enter__()
    with hold():
        assert child.is_alive()
    child.kill()
    child.join()


def test_workers_are_bounded_by_shared_memory(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = os.statvfs_result((512, 512, 0, 0, 1, 0, 0, 0, 0, 255))
    monkeypatch.setattr(feeding.os, "statvfs", lambda path: state)
    monkeypatch.setattr(feeding, "SHARED_MEMORY", str(tmp_path))
    with pytest.raises(ValueError, match=r"need .* MiB of shared memory, .* has 0 MiB free; allowed: fewer --workers"):
        extract(open_source(str(photos)), TinyExtractor(), tmp_path / "out", workers=2)
    assert extract(open_source(str(photos)), TinyExtractor(), tmp_path / "out", workers=0)["features"] == COUNT


def test_pictures_are_only_converted_for_the_fid_network() -> None:
    """Orientation and transparency stay unread there, as in the tools it is compared with; models see them."""
    assert FidPrepare("tensorflow").plain and not ConfigPrepare(fast.create_model("inception_v1").data_config).plain


def test_command(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real model end to end: embeddings of faces, from weights that also classify."""
    weights = tmp_path / "weights.pth"
    torch.manual_seed(0)
    net = fast.create_model("inception_resnet_v1", num_classes=7).eval()
    torch.save(net.state_dict(), weights)
    (photos / "0001.jpg").write_bytes(b"?")
    command = ["features", str(photos), "--model", "inception_resnet_v1", "--weights", str(weights)]
    command += ["--out", str(tmp_path / "out"), "--workers", "0", "--shard-size", "16"]
    assert main([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert (summary["images"], summary["features"], summary["width"]) == (COUNT, COUNT - 1, 512)
    assert summary["settings"]["model"] == "inception_resnet_v1" and "0001.jpg is not an image" in err
    rows = table(tmp_path / "out")
    from inception_fast.images import load_image, prepare_batch

    embedder = fast.create_model("inception_resnet_v1", weights=weights, num_classes=0).eval()
    with torch.no_grad():
        wanted = embedder(prepare_batch([load_image(rows["path"][5])], embedder.data_config))[0]
    np.testing.assert_allclose(rows["feature"][5], wanted.numpy(), atol=1e-5)
    assert main(command) == 0
    assert "all there already" in capsys.readouterr().out
    assert main([*command[:-2], "--unreadable", "fail", "--shard-size", "8"]) == 2
    assert "holds a run with shard_size 16" in capsys.readouterr().err


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_feature_that_is_no_number_ends_the_run(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    """What is whole by then stays."""

    class Broken(TinyExtractor):
        def run(self, x: torch.Tensor) -> torch.Tensor:
            found = super().run(x)
            found[(found == wanted).all(1), 1] = value
            return found

    source = open_source(str(photos))
    wanted = torch.from_numpy(np.concatenate([part.values for part in stream(source, TinyExtractor())])[12])
    monkeypatch.setattr(Recipe, "make", lambda self: Broken())
    command = ["features", str(photos), "--out", str(tmp_path / "out"), "--workers", "0", "--shard-size", "10"]
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(f"the feature of {source.names[12]} is NaN or infinite; allowed: finite numbers")
    assert len(table(tmp_path / "out")["path"]) == 10


@pytest.mark.parametrize("out", ["features", "."])
def test_a_run_into_the_folder_of_the_images_goes_on(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    """Its shards are parquet files, which are no images of the next call's."""
    monkeypatch.chdir(photos)
    monkeypatch.setattr(Recipe, "make", lambda self: TinyExtractor())
    command = ["features", ".", "--out", out, "--workers", "0", "--shard-size", "16"]
    assert main(command) == 0
    (photos / out / "features-00001.parquet").unlink()
    assert main(command) == main(command) == 0
    assert "all there already" in capsys.readouterr().out
    assert len(table(photos / out)["path"]) == COUNT


@pytest.mark.parametrize(
    "options, said",
    [
        (["nowhere", "--out", "out"], "nowhere: no such file or folder"),
        (["photos"], "--out"),
        (["photos", "--out", "out", "--model", "vgg"], "unknown model 'vgg'"),
        (["photos", "--out", "out", "--weights", "none.pth"], "no weights at none.pth"),
        (["photos", "--out", "out", "--preprocessing", "pytorch-fid"], "allowed: with weights of the FID network only"),
        (
            ["photos", "--out", "out", "--ray-address", "x"],
            "--ray-address without --engine ray; allowed: with --engine ray",
        ),
        (
            ["photos", "--out", "out", "--ray-actors", "1"],
            "--ray-actors without --engine ray; allowed: with --engine ray",
        ),
        (["photos", "--out", "out", "--engine", "ray", "--workers", "1"], "--workers without --engine local; allowed"),
        (["photos", "--out", "out", "--dtype", "int8"], "int8"),
        (["photos", "--out", "out", "--batch-size", "0"], "0 is out of range"),
    ],
)
def test_command_refuses(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    monkeypatch.chdir(photos.parent)
    assert main(["features", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("inception-fast: error: ") and said in error
    assert not (photos.parent / "out").exists()


def test_recipes_know_the_fid_network(tmp_path: Path) -> None:
    net = fast.create_model("inception_v3", fid=True)
    torch.save(net.state_dict(), tmp_path / "fid.pth")
    extractor = Recipe(None, str(tmp_path / "fid.pth")).make()
    assert extractor.settings["form"] == "fid" and extractor.prepare.shape == (3, 299, 299)
    assert Recipe("inception_v1", None).make().settings["form"] == "model"


def test_recipes_refuse_other_dtypes() -> None:
    with pytest.raises(ValueError, match="dtype 'float99'; allowed: float32, bfloat16"):
        Recipe("inception_v1", None, "float99").make()
